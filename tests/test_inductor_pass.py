"""What inductor is told of a step: numbers found once, no memory for parameters, same results."""

import copy

import pytest
import torch
import torch._dynamo
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Adam, AdamW

from rai_toolbox.constraints import L1Ball, L2Ball, MinMaxNorm, UnitNorm
from rai_toolbox.inductor_pass import (
    InductorPass,
    inductor,
    keep_small_values,
    one_by_one,
    write_early,
)
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedOptimizer, compiled

SHAPE = (400, 100)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters(count=3, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]


def set_gradients(params, k):
    generator = torch.Generator().manual_seed(k)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def largest_allocation(step):
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


MADE = {
    "unit norms": lambda p: ProjectedOptimizer(p, AdamW, constraint=UnitNorm(), lr=0.1),
    "shells": lambda p: ProjectedOptimizer(p, SGD, constraint=MinMaxNorm(5.0, 9.0), lr=0.1),
    "L1 balls": lambda p: ProjectedOptimizer(p, SGD, constraint=L1Ball(9.0), lr=0.1),
    "balls": lambda p: ProjectedOptimizer(
        p, Adam, constraint=L2Ball(9.0), gradient_mapping=False, lr=0.1
    ),
}


def check_that_compiled_is_eager(make, params):
    """Step two copies of the parameters; the compiled step and both copies."""
    ours, theirs = params(), params()
    step, eager = compiled(make(ours)), make(theirs)
    for k in range(4):
        set_gradients(ours, k)
        set_gradients(theirs, k)
        step()
        eager.step()
    assert step.graphs == 1
    for a, b in zip(ours, theirs, strict=True):
        # (torch's compiled Adam takes the power of its bias correction in float32)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return step, ours, theirs


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_compiled_step_does_the_same_in_the_memory_of_the_parameters(make):
    step, ours, theirs = check_that_compiled_is_eager(make, parameters)
    for a, b in zip(ours, theirs, strict=True):
        # (the gradient mapping divides differences of parameters by some hundredths)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-3)
    assert largest_allocation(step) < 4 * ours[0].numel() / 4


def slices():
    whole = torch.randn(120, 4, 25, generator=torch.Generator().manual_seed(0))
    return [part.detach().requires_grad_() for part in (whole[:80], whole[80:])]


def entries():
    whole = torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(0))
    return [part.detach().requires_grad_() for part in whole]


def halves_of_rows():
    whole = torch.randn(80, 200, generator=torch.Generator().manual_seed(0))
    return [part.detach().requires_grad_() for part in (whole[:, :100], whole[:, 100:])]


def transposed():
    return [part.detach().t().requires_grad_() for part in parameters(2, (100, 80))]


VIEWS = [slices, entries, halves_of_rows, transposed]
SETS = {"L1 ball": L1Ball(9.0), "L2 ball": L2Ball(9.0), "unit norm": UnitNorm()}


@pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)
@pytest.mark.parametrize("views", VIEWS)
def test_parameters_that_are_parts_of_one_memory_are_stepped_as_if_they_were_not(views, constraint):
    check_that_compiled_is_eager(
        lambda p: ProjectedOptimizer(p, SGD, constraint=constraint, lr=0.05), views
    )


def captured(step, *tensors):
    return make_fx(step)(*tensors).graph


def ran(graph, *tensors):
    inputs = copy.deepcopy(tensors)
    torch.fx.Interpreter(torch.fx.GraphModule(torch.nn.Module(), graph)).run(*inputs)
    return inputs


def scaled_steps(p, q, step):
    """Two updates, then two projections, written back at the end, as inductor gets them."""
    power = 1 - 0.9 ** (step + 1)
    new = [x - power * x.square() for x in (p, q)]
    made = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in new]
    p.copy_(made[0])
    q.copy_(made[1])
    return ()


