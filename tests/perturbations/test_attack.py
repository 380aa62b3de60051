"""The short form: what it returns is in ball and box and the best, and what it costs."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from host_reads import HostReads
from sklearn.datasets import load_digits
from tiers import slow_but
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from rai_toolbox.constraints import BoundedBall, L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import PGD, FrankWolfe, ProjectedOptimizer
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.losses import (
    cross_entropy,
    dlr_loss,
    is_fooled,
    margin_loss,
    targeted_dlr_loss,
)
from rai_toolbox.perturbations.minimum_norm import minimum_norm_attack
from rai_toolbox.perturbations.solvers import ZeroGradientWarning, gradient_ascent

N, SIZE, CLASSES = 24, (1, 5, 4), 4
ORDER = {LinfBall: np.inf, L2Ball: 2, L1Ball: 1}
BALLS = [LinfBall(0.07), L2Ball(0.4), L1Ball(1.3)]
STEP = partial(ProjectedOptimizer, lr=0.05)
ORACLE = partial(FrankWolfe, initial_step=2)


def a_net(dtype=torch.float32):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, CLASSES))
    with torch.no_grad():
        net[1].weight.mul_(4)
    return net.to(dtype)


def images(dtype=torch.float32):
    x = torch.rand(N, *SIZE, generator=torch.Generator().manual_seed(4))
    return (1.4 * x - 0.2).clamp(0, 1).to(dtype)  # some pixels are at the ends of the range


@pytest.fixture
def problem():
    net, x = a_net(), images()
    return net, x, net(x).argmax(1)


def check_inside(found, x, kind, epsilon, low=0.0, high=1.0):
    data, x = found.double().flatten(1).numpy(), x.double().flatten(1).numpy()
    assert (data >= low).all() and (data <= high).all()
    epsilon = np.broadcast_to(np.asarray(epsilon, dtype=np.float64).reshape(-1), len(x))
    # (the numbers are exact in float64, whose sums and roots may be off by some 1e-16)
    slack = 1 if kind is LinfBall else 1 + 1e-14
    assert (np.linalg.norm(data - x, ORDER[kind], axis=1) <= epsilon * slack).all()


# --- inside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ball", BALLS, ids=repr)
@pytest.mark.parametrize("optimizer", [STEP, ORACLE], ids=["projection", "oracle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("random_start", [False, True])
def test_what_is_returned_is_in_ball_and_box(ball, optimizer, dtype, random_start):
    net, x = a_net(dtype), images(dtype)
    target = net(x).argmax(1)
    found = attack(
        net, x, target, ball=ball, optimizer=optimizer, steps=15, random_start=random_start
    )
    check_inside(found.data, x, type(ball), ball.epsilon)
    assert not torch.equal(found.data, x)
    if optimizer is ORACLE:
        return
    # and near the boundary, so that it is the set that has stopped it
    norms = np.linalg.norm((found.data - x).double().flatten(1).numpy(), ORDER[type(ball)], axis=1)
    assert (norms > 0.99 * ball.epsilon).any()


@pytest.mark.parametrize("ball", BALLS[:2], ids=repr)
def test_rounding_alone_would_leave_the_ball(ball):
    # so that the test above can fail: data plus a delta of the radius is outside for about half
    x = images()
    delta = torch.randn(N, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    delta *= ball.epsilon / torch.linalg.vector_norm(delta, ORDER[type(ball)], 1, keepdim=True)
    delta = delta.float().view(N, *SIZE)
    sums = (x + delta).double().flatten(1).numpy() - x.double().flatten(1).numpy()
    assert (np.linalg.norm(sums, ORDER[type(ball)], axis=1) > ball.epsilon).any()


@pytest.mark.parametrize("kind", ORDER)
@pytest.mark.parametrize("shape", [(N,), (N, 1, 1, 1)])
def test_a_radius_for_each_example(problem, kind, shape):
    net, x, y = problem
    epsilon = torch.linspace(0, 0.6, N, dtype=torch.float64)
    found = attack(net, x, y, ball=kind(epsilon.reshape(shape)), optimizer=STEP, steps=10)
    check_inside(found.data, x, kind, epsilon.numpy())
    assert torch.equal(found.data[0], x[0])  # radius 0


@pytest.mark.parametrize(
    "data_range",
    [
        (0.0, 1.0),
        (-0.5, 1.5),
        (torch.tensor(0.0), torch.full((5, 1), 1.0)),
        (torch.zeros(1, 1, 1), torch.ones(N, *SIZE)),
    ],
)
def test_the_range_of_the_data(problem, data_range):
    net, x, y = problem
    found = attack(net, x, y, ball=LinfBall(0.4), data_range=data_range, optimizer=STEP, steps=10)
    low, high = (float(torch.as_tensor(bound).flatten()[0]) for bound in data_range)
    check_inside(found.data, x, LinfBall, 0.4, low, high)
    if low == 0.0:
        assert found.data.min() == 0 and found.data.max() == 1
    else:
        assert found.data.min() < 0 and found.data.max() > 1


def test_no_range(problem):
    net, x, y = problem
    found = attack(net, x, y, ball=LinfBall(0.4), data_range=None, optimizer=STEP, steps=10)
    check_inside(found.data, x, LinfBall, 0.4, -0.4, 1.4)
    assert found.data.min() < 0 and found.data.max() > 1


@pytest.mark.parametrize("ball", BALLS, ids=repr)
@pytest.mark.parametrize("data_range", [(0.0, 1.0), None])
@pytest.mark.parametrize("random_start", [False, True])
def test_a_mask_keeps_all_else_bit_for_bit(problem, ball, data_range, random_start):
    net, x, y = problem
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:, 1:3] = True
    found = attack(
        net, x, y, ball=ball, mask=mask, data_range=data_range, optimizer=STEP, steps=9,
        random_start=random_start, stop_once_fooled=True, restarts=2,
    )  # fmt: skip
    changed = found.data != x
    assert not changed[:, ~mask].any() and changed[:, mask].any()
    check_inside(found.data, x, type(ball), ball.epsilon, *(data_range or (-9, 9)))


# --- the best -----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [None, cross_entropy, dlr_loss, partial(dlr_loss)])
@pytest.mark.parametrize("targeted", [False, True])
def test_losses_and_success_are_those_of_what_is_returned(problem, criterion, targeted):
    net, x, y = problem
    target = (y + 1) % CLASSES if targeted else y
    found = attack(
        net, x, target, ball=L2Ball(0.4), optimizer=STEP, steps=12, criterion=criterion,
        targeted=targeted,
    )  # fmt: skip
    with torch.no_grad():
        loss = margin_loss if criterion is None else criterion
        if targeted and criterion not in (None, cross_entropy):
            loss = targeted_dlr_loss  # which is chosen, as the other is flat far from the target
        assert torch.equal(found.losses, loss(net(found.data), target))
        assert torch.equal(found.fooled, is_fooled(net(found.data), target, targeted))
        clean = loss(net(x), target)
    # (of two that fool, the one of the larger loss; but who fools comes first)
    better = found.losses <= clean + 1e-6 if targeted else found.losses >= clean - 1e-6
    assert (better | found.fooled).all()
    assert found.fooled.any() and not found.fooled.all()
    assert found.model_calls in (13, 14)  # one more if rounding has moved the result


def test_who_fools_comes_before_who_has_a_larger_loss():
    # cross entropy is larger at the end, where the model is right, than on the way, where it is not
    class Trap(nn.Module):
        def forward(self, x):
            d = x[:, 0]
            near = torch.stack([1 - 20 * d, torch.zeros_like(d), d * 0 - 9.0], 1)
            far = torch.stack([2 + d * 0, 1.9 + d * 0, 3 * d], 1)
            return torch.where(d[:, None] < 0.2, near, far)

    x = torch.full((1, 2), 0.0)
    found = attack(
        Trap(), x, torch.tensor([0]), ball=LinfBall(0.9), criterion=cross_entropy, steps=12,
        optimizer=partial(ProjectedOptimizer, lr=0.004), data_range=None,
    )  # fmt: skip
    assert found.fooled.all() and found.data[0, 0] < 0.2


def test_more_of_anything_is_never_worse(problem):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=L2Ball(0.25), optimizer=STEP)
    torch.manual_seed(0)
    few = run(steps=3)
    more_steps = run(steps=12)
    restarts = run(steps=3, restarts=4)
    assert (more_steps.losses >= few.losses - 1e-6).all()
    assert (restarts.losses >= few.losses - 1e-6).all()
    assert (restarts.losses > few.losses + 1e-3).any()
    wider = attack(net, x, y, ball=L2Ball(0.5), optimizer=STEP, steps=12)
    assert wider.fooled.sum() > more_steps.fooled.sum()


def test_the_first_run_starts_at_the_data(problem):
    net, x, y = problem
    found = attack(net, x, y, ball=L2Ball(0.25), optimizer=STEP, steps=0)
    assert torch.equal(found.data, x) and found.model_calls == 2
    started = attack(net, x, y, ball=L2Ball(0.25), optimizer=STEP, steps=0, random_start=True)
    assert (started.data != x).flatten(1).any(1).all()


@pytest.mark.filterwarnings("ignore:`ball` is wider than the data range")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-3.0, 255.0)])
def test_sums_in_linf_balls_need_no_placing(dtype, data_range):
    low, high = data_range
    draw = torch.Generator().manual_seed(0)
    x = (low + (high - low) * torch.rand(64, 500, generator=draw, dtype=torch.float64)).to(dtype)
    x[:, :9] = torch.tensor([low, high, 0.0, 1e-30, 1e-8, 0.1, 0.9999, 1.0, 0.5]).to(dtype)
    for epsilon in (8 / 255, 0.1, 0.3, 1e-9, 0.0, 7.0):
        around = FeasibleSet.around(x, LinfBall(epsilon), data_range, None)
        delta = around.of_perturbations().project(torch.randn(x.shape, generator=draw).to(dtype))
        ends = around.of_perturbations().project(torch.sign(delta) * 1e3)
        exact = BoundedBall(LinfBall(epsilon, center=x), *data_range)
        for summed in (x + delta, x + ends):
            assert torch.equal(exact.project(summed), summed)
            assert torch.equal(around.project(summed), summed)


@pytest.mark.parametrize("stop", [False, True])
def test_what_is_returned_is_what_was_evaluated_last(problem, stop):
    # its examples depend on each other, and each has its best iterate at another step
    net, x, y = problem
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(20, track_running_stats=False), net[1:])
    y = model(x).argmax(1)
    found = attack(
        model, x, y, ball=LinfBall(0.05), optimizer=STEP, steps=30, stop_once_fooled=stop
    )
    with torch.no_grad():
        assert torch.equal(found.fooled, is_fooled(model(found.data), y))
        assert torch.equal(found.losses, margin_loss(model(found.data), y))
    assert found.fooled.any()


def test_a_ball_wider_than_the_range_warns(problem):
    net, x, y = problem
    run = partial(attack, net, x, y, optimizer=STEP, steps=1)
    one_wide = L1Ball(torch.tensor([1.0] * (N - 1) + [21.0]))
    for wide in (LinfBall(8.0), L2Ball(4.6), L1Ball(20.3), one_wide):
        with pytest.warns(UserWarning, match="`ball` is wider than the data range: L") as caught:
            run(ball=wide)
        assert caught[0].filename == __file__
    run(ball=LinfBall(1.0))  # no warnings: all of the range, no more
    run(ball=LinfBall(8.0), data_range=None)
    run(ball=L2Ball(3.0), mask=torch.arange(20).view(SIZE) < 3)


def test_a_range_whose_norm_is_beyond_the_dtype_is_compared_with_the_ball():
    x = torch.full((1, 70_000), 0.5, dtype=torch.float16)
    with pytest.warns(UserWarning, match="`ball` is wider than the data range"):
        FeasibleSet.around(x, L1Ball(8e4), (0.0, 1.0), None)


@pytest.mark.filterwarnings("ignore:.*(is wider than|gradient)")
@pytest.mark.parametrize("data_range", [(0.0, 1.0), None])
@pytest.mark.parametrize("ball", [L1Ball, L2Ball, LinfBall])
def test_examples_without_elements(ball, data_range):
    def net(x):
        return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], 1)

    x, y = torch.zeros(2, 0, 4), torch.zeros(2, dtype=torch.long)
    found = attack(net, x, y, ball=ball(0.5), data_range=data_range, optimizer=STEP, steps=1)
    assert torch.equal(found.data, x)
    assert torch.equal(minimum_norm_attack(net, x, y, ball=ball).data, x)


@pytest.mark.parametrize("seeds", slow_but([range(1), range(5)]), ids=len)
@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.5)], ids=repr)
def test_one_run_by_default_fools_more_than_textbook_pgd(seeds, ball):
    pixels, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels).float() / 16, torch.tensor(classes)
    fooled = []
    for seed in seeds:  # (of single nets, one or two examples may be lost)
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x[150:]), y[150:]).backward()
            adam.step()
        run = partial(attack, net, x[:150], y[:150], ball=ball, steps=40)
        textbook = run(optimizer=PGD, criterion=cross_entropy)
        runs = [run(), textbook, run(criterion=margin_loss)]
        fooled.append([int(found.fooled.sum()) for found in runs])
    by_default, by_textbook, by_margin = torch.tensor(fooled).sum(0).tolist()
    assert by_default > by_textbook and by_default > by_margin


@pytest.mark.parametrize("ball", BALLS, ids=repr)
def test_without_lr_a_step_of_pgd_fits_the_radius(problem, ball):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=ball, steps=20)
    fit = partial(PGD, lr=2.5 * ball.epsilon / 20)
    assert torch.equal(run(optimizer=PGD).data, run(optimizer=fit).data)
    own = type("Own", (PGD,), {})
    assert torch.equal(run(optimizer=own).data, run(optimizer=fit).data)
    momentum = partial(PGD, momentum=0.5)
    assert torch.equal(run(optimizer=momentum).data, run(optimizer=partial(fit, momentum=0.5)).data)
    # an inner optimizer that is given has its own lr
    adam = partial(PGD, InnerOpt=partial(torch.optim.Adam, lr=0.03))
    assert torch.equal(
        run(optimizer=adam).data, run(optimizer=partial(PGD, InnerOpt=Adam, lr=0.03)).data
    )
    radii = torch.full((N,), ball.epsilon)
    radii[0] = 0.0
    each = run(ball=type(ball)(radii), optimizer=PGD)
    torch.testing.assert_close(each.data[1:], run(optimizer=PGD).data[1:])


def test_the_step_of_an_optimizer_around_pgd_is_called(problem):
    net, x, y = problem

    class PassesOn(SGD):
        number = 0

        def __init__(self, params, constraint):
            params = list(params)
            self.within = PGD(params, constraint=constraint, lr=0.01)
            super().__init__(params, lr=1.0)

        def __getattr__(self, name):
            return getattr(self.within, name)

        def step(self, closure=None):
            PassesOn.number += 1
            self.within.step()

    attack(net, x, y, ball=LinfBall(0.05), optimizer=PassesOn, steps=4)
    assert PassesOn.number == 4


def test_a_generator_makes_it_reproducible(problem):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=L1Ball(0.5), optimizer=STEP, steps=2, random_start=True)
    a, b, c = (run(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.data, b.data) and not torch.equal(a.data, c.data)


def test_rivals_find_what_one_loss_does_not(problem):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=L2Ball(0.3), optimizer=STEP, steps=6)
    one, all_of_them = run(), run(rivals=CLASSES - 1)
    assert all_of_them.model_calls == 1 + 3 * 7 + 1
    assert all_of_them.losses.mean() >= one.losses.mean()
    assert torch.equal(all_of_them.losses > 0, all_of_them.fooled)


def just(classes):
    return lambda model, around, target: classes


@pytest.mark.parametrize("criterion", [margin_loss, dlr_loss, cross_entropy])
def test_each_loss_runs_toward_each_rival(problem, criterion):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=L2Ball(0.3), optimizer=STEP, steps=6, criterion=criterion)
    order = net(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    each = [run(rivals=just(order[:, i : i + 1])) for i in range(CLASSES - 1)]
    found = run(rivals=CLASSES - 1)
    assert torch.equal(found.fooled, torch.stack([one.fooled for one in each]).any(0))
    # what is found is what one of the runs has found: that of the largest loss toward its rival
    toward = torch.stack(
        [criterion(net(one.data), y, order[:, i]) for i, one in enumerate(each)]
    ).where(torch.stack([one.fooled for one in each]) | ~found.fooled, -torch.inf)
    points = torch.stack([one.data for one in each])
    best = points[toward.argmax(0), torch.arange(N)]
    torch.testing.assert_close(found.data, best)
    assert len(toward.argmax(0).unique()) > 1
    assert torch.equal(found.losses, criterion(net(found.data), y))
    # the classes themselves are as good as their number
    assert torch.equal(run(rivals=just(order)).data, found.data)
    if criterion is not margin_loss:  # the loss counts
        assert not torch.equal(run(rivals=just(order), criterion=margin_loss).data, found.data)


def test_a_loss_of_ones_own_toward_rivals(problem):
    net, x, y = problem

    def share(logits, target, rival=None):
        shares = logits.softmax(1)
        if rival is None:
            return 1 - shares.gather(1, target[:, None]).squeeze(1)
        return shares.gather(1, rival[:, None]).squeeze(1)

    rival = ((y + 1) % CLASSES)[:, None]
    run = partial(attack, net, x, y, ball=L2Ball(0.3), optimizer=STEP, steps=6)
    found = run(criterion=share, rivals=just(rival))
    before, after = (net(data).softmax(1).gather(1, rival) for data in (x, found.data))
    assert (after > before).all()
    assert torch.equal(found.losses, share(net(found.data), y))


def with_options(logits, target, **options):
    return margin_loss(logits, target, **options)


class Margin(nn.Module):
    def forward(self, logits, target, rival=None):
        return margin_loss(logits, target, rival)


@pytest.mark.parametrize("criterion", [with_options, Margin(), partial(margin_loss)])
def test_what_takes_a_rival_is_told_from_its_signature(problem, criterion):
    net, x, y = problem
    run = partial(attack, net, x, y, ball=L2Ball(0.3), optimizer=STEP, steps=3, rivals=2)
    assert torch.equal(run(criterion=criterion).data, run().data)


# --- NaN ----------------------------------------------------------------------------------------


class NaNFarAway(nn.Module):
    def __init__(self, net, x, entry):
        super().__init__()
        self.net, self.x, self.entry = net, x, entry

    def forward(self, x):
        far = (x - self.x).flatten(1).norm(dim=1, keepdim=True) > 0.1
        return self.net(x).masked_fill(far & self.entry, torch.nan)


@pytest.mark.parametrize("optimizer", [None, STEP, ORACLE])
@pytest.mark.parametrize("entry", [torch.ones(CLASSES).bool(), torch.arange(CLASSES) == 2])
@pytest.mark.parametrize("targeted", [False, True])
def test_where_the_model_answers_nan_it_predicts_nothing(problem, optimizer, entry, targeted):
    net, x, y = problem
    model, target = NaNFarAway(net, x, entry), (y + 1) % CLASSES if targeted else y
    found = attack(
        model, x, target, ball=L2Ball(0.15), optimizer=optimizer, steps=9, targeted=targeted
    )
    check_inside(found.data, x, L2Ball, 0.15)  # though later iterates were NaN
    nothing = model(found.data).isnan().any(1)
    if targeted:  # no NaN is what it wants
        assert not nothing.any() and not found.losses.isnan().any()
    else:
        assert nothing.any() and found.fooled[nothing].all()


NOT_FINITE = "entries of the first gradient are not finite"


@pytest.mark.filterwarnings("ignore:the gradient of 24 of 24 examples is 0")
def test_a_nan_gradient_leaves_the_data_as_they_are(problem):
    net, x, y = problem

    def model(data):  # whose slope at the data is infinity times 0
        return net(data) + 0 * (data - x).abs().flatten(1).sum(1, keepdim=True).sqrt()

    with pytest.warns(UserWarning, match=f"480 {NOT_FINITE}"):
        found = attack(model, x, y, ball=L2Ball(0.3), steps=5)
    assert torch.equal(found.data, x) and not found.fooled.any() and found.zero_gradient.all()
    assert torch.equal(found.losses, margin_loss(net(x), y))


def test_only_the_first_radius_of_a_search_tells_of_what_is_not_finite(problem):
    net, x, y = problem
    with pytest.warns(UserWarning, match=NOT_FINITE) as caught:
        minimum_norm_attack(
            lambda data: net(data.sqrt().square()), x, y, ball=L2Ball, steps=3, solver=attack
        )
    assert len(caught) == 1


@pytest.mark.parametrize("ball", [LinfBall(0.2), L2Ball(1.0), L1Ball(4.0)], ids=repr)
@pytest.mark.parametrize("optimizer", [None, STEP, ORACLE, PGD])
def test_entries_that_are_not_finite_count_as_0(problem, ball, optimizer):
    net, x, y = problem

    def squares_of_roots(data):  # whose slope at 0 is 0 times infinity
        return net(data.sqrt().square())

    def attacked(model):
        return attack(model, x, y, ball=ball, optimizer=optimizer, steps=15)

    with pytest.warns(UserWarning, match=f"{int((x == 0).sum())} {NOT_FINITE}"):
        found = attacked(squares_of_roots)
    assert found.data.isfinite().all() and not found.zero_gradient.any()
    assert found.fooled.sum() > 0.6 * attacked(net).fooled.sum() > 0
    with pytest.warns(UserWarning, match=NOT_FINITE):
        data, losses = gradient_ascent(
            model=squares_of_roots, data=x, target=y, optimizer=SGD, lr=0.01, steps=3
        )
    assert data.isfinite().any() and not torch.equal(data, x)


# --- cost ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("rivals", [None, 2])
def test_nothing_is_spent_on_who_is_fooled(problem, rivals):
    net, x, y = problem
    run = partial(stopping_or_not, x=x, y=y, rivals=rivals)
    whole, short = Counting(net), Counting(net)
    torch.manual_seed(0)
    expected = run(whole, stop_once_fooled=False)
    torch.manual_seed(0)
    found = run(short, stop_once_fooled=True)
    assert sum(short.rows) < 0.7 * sum(whole.rows)
    assert found.model_calls == len(short.rows)
    assert expected.model_calls == len(whole.rows)
    assert found.fooled.any() and not found.fooled.all()
    # the runs of the others take the same steps up to chance, so that success is about equal
    assert abs(int(found.fooled.sum()) - int(expected.fooled.sum())) <= 1
    check_inside(found.data, x, LinfBall, 0.1)


def stopping_or_not(net, *, x, y, rivals, stop_once_fooled):
    return attack(
        net, x, y, ball=LinfBall(0.1), optimizer=STEP, steps=20, restarts=2, rivals=rivals,
        stop_once_fooled=stop_once_fooled,
    )  # fmt: skip


def test_no_step_reads_a_value(problem, as_on_a_device):
    net, x, y = problem

    def reads(steps):
        with HostReads() as mode:
            attack(net, x, y, ball=LinfBall(0.1), optimizer=STEP, steps=steps)
        return mode.count

    assert reads(3) == reads(30)


def test_the_model_is_as_it_was(problem):
    net = nn.Sequential(problem[0], nn.Dropout(0.3)).train()
    problem[0].eval()
    net[0][1].bias.requires_grad_(False)
    before = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    _, x, y = problem

    def fail(logits, target):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        attack(net, x, y, ball=LinfBall(0.1), optimizer=STEP, steps=3, criterion=fail)
    attack(net, x, y, ball=LinfBall(0.1), optimizer=STEP, steps=3)
    after = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    assert before == after and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(problem, context):
    net, x, y = problem
    run = partial(attack, ball=L2Ball(0.4), optimizer=STEP, steps=5, mask=torch.ones(SIZE).bool())
    expected = run(net, x, y)
    with context():
        found = run(net, x * 1, y * 1)
    assert torch.equal(found.data, expected.data) and not found.data.is_inference()


def test_autocast_around_it(problem):
    net, x, y = problem
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attack(net, x, y, ball=L2Ball(0.4), optimizer=STEP, steps=5)
    assert found.data.dtype == torch.float32
    check_inside(found.data, x, L2Ball, 0.4)


def test_a_model_that_depends_on_chance(problem):
    net, x, y = problem

    class Noisy(nn.Module):
        def forward(self, x):
            return net(x + 0.02 * torch.randn_like(x))

    torch.manual_seed(0)
    found = attack(Noisy(), x, y, ball=L2Ball(0.4), optimizer=STEP, steps=5, samples=4)
    assert found.model_calls == 4 * 7
    check_inside(found.data, x, L2Ball, 0.4)
    assert margin_loss(net(found.data), y).mean() > margin_loss(net(x), y).mean() + 0.2


def test_a_rule_is_asked_right_after_the_model(problem):
    net, x, y = problem
    seen, asked = [], []

    def model(x):
        seen.append(x.detach().clone())
        return net(x)

    def fooled(output, target):  # one that looks at more than it is given, and keeps a state
        asked.append(len(seen))
        assert torch.equal(net(seen[-1]), output)
        return output.argmax(1) != target

    attack(model, x, y, ball=L2Ball(0.4), fooled=fooled, steps=5)
    assert asked == [1, 2, 3, 4, 5, 6, 7]


@dataclass
class Maker:
    """A callable without a hash."""

    lr: float

    def __call__(self, params, constraint):
        return PGD(params, constraint=constraint, lr=self.lr)


class Slotted:
    """A callable that no weak reference can be made to."""

    __slots__ = ()
    __call__ = Maker(0.1).__call__


@pytest.mark.parametrize("optimizer", [Maker(0.1), Slotted()], ids=["no hash", "no reference"])
def test_what_makes_the_optimizer_may_be_any_callable(problem, optimizer):
    net, x, y = problem
    found = attack(net, x, y, ball=L2Ball(0.4), optimizer=optimizer, steps=5)
    same = attack(net, x, y, ball=L2Ball(0.4), optimizer=partial(PGD, lr=0.1), steps=5)
    assert torch.equal(found.data, same.data)


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "data below": (
        {"data": lambda x: x - 0.5},
        ValueError,
        r"`data` must be within `data_range`, \[0, 1\], got -",
    ),
    "data above": (
        {"data": lambda x: 255 * x},
        ValueError,
        r"`data` must be within `data_range`, \[0, 1\], got \d",
    ),
    "nan": ({"data": lambda x: x.log().sqrt()}, ValueError, "`data` must be finite"),
    "integers": (
        {"data": lambda x: x.long()},
        TypeError,
        "`data` must be of a floating-point dtype",
    ),
    "one dim": (
        {"data": lambda x: x[:, 0, 0, 0]},
        ValueError,
        r"`data` must have the shape \(N, ...\)",
    ),
    "class too high": (
        {"target": lambda y: y + 3},
        ValueError,
        r"`target` must hold classes from 0 to 3, got [456]",
    ),
    "class too low": (
        {"target": lambda y: y - 9},
        ValueError,
        "`target` must hold classes from 0 to 3, got -",
    ),
    "target one-hot": (
        {"target": lambda y: nn.functional.one_hot(y, 4)},
        ValueError,
        r"shape \(24,\), got shape \(24, 4\)",
    ),
    "target short": ({"target": lambda y: y[:3]}, ValueError, r"shape \(24,\), got shape \(3,\)"),
    "target of one example": (
        {"target": lambda y: 3},
        ValueError,
        r"shape \(24,\), got shape \(\) \(one example alone: `data\[None\]`, ",
    ),
    "target float": (
        {"target": lambda y: y.float()},
        TypeError,
        r"`target` must hold classes, .* got torch.float32 \(if not of classes: pass `criterion`, ",
    ),
    "loss of all": (
        {"criterion": nn.CrossEntropyLoss()},
        ValueError,
        r'`criterion` must give one value for each example, .* `reduction="none"`, got shape \(\)',
    ),
    "no ball": ({"ball": 0.1}, TypeError, "`ball` must be a LinfBall, L2Ball or L1Ball, got 0.1"),
    "center": ({"ball": L2Ball(1.0, center=1.0)}, ValueError, "`ball` must have no center"),
    "infinite": ({"ball": L2Ball(float("inf"))}, ValueError, "`epsilon` of `ball` must be finite"),
    "epsilons": (
        {"ball": L2Ball(torch.ones(3))},
        ValueError,
        r"one value for each example, shape \(24,\), got shape \(3,\)",
    ),
    "range": ({"data_range": (1.0, 0.0)}, ValueError, "`lower` must be <= `upper`"),
    "range shape": (
        {"data_range": (0.0, torch.ones(7))},
        ValueError,
        "`data_range` must broadcast",
    ),
    "range number": ({"data_range": 1.0}, TypeError, "`data_range` must be a pair"),
    "mask": ({"mask": torch.ones(SIZE)}, TypeError, "`mask` must be a tensor of bools"),
    "array as mask": (
        {"mask": np.ones((N, *SIZE), bool)},
        TypeError,
        "`mask` must be a tensor of bools, got ndarray",
    ),
    "mask shape": ({"mask": torch.ones(7).bool()}, ValueError, "`mask` must broadcast"),
    "steps": ({"steps": -1}, ValueError, "`steps` must be >= 0, got -1"),
    "restarts": ({"restarts": 0}, ValueError, "`restarts` must be >= 1, got 0"),
    "samples": ({"samples": 0}, ValueError, "`samples` must be >= 1, got 0"),
    "rivals": ({"rivals": 4}, ValueError, "`rivals` must be from 1 to 3, .* classes, got 4"),
    "rivals, targeted": (
        {"rivals": 2, "targeted": True},
        ValueError,
        "`rivals` must be None with `targeted`, whose target is the rival, got 2",
    ),
    "rivals, criterion": (
        {"rivals": 2, "criterion": targeted_dlr_loss},
        TypeError,
        "`criterion` must take `rival` where there are `rivals`, .* got <function targeted_dlr",
    ),
    "rivals of a module": (
        {"rivals": 2, "criterion": nn.CrossEntropyLoss(reduction="none")},
        TypeError,
        r"`criterion` must take `rival` where .* got CrossEntropyLoss\(\)",
    ),
    "rivals float": ({"rivals": 1.5}, TypeError, "`rivals` must be an int, got 1.5"),
    "rivals of another shape": (
        {"rivals": just(torch.ones(N).long())},
        ValueError,
        r"`rivals` must give classes of shape \(24, m\) .* got shape \(24,\)",
    ),
    "rivals that are targets": (
        {"rivals": just(torch.arange(4).expand(N, 4))},
        ValueError,
        r"`rivals` must give classes .* that are not the targets, got shape \(24, 4\)",
    ),
    "rivals of a list": ({"rivals": just([[1]] * N)}, TypeError, "`rivals` must hold classes, "),
    "rivals, none": (
        {"rivals": just(torch.zeros(N, 0).long())},
        ValueError,
        r"`rivals` must give classes .* got shape \(24, 0\)",
    ),
    "rivals of floats": (
        {"rivals": just(torch.zeros(N, 1))},
        TypeError,
        "`rivals` must hold classes, which are integers, .* got torch.float32",
    ),
    "rivals too high": (
        {"rivals": just(torch.full((N, 1), CLASSES))},
        ValueError,
        "`rivals` must hold classes from 0 to 3, got 4",
    ),
    "rivals too low": (
        {"rivals": just(torch.full((N, 1), -1))},
        ValueError,
        "`rivals` must hold classes from 0 to 3, got -1",
    ),
    "rival that is no option": (
        {"rivals": 2, "criterion": lambda logits, target, rival: logits.sum(1)},
        TypeError,
        "`criterion` must take `rival` where there are `rivals`, as an option",
    ),
    "one class": (
        {"model": lambda data: data.flatten(1).sum(1, keepdim=True)},
        ValueError,
        r"must give logits of shape .*, of two classes at least, got Tensor of shape \(24, 1\)",
    ),
    "a closure": (
        {"optimizer": partial(ProjectedOptimizer, InnerOpt=LBFGS, lr=1.0)},
        TypeError,
        "`optimizer` must step by gradients alone, without a `closure`, got LBFGS",
    ),
    "no lr": (
        {"optimizer": ProjectedOptimizer},
        TypeError,
        r"`optimizer` must be given `lr`, .* `partial\(ProjectedOptimizer, lr=...\)`",
    ),
    "no lr of Adam": (
        {"optimizer": partial(ProjectedOptimizer, InnerOpt=Adam)},
        TypeError,
        "must be given `lr`, .* got ProjectedOptimizer without it",
    ),
    "name of a criterion": (
        {"criterion": "ce"},
        TypeError,
        "`criterion` must be a function of output and target, .* got 'ce'",
    ),
    "optimizer": ({"optimizer": SGD}, TypeError, "`optimizer` must take `constraint`"),
    "logits": (
        {"model": nn.Identity()},
        ValueError,
        r"`model` must give logits of shape \(24, K\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(problem, name):
    change, error, match = BAD[name]
    arguments = dict(zip(("model", "data", "target"), problem, strict=True))
    arguments |= {"ball": LinfBall(0.1), "optimizer": STEP, "steps": 2}
    for key, value in change.items():
        computed = key in ("data", "target")
        arguments[key] = value(arguments[key]) if computed else value
    before = problem[1].clone()
    with pytest.raises(error, match=match):
        attack(**arguments)
    assert torch.equal(problem[1], before)
    assert all(p.requires_grad for p in problem[0].parameters())


def test_a_negative_radius_is_no_ball():
    with pytest.raises(ValueError, match="`epsilon` must be >= 0, got -4.0"):
        LinfBall(-4.0)


def test_a_model_that_does_not_look_at_its_input(problem):
    net = problem[0]
    with torch.no_grad():
        net[1].weight.zero_()
    with pytest.warns(ZeroGradientWarning, match="of 24 of 24 examples is 0"):
        found = attack(
            net, problem[1], net(problem[1]).argmax(1), ball=LinfBall(0.1), optimizer=STEP, steps=3
        )
    assert found.zero_gradient.all() and not found.fooled.any()
    assert torch.equal(found.data, problem[1])
