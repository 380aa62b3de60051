"""The solver: its results, what it leaves behind, what it keeps, and what it costs."""

import warnings
from functools import partial

import pytest
import torch
from host_reads import HostReads
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rai_toolbox import _torch
from rai_toolbox.constraints import BoundedBall, LinfBall
from rai_toolbox.optim import LinfProjectedOptim, ProjectedOptimizer, SignedGradientOptim
from rai_toolbox.perturbations.losses import is_fooled
from rai_toolbox.perturbations.models import AdditivePerturbation
from rai_toolbox.perturbations.solvers import ZeroGradientWarning, gradient_ascent


def distance(output, target):
    return (output - target).abs()


def identity(x):
    return x


LINE = {"model": identity, "criterion": distance, "optimizer": SGD, "lr": 0.1, "steps": 5}


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))


@pytest.fixture
def problem():
    net = small_net().eval()
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return {"model": net, "data": x, "target": net(x).argmax(1)}


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("targeted", "expected"), [(False, [-1.5, 2.5]), (True, [-0.5, 1.5])])
@pytest.mark.parametrize("data", [[-1.0, 2.0], [-1, 2], torch.tensor([-1.0, 2.0])])
@pytest.mark.parametrize("target", [0, 0.0, [0.0, 0.0], torch.zeros(2)])
@pytest.mark.parametrize("use_best", [False, True])
def test_the_example(targeted, expected, data, target, use_best):
    found, losses = gradient_ascent(
        data=data, target=target, targeted=targeted, use_best=use_best, **LINE
    )
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(losses, found.abs())
    assert not found.requires_grad and not losses.requires_grad


def test_a_scalar():
    found, losses = gradient_ascent(data=2.0, target=0.0, use_best=True, **LINE)
    torch.testing.assert_close(found, torch.tensor(2.5))
    assert losses.shape == ()


def test_it_is_the_loop_that_one_would_write(problem):
    net, x, y = problem["model"], problem["data"], problem["target"]
    delta = torch.zeros_like(x, requires_grad=True)
    optimizer = Adam([delta], lr=0.05)
    for _ in range(7):
        optimizer.zero_grad()
        (-nn.functional.cross_entropy(net(x + delta), y, reduction="sum")).backward()
        optimizer.step()
    found, losses = gradient_ascent(**problem, optimizer=Adam, lr=0.05, steps=7)
    assert torch.equal(found, (x + delta).detach())
    assert torch.equal(losses, nn.functional.cross_entropy(net(found), y, reduction="none"))


def test_a_non_leaf_is_data_like_any_other(problem):
    x = 2 * problem["data"].clone().requires_grad_()
    found, _ = gradient_ascent(**{**problem, "data": x}, optimizer=SGD, lr=0.1, steps=2)
    again, _ = gradient_ascent(**{**problem, "data": x.detach()}, optimizer=SGD, lr=0.1, steps=2)
    assert torch.equal(found, again) and not found.requires_grad


def test_reduction_scales_the_gradient():
    found, _ = gradient_ascent(data=[1.0, 2.0], target=0.0, reduction_fn=torch.mean, **LINE)
    torch.testing.assert_close(found, torch.tensor([1.25, 2.25]))


def test_no_steps_give_the_data_back(problem):
    found, losses = gradient_ascent(**problem, optimizer=SGD, lr=1.0, steps=0, use_best=True)
    assert torch.equal(found, problem["data"]) and losses.shape == (12,)


def test_the_spelled_out_form_stays_in_ball_and_box(problem):
    x = torch.rand(12, 6)
    inside = BoundedBall(LinfBall(0.2), -x, 1 - x)
    found, _ = gradient_ascent(
        **{**problem, "data": x},
        optimizer=partial(ProjectedOptimizer, constraint=inside),
        lr=5.0,
        steps=4,
    )
    assert (found - x).abs().max() <= 0.2 + 1e-7
    assert found.min() >= 0 and found.max() <= 1 and not torch.equal(found, x)