def test_the_passes_change_no_value():
    tensors = [torch.randn(100, 50), torch.randn(100, 50), torch.tensor(3.0)]
    graph = captured(scaled_steps, *tensors)
    expected = ran(graph, *tensors)
    order = [node.name for node in graph.nodes]
    one_by_one(graph)
    assert [node.name for node in graph.nodes] != order
    number = len(graph.nodes)
    write_early(graph)
    assert len(graph.nodes) == number + 2
    graph.lint()
    for a, b in zip(ran(graph, *tensors), expected, strict=True):
        assert torch.equal(a, b)


def read_late(p, q, step):
    """What is written over is read to the end: by a view of it, and for an output."""
    view = p.view(-1)
    new = p - step
    norms = torch.linalg.vector_norm(new, dim=1, keepdim=True)
    made = new / norms + 1, new / norms + view.view(p.shape) * norms
    q.copy_(made[0])
    p.copy_(made[1])
    return (new * 2,)


@pytest.mark.parametrize("step", [scaled_steps, read_late])
@pytest.mark.parametrize("passes", [(one_by_one,), (write_early,), (one_by_one, write_early)])
def test_what_is_still_to_be_read_is_not_written_over(step, passes):
    tensors = [torch.randn(100, 50), torch.randn(100, 50), torch.tensor(3.0)]
    graph = captured(step, *tensors)
    expected = ran(graph, *tensors)
    for change in passes:
        change(graph)
    graph.lint()
    for a, b in zip(ran(graph, *tensors), expected, strict=True):
        assert torch.equal(a, b)


# --- what a step may do beside: each of these went wrong once -------------------------------------


def sums(x):
    return x.abs().sum(1, keepdim=True)


def keeps_what_was(kept, p, q, g):
    kept.copy_(q)
    new = p - g
    late = q + kept
    kept.copy_(p)
    p.copy_(new / torch.linalg.vector_norm(new, dim=1, keepdim=True))
    q.copy_(late)


def swaps(p, q, t, g):
    t.copy_(p)
    p.copy_(q)
    q.copy_(t)


def keeps_a_projected_point(p, kept, q, g):
    new = p - g
    torch.ops.rai_toolbox.project_l1_rows_(new, torch.tensor(9.0))
    kept.add_(new)
    p.copy_(new * 2)


def copies_a_view_of_the_update(p, kept, q, g):
    new = p - g
    view = new.t()
    total = sums(view).sum()
    p.copy_(new.clamp(-total, total) * 2)
    kept.t().copy_(view)


def transposes_the_update(p, kept, q, g):
    new = p - g
    kept.copy_(new - sums(new))
    p.copy_(new.t())


def reads_late_what_was_rounded(p, kept, q, g):
    old = p.double().float().t()
    new = p - g
    total = sums(new)
    p.copy_((old * total.t()).t() + new.clamp(-total, total))


def writes_what_it_does_not_read(p, kept, q, g):
    new = p - g
    total = sums(new)
    p.copy_(new * 0.5 - total)
    kept.copy_((total / 100).expand(p.shape).tanh())


def updates_a_part(p, average, q, g):
    p[:40].sub_(g[:40])
    average.lerp_(p, 0.1)
    p.clamp_(-1.0, 1.0)


def updates_by_index(p, average, q, g):
    p.index_put_((torch.arange(40),), g[:40], accumulate=True)
    average.lerp_(p, 0.1)
    p.clamp_(-1.0, 1.0)


def takes_a_row_off(p, kept, q, g):
    p.sub_(g)
    p.copy_(p - p[0])


def makes_it_symmetric(p, kept, q, g):
    p.sub_(g)
    p.div_(torch.linalg.vector_norm(p, dim=1, keepdim=True))
    p.copy_((p + p.flip(1)) / 2)


def rolls_what_is_projected(p, kept, q, g):
    p.sub_(g)
    torch.ops.rai_toolbox.project_l1_rows_(p, torch.tensor(9.0))
    kept.copy_(p.flip(0))
    p.copy_(p.roll(1, 0))


