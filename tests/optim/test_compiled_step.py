"""`torch.compile(opt.step)` captures transform, inner step and projection, and changes no result.

The backend runs the graphs that dynamo captures as they are, so that no C++ compiler is needed and
sums are taken in the order of the eager step.
"""

from collections import Counter
from functools import cache, partial

import pytest
import torch
import torch._dynamo
from engine_cases import FRANK_WOLFE, WITH_INNER, WRAPPERS, new_gradients, tensors, unbounded
from tiers import slow_but
from torch.optim import SGD, Adam, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch_versions import compiles

from rai_toolbox import optim, to_batch
from rai_toolbox.constraints import MinMaxNorm
from rai_toolbox.optim import (
    ClampedParameterOptimizer,
    ParamTransformingOptimizer,
    ProjectedOptimizer,
)

pytestmark = compiles

SHAPES = (3, 2), (2, 2)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    forget()
    yield
    forget()


def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Graphs(list):
    """A backend that keeps, for each graph, the names of its operators."""

    def __call__(self, module, inputs):
        calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
        self.append([getattr(n.target, "__name__", n.target) for n in calls])
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


def parameters(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def compiled_run(opt, steps=3, warm_after=1):
    """Step by compiled code; the graphs, and how often each cause has broken them."""
    graphs = Graphs()
    step = torch.compile(opt.step, backend=graphs)
    for k in range(steps):
        new_gradients(parameters(opt), k)  # other tensors each time
        with torch._dynamo.config.patch(error_on_recompile=k >= warm_after):
            step()
    return graphs, Counter(torch._dynamo.utils.counters["graph_break"])


@cache
def bare_run(inner):
    opt = inner(tensors(*SHAPES), lr=0.1)
    graphs, breaks = compiled_run(opt)
    forget()
    return parameters(opt), graphs, breaks


def eager_run(opt, steps=3):
    for k in range(steps):
        new_gradients(parameters(opt), k)
        opt.step()
    return parameters(opt)


# --- one graph ---------------------------------------------------------------------------------

# Of each wrapper, operators of its transform and of its projection that SGD and Adam do not have.
ONE_GRAPH = {
    "Param": [],
    "ClampedParameter": ["clamp_"],
    "ClampedGradient": ["clamp_"],
    "Signed": ["clamp_"],
    "LinfProjected": ["clamp_", "clamp_"],  # the sign is a clamp, too
    "TopQ": ["topk", "masked_fill_"],
    "Chained": ["topk", "masked_fill_", "clamp_", "clamp_"],
}


@pytest.mark.parametrize(
    ("name", "inner"),
    slow_but([(name, SGD) for name in ONE_GRAPH], ("Param", SGD), ("TopQ", SGD))
    + slow_but([(name, Adam) for name in ONE_GRAPH if name not in ("Param", "TopQ")]),
)
def test_transform_inner_step_and_projection_are_one_graph(name, inner):
    _, (of_inner,), breaks_of_inner = bare_run(inner)
    graphs, breaks = compiled_run(WRAPPERS[name](tensors(*SHAPES), InnerOpt=inner, lr=0.1))
    (graph,) = graphs  # and so no recompilation at the second step or the third
    assert breaks == breaks_of_inner
    expected = Counter(of_inner) + Counter(ONE_GRAPH[name] * len(SHAPES))
    assert not expected - Counter(graph)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["lr", "tensor lr"])
def test_the_start_of_a_warm_up_is_one_graph_too(lr):
    # Eagerly, such a step is told from that of a distributed checkpoint by a look at values.
    _, _, breaks_of_inner = bare_run(SGD)
    graphs, breaks = compiled_run(ClampedParameterOptimizer(tensors(*SHAPES), lr=lr, clamp_max=0.5))
    assert breaks == breaks_of_inner
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "bounds", slow_but([(0.0, torch.inf), (-torch.inf, 1.0), (-1e6, 1e6)], single=True), ids=str
)
def test_bounds_that_half_precision_cannot_hold_are_in_the_graph_too(bounds):
    _, _, breaks_of_inner = bare_run(SGD)
    lower, upper = bounds
    opt = ClampedParameterOptimizer(tensors(*SHAPES), lr=0.1, clamp_min=lower, clamp_max=upper)
    graphs, breaks = compiled_run(opt)
    assert breaks == breaks_of_inner
    assert len(graphs) == 1
    eager = ClampedParameterOptimizer(tensors(*SHAPES), lr=0.1, clamp_min=lower, clamp_max=upper)
    assert all(map(torch.equal, parameters(opt), eager_run(eager)))