# --- the best iterate --------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True])
def test_use_best_keeps_the_best_of_each_example(targeted):
    seen = []

    def wavy(output, target):
        loss = (3 * output).sin()
        seen.append(loss.detach().clone())
        return loss

    model = AdditivePerturbation((50,))
    data = torch.linspace(-3, 3, 50)
    found, losses = gradient_ascent(
        model=identity, data=data, target=0.0, criterion=wavy, targeted=targeted, use_best=True,
        perturbation_model=model, optimizer=SGD(model.parameters(), lr=0.9), steps=9,
    )  # fmt: skip
    assert len(seen) == 10
    best = torch.stack(seen).amin(0) if targeted else torch.stack(seen).amax(0)
    assert torch.equal(losses, best)
    assert torch.equal((3 * found).sin(), best)
    assert (losses != seen[-1]).any()  # so that the last would not do
    assert torch.equal(data + model.delta, found)  # written back
    assert model.delta.grad is None


def test_a_shared_perturbation_returns_the_best_data_all_the_same():
    model = AdditivePerturbation((3, 2), delta_ndim=-1)
    data = torch.tensor([[0.0, 0.1], [2.0, 0.2], [4.0, 0.3]])
    seen = []

    def wavy(output, target):
        seen.append((3 * output).sin().sum(1).detach())
        return (3 * output).sin().sum(1)

    found, losses = gradient_ascent(
        model=identity, data=data, target=0.0, criterion=wavy, use_best=True,
        perturbation_model=model, optimizer=SGD(model.parameters(), lr=0.5), steps=6,
    )  # fmt: skip
    assert torch.equal(losses, torch.stack(seen).amax(0))
    assert torch.equal((3 * found).sin().sum(1), losses)


def test_a_shape_that_only_looks_like_rows_of_data():
    # delta of shape (3,), and 3 data: it is one perturbation for all, not one row for each
    model = AdditivePerturbation((3,))
    data = torch.arange(9.0).view(3, 3)
    found, losses = gradient_ascent(
        model=identity, data=data, target=0.0, criterion=lambda o, t: (3 * o).sin().sum(1),
        use_best=True, perturbation_model=model,
        optimizer=SGD(model.parameters(), lr=0.5), steps=5,
    )  # fmt: skip
    assert torch.equal((3 * found).sin().sum(1), losses)


def test_nan_is_not_hidden_and_not_kept():
    def broken(output, target):
        return torch.where(output > 2, torch.nan, output)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroGradientWarning)
        found, losses = gradient_ascent(
            data=[1.0, 5.0], target=0.0, use_best=True, **{**LINE, "criterion": broken, "lr": 0.6}
        )
    torch.testing.assert_close(losses[0], torch.tensor(1.6))  # the last before it broke
    assert losses[1].isnan()


# --- what is left behind -----------------------------------------------------------------------


def state_of(net):
    return [
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [p.grad for p in net.parameters()],
    ]


def mixed_net():
    net = small_net().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    return net


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails):
    net = mixed_net()
    before, running = state_of(net), net[1].running_mean.clone()
    seen = []

    class Broken(SGD):
        def step(self, closure=None):
            seen.append(state_of(net))
            if fails:
                raise RuntimeError("broken")
            return super().step(closure)

    run = partial(
        gradient_ascent, model=net, data=torch.randn(5, 6), target=torch.zeros(5).long(),
        optimizer=Broken, lr=0.1, steps=2,
    )  # fmt: skip
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    else:
        run()
    assert state_of(net) == before
    assert torch.equal(net[1].running_mean, running)
    assert not any(seen[0][0]) and not any(seen[0][1])  # meanwhile: eval, frozen


def test_no_gradient_is_left_on_a_model_that_hides_in_a_function():
    net = small_net().eval()
    gradient_ascent(
        model=lambda x: net(x), data=torch.randn(5, 6), target=torch.zeros(5).long(),
        optimizer=SGD, lr=0.1, steps=2,
    )  # fmt: skip
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use_best", [False, True])
def test_it_works_where_gradients_are_off(context, use_best, problem):
    run = partial(gradient_ascent, optimizer=SGD, lr=0.5, steps=3, use_best=use_best)
    expected = run(**problem)
    with context():
        data, target = problem["data"] * 1, problem["target"] * 1  # inference tensors, maybe
        found = run(model=problem["model"], data=data, target=target)
        assert not torch.is_grad_enabled()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and not a.is_inference()


