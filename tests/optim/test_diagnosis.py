"""What every constrained optimizer tells of its parameters, and how it makes them feasible."""

from functools import partial
from math import isnan

import pytest
import torch
from torch.optim import Adam

from rai_toolbox.constraints import Box, L1Ball, L2Ball, LinfBall, Simplex
from rai_toolbox.optim import (
    APGD,
    PGD,
    ClampedParameterOptimizer,
    ExponentiatedGradient,
    FrankWolfe,
    L1FrankWolfe,
    L1qFrankWolfe,
    L2FrankWolfe,
    L2ProjectedOptim,
    LinfFrankWolfe,
    LinfProjectedOptim,
    ProjectedLBFGS,
    ProjectedOptimizer,
)

BALL = L2Ball(0.5)
MAKES = {
    "ProjectedOptimizer": (partial(ProjectedOptimizer, constraint=BALL), BALL),
    "FrankWolfe": (partial(FrankWolfe, constraint=BALL), BALL),
    "ExponentiatedGradient": (partial(ExponentiatedGradient, lr=0.1, total=2.0), Simplex(2.0)),
    "ProjectedLBFGS": (partial(ProjectedLBFGS, constraint=BALL), BALL),
    "PGD": (partial(PGD, constraint=BALL, lr=0.1), BALL),
    "APGD": (partial(APGD, constraint=BALL, steps=5), BALL),
    "Clamped": (partial(ClampedParameterOptimizer, clamp_min=-0.3, clamp_max=0.2), Box(-0.3, 0.2)),
    "one bound": (partial(ClampedParameterOptimizer, clamp_max=0.2), Box(None, 0.2)),
    "L2Projected": (partial(L2ProjectedOptim, epsilon=0.5), BALL),
    "LinfProjected": (partial(LinfProjectedOptim, epsilon=0.5), LinfBall(0.5)),
    "L1FrankWolfe": (partial(L1FrankWolfe, epsilon=0.5), L1Ball(0.5)),
    "L1qFrankWolfe": (partial(L1qFrankWolfe, epsilon=0.5, q=0.5), L1Ball(0.5)),
    "L2FrankWolfe": (partial(L2FrankWolfe, epsilon=0.5), BALL),
    "LinfFrankWolfe": (partial(LinfFrankWolfe, epsilon=0.5), LinfBall(0.5)),
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("make", "constraint"), MAKES.values(), ids=MAKES)
def test_every_constrained_optimizer_has_the_same_methods(make, constraint):
    start, grad = normal(4, 3), normal(4, 3, seed=1)
    x = start.clone().requires_grad_()
    opt = make([x])
    torch.testing.assert_close(opt.violation(), [constraint.violation(start).max()])
    assert isnan(opt.kkt_residual()[0])  # there is no gradient yet
    opt.make_feasible_()
    nearest = constraint.project(start)
    torch.testing.assert_close(x.detach(), nearest)
    assert opt.violation() == [0.0]
    x.grad = grad.clone()
    residual = (nearest - constraint.project(nearest - grad)).norm()
    torch.testing.assert_close(opt.kkt_residual(), [residual])


def test_frank_wolfe_without_a_set_is_unconstrained():
    x = normal(4).requires_grad_()
    opt = FrankWolfe([x])
    opt.make_feasible_()
    assert torch.equal(x.detach(), normal(4))
    x.grad = normal(4, seed=1)
    assert opt.violation() == [0.0]
    torch.testing.assert_close(opt.kkt_residual(), [x.grad.norm()])


@pytest.mark.parametrize(
    "make",
    [
        partial(ProjectedOptimizer, constraint=None),
        lambda x: ClampedParameterOptimizer([{"params": x, "clamp_min": None, "clamp_max": None}]),
    ],
)
def test_what_is_unconstrained_may_be_complex(make):
    x = torch.tensor([1 + 2j, 3j], requires_grad=True)
    x.grad = torch.tensor([3j, 4 + 0j])
    opt = make([x])
    opt.make_feasible_()
    assert opt.violation() == [0.0]
    assert opt.kkt_residual()[0] == pytest.approx(5.0)


def test_nothing_is_known_without_gradients():
    """A residual of 0 would mean that the work is done."""
    x, frozen = normal(2, 3).requires_grad_(), normal(2, 3)
    opt = ProjectedOptimizer([{"params": [x]}, {"params": [frozen]}], Adam, constraint=BALL)
    methods = (opt.kkt_residual, opt.active_fraction, opt.frank_wolfe_gap)
    gap = FrankWolfe([x], constraint=BALL).gap
    assert all(isnan(value) for method in (*methods, gap) for value in method())
    x.grad = normal(2, 3, seed=1)
    assert all(method()[0] > 0 and method()[1] == 0 for method in methods)
    assert gap()[0] > 0