@pytest.mark.parametrize(
    "name", slow_but(["L1Normed", "L2Normed", "L1qNormed", "L2Projected"], "L2Projected")
)
def test_normed_classes_break_the_graph_once_on_cpu_and_for_one_cause(name, monkeypatch):
    # Inductor of torch 2.13 fails on CPU ("KeyError: 'buf4'") where a row norm, a division by it
    # and SGD's update are one graph.
    _, _, breaks_of_inner = bare_run(SGD)
    graphs, breaks = compiled_run(WRAPPERS[name](tensors(*SHAPES), lr=0.1))
    with_norms, with_update = graphs
    assert "div_" in with_norms and "add_" not in with_norms
    assert "add_" in with_update and "div_" not in with_update
    forget()
    monkeypatch.setattr(ParamTransformingOptimizer, "_must_break_graph", lambda self: False)
    graphs, breaks = compiled_run(WRAPPERS[name](tensors(*SHAPES), lr=0.1))
    assert len(graphs) == 1
    assert breaks == breaks_of_inner


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_no_attribute_has_a_name_that_dynamo_does_not_trace(make):
    # Dynamo of torch 2.13 takes an attribute of an optimizer whose name is part of "_init_group"
    # for that method, and breaks the graph where it is read.
    opt = make(tensors(*SHAPES))
    untraced = {name for name in dir(opt) if name in "_init_group"} - {"_init_group"}
    assert untraced <= {"p"}  # public, and read from the class; that it is, the test above tells
    assert not any(name in "_init_group" for name in vars(opt))


# --- the result --------------------------------------------------------------------------------


def same_run(make):
    opt = make(tensors(*SHAPES))
    compiled_run(opt)  # which raises if anything is compiled again
    return parameters(opt), eager_run(make(tensors(*SHAPES)))