def test_autocast_around_it(problem):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, losses = gradient_ascent(
            **problem, optimizer=SignedGradientOptim, lr=0.1, steps=3, use_best=True
        )
    assert found.dtype == torch.float32 and losses.dtype == torch.float32
    with torch.no_grad():
        clean = nn.functional.cross_entropy(
            problem["model"](problem["data"]), problem["target"], reduction="none"
        )
    assert (losses > clean).all()


# --- stop ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("use_best", [False, True])
def test_what_is_fooled_is_seen_no_more_and_stays(problem, use_best):
    net = Counting(problem["model"])
    model = AdditivePerturbation(problem["data"])
    optimizer = SignedGradientOptim(model.parameters(), lr=0.02)
    found, losses = gradient_ascent(
        **{**problem, "model": net}, optimizer=optimizer, steps=200, use_best=use_best,
        perturbation_model=model, stop_once=is_fooled,
    )  # fmt: skip
    assert is_fooled(problem["model"](found), problem["target"]).all()
    assert net.rows[0] == 12 and net.rows == sorted(net.rows, reverse=True)
    assert 0 < net.rows[-1] < 12 and len(net.rows) < 201
    assert torch.equal(problem["data"] + model.delta, found)
    # each was kept by the step that fooled it: one step less does not fool it
    steps = ((found - problem["data"]).abs().amax(1) / 0.02).round().long()
    for n in steps.unique().tolist():
        before, _ = gradient_ascent(
            **problem, optimizer=SignedGradientOptim, lr=0.02, steps=max(n - 1, 0)
        )
        rows = steps == n
        assert not is_fooled(problem["model"](before), problem["target"])[rows].any()
    torch.testing.assert_close(
        losses,
        nn.functional.cross_entropy(problem["model"](found), problem["target"], reduction="none"),
    )


def test_a_stop_changes_nothing_for_those_that_go_on(problem):
    run = partial(gradient_ascent, **problem, optimizer=Adam, lr=0.01, steps=12, use_best=True)
    with_stop, losses = run(stop_once=lambda z, y: is_fooled(z, y) & False)
    assert torch.equal(with_stop, run()[0]) and torch.equal(losses, run()[1])
    never = problem["target"] < 2  # the others stop at once

    def stop(z, y):
        return y >= 2

    found = run(stop_once=stop)[0]
    torch.testing.assert_close(found[never], run()[0][never])
    assert torch.equal(found[~never], problem["data"][~never])


# --- chance ------------------------------------------------------------------------------------


def test_samples_are_averaged():
    torch.manual_seed(0)

    def noisy(x):
        return x + 3 * torch.randn_like(x)

    run = partial(
        gradient_ascent, model=noisy, data=torch.ones(400), target=0.0, optimizer=SGD,
        criterion=lambda out, t: out.square(), steps=1, lr=0.1, targeted=True,
    )  # fmt: skip
    one, many = run()[0], run(samples=100)[0]
    # gradient 2 (x + noise): the deviation falls as 1 / sqrt(samples)
    assert one.std() == pytest.approx(0.6, rel=0.2)
    assert many.std() == pytest.approx(0.06, rel=0.2)
    assert run(samples=100)[1].mean() == pytest.approx(0.8**2 + 9, rel=0.05)


@pytest.mark.parametrize("reduction_fn", [torch.mean, lambda loss: loss.logsumexp(0)])
def test_samples_of_a_model_without_chance_change_nothing(problem, reduction_fn):
    run = partial(
        gradient_ascent, **problem, optimizer=SGD, lr=0.5, steps=4, reduction_fn=reduction_fn
    )
    torch.testing.assert_close(run(samples=3), run())


# --- optimizers that want to know losses --------------------------------------------------------


class Observer(SGD):
    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.told = []
        Observer.last = self

    def observe_(self, losses):
        self.told.append(losses)


@pytest.mark.parametrize("targeted", [False, True])
def test_an_observer_is_told_what_it_descends(problem, targeted):
    found, losses = gradient_ascent(
        **problem, optimizer=Observer, lr=0.1, steps=4, targeted=targeted
    )
    told = Observer.last.told
    assert len(told) == 4 and all(t.shape == (12,) and not t.requires_grad for t in told)
    clean = nn.functional.cross_entropy(
        problem["model"](problem["data"]), problem["target"], reduction="none"
    )
    torch.testing.assert_close(told[0], clean.detach() if targeted else -clean.detach())


