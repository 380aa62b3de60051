"""`compiled`: one graph for a whole step, made once, or a warning and the eager step.

The backend runs the graphs as they are, so that no C++ compiler is needed.
"""

import warnings

import pytest
import torch
import torch._dynamo
from every_class import CASES
from tiers import slow_but
from torch.optim import LBFGS, SGD, Adafactor, Adam, lr_scheduler
from torch_versions import compiles

from rai_toolbox.constraints import L1Ball, L2Ball
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedOptimizer
from rai_toolbox.optim.compile import compiled

pytestmark = compiles


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(2)]


def run(optimizer, step, steps=5, change=lambda group, k: None):
    """Some steps; the numbers of graphs after each of them."""
    generator = torch.Generator().manual_seed(1)
    graphs = []
    for k in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
            change(group, k)
        step()
        graphs.append(getattr(step, "graphs", 0))
    return graphs


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_but(
        [(name, SGD) for name in CASES]
        + [(name, Adam) for name in ("ClampedParameter", "L2Projected", "Projected")]
        + [("ProjectedBox", Adam)],
        ("Chained", SGD),
        ("L1FrankWolfe", SGD),
        ("ProjectedBox", Adam),
    ),
)
def test_every_class_is_compiled_once_and_does_the_same(name, inner):
    case = CASES[name]

    def make():
        return case.make(parameters(), **({} if case.frank_wolfe else {"InnerOpt": inner}))

    optimizer, eager = make(), make()
    step = compiled(optimizer, backend="aot_eager")
    # (torch 2.13 cannot compile norms, a division by them and the update as one)
    most = 2 if getattr(optimizer, "_must_break_graph", bool)() else 1
    assert run(optimizer, step, steps=4) == [0] + [most] * 3
    run(eager, eager.step, steps=4)
    for ours, theirs in zip(
        optimizer.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # Adam's own difference


def lower_lr(group, k):
    group["lr"] = 0.1 / (k + 1)


def lower_bound(group, k):
    group["clamp_max"] = 1.0 / (k + 1)


def shrink(group, k):
    group["constraint"] = L2Ball(1.0 / (k + 1))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda p: ClampedParameterOptimizer(p, lr=0.1, clamp_max=1.0), lower_lr),
        (lambda p: ClampedParameterOptimizer(p, Adam, lr=0.1, clamp_max=1.0), lower_lr),
        (lambda p: ClampedParameterOptimizer(p, lr=0.1, clamp_max=1.0), lower_bound),
        (lambda p: ProjectedOptimizer(p, lr=0.1, constraint=L2Ball(1.0)), shrink),
    ],
    ids=["lr", "lr of Adam", "clamp_max", "epsilon of the constraint"],
)
def test_a_changed_number_is_used_and_compiles_nothing_again(make, change):
    optimizer, eager = make(parameters()), make(parameters())
    step = compiled(optimizer, backend="aot_eager")
    assert run(optimizer, step, change=change) == [0, 1, 1, 1, 1]
    run(eager, eager.step, change=change)
    for ours, theirs in zip(
        optimizer.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_l1_balls_take_few_operators_for_each_tensor():
    """The graph must not grow by a whole search for each tensor, for minutes of compiling."""

    def operators(count):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(count)]
        seen = []

        def backend(module, inputs):
            seen.append(sum(node.op.startswith("call") for node in module.graph.nodes))
            return module.forward

        optimizer = ProjectedOptimizer(params, lr=0.1, constraint=L1Ball(1.0))
        run(optimizer, compiled(optimizer, backend=backend), steps=2)
        (number,) = seen
        return number

    assert operators(8) - operators(4) <= 4 * 15


def test_a_new_graph_would_be_counted():
    optimizer = ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=1.0)

    def toggle(group, k):
        group["clamp_min"] = None if k < 3 else -1.0

    step = compiled(optimizer, backend="eager")
    assert run(optimizer, step, change=toggle) == [0, 1, 1, 2, 2]


