"""Auto-PGD: where it gets to, when it halves its steps, and what is kept of it."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from bitwise import same_bits, snapshot
from files import through_a_file
from test_pgd import BALLS, Passes, bounds, each_ball, linear_cases
from tiers import slow_but

from rai_toolbox.constraints import BoundedBall, Box, L1Ball, L2Ball, LinfBall, Simplex
from rai_toolbox.optim import APGD, PGD
from rai_toolbox.optim.apgd import period_ending_at


def step(opt, x, objective):
    losses = objective(x)
    (x.grad,) = torch.autograd.grad(losses.sum(), x)
    if isinstance(opt, APGD):
        opt.observe_(losses)
    opt.step()
    return losses.detach()


def solved(make, start, objective, steps):
    """The best losses over all points that the optimizer visits; all are in its set."""
    x = start.clone().requires_grad_()
    opt = make([x])
    constraint = opt.param_groups[0]["constraint"]
    best = torch.full((len(x),), math.inf, dtype=start.dtype)
    for _ in range(steps):
        best = torch.minimum(best, step(opt, x, objective))
        assert (constraint.violation(x.detach()) == 0).all()
    return torch.minimum(best, objective(x.detach()))


def relu_net(seed, n=12, size=24):
    """The margin of the label over the other classes, of a random net: what an attack lowers."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    first, second = draw(32, size) * 1.5 / size**0.5, draw(32, 32) * 1.5 / 32**0.5
    last, bias = draw(5, 32) / 32**0.5, draw(32) * 0.3
    data = torch.rand(n, size, generator=generator)

    def logits(x):
        return torch.relu(torch.relu(x @ first.T + bias) @ second.T) @ last.T

    label = logits(data).argmax(1, keepdim=True)

    def margin(delta):
        out = logits(data + delta)
        return (out.gather(1, label) - out.scatter(1, label, -1e9).amax(1, keepdim=True)).squeeze(1)

    return data, margin


def toy(kind, rows=slice(0, 3), dtype=torch.float32):
    """Three rows in balls of their own, with objectives that a few steps do not solve."""
    lower, upper = bounds((3, 9), dtype=dtype)
    radius = torch.tensor([0.1, 0.3, 0.6], dtype=dtype).view(3, 1)
    radius = radius * {"linf": 1, "l2": 2, "l1": 6}[kind]
    constraint = BoundedBall(BALLS[kind](radius[rows]), lower[rows], upper[rows])
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(3, 9, 9, generator=generator, dtype=dtype)[rows] for _ in range(2))

    def objective(x):
        return (torch.einsum("nij,nj->ni", a, x).sin() + (b @ x.unsqueeze(2)).squeeze(2)).sum(1)

    start = torch.zeros(3, 9, dtype=dtype)[rows]
    return constraint, objective, start


# --- where it gets to -----------------------------------------------------------------------------


@each_ball
def test_the_worst_case_of_a_linear_objective(kind):
    c, constraint, least = linear_cases(kind)
    make = partial(APGD, constraint=constraint, steps=100)
    reached = solved(make, torch.zeros_like(c), lambda x: (c * x).sum(1), 100)
    assert ((reached - least) >= -1e-9).all()
    assert ((reached - least) <= 1e-12 * least.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 30])
def test_the_worst_case_where_bounds_leave_the_small_slopes_only(dtype, steps):
    # the large slope leads out of its bound; and a zero slope leaves the start as it is
    c = torch.tensor([[1.0, -2e-3, 1e-3], [0.0, 0.0, 0.0]], dtype=dtype)
    lower = torch.tensor([0.0, -1.0, -1.0], dtype=dtype)
    start = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]], dtype=dtype)
    for ball, dual in {L1Ball: 2e-3, L2Ball: 5**0.5 * 1e-3, LinfBall: 3e-3}.items():
        x = start.clone().requires_grad_()
        optim = APGD([x], constraint=BoundedBall(ball(0.7), lower, 1.0), steps=steps)
        for _ in range(steps):
            losses = (c * x).sum(1)
            (x.grad,) = torch.autograd.grad(losses.sum(), x)
            optim.observe_(losses)
            optim.step()
        assert (c * x).sum(1)[0].item() == pytest.approx(-0.7 * dual, rel=1e-6)
        assert torch.equal(x[1], start[1])


@pytest.mark.parametrize("kind", slow_but(BALLS))
def test_it_gets_farther_than_pgd_at_equal_gradients(kind):
    epsilon = {"linf": 0.1, "l2": 0.6, "l1": 2.0}[kind]
    mine, theirs = [], []
    for seed in range(5):
        data, margin = relu_net(seed)
        constraint = BoundedBall(BALLS[kind](epsilon), -data, 1 - data)
        start = torch.zeros_like(data)
        mine.append(solved(partial(APGD, constraint=constraint, steps=40), start, margin, 40))
        for share in (0.05, 0.1, 0.25, 1.0):
            make = partial(PGD, constraint=constraint, lr=share * epsilon)
            theirs.append(solved(make, start, margin, 40))
    best_of_pgd = torch.stack(theirs).view(5, 4, -1).mean((0, 2)).min()
    assert torch.cat(mine).mean() < best_of_pgd