def test_an_observer_is_told_of_all_also_of_what_has_stopped(problem):
    gradient_ascent(
        **problem, optimizer=Observer, lr=0.1, steps=4, stop_once=lambda z, y: y == y.max()
    )
    told = Observer.last.told
    assert all(t.shape == (12,) for t in told)
    stopped = problem["target"] == problem["target"].max()
    assert torch.equal(told[-1][stopped], told[0][stopped])
    assert (told[-1][~stopped] < told[0][~stopped]).all()


# --- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_best", [False, True])
def test_no_step_reads_a_value(problem, use_best):
    # (torch's own optimizer reads none; transforms of gradients may, where that costs nothing)
    run = partial(gradient_ascent, **problem, optimizer=SGD, lr=0.1, use_best=use_best)

    def reads(steps, **kwargs):
        with HostReads() as mode:
            run(steps=steps, **kwargs)
        return mode.count

    assert reads(2) == reads(30)
    # looking who has stopped reads a few times; never stops:
    stop = {"stop_once": lambda z, y: torch.zeros_like(y, dtype=torch.bool)}
    assert reads(60, **stop) - reads(60) <= 3 * 10


def test_the_model_is_called_once_for_each_step_and_once_more(problem):
    net = Counting(problem["model"])
    gradient_ascent(**{**problem, "model": net}, optimizer=SGD, lr=0.1, steps=5)
    assert len(net.rows) == 6
    gradient_ascent(**{**problem, "model": net}, optimizer=SGD, lr=0.1, steps=5, samples=3)
    assert len(net.rows) == 6 + 18


@pytest.mark.parametrize("samples", [1, 3])
def test_no_graph_stays_while_the_next_one_is_made(samples):
    alive, peak = 0, []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive
            alive += 1
            ctx.mark = Mark()
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            peak.append(alive)
            return grad

    class Mark:
        def __del__(self):
            nonlocal alive
            alive -= 1

    gradient_ascent(
        model=Noting.apply, data=torch.rand(9), target=0.0, criterion=distance, use_best=True,
        optimizer=SGD, lr=0.1, steps=8, samples=samples,
    )  # fmt: skip
    assert peak == [1] * 8 * samples


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_tensors_are_refused(dtype):
    with pytest.raises(TypeError, match=f"`data` must be of a floating-point dtype.*got {dtype}"):
        gradient_ascent(data=torch.ones(2, dtype=dtype), target=0.0, **LINE)