@pytest.mark.parametrize("name", slow_but(WITH_INNER, "ClampedParameter", "Chained", "Projected"))
def test_compiled_is_eager(name):
    for ours, theirs in zip(*same_run(partial(WITH_INNER[name], lr=0.1)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", slow_but(FRANK_WOLFE.values()), ids=FRANK_WOLFE.keys())
def test_compiled_is_eager_but_for_the_rounding_of_the_step_size(make):
    # which is a tensor where it is compiled, as Adam's bias correction is
    for ours, theirs in zip(*same_run(make), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("param_ndim", slow_but([0, 1, None], None))
def test_compiled_is_eager_in_other_views(param_ndim):
    make = partial(WRAPPERS["L2Projected"], lr=0.1, param_ndim=param_ndim, grad_bias=0.1)
    for ours, theirs in zip(*same_run(make), strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_is_eager_where_strides_allow_no_view():
    runs = []
    for run in (compiled_run, eager_run):
        param = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        param = param.to(memory_format=torch.channels_last).requires_grad_()
        constraint = MinMaxNorm(0.5, 0.6)
        opt = ProjectedOptimizer([param], SGD, lr=0.1, constraint=constraint, param_ndim=2)
        run(opt)
        assert (constraint.violation(to_batch(param.detach(), 2)) == 0).all()
        runs.append(param)
    torch.testing.assert_close(*runs)


def test_a_gradient_of_two_parameters_is_transformed_once():
    params = tensors((3,), (3,), (3,))
    opt = ParamTransformingOptimizer(
        [{"params": params[:2]}, {"params": params[2:]}], SGD, lr=1.0, grad_scale=2.0
    )
    step = torch.compile(opt.step, backend=Graphs())
    for shares in (False, True):
        for param in params:
            param.data.zero_()
            param.grad = torch.ones(3)
        if shares:
            params[1].grad = params[2].grad = params[0].grad
        step()
        assert [param.tolist() for param in params] == [[-2.0] * 3] * 3


def test_a_wrapper_that_does_nothing_compiles_to_what_adam_compiles_to():
    theirs, _, _ = bare_run(Adam)
    ours = tensors(*SHAPES)
    compiled_run(unbounded(ours, Adam, lr=0.1))
    assert all(map(torch.equal, ours, theirs))


class Doubled(ParamTransformingOptimizer):
    """A user's subclass."""

    def _pre_step_transform_(self, param, optim_group):
        param.grad.mul_(2)

    def _post_step_transform_(self, param, optim_group):
        param.clamp_(-0.5, 0.5)


def test_hooks_of_a_user_are_in_the_graph():
    _, _, breaks_of_inner = bare_run(SGD)
    opt = Doubled(tensors(*SHAPES), lr=0.1)
    (graph,), breaks = compiled_run(opt)
    assert breaks == breaks_of_inner
    assert graph.count("clamp_") == len(SHAPES)
    theirs = eager_run(Doubled(tensors(*SHAPES), lr=0.1))
    assert all(map(torch.equal, parameters(opt), theirs))


def test_random_draws_are_drawn_at_each_step():
    def make():
        generator = torch.Generator().manual_seed(1)
        return optim.TopQGradientOptimizer(
            tensors(20), q=0.5, dq=0.5, generator=generator, param_ndim=None, lr=0.1
        )

    opt, reference = make(), make()
    compiled_run(opt, steps=2, warm_after=2)  # how many entries are kept is known to no graph
    eager_run(reference, steps=2)
    assert all(map(torch.equal, parameters(opt), parameters(reference)))
    assert torch.equal(opt.generator.get_state(), reference.generator.get_state())


def test_closures():
    def closure(x):
        x.grad = x.detach().clone()
        return x.detach().square().sum() / 2

    (x,), (y,) = tensors(4), tensors(4)
    opt = ClampedParameterOptimizer([x], lr=0.5, clamp_max=0.3)
    reference = ClampedParameterOptimizer([y], lr=0.5, clamp_max=0.3)
    step = torch.compile(opt.step, backend=Graphs())
    for _ in range(3):
        assert torch.equal(step(lambda: closure(x)), reference.step(lambda: closure(y)))
        assert torch.equal(x, y)


# --- recompilation -----------------------------------------------------------------------------


def test_the_momentum_of_sgd_costs_one_more_compilation_as_it_does_bare():
    # (which also shows that `compiled_run` would notice one)
    for make in (SGD, WRAPPERS["ClampedParameter"]):
        with pytest.raises(torch._dynamo.exc.RecompileError):
            compiled_run(make(tensors(*SHAPES), lr=0.1, momentum=0.9))
        forget()
        opt = make(tensors(*SHAPES), lr=0.1, momentum=0.9)
        graphs, _ = compiled_run(opt, steps=4, warm_after=2)
        assert len(graphs) == 2
        forget()


def test_a_scheduled_tensor_lr_is_not_compiled_in():
    params, theirs = tensors(*SHAPES), tensors(*SHAPES)
    opt, reference = (
        ClampedParameterOptimizer(some, Adam, lr=torch.tensor(0.1), clamp_max=0.6)
        for some in (params, theirs)
    )
    graphs = Graphs()
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, reference)]
    step = torch.compile(opt.step, backend=graphs)
    for k in range(4):
        for some, one_step in ((params, step), (theirs, reference.step)):
            new_gradients(some, k)
            one_step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(graphs) == 1
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # Adam's own difference


def test_an_edited_setting_is_honored():
    (x,) = tensors(3)
    opt = ClampedParameterOptimizer([x], lr=0.0, clamp_max=0.5)
    step = torch.compile(opt.step, backend=Graphs())
    for bound in (0.5, 0.25, -1.0):
        opt.param_groups[0]["clamp_max"] = bound
        x.detach().fill_(5.0)
        step()
        assert x.tolist() == [bound] * 3


def test_a_step_before_and_after_compilation():
    # Eager and compiled steps of one optimizer may alternate.
    params, theirs = tensors(*SHAPES), tensors(*SHAPES)
    opt = WRAPPERS["Chained"](params, lr=0.1)
    step = torch.compile(opt.step, backend=Graphs())
    for k, one_step in enumerate([opt.step, step, opt.step, step]):
        new_gradients(params, k)
        one_step()
    eager_run(WRAPPERS["Chained"](theirs, lr=0.1), steps=4)
    assert all(map(torch.equal, params, theirs))


def test_hooks_run_once_also_after_dynamo_has_wrapped_the_inner_step_again(monkeypatch):
    # Once per process, dynamo puts a wrapper around the `step` of some classes (LBFGS), hooked or
    # not by then, and the wrapper takes the attribute `hooked` over.
    torch.optim.LBFGS(tensors(1))
    monkeypatch.setattr(torch.optim.LBFGS, "step", torch._dynamo.disable(torch.optim.LBFGS.step))
    seen = []
    opt = ClampedParameterOptimizer(tensors(1), torch.optim.LBFGS, clamp_max=1.0)
    param = opt.param_groups[0]["params"][0]

    def closure():
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(optimizer)
    )
    try:
        opt.step(closure)
    finally:
        handle.remove()
    assert seen == [opt]