# --- its rules ------------------------------------------------------------------------------------


def test_checkpoints_by_hand():
    # p = 0, .22, .41, .57, .70, .80, .87, .93, .99: ceil(p_j * 100), then every 6 steps
    ends = {i: period_ending_at(i, 100, LinfBall(1.0)) for i in range(115)}
    found = {i: period for i, period in ends.items() if period}
    assert found == {
        22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6, 105: 6, 111: 6,
    }  # fmt: skip
    ends = {i: period_ending_at(i, 10, L2Ball(1.0)) for i in range(14)}
    assert [i for i, period in ends.items() if period] == [3, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert sum(ends.values()) == 13
    assert [i for i in range(20) if period_ending_at(i, 100, L1Ball(1.0))] == [4, 8, 12, 16]
    assert period_ending_at(0, 1, L1Ball(1.0)) == 0


def told(opt, x, losses, grad):
    x.grad = grad.clone()
    opt.observe_(torch.tensor(losses))
    opt.step()


def test_steps_halve_where_they_should_and_go_back_to_the_best_point():
    x = torch.zeros(3, 2, requires_grad=True)
    opt = APGD([x], constraint=LinfBall(8.0), steps=10, momentum=1.0)  # first checked at step 3
    grads = [torch.full((3, 2), sign) for sign in (1.0, -1.0, 1.0)]
    # row 0 falls 3 times of 3; row 1 twice, fewer than 3/4; row 2 not at all
    told(opt, x, [9.0, 9.0, 9.0], grads[0])
    assert x[:, 0].tolist() == [-8.0] * 3  # 2 epsilon, and back into the ball
    told(opt, x, [8.0, 8.0, 9.5], grads[1])
    assert x[:, 0].tolist() == [8.0] * 3
    told(opt, x, [7.0, 7.0, 9.5], grads[2])
    assert x[:, 0].tolist() == [-8.0] * 3
    rate = opt.state[x]["rate"]
    assert rate.flatten().tolist() == [1.0] * 3
    told(opt, x, [6.0, 7.5, 9.5], torch.full((3, 2), -1.0))
    assert opt.state[x]["rate"].flatten().tolist() == [1.0, 0.5, 0.5]
    # row 0 goes on from where it is, -8 + 16; row 1 from its best point, 8, with the gradient
    # there, +1: 8 - 8; row 2 from its start, 0, with the gradient +1 there: 0 - 8
    assert x[:, 0].tolist() == [8.0, 0.0, -8.0]
    assert opt.state[x]["best_loss"].flatten().tolist() == [6.0, 7.0, 9.0]


def test_steps_halve_where_neither_step_nor_best_point_has_changed():
    x = torch.zeros(1, 1, requires_grad=True)
    opt = APGD([x], constraint=LinfBall(1.0), steps=10, rho=0.0)  # so that only that rule counts
    rates = []
    for _ in range(10):
        told(opt, x, [1.0], torch.ones(1, 1))
        rates.append(opt.state[x]["rate"].item())
    # checked at 3, where nothing is known from before, at 5, and then at each; a step that has just
    # been halved is given a period
    assert rates == [1, 1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_inertia_is_the_rest_of_the_last_move():
    x = torch.zeros(1, 1, requires_grad=True)
    opt = APGD([x], constraint=BoundedBall(L2Ball(1.0), -0.75, None), steps=100, momentum=0.5)
    told(opt, x, [0.0], torch.ones(1, 1))
    assert x.item() == -0.75
    told(opt, x, [0.0], -torch.ones(1, 1))  # z = 1; -.75 + .5 * 1.75 + .5 * (-.75)
    assert x.item() == pytest.approx(-0.25, abs=1e-6)


def test_sparsity_and_step_of_an_l1_ball():
    n = 30
    x = torch.zeros(2, n, requires_grad=True)
    opt = APGD([x], constraint=L1Ball(6.0), steps=50)  # checked every 2 steps
    grad = torch.arange(1.0, n + 1).expand(2, n)
    told(opt, x, [5.0, 5.0], grad)
    assert (x != 0).sum(1).tolist() == [6, 6]  # a fifth of the entries
    torch.testing.assert_close(x.detach()[:, -6:], torch.full((2, 6), -1.0), rtol=0, atol=1e-5)
    told(opt, x, [4.0, 6.0], grad)
    told(opt, x, [4.5, 6.0], grad)
    # row 0 has its best point with 6 entries, sparser than 30: 4 at a time, and the first step
    # size; row 1 has it at the center, from where it begins anew
    assert opt.state[x]["density"].flatten().tolist() == pytest.approx([6 / 1.5 / n, 0.2])
    assert opt.state[x]["rate"].flatten().tolist() == [1.0, 1.0]
    told(opt, x, [4.5, 6.0], grad)
    told(opt, x, [4.5, 6.0], grad)
    assert opt.state[x]["rate"][0].item() == pytest.approx(1 / 1.5)
    for _ in range(30):
        told(opt, x, [4.5, 6.0], grad)
    assert opt.state[x]["rate"][0].item() == pytest.approx(0.1)


@each_ball
def test_a_start_outside_is_no_point_to_go_back_to(kind):
    constraint = BALLS[kind](0.5)
    x = torch.full((1, 3), 7.0, requires_grad=True)
    opt = APGD([x], constraint=constraint, steps=5)
    told(opt, x, [-100.0], torch.ones(1, 3))
    assert opt.state[x]["best_loss"].item() == math.inf
    for _ in range(8):
        told(opt, x, [0.0], torch.ones(1, 3))
        assert constraint.violation(opt.state[x]["best"]).item() == 0


@each_ball
def test_batched_is_row_by_row(kind):
    def run(rows):
        constraint, objective, start = toy(kind, rows, torch.float64)
        x = start.clone().requires_grad_()
        opt = APGD([x], constraint=constraint, steps=20)
        for _ in range(20):
            step(opt, x, objective)
        return x.detach(), opt.state[x]["rate"]

    whole, rates = run(slice(0, 3))
    each = [run(slice(i, i + 1)) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat([x for x, _ in each]), rtol=0, atol=1e-9)
    assert torch.equal(rates, torch.cat([rate for _, rate in each]))


@each_ball
def test_param_ndim_and_strides(kind):
    constraint, objective, start = toy(kind, dtype=torch.float64)
    flat = start.clone().requires_grad_()
    deep = start.view(3, 3, 3).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    whole = BoundedBall(
        BALLS[kind](constraint.ball.epsilon.view(3, 1, 1)),
        *(bound.view(3, 3, 3) for bound in (constraint.lower, constraint.upper)),
    )
    opts = (
        APGD([flat], constraint=constraint, steps=9),
        APGD([deep], constraint=whole, steps=9, param_ndim=2),
    )
    for _ in range(9):
        step(opts[0], flat, objective)
        step(opts[1], deep, lambda x: objective(x.reshape(3, 9)))
    torch.testing.assert_close(deep.detach().reshape(3, 9), flat.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_ball
def test_half_precision_stays_inside(kind, dtype):
    constraint, objective, start = toy(kind)
    x = start.to(dtype).requires_grad_()
    constraint = constraint.to(dtype)
    opt = APGD([x], constraint=constraint, steps=8)
    for _ in range(8):
        losses = objective(x.float())
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        opt.observe_(losses)
        opt.step()
        assert (constraint.violation(x.detach()) == 0).all()
    assert opt.state[x]["best_loss"].dtype == torch.float64
    assert (objective(x.detach().float()) < objective(start)).all()


@each_ball
def test_zero_and_nan_gradients(kind):
    constraint = BoundedBall(BALLS[kind](0.5), -0.2, 0.9)
    x = torch.zeros(2, 4, requires_grad=True)
    opt = APGD([x], constraint=constraint, steps=4)
    told(opt, x, [0.0, math.nan], torch.stack([torch.zeros(4), torch.full((4,), math.nan)]))
    assert x[0].tolist() == [0.0] * 4
    assert x[1].isnan().all()


# --- how it is kept -------------------------------------------------------------------------------


def copies(opt, x):
    """The optimizer and its parameter, as each way of keeping them gives them back."""

    def loaded(state_dict):
        y = x.detach().clone().requires_grad_()
        other = APGD([y], constraint=LinfBall(1.0), steps=1)
        other.load_state_dict(state_dict)
        return other, y

    yield "state_dict", *loaded(copy.deepcopy(opt.state_dict()))
    yield "weights_only", *loaded(through_a_file(opt.state_dict()))
    yield "deepcopy", *copy.deepcopy((opt, x))
    yield "pickle", *pickle.loads(pickle.dumps((opt, x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_ball
def test_it_resumes_bit_for_bit(kind, dtype):
    constraint, objective, start = toy(kind)
    x = start.to(dtype).requires_grad_()
    opt = APGD([x], constraint=constraint.to(dtype), steps=20)

    def go(opt, x, n):
        for _ in range(n):
            losses = objective(x.float())
            (x.grad,) = torch.autograd.grad(losses.sum(), x)
            opt.observe_(losses)
            opt.step()

    go(opt, x, 7)
    kept = list(copies(opt, x))
    go(opt, x, 12)
    for name, other, y in kept:
        go(other, y, 12)
        assert same_bits(snapshot([x], opt), snapshot([y], other)), name


def test_settings_of_a_group():
    x, y = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    opt = APGD([{"params": [x], "rho": 0.5}], constraint=L2Ball(1.0), steps=4)
    opt.add_param_group({"params": y, "constraint": LinfBall(0.1)})
    for param in (x, y):
        param.grad = torch.ones(2, 3)
    opt.observe_(torch.zeros(2))
    opt.step()
    assert y.detach().tolist() == torch.full((2, 3), -0.1).tolist()
    torch.testing.assert_close(x.detach().norm(dim=1), torch.ones(2))


def test_a_closure_observes():
    x = torch.zeros(2, 3, requires_grad=True)
    opt = APGD([x], constraint=LinfBall(0.5), steps=4)

    def closure():
        losses = x.sum(1)
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        opt.observe_(losses)
        return losses.sum()

    assert opt.step(closure).item() == 0
    assert x.detach().tolist() == [[-0.5] * 3] * 2


# --- what it costs --------------------------------------------------------------------------------


@each_ball
def test_a_step_reads_no_value_of_a_device(kind, as_on_a_device):
    constraint, objective, start = toy(kind)
    x = start.clone().requires_grad_()
    opt = APGD([x], constraint=constraint, steps=10)
    seen = []
    for _ in range(6):  # a checkpoint among them
        losses = objective(x)
        (x.grad,) = torch.autograd.grad(losses.sum(), x)
        with Passes(None) as mode:
            opt.observe_(losses)
            opt.step()
        seen += mode.all
    reads = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"}
    assert "clamp_" in seen
    assert not reads & set(seen)


@each_ball
def test_reading_values_changes_none(kind, request):
    """Where reading is free, loops end early, and rows are copied by their numbers."""

    def run():
        constraint, objective, start = toy(kind)
        x = start.clone().requires_grad_()
        opt = APGD([x], constraint=constraint, steps=10)
        for _ in range(10):
            step(opt, x, objective)
        return x.detach()

    here = run()
    request.getfixturevalue("as_on_a_device")
    torch.testing.assert_close(run(), here, rtol=0, atol=1e-5)


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": 0}, ValueError, "`steps` must be >= 1, got 0"),
        ({"steps": 2.5}, TypeError, "`steps` must be an int, got 2.5"),
        ({"steps": True}, TypeError, "`steps` must be an int, got True"),
        ({"momentum": 1.5}, ValueError, r"`momentum` must be in \[0, 1\], got 1.5"),
        ({"rho": -0.1}, ValueError, r"`rho` must be in \[0, 1\], got -0.1"),
        ({"constraint": Box(0.0, 1.0)}, TypeError, "`constraint` must be a LinfBall, L2Ball"),
        ({"constraint": Simplex()}, TypeError, "`constraint` must be a LinfBall, L2Ball"),
        ({"constraint": None}, TypeError, "`constraint` must be a LinfBall, L2Ball"),
        ({"constraint": LinfBall(math.inf)}, ValueError, "`epsilon` of `constraint` must be"),
        ({"constraint": L2Ball(torch.ones(4, 1))}, ValueError, "`epsilon` must broadcast"),
        ({"param_ndim": 0.5}, TypeError, "`param_ndim` must be an int or None"),
    ],
)
def test_what_is_refused(settings, error, message):
    x = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(error, match=message):
        APGD([x], **{"constraint": L2Ball(1.0), "steps": 5, **settings})


def test_losses_that_are_refused():
    x = torch.zeros(3, 2, requires_grad=True)
    opt = APGD([x], constraint=L2Ball(1.0), steps=5)
    x.grad = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="`observe_` must be called"):
        opt.step()
    with pytest.raises(ValueError, match=r"`losses` must have one value per sub-tensor, .*\(2,\)"):
        opt.observe_(torch.zeros(2))
    with pytest.raises(TypeError, match="`losses` must be a tensor of real numbers, got torch.int"):
        opt.observe_(torch.zeros(3, dtype=torch.int64))
    opt.observe_(torch.zeros(3))
    opt.step()
    with pytest.raises(RuntimeError, match="`observe_` must be called"):
        opt.step()  # once for each
    assert opt.state[x]["step"] == 1


def test_a_checkpoint_with_bad_settings_changes_nothing():
    x = torch.zeros(3, 2, requires_grad=True)
    opt = APGD([x], constraint=L2Ball(1.0), steps=5)
    saved = opt.state_dict()
    saved["param_groups"][0] = {**saved["param_groups"][0], "steps": 0}
    with pytest.raises(ValueError, match="`steps` must be >= 1, got 0"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["steps"] == 5
