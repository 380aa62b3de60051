"""Bound-constrained problems of the literature, and what runs a solver on one and counts.

The names are those of CUTEst (Gould, Orban & Toint, 2015), where it has the problem. The functions
were written down from the sources that are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from rai_toolbox.constraints import Box, Constraint
from rai_toolbox.optim import ProjectedLBFGS

Loss = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    loss: Loss
    start: Tensor
    lower: Tensor
    upper: Tensor


class Run(NamedTuple):
    """Losses at all evaluations, in order, and why there were no more."""

    losses: list[float]
    status: str

    def evaluations_to(self, level: float) -> int | None:
        """How many evaluations it takes to get to a loss."""
        return next((i + 1 for i, loss in enumerate(self.losses) if loss <= level), None)


def in_set(loss: Loss, start: Tensor, constraint: Constraint, **settings: Any) -> Run:
    """A step of `ProjectedLBFGS`, as long as `settings` allow."""
    x = start.clone().requires_grad_()
    optim = ProjectedLBFGS([x], constraint=constraint, tolerance_change=1e-15, **settings)
    losses = []

    def closure() -> Tensor:
        optim.zero_grad()
        value = loss(x)
        value.backward()
        losses.append(value.item())
        return value

    optim.step(closure)
    assert optim.violation()[0] == 0
    return Run(losses, str(optim.status))


def by_ours(problem: Problem, most: int) -> Run:
    constraint = Box(problem.lower, problem.upper)
    ends = {"tolerance_grad": 0.0, "max_iter": most, "max_eval": most}
    return in_set(problem.loss, problem.start, constraint, param_ndim=None, **ends)


def by_scipy(problem: Problem, most: int, method: str = "L-BFGS-B") -> Run:
    losses = []

    def loss_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(point.copy()).requires_grad_()
        loss = problem.loss(x)
        loss.backward()
        losses.append(loss.item())
        return loss.item(), x.grad.numpy()

    options = {
        "L-BFGS-B": {"maxcor": 10, "ftol": 0.0, "gtol": 0.0, "maxiter": most, "maxfun": most},
        "TNC": {"ftol": 0.0, "gtol": 0.0, "xtol": 0.0, "maxfun": most},
    }
    found = optimize.minimize(
        loss_and_gradient,
        problem.start.numpy(),
        jac=True,
        method=method,
        bounds=optimize.Bounds(problem.lower.numpy(), problem.upper.numpy()),
        options=options[method],
    )
    return Run(losses, str(found.message))


def non_negative_least_squares(decades: float, seed: int) -> tuple[Problem, float]:
    """``|A x - b|^2 / 2`` over x >= 0, with columns of scales 10^U(-decades, decades).

    And its least value, by the active sets of Lawson and Hanson.
    """
    generator, n = np.random.default_rng(seed), 200
    A = generator.standard_normal((300, n)) * 10 ** generator.uniform(-decades, decades, n)
    b = generator.standard_normal(300)
    _, distance = optimize.nnls(A, b, maxiter=100 * n)
    matrix, target = torch.from_numpy(A), torch.from_numpy(b)
    problem = bounded(
        lambda x: (matrix @ x - target).square().sum() / 2, torch.zeros(n), 0.0, math.inf
    )
    return problem, distance**2 / 2


def bounded(loss: Loss, start: Tensor, lower: Any, upper: Any) -> Problem:
    start = start.double()
    ends = (torch.as_tensor(end, dtype=torch.float64).expand_as(start) for end in (lower, upper))
    return Problem(loss, start, *(end.clone() for end in ends))


# Of few variables


def nonscomp(n: int = 25) -> Problem:
    """Zhu, Byrd, Lu & Nocedal (1997), the sample problem of L-BFGS-B."""
    lower = torch.tensor([1.0, -100.0]).repeat(n)[:n]
    return bounded(
        lambda x: (x[0] - 1) ** 2 + 4 * (x[1:] - x[:-1] ** 2).square().sum(),
        torch.full((n,), 3.0),
        lower,
        100.0,
    )


def hs1() -> Problem:
    """Hock & Schittkowski (1981), problem 1: Rosenbrock's function."""
    return bounded(
        lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2,
        torch.tensor([-2.0, 1.0]),
        torch.tensor([-math.inf, -1.5]),
        math.inf,
    )


def hs38() -> Problem:
    """Hock & Schittkowski (1981), problem 38: Colville's function."""

    def loss(x: Tensor) -> Tensor:
        a, b, c, d = x
        return (
            100 * (b - a**2) ** 2
            + (1 - a) ** 2
            + 90 * (d - c**2) ** 2
            + (1 - c) ** 2
            + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2)
            + 19.8 * (b - 1) * (d - 1)
        )

    return bounded(loss, torch.tensor([-3.0, -1.0, -3.0, -1.0]), -10.0, 10.0)


def hs110() -> Problem:
    """Hock & Schittkowski (1981), problem 110."""
    return bounded(
        lambda x: ((x - 2).log() ** 2 + (10 - x).log() ** 2).sum() - x.prod() ** 0.2,
        torch.full((10,), 9.0),
        2.001,
        9.999,
    )


