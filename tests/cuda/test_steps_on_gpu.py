"""Steps on a GPU: as on a CPU, without waiting for the device, in a CUDA graph, and compiled."""

from functools import partial

import pytest
import torch
from constraints.cases import CASES
from optim.engine_cases import WITH_INNER, WRAPPERS
from torch.optim import SGD, Adam

from rai_toolbox.constraints import BoundedBall, Box, L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import APGD, PGD, ProjectedLBFGS, ProjectedOptimizer, compiled
from rai_toolbox.perturbations import attack

GPU = torch.device("cuda")
SETS = {str(case): case for case in CASES}


@pytest.fixture
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def run(make, device, steps=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator, dtype=dtype) for s in [(8, 5), (3, 4, 2)]]
    params = [param.to(device).requires_grad_() for param in params]
    optimizer = make(params)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=dtype).to(device)
        optimizer.step()
    return params


def assert_the_same(found, wanted, tolerance=1e-9):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", WRAPPERS)
def test_trajectory_of_a_cpu(name):
    make = partial(WRAPPERS[name], lr=0.1)
    assert_the_same(run(make, GPU), run(make, "cpu"))


@pytest.mark.parametrize("constraint", [Box(-0.3, 0.4), L2Ball(0.7), None])
def test_lbfgs_of_a_cpu(constraint):
    def ended(device):
        target = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = torch.zeros(3, 5, dtype=torch.float64, device=device, requires_grad=True)
        optimizer = ProjectedLBFGS([x], constraint=constraint, max_iter=200)

        def closure():
            optimizer.zero_grad()
            loss = ((x - target.to(device)) ** 2).sum() + (x[1:] - x[:-1]).pow(4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return [x.detach()]

    assert_the_same(ended(GPU), ended("cpu"), 1e-5)


@pytest.mark.parametrize("name", SETS)
def test_projection_of_a_cpu(name):
    case = SETS[name]
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = case.constraint().to(GPU).project(x.to(GPU))
    assert case.constraint().to(GPU).violation(found).max() <= case.tolerance
    if case.constraint().convex:
        assert_the_same([found], [case.constraint().project(x)], 1e-6)


@pytest.mark.parametrize("name", WITH_INNER)
def test_no_step_waits(name, waiting_is_an_error):
    params = [torch.randn(8, 5, device=GPU, requires_grad=True)]
    optimizer = WITH_INNER[name](params, Adam, lr=0.1, capturable=True)
    for _ in range(3):
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()


@pytest.mark.parametrize("name", WITH_INNER)
def test_cuda_graph(name):
    make = partial(WITH_INNER[name], InnerOpt=Adam, lr=0.1, capturable=True)
    captured, eager = (torch.ones(8, 5, device=GPU, requires_grad=True) for _ in range(2))
    gradient = torch.randn(8, 5, device=GPU)
    pairs = [(param, make([param])) for param in (captured, eager)]
    for param, optimizer in pairs:
        param.grad = torch.empty_like(param)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as capture asks: a first step outside of the graph
            param.grad.copy_(gradient)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.grad.copy_(gradient)
        pairs[0][1].step()
    for _ in range(3):
        graph.replay()
        eager.grad.copy_(gradient)
        pairs[1][1].step()
    assert_the_same([captured], [eager], 1e-5)


@pytest.mark.parametrize("name", WITH_INNER)
def test_compiled(name):
    make = partial(WITH_INNER[name], InnerOpt=SGD, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(8, 5, generator=generator).to(GPU).requires_grad_() for _ in range(1)]
    params.append(params[0].detach().clone().requires_grad_())
    steps = [compiled(make(params[:1])), make(params[1:]).step]
    for _ in range(3):
        gradient = torch.randn(8, 5, generator=generator).to(GPU)
        for param, step in zip(params, steps, strict=True):
            param.grad = gradient.clone()
            step()
    assert_the_same(params[:1], params[1:], 1e-5)


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.5), L1Ball(2.0)], ids=repr)
@pytest.mark.parametrize("solver", [partial(PGD, lr=0.05), APGD, ProjectedOptimizer], ids=str)
def test_attacks(solver, ball):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 1, 8, 8, generator=generator).to(GPU), torch.arange(16, device=GPU) % 10
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).to(GPU)
    if solver is ProjectedOptimizer:
        solver = partial(ProjectedOptimizer, lr=0.1)
    found = attack(model, x, y, ball=ball, steps=10, optimizer=solver)
    inside = BoundedBall(type(ball)(ball.epsilon, center=x), 0.0, 1.0)
    assert inside.violation(found.data).max() == 0