def keeps_a_point_between(p, kept, q, g):
    p.sub_(g)
    torch.ops.rai_toolbox.project_l1_rows_(p, torch.tensor(9.0))
    p.div_(torch.linalg.vector_norm(p, dim=1, keepdim=True))
    kept.copy_(p)


def takes_pairs_of_rows(p, kept, q, g):
    p.sub_(g)
    p.mul_(0.1)
    p.copy_((p[None] * p[:, None]).sum(2) + p)


STEPS = [
    takes_a_row_off,
    makes_it_symmetric,
    rolls_what_is_projected,
    keeps_a_point_between,
    takes_pairs_of_rows,
    keeps_what_was,
    swaps,
    keeps_a_projected_point,
    copies_a_view_of_the_update,
    transposes_the_update,
    reads_late_what_was_rounded,
    writes_what_it_does_not_read,
    updates_a_part,
    updates_by_index,
]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_any_kind_does_the_same(step, order):
    def ordered(*tensors):  # as the graph has them
        step(*(tensors[i] for i in order))

    def result(run):
        tensors = [x.detach() for x in parameters(4, (90, 90))]
        for _ in range(2):
            run(*tensors)
        return tensors

    expected, found = result(ordered), result(torch.compile(ordered, backend=inductor))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class HeavyBall(torch.optim.Optimizer):
    """It keeps the point before this one, as its state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            before = self.state[param].setdefault("before", param.clone())
            moved = param - before
            before.copy_(param)
            param.add_(moved, alpha=0.5).sub_(param.grad, alpha=0.1)


@pytest.mark.parametrize("constraint", SETS.values(), ids=SETS)
def test_an_inner_optimizer_may_keep_what_a_parameter_was(constraint):
    options = {"constraint": constraint, "gradient_mapping": False, "lr": 0.1}
    check_that_compiled_is_eager(
        lambda p: ProjectedOptimizer(p, HeavyBall, **options), lambda: parameters(2, (80, 100))
    )


def test_numbers_and_norms_are_kept_and_constants_and_elements_are_not():
    graph = captured(scaled_steps, torch.randn(100, 50), torch.randn(100, 50), torch.tensor(3.0))
    keep_small_values(graph)
    kept = {n.meta["val"].numel() for n in graph.nodes if "inductor_realize_to_strides" in n.meta}
    assert kept == {1, 100}


def test_what_is_written_to_in_between_is_left_where_it_is():
    def step(p, q):
        p.add_(1.0)
        q.copy_(p * 2)
        return ()

    graph = captured(step, torch.randn(3), torch.randn(3))
    order = list(graph.nodes)
    InductorPass()(graph)
    assert list(graph.nodes) == order


def test_an_elementwise_step_takes_no_memory():
    params = parameters()
    step = compiled(ClampedParameterOptimizer(params, AdamW, lr=0.1, clamp_min=-1.0))
    for k in range(3):
        set_gradients(params, k)
        step()
    assert step.graphs == 1
    assert largest_allocation(step) <= 64


def test_other_passes_of_the_user_are_run_too():
    from torch._inductor import config

    seen = []
    with config.patch(post_grad_custom_post_pass=seen.append):
        params = parameters(1)
        step = compiled(ClampedParameterOptimizer(params, SGD, lr=0.1, clamp_min=-1.0))
        for k in range(2):
            set_gradients(params, k)
            step()
    assert step.graphs == 1
    assert len(seen) == 1


def test_shapes_may_be_unknown():
    def step(x):
        x.mul_(2).copy_(x / torch.linalg.vector_norm(x, dim=1, keepdim=True))

    compiled_step = torch.compile(step, backend=inductor, dynamic=True)
    for height in (60, 50, 40):
        x = torch.randn(height, 100)
        compiled_step(x)
        assert (torch.linalg.vector_norm(x, dim=1) - 1).abs().max() <= 1e-6
