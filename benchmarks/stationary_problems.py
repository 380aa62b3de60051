"""Quadratic programs over sets, and their solutions by independent solvers.

`min (x - t)' Q (x - t) / 2` over a set: most solutions come from `scipy.optimize.lsq_linear` (exact
active sets, for bounds alone) and one multiplier, found by `scipy.optimize.brentq`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq, lsq_linear
from torch import Tensor

from rai_toolbox.constraints import (
    BoundedBall,
    BoxSection,
    Constraint,
    L1Ball,
    L2Ball,
    Monotone,
    Simplex,
    SpectralBall,
)

SETS = ("L2Ball", "L1Ball", "Simplex", "BoxSection", "SpectralBall", "BoundedBall", "Monotone")
CONDITION = 100.0
OPEN = math.inf

Array = np.ndarray
Solver = Callable[[Array, Array], Array]  # of Q and t


class Case(NamedTuple):
    """A set, the shape of a point, and how to solve a quadratic program over it."""

    constraint: Constraint
    shape: tuple[int, ...]
    solve: Solver


class Problem(NamedTuple):
    """Quadratic programs over one set, as rows of a batch."""

    constraint: Constraint
    shape: tuple[int, ...]
    Q: Tensor  # (N, n, n)
    t: Tensor  # (N, n)
    best: Tensor  # (N,): the least objectives, by an independent solver
    at_best: Tensor  # (N, n): where they are

    @property
    def largest_eigenvalue(self) -> float:
        return float(torch.linalg.eigvalsh(self.Q).max())

    def objective(self, x: Tensor) -> Tensor:
        """Of each row of `x`, shape (N, *shape)."""
        d = (x.reshape(self.t.shape) - self.t).unsqueeze(-1)
        return (d.mT @ self.Q @ d).flatten() / 2

    def gradient(self, x: Tensor) -> Tensor:
        """Of the shape of `x`."""
        d = (x.reshape(self.t.shape) - self.t).unsqueeze(-1)
        return (self.Q @ d).reshape(x.shape)

    def residual(self, x: Tensor) -> Tensor:
        """`|x - P(x - gradient)|` of each row."""
        moved = x - self.constraint.project(x - self.gradient(x))
        return moved.flatten(1).norm(dim=1)

    def start(self) -> Tensor:
        """A random feasible point, the same for every run."""
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.t), *self.shape)
        return self.constraint.project(torch.randn(shape, generator=generator, dtype=torch.float64))

    def repeated(self, times: int) -> Problem:
        """Each row `times` times."""
        rows = (v.repeat_interleave(times, 0) for v in (self.Q, self.t, self.best, self.at_best))
        return Problem(self.constraint, self.shape, *rows)


def solved(case: Case, Q: Tensor, t: Tensor) -> Problem:
    found = [case.solve(q.numpy(), s.numpy()) for q, s in zip(Q, t, strict=True)]
    at_best = torch.from_numpy(np.stack(found))
    problem = Problem(case.constraint, case.shape, Q, t, torch.empty(0), at_best)
    return problem._replace(best=problem.objective(at_best))


def reference(name: str) -> Problem:
    """The reference quadratic, `Q = diag(1, 3, 1/2)`, `t = (2, 1/2, -2/5)`."""
    weight, n = np.array([1.0, 2.0, 3.0]), 3
    cases = {
        "L2Ball": Case(L2Ball(1.0), (n,), over_ball(1.0)),
        "L1Ball": Case(L1Ball(1.0), (n,), over_l1_ball(1.0)),
        "Simplex": Case(Simplex(), (n,), over_section(np.ones(n), 1.0, 0.0, OPEN)),
        "BoxSection": Case(
            BoxSection(torch.from_numpy(weight), 1.0, 0.0, 0.8),
            (n,),
            over_section(weight, 1.0, 0.0, 0.8),
        ),
        "SpectralBall": Case(SpectralBall(1.0), (1, n), over_spectral_ball(1.0, (1, n))),
        "BoundedBall": Case(
            BoundedBall(L2Ball(1.0), 0.0, 1.0), (n,), over_ball(1.0, lower=0.0, upper=1.0)
        ),
        "Monotone": Case(Monotone(), (n,), over_rising),
    }
    Q = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).diag().unsqueeze(0)
    t = torch.tensor([[2.0, 0.5, -0.4]], dtype=torch.float64)
    return solved(cases[name], Q, t)


def random(name: str, rows: int = 4, n: int = 50, seed: int = 0) -> Problem:
    """Random quadratics of condition number `CONDITION`, as rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    U = torch.linalg.qr(normal(rows, n, n))[0]
    eigenvalues = torch.logspace(0, math.log10(CONDITION), n, dtype=torch.float64)
    Q = U @ eigenvalues.diag() @ U.mT
    t = 1.5 * normal(rows, n)
    weight = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    total, shape = 0.3 * float(weight.sum()), (n // 10, 10)
    cases = {
        "L2Ball": Case(L2Ball(1.0), (n,), over_ball(1.0)),
        "L1Ball": Case(L1Ball(2.0), (n,), over_l1_ball(2.0)),
        "Simplex": Case(Simplex(), (n,), over_section(np.ones(n), 1.0, 0.0, OPEN)),
        "BoxSection": Case(
            BoxSection(weight, total, 0.0, 0.8),
            (n,),
            over_section(weight.numpy(), total, 0.0, 0.8),
        ),
        "SpectralBall": Case(SpectralBall(1.0), shape, over_spectral_ball(1.0, shape)),
        "BoundedBall": Case(
            BoundedBall(L2Ball(1.5), -0.3, 0.4), (n,), over_ball(1.5, lower=-0.3, upper=0.4)
        ),
        "Monotone": Case(Monotone(), (n,), over_rising),
    }
    return solved(cases[name], Q, t)


# Solvers


def over_box(Q: Array, b: Array, lower: float | Array, upper: float | Array) -> Array:
    """`argmin x' Q x / 2 - b' x` over bounds."""
    root = np.linalg.cholesky(Q)
    target = np.linalg.solve(root, b)
    bounds = (np.broadcast_to(lower, b.shape), np.broadcast_to(upper, b.shape))
    return lsq_linear(root.T, target, bounds, method="bvls", tol=1e-14, max_iter=1000).x


def at_multiplier(solution: Callable[[float], Array], excess: Callable[[Array], float]) -> Array:
    """The solution whose excess is 0; its excess falls while the multiplier rises from 0."""
    if excess(solution(0.0)) == 0:
        return solution(0.0)
    sign = 1.0 if excess(solution(0.0)) > 0 else -1.0
    end = sign
    while sign * excess(solution(end)) > 0:
        end *= 2
    root = brentq(lambda m: excess(solution(m)), 0.0, end, xtol=1e-15, rtol=1e-14, maxiter=500)
    return solution(root)


def over_ball(radius: float, lower: float = -OPEN, upper: float = OPEN) -> Solver:
    def solve(Q: Array, t: Array) -> Array:
        return at_multiplier(
            lambda m: over_box(Q + m * np.eye(len(t)), Q @ t, lower, upper),
            lambda x: float(np.linalg.norm(x)) - radius,
        )

    return solve


def over_section(weight: Array, total: float, lower: float, upper: float) -> Solver:
    def solve(Q: Array, t: Array) -> Array:
        return at_multiplier(
            lambda m: over_box(Q, Q @ t - m * weight, lower, upper),
            lambda x: float(weight @ x) - total,
        )

    return solve


def over_l1_ball(radius: float) -> Solver:
    """By the dual, in which the multiplier bounds each entry."""

    def solve(Q: Array, t: Array) -> Array:
        inverse = np.linalg.inv(Q)

        def solution(m: float) -> Array:
            return t - inverse @ over_box(inverse, t, -m, m) if m > 0 else t

        return at_multiplier(solution, lambda x: float(np.abs(x).sum()) - radius)

    return solve


def over_rising(Q: Array, t: Array) -> Array:
    """In the differences of neighbors, which are bounds alone."""
    sums = np.tril(np.ones_like(Q))
    least = np.array([-OPEN] + [0.0] * (len(t) - 1))
    return sums @ over_box(sums.T @ Q @ sums, sums.T @ Q @ t, least, OPEN)


def over_spectral_ball(radius: float, shape: tuple[int, int]) -> Solver:
    """By accelerated projected gradients, with the projection by numpy's SVD."""

    def project(x: Array) -> Array:
        u, s, v = np.linalg.svd(x.reshape(shape), full_matrices=False)
        return ((u * np.minimum(s, radius)) @ v).reshape(-1)

    def solve(Q: Array, t: Array) -> Array:
        rate, x, momentum = 1 / np.linalg.eigvalsh(Q)[-1], project(t), 1.0
        y = x
        for _ in range(20_000):
            new = project(y - rate * (Q @ (y - t)))
            if np.abs(new - y).max() <= 1e-15:
                return new
            if (y - new) @ (new - x) > 0:
                momentum = 1.0
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            y = new + (momentum - 1) / following * (new - x)
            x, momentum = new, following
        return x

    return solve
