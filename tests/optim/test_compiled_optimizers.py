"""`compiled`: one graph for a whole step, made once, or a warning and the eager step.

The backend runs the graphs as they are, so that no C++ compiler is needed.
"""

import warnings
from functools import partial

import pytest
import torch
import torch._dynamo
from every_class import CASES
from tiers import slow_but
from torch.optim import LBFGS, SGD, Adafactor, Adam, AdamW, Optimizer, lr_scheduler
from torch_versions import compiles

from rai_toolbox.constraints import (
    BoundedBall,
    BoxSection,
    Intersection,
    L2Ball,
    LinfBall,
    Masked,
    NonNegative,
    TopK,
)
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedParameterOptimizer,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    ProjectedOptimizer,
    SettingScheduler,
    TopQGradientOptimizer,
)
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
    assert sum(w.category is UserWarning for w in found) == 1
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
    assert sum(w.category is UserWarning for w in found) == 1
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
    assert sum(w.category is UserWarning for w in found) == 1
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


# --- each graph is checked once -------------------------------------------------------------------


def without_writes(skipped):
    """A backend that leaves out some of the graph's operators in place."""

    def backend(module, inputs):
        for node in list(module.graph.nodes):
            if node.op == "call_method" and node.target == skipped:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        module.recompile()
        return module.forward

    return backend