@pytest.mark.parametrize(
    ("steps", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_steps_are_counted(steps, error):
    with pytest.raises(error, match="`steps` must be"):
        gradient_ascent(data=[1.0], target=0.0, **{**LINE, "steps": steps})


def test_samples_are_counted():
    with pytest.raises(ValueError, match="`samples` must be >= 1, got 0"):
        gradient_ascent(data=[1.0], target=0.0, samples=0, **LINE)


@pytest.mark.parametrize("option", [{"use_best": True}, {"stop_once": is_fooled}])
def test_a_loss_of_all_data_together_is_refused_where_one_of_each_is_needed(problem, option):
    with pytest.raises(ValueError, match=r"`criterion` must give .* shape \(12,\).*got shape \(\)"):
        gradient_ascent(
            **problem, criterion=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, steps=2, **option
        )
    found, loss = gradient_ascent(
        **problem, criterion=nn.CrossEntropyLoss(), optimizer=SGD, lr=0.1, steps=2
    )
    assert loss.shape == ()


def test_a_reduction_to_more_than_a_number():
    with pytest.raises(ValueError, match=r"`reduction_fn` must give one number, got shape \(2,\)"):
        gradient_ascent(data=[1.0, 2.0], target=0.0, reduction_fn=identity, **LINE)


def test_a_model_that_detaches():
    with pytest.raises(ValueError, match="must be differentiable, got a loss that does not depend"):
        gradient_ascent(data=[1.0], target=0.0, **{**LINE, "model": torch.Tensor.detach})


def test_a_zero_gradient_is_told():
    with pytest.warns(ZeroGradientWarning, match="gradient of 1 of 2 examples is 0 at the start"):
        gradient_ascent(data=[-1.0, 2.0], target=0.0, **{**LINE, "model": torch.relu})


def test_optimizer_instances():
    model = AdditivePerturbation((2,))
    optimizer = SGD(model.parameters(), lr=0.1)
    run = partial(
        gradient_ascent, model=identity, criterion=distance, data=[1.0, 2.0], target=0.0, steps=1
    )
    with pytest.raises(TypeError, match="`perturbation_model` must be an instance"):
        run(optimizer=optimizer)
    with pytest.raises(TypeError, match="`optim_kwargs` must not be given .* got lr"):
        run(optimizer=optimizer, perturbation_model=model, lr=0.1)
    found, _ = run(optimizer=optimizer, perturbation_model=model)
    torch.testing.assert_close(found, torch.tensor([1.1, 2.1]))


def test_what_makes_no_perturbation_model():
    run = partial(gradient_ascent, data=[1.0], target=0.0, **LINE)
    with pytest.raises(TypeError, match="`perturbation_model` must be or make a Pert.*, got 3"):
        run(perturbation_model=3)
    with pytest.raises(TypeError, match="`perturbation_model` must be or make a Pert.*, got 3"):
        run(perturbation_model=lambda data: 3)
    frozen = AdditivePerturbation((1,)).requires_grad_(False)
    with pytest.raises(ValueError, match="must have parameters that require gradients"):
        run(perturbation_model=frozen)
    with pytest.raises(TypeError, match="`optimizer` must be an Optimizer, or make one, got 3"):
        gradient_ascent(data=[1.0], target=0.0, **{**LINE, "optimizer": 3})


def test_an_optimizer_with_a_set():
    found, _ = gradient_ascent(
        data=[1.0, -2.0], target=0.0, model=identity, criterion=distance, steps=9,
        optimizer=LinfProjectedOptim, epsilon=0.25, lr=1.0,
    )  # fmt: skip
    assert found.tolist() == [1.25, -2.25]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (LBFGS, "`optimizer` must step by gradients alone, without a `closure`, got LBFGS"),
        (list, "`optimizer` must be or make what has a `step`, got "),
    ],
)
def test_what_cannot_step_so(optimizer, message, problem):
    with pytest.raises(TypeError, match=message):
        gradient_ascent(**problem, optimizer=optimizer, steps=1)


def test_hooks_of_all_optimizers_are_run_once_for_each_step(problem):
    run = partial(gradient_ascent, **problem, optimizer=SGD, lr=0.1, steps=3)
    seen = []
    unheard = run()
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        heard = run()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == ["before", "after"] * 3
    assert torch.equal(heard[0], unheard[0])


class Shortening(SGD):
    """Changes gradients in place, as gradient clipping does."""

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.grad.mul_(0.5)
        return super().step(closure)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 1)])
def test_gradients_may_be_changed_in_place(shape):
    # The gradient of a loss that is a view of the data is one of what losses are multiplied by.
    found, _ = gradient_ascent(
        model=lambda x: x, criterion=lambda out, target: out.flatten(), data=torch.zeros(shape),
        target=torch.zeros(shape[0]), optimizer=Shortening, lr=1.0, steps=4,
    )  # fmt: skip
    assert torch.equal(found, torch.full(shape, 2.0))


class Decaying(SGD):
    """Differentiates a penalty in its step, which is not decorated as those of torch are."""

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            penalty = torch.autograd.grad((param**2).sum(), param)[0]
            with torch.no_grad():
                param.sub_(param.grad + penalty, alpha=0.25)


def test_a_step_may_differentiate():
    found, _ = gradient_ascent(
        model=lambda x: x, criterion=lambda out, target: out.clone(), data=torch.zeros(2),
        target=0.0, optimizer=Decaying, lr=1.0, steps=2, use_best=False,
    )  # fmt: skip
    assert found.tolist() == [0.375, 0.375]


def test_gradients_are_the_same_where_torch_has_no_such_engine(monkeypatch):
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    search = {"model": net, "data": x, "target": y, "optimizer": SGD, "lr": 0.1, "steps": 3}
    found = gradient_ascent(**search)
    monkeypatch.setattr(_torch, "_run_backward", None)
    for one, other in zip(found, gradient_ascent(**search), strict=True):
        assert torch.equal(one, other)