def hatflda() -> Problem:
    """Conn, Gould & Toint (1988): a flat function of 4 variables."""
    return bounded(
        lambda x: (x[0] - 1) ** 2 + (x[:-1] - x[1:].sqrt()).square().sum(),
        torch.full((4,), 0.1),
        1e-7,
        math.inf,
    )


# Of any number of variables


def mccormck(n: int = 50) -> Problem:
    """McCormick's function (1976), as of Conn, Gould & Toint (1988)."""

    def loss(x: Tensor) -> Tensor:
        a, b = x[:-1], x[1:]
        return (-1.5 * a + 2.5 * b + 1 + (a - b) ** 2 + (a + b).sin()).sum()

    return bounded(loss, torch.zeros(n), -1.5, 3.0)


def explin(n: int = 120, m: int = 10) -> Problem:
    """Conn, Gould & Toint (1988): exponentials and a linear function."""
    slopes = 10 * torch.arange(1, n + 1, dtype=torch.float64)
    return bounded(
        lambda x: (0.1 * x[:m] * x[1 : m + 1]).exp().sum() - slopes @ x, torch.zeros(n), 0.0, 10.0
    )


def biggsb1(n: int = 100) -> Problem:
    """Biggs's quadratic, as of Toint: a chain of springs, the last of which is unbounded."""
    upper = torch.full((n,), 0.9)
    upper[-1] = math.inf
    lower = torch.zeros(n)
    lower[-1] = -math.inf
    return bounded(
        lambda x: (x[0] - 1) ** 2 + (x[1:] - x[:-1]).square().sum() + (1 - x[-1]) ** 2,
        torch.zeros(n),
        lower,
        upper,
    )


def cvxbqp1(n: int = 100) -> Problem:
    """A convex quadratic in a box, of CUTEst's own."""
    i = torch.arange(1, n + 1)
    second, third = (2 * i - 1) % n, (3 * i - 1) % n

    def loss(x: Tensor) -> Tensor:
        return (i * (x + x[second] + x[third]).square()).sum() / 2

    return bounded(loss, torch.full((n,), 0.5), 0.1, 10.0)


# Of functions on a grid: More & Toraldo (1991). The values at the boundary are 0.


def _grid(n: int) -> tuple[Tensor, Tensor]:
    inner = torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    return torch.meshgrid(inner, inner, indexing="ij")


def _slopes(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Differences of neighbors along both dims."""
    v = torch.nn.functional.pad(x.view(n, n), (1, 1, 1, 1))
    return v.diff(dim=0)[:, 1:-1], v.diff(dim=1)[1:-1]


def torsion1(n: int = 30, force: float = 5.0) -> Problem:
    """Elastic-plastic torsion of a bar."""

    def loss(x: Tensor) -> Tensor:
        a, b = _slopes(x, n)
        return (a.square().sum() + b.square().sum()) / 2 - force * x.sum() / (n + 1) ** 2

    u, v = _grid(n)
    distance = torch.stack([u, 1 - u, v, 1 - v]).amin(0).flatten()
    return bounded(loss, torch.zeros(n * n), -distance, distance)


def obstclae(n: int = 30) -> Problem:
    """A membrane over an obstacle."""

    def loss(x: Tensor) -> Tensor:
        a, b = _slopes(x, n)
        return (a.square().sum() + b.square().sum()) / 2 - x.sum() / (n + 1) ** 2

    u, v = _grid(n)
    obstacle = ((9.2 * u).sin() * (9.3 * v).sin()).flatten() ** 3
    return bounded(loss, torch.ones(n * n), obstacle, 2000.0)


def jnlbrng1(n: int = 30, eccentricity: float = 0.1, height: float = 10.0) -> Problem:
    """The pressure in a journal bearing, which is not negative."""
    wide, high = 2 * math.pi / (n + 1), 2 * height / (n + 1)
    angles = wide * torch.arange(n + 2, dtype=torch.float64)
    gap = (1 + eccentricity * angles.cos()) ** 3
    across = (gap[:-1] + gap[1:]).unsqueeze(1) / 2
    force = eccentricity * angles[1:-1].sin().repeat_interleave(n)

    def loss(x: Tensor) -> Tensor:
        a, b = _slopes(x, n)
        energy = (across * (a / wide).square()).sum()
        energy = energy + (gap[1:-1].unsqueeze(1) * (b / high).square()).sum()
        return wide * high * (energy / 2 - force @ x)

    start = angles[1:-1].sin().clamp(min=0).repeat_interleave(n)
    return bounded(loss, start, 0.0, math.inf)


BOUNDED: dict[str, Callable[[], Problem]] = {
    "NONSCOMP": nonscomp,
    "HS1": hs1,
    "HS38": hs38,
    "HS110": hs110,
    "HATFLDA": hatflda,
    "MCCORMCK": mccormck,
    "EXPLIN": explin,
    "BIGGSB1": biggsb1,
    "CVXBQP1": cvxbqp1,
    "TORSION1": torsion1,
    "OBSTCLAE": obstclae,
    "JNLBRNG1": jnlbrng1,
}