def test_a_step_that_cannot_be_captured_stays_eager_with_one_warning():
    optimizer, eager = (
        ClampedParameterOptimizer(parameters(), Adafactor, lr=0.1, clamp_max=0.5) for _ in range(2)
    )
    step = compiled(optimizer, backend="eager")
    with pytest.warns(UserWarning, match="cannot be compiled as a whole and stays eager") as found:
        run(optimizer, step)
    assert len(found) == 1
    run(eager, eager.step)
    for ours, theirs in zip(
        optimizer.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_backend_that_fails_leaves_a_right_step_and_one_warning():
    def broken(module, inputs):
        raise RuntimeError("no compiler here")

    optimizer, eager = (ClampedParameterOptimizer(parameters(), clamp_max=0.5) for _ in range(2))
    step = compiled(optimizer, backend=broken)
    with pytest.warns(UserWarning, match="no compiler here") as found:
        run(optimizer, step)
    assert len(found) == 1
    run(eager, eager.step)
    assert torch.equal(optimizer.param_groups[0]["params"][0], eager.param_groups[0]["params"][0])


def test_a_failure_of_the_compiler_itself_leaves_a_right_step_and_one_warning():
    ours, theirs = parameters(), parameters()
    optimizer = ProjectedOptimizer(ours, Adam, constraint=L2Ball(1.0), lr=0.1)
    eager = ProjectedOptimizer(theirs, Adam, constraint=L2Ball(1.0), lr=0.1)
    step = compiled(optimizer, backend="eager")

    def stepped(params, step, k):
        # slices of one buffer, which torch 2.13 fails to trace
        buffer = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(k))
        for param, grad in zip(params, buffer, strict=True):
            param.grad = grad
        step()

    stepped(ours, step, 0)
    with pytest.warns(UserWarning, match="stays eager: .*Error") as found:
        stepped(ours, step, 1)
        stepped(ours, step, 2)
    assert len(found) == 1
    for k in range(3):
        stepped(theirs, eager.step, k)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


class Failing(SGD):
    """An inner optimizer that fails from its second step on, before or after it has moved."""

    def __init__(self, params, lr, late):
        super().__init__(params, lr)
        self.steps, self.late = 0, late

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        if self.late:
            for param in self.param_groups[0]["params"]:
                param.add_(1.0)
        if self.steps >= 2:
            raise RuntimeError("no more")


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_fails_by_itself_fails_as_it_does_eagerly(late):
    params = parameters()
    starts = [param.detach().clone() for param in params]
    optimizer = ClampedParameterOptimizer(params, Failing, lr=0.1, late=late, clamp_max=1e6)
    step = compiled(optimizer, backend="eager")
    step()
    with pytest.raises(RuntimeError, match="no more"):
        step()
    for param, start in zip(params, starts, strict=True):
        torch.testing.assert_close(param.detach(), start + 2.0 * late)


class Stop(Exception):
    pass


def test_an_exception_of_a_hook_is_raised_and_the_step_is_not_repeated():
    class WithoutVersions(SGD):
        """It writes to parameters behind autograd's back, as older optimizers do."""

        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.data.add_(1.0)

    params = parameters()
    starts = [param.detach().clone() for param in params]
    optimizer = ClampedParameterOptimizer(params, WithoutVersions, lr=0.1, clamp_max=1e6)
    calls = []

    def stop_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Stop

    optimizer.register_step_post_hook(stop_once)
    step = compiled(optimizer, backend="eager")
    step()
    with pytest.raises(Stop):
        step()
    for param, start in zip(params, starts, strict=True):
        torch.testing.assert_close(param.detach(), start + 2.0)


@pytest.mark.parametrize("kept", [0, [torch.zeros(2)], torch.zeros(2), {"n": [torch.zeros(2)]}])
def test_a_state_of_any_form_will_do(kept):
    class WithState(SGD):
        def step(self, closure=None):
            super().step()
            self.state["kept"] = kept

    ours, theirs = parameters(), parameters()
    optimizer = ClampedParameterOptimizer(ours, WithState, lr=0.1, clamp_max=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*stays eager")  # which dynamo makes of some
        run(optimizer, compiled(optimizer, backend="eager"))
    eager = ClampedParameterOptimizer(theirs, SGD, lr=0.1, clamp_max=0.5)
    run(eager, eager.step)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
def test_tensors_of_inference_mode_will_do():
    params = [torch.ones(3, 4), torch.ones(2)]
    optimizer = ClampedParameterOptimizer(params, SGD, lr=0.1, clamp_max=0.5)
    run(optimizer, compiled(optimizer, backend="eager"), steps=3)
    assert all(bool((param <= 0.5).all()) for param in params)


def test_closures_are_eager():
    x = torch.ones(2, requires_grad=True)
    optimizer = ClampedParameterOptimizer([x], LBFGS, clamp_max=3.0)
    step = compiled(optimizer, backend="eager")

    def closure():
        optimizer.zero_grad()
        loss = (x - 5).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        assert step(closure) >= 0
    assert step.graphs == 0
    assert x.tolist() == [3.0, 3.0]


def test_a_scheduler_that_comes_later_sees_the_steps():
    optimizer = ClampedParameterOptimizer(parameters(), lr=1.0, clamp_max=1.0)
    step = compiled(optimizer, backend="eager")
    run(optimizer, step, steps=2)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, step, steps=2)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="`optimizer` must be a torch.optim.Optimizer, got 3"):
        compiled(3)