def same_as_eager(make, step_of, steps=4, change=lambda optimizer, k: None):
    """Check that compiled steps end where eager ones do; return the compiled step."""
    optimizers = make(), make()
    steps_of = step_of(optimizers[0]), optimizers[1].step
    for optimizer, step in zip(optimizers, steps_of, strict=True):
        run(optimizer, step, steps=1)
        for k in range(1, steps):
            change(optimizer, k)
            run(optimizer, step, steps=1)
    groups = zip(*(optimizer.param_groups for optimizer in optimizers), strict=True)
    for ours, theirs in groups:
        for a, b in zip(ours["params"], theirs["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        names = ours.keys() - {"params"}
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    return steps_of[0]


@pytest.mark.parametrize(
    "backend", [without_writes("clamp_"), lambda module, inputs: lambda *inputs: ()]
)
def test_a_backend_that_leaves_something_out_is_found_out(backend):
    def make():
        return ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.1)

    match = "stays eager: compiled and eager steps differ in parameter 0"
    with pytest.warns(UserWarning, match=match) as found:
        same_as_eager(make, lambda o: compiled(o, backend=backend))
    assert sum(w.category is UserWarning for w in found) == 1


class HeavyBall(Optimizer):
    """``x <- x + (x - last) / 2 - lr g``: the last point and the new one change places."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if "last" not in self.state[param]:
                    self.state[param]["last"] = param.clone()
                last = self.state[param]["last"]
                new = param + 0.5 * (param - last) - group["lr"] * param.grad
                last.copy_(param)
                param.copy_(new)


def test_inductor_loses_a_copy_and_the_step_stays_eager():
    # (torch 2.13 drops `last.copy_(param)`; should a later one not, there is no warning)
    def make():
        return HeavyBall(parameters(), lr=0.1)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*stays eager: compiled and eager steps differ")
        same_as_eager(make, compiled)


def test_a_graph_made_later_is_checked_too():
    def make():
        return ClampedParameterOptimizer(parameters(), lr=0.1, clamp_min=-0.1)

    def two_sided(optimizer, k):
        optimizer.param_groups[0]["clamp_max"] = 0.1 if k >= 3 else None

    module_of = []

    def backend(module, inputs):
        module_of.append(module)
        if len(module_of) == 1:
            return module.forward
        return without_writes("clamp_")(module, inputs)

    with pytest.warns(UserWarning, match="compiled and eager steps differ in parameter 0"):
        same_as_eager(make, lambda o: compiled(o, backend=backend), steps=5, change=two_sided)
    assert len(module_of) == 2


def test_random_numbers_are_drawn_once_in_each_step():
    generators = []

    def make():
        generators.append(torch.Generator().manual_seed(3))
        return TopQGradientOptimizer(
            parameters(), q=0.5, dq=0.4, generator=generators[-1], param_ndim=None, lr=0.1
        )

    with pytest.warns(UserWarning, match="stays eager"):
        same_as_eager(make, lambda o: compiled(o, backend="eager"))
    ours, theirs = generators
    assert torch.equal(ours.get_state(), theirs.get_state())


class Noisy(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.add_(torch.randn_like(param), alpha=0.1)


def test_the_global_random_numbers_are_drawn_once_in_each_step():
    results = []
    for backend in ("eager", None):
        optimizer = Noisy(parameters(), lr=0.1)
        torch.manual_seed(0)
        run(optimizer, optimizer.step if backend is None else compiled(optimizer, backend=backend))
        results.append(optimizer.param_groups[0]["params"])
    assert all(map(torch.equal, *results))


# --- what may change between steps ----------------------------------------------------------------


@pytest.mark.parametrize("inner", [SGD, AdamW])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_scheduler_that_was_there_before(inner, wrapped):
    schedulers = []

    def make():
        if wrapped:
            optimizer = ClampedParameterOptimizer(parameters(), inner, lr=0.1, clamp_max=0.5)
        else:
            optimizer = inner(parameters(), lr=0.1)
        schedulers.append((optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5)))
        return optimizer

    def lower(optimizer, k):
        for owner, scheduler in schedulers:
            if owner is optimizer:
                scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step = same_as_eager(make, lambda o: compiled(o, backend="aot_eager"), change=lower)
    assert step.graphs == 1


@pytest.mark.slow
def test_a_group_that_is_added_later():
    def make():
        return L2ProjectedOptim(parameters(), epsilon=0.5, lr=0.1)

    def more(optimizer, k):
        if k == 3:
            optimizer.add_param_group({"params": [torch.ones(5, 2, requires_grad=True)]})

    step = same_as_eager(make, lambda o: compiled(o, backend="aot_eager"), steps=6, change=more)
    assert step.graphs == 4  # (two for each)


def test_gradients_in_other_strides():
    optimizer, eager = (
        ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.5) for _ in range(2)
    )
    step = compiled(optimizer, backend="aot_eager")
    for one, one_step in ((optimizer, step), (eager, eager.step)):
        for k in range(6):
            for param in one.param_groups[0]["params"]:
                grad = torch.ones(3, 4) if k < 3 else torch.ones(4, 3).T
                param.grad = grad[:, :1].expand(3, 4) if k == 5 else grad
            one_step()
    for a, b in zip(*(o.param_groups[0]["params"] for o in (optimizer, eager)), strict=True):
        assert torch.equal(a, b)


def test_groups_that_share_a_set_until_one_gets_another():
    shared = Masked(L2Ball(torch.tensor(1.0)), torch.tensor([True, True, True, False]))

    def make():
        a, b = parameters()
        return ProjectedOptimizer([{"params": [a]}, {"params": [b]}], constraint=shared, lr=0.1)

    def smaller(optimizer, k):
        if k == 2:
            SettingScheduler(
                optimizer, "constraint.constraint.epsilon", [None, lambda step: torch.tensor(0.1)]
            )

    same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=5, change=smaller)


def test_groups_that_share_a_set_after_load_state_dict():
    shared = L2Ball(torch.tensor(1.0))
    saved = ProjectedOptimizer(
        [
            {"params": [p], "constraint": L2Ball(torch.tensor(r))}
            for p, r in zip(parameters(), (1.0, 0.1), strict=True)
        ],
        lr=0.1,
    ).state_dict()

    def make():
        a, b = parameters()
        return ProjectedOptimizer([{"params": [a]}, {"params": [b]}], constraint=shared, lr=0.1)

    def load(optimizer, k):
        if k == 2:
            optimizer.load_state_dict(saved)

    same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=5, change=load)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another set", "another k", "a checkpoint"])
def test_groups_that_share_a_set_with_what_the_graph_holds_as_a_constant(change):
    def make():
        groups = [{"params": [param]} for param in parameters()]
        return ProjectedOptimizer(groups, constraint=TopK(2), lr=0.1)

    saved = make()
    saved.param_groups[1]["constraint"] = NonNegative()
    saved = saved.state_dict()

    def replaced(optimizer, k):
        if k != 4:
            return
        if change == "another set":
            optimizer.param_groups[1]["constraint"] = NonNegative()
        elif change == "another k":
            SettingScheduler(optimizer, "constraint.k", [None, lambda step: 1])
        else:
            optimizer.load_state_dict(saved)

    same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=6, change=replaced)


def test_parameters_that_get_state_later_get_it_by_an_eager_step():
    def make():
        optimizer = ClampedParameterOptimizer(parameters(), Adam, lr=0.1, clamp_max=0.5)
        saved.append(optimizer.state_dict())
        return optimizer

    def fresh(optimizer, k):
        if k == 3:
            optimizer.load_state_dict(saved[0])
        if k == 4:
            optimizer.param_groups[0]["params"].append(torch.ones(2, requires_grad=True))

    saved = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step = same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=6, change=fresh)
    assert step.graphs == 2  # (of two parameters, and of three)


def test_a_step_without_any_gradient_is_eager():
    optimizer = ClampedParameterOptimizer(parameters(), Adam, lr=0.1, clamp_max=0.5)
    step = compiled(optimizer, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step()
        run(optimizer, step, steps=2)
        optimizer.zero_grad()
        step()
        assert run(optimizer, step, steps=2) == [1, 1]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_parameter_that_is_a_view(wrapped):
    bases = [torch.linspace(-1, 1, 24).view(6, 4) for _ in range(2)]
    optimizers = []
    for base in bases:
        params = [base[::2, 1:].requires_grad_()]
        optimizers.append(
            ClampedParameterOptimizer(params, AdamW, lr=0.1, clamp_max=0.5)
            if wrapped
            else AdamW(params, lr=0.1)
        )
    step = compiled(optimizers[0], backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(optimizers[0], step, steps=3)
    run(optimizers[1], optimizers[1].step, steps=3)
    assert step.graphs == 1
    torch.testing.assert_close(*bases, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [Adam, AdamW])
def test_a_learning_rate_of_0_with_rows_that_have_no_gradient_yet(inner):
    def make():
        return ClampedParameterOptimizer(parameters(), inner, lr=0.1, clamp_max=0.5)

    def rest(optimizer, k):
        optimizer.param_groups[0]["lr"] = 0.0 if k in (1, 3) else 0.1
        for param in optimizer.param_groups[0]["params"]:
            optimizer.state[param]["exp_avg"][0] = 0
            optimizer.state[param]["exp_avg_sq"][0] = 0

    same_as_eager(make, lambda o: compiled(o, backend="aot_eager"), change=rest)


def test_differentiable_steps_are_eager():
    optimizer = SGD([torch.ones(2, requires_grad=True).clone()], lr=0.1, differentiable=True)
    step = compiled(optimizer, backend="eager")
    (param,) = optimizer.param_groups[0]["params"]
    param.retain_grad()
    for _ in range(3):
        param.grad = torch.ones(2)
        step()
    assert step.graphs == 0
    assert param.tolist() == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("inner", slow_but([SGD, Adam]))
def test_every_and_warmup_leave_no_trace_in_the_group(inner):
    def make():
        return ProjectedOptimizer(
            parameters(), inner, constraint=LinfBall(0.5), every=2, warmup=1, lr=0.1
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step = same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=4)
    assert step.graphs > 0
    groups = step.optimizer.param_groups + step.optimizer.state_dict()["param_groups"]
    assert not any(group.get("capturable") for group in groups)


def test_hooks_run_once_and_what_they_write_counts():
    calls = []

    def make():
        optimizer = ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.5)

        def before(optimizer, args, kwargs):
            calls.append(optimizer)
            optimizer.param_groups[0]["lr"] = 0.1 / len([o for o in calls if o is optimizer])

        def after(optimizer, args, kwargs):
            optimizer.param_groups[0]["clamp_max"] *= 0.9

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    step = same_as_eager(make, lambda o: compiled(o, backend="aot_eager"), steps=5)
    assert step.graphs == 1
    assert len(calls) == 10


def set_transform(optimizer):
    optimizer._pre_step_transform_ = lambda param, optim_group: param.grad.neg_()


def set_projection(optimizer):
    optimizer._post_step_transform_ = lambda param, optim_group: param.clamp_(max=0.1)


def set_inner_step(optimizer):
    step = optimizer.inner_opt.step
    optimizer.inner_opt.step = lambda: [step(), optimizer.param_groups[0].update(clamp_max=0.2)]


def add_inner_hook(optimizer):
    def lower(inner, args, kwargs):
        inner.param_groups[0]["lr"] *= 0.5

    optimizer.inner_opt.register_step_post_hook(lower)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    "change",
    [set_transform, set_projection, set_inner_step, add_inner_hook],
    ids=lambda f: f.__name__,
)
def test_methods_and_inner_hooks_that_an_instance_gets(change, at):
    def make():
        optimizer = ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.5)
        if at == 0:
            change(optimizer)
        return optimizer

    def later(optimizer, k):
        if k == at:
            change(optimizer)

    step = same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=5, change=later)
    assert step.graphs == (at > 0)


@pytest.mark.slow
def test_inner_hooks_between_two_graphs():
    def make():
        return L2NormedGradientOptim(parameters(), lr=0.1)

    def later(optimizer, k):
        if k == 3:
            add_inner_hook(optimizer)

    same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=5, change=later)


def test_a_step_that_is_replaced_later_on_the_instance_is_called():
    optimizer = ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.5)
    step = compiled(optimizer, backend="eager")
    run(optimizer, step, steps=3)
    calls = []
    optimizer.step = lambda: calls.append(1)
    run(optimizer, step, steps=2)
    assert calls == [1, 1]


@pytest.mark.slow
def test_a_step_that_compiles_anew_again_and_again_stays_eager():
    def make():
        return ClampedParameterOptimizer(parameters(), lr=0.1, clamp_max=0.5)

    def one_more(optimizer, k):
        if k % 2 == 0:  # (the step after that is eager, because it makes state)
            optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})

    with pytest.warns(UserWarning, match="it had to be compiled 8 times") as found:
        same_as_eager(make, lambda o: compiled(o, backend="eager"), steps=18, change=one_more)
    assert sum(w.category is UserWarning for w in found) == 1


SLOW_TO_TRACE = [
    BoxSection(torch.ones(4), 1.0, lower=-1.0, upper=0.8),
    BoundedBall(L2Ball(1.0), -0.5, 0.5),
    Intersection(L2Ball(1.0), LinfBall(0.5)),
]


@pytest.mark.parametrize(
    "constraint",
    [
        *SLOW_TO_TRACE,
        *(Masked(inside, torch.ones(4, dtype=torch.bool)) for inside in SLOW_TO_TRACE),
    ],
    ids=lambda constraint: type(getattr(constraint, "constraint", constraint)).__name__,
)
def test_sets_that_take_minutes_to_trace_stay_eager(constraint):
    def make():
        return ProjectedOptimizer(parameters(), constraint=constraint, lr=0.1)

    match = f"stays eager: it takes minutes to trace .* {type(constraint).__name__}"
    with pytest.warns(UserWarning, match=match):
        step = same_as_eager(make, lambda o: compiled(o, backend="eager"))
    assert step.graphs == 0


def test_such_sets_in_a_chain_stay_eager():
    def make():
        return ChainedParamTransformingOptimizer(
            partial(ProjectedOptimizer, constraint=SLOW_TO_TRACE[1]),
            partial(ProjectedOptimizer, constraint=L2Ball(0.4)),
            params=parameters(),
            lr=0.1,
        )

    with pytest.warns(UserWarning, match="stays eager: it takes minutes to trace .* BoundedBall"):
        step = same_as_eager(make, lambda o: compiled(o, backend="eager"))
    assert step.graphs == 0
