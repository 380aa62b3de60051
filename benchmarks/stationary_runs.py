"""Runs of constrained inner optimizers on quadratic programs: where they stop, and how soon."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from stationary_problems import Problem
from torch import Tensor, optim

from rai_toolbox.optim import ProjectedOptimizer

STEPS = 12_000
EVERY = 20  # steps between two looks at the residual
WANTED, ENOUGH = 1e-6, 1e-8


class Rule(NamedTuple):
    """An inner optimizer, and its learning rate for all sets and problems.

    The rate is `lr` (over the largest eigenvalue where `by_curvature`), and falls geometrically:
    by a factor of ten every `tenfold` steps.
    """

    inner: Callable[..., optim.Optimizer]
    lr: float
    tenfold: float = math.inf
    by_curvature: bool = False

    def first_lr(self, problem: Problem) -> float:
        return self.lr / problem.largest_eigenvalue if self.by_curvature else self.lr

    def text(self) -> str:
        start = f"{self.lr:g} / L" if self.by_curvature else f"{self.lr:g}"
        return start if self.tenfold == math.inf else f"{start} / 10^(k / {self.tenfold:g})"


RULES = {
    "SGD": Rule(optim.SGD, 1.0, by_curvature=True),
    "SGD momentum": Rule(partial(optim.SGD, momentum=0.9), 1.0, by_curvature=True),
    "Adam": Rule(optim.Adam, 0.1, 2000),
    "AdamW": Rule(partial(optim.AdamW, weight_decay=0.0), 0.1, 2000),
    "RMSprop": Rule(optim.RMSprop, 0.05, 750),
    "Adagrad": Rule(optim.Adagrad, 1.0, 12_000),
    "NAdam": Rule(optim.NAdam, 0.1, 2000),
    "RAdam": Rule(optim.RAdam, 0.1, 2000),
    "Adadelta": Rule(optim.Adadelta, 10.0, 2000),
    "LBFGS": Rule(partial(optim.LBFGS, max_iter=1, tolerance_grad=0, tolerance_change=0), 1.0),
}


class Run(NamedTuple):
    """How a run ended: the worst of its rows."""

    residual: float
    excess: float  # of the objective over the least one, relative to it
    steps: int
    steps_to_wanted: int | None
    trace: list[tuple[int, float]]  # the residual after steps


def run(
    problem: Problem,
    rule: Rule,
    gradient_mapping: bool | None = None,
    steps: int = STEPS,
    enough: float = ENOUGH,
    stall: int | None = None,
    **settings: Any,
) -> Run:
    """Up to `steps` steps, ended early by a residual <= `enough`.

    With `stall`, also where the residual has kept its value to 0.1 % for that many steps.
    """
    optimizer, x = make(problem, rule, gradient_mapping, **settings)
    first_lr, trace, reached = rule.first_lr(problem), [], None
    done = 0
    while True:
        if done % EVERY == 0 or done == steps:
            residual = float(problem.residual(x.detach()).amax())
            trace.append((done, residual))
            if not math.isfinite(residual):
                return Run(math.nan, math.nan, done, None, trace)
            reached = (done if reached is None else reached) if residual <= WANTED else None
            if residual <= enough or done == steps or (stall and stalled(trace, stall)):
                break
        optimizer.param_groups[0]["lr"] = first_lr * 0.1 ** (done / rule.tenfold)
        step(optimizer, x, problem)
        done += 1
    excess = ((problem.objective(x.detach()) - problem.best) / problem.best).amax()
    return Run(residual, float(excess), done, reached, trace)


def make(
    problem: Problem, rule: Rule, gradient_mapping: bool | None, **settings: Any
) -> tuple[ProjectedOptimizer, Tensor]:
    x = problem.start().requires_grad_()
    optimizer = ProjectedOptimizer(
        [x],
        rule.inner,
        constraint=problem.constraint,
        param_ndim=len(problem.shape),
        gradient_mapping=gradient_mapping,
        lr=rule.first_lr(problem),
        **settings,
    )
    return optimizer, x


def step(
    optimizer: optim.Optimizer, x: Tensor, problem: Problem, noise: Tensor | float = 0.0
) -> None:
    def closure() -> float:  # LBFGS without a line search reads no loss
        x.grad = problem.gradient(x.detach()) + noise
        return 0.0

    optimizer.step(closure)


def stalled(trace: list[tuple[int, float]], steps: int) -> bool:
    recent = [residual for _, residual in trace[-(steps // EVERY) :]]
    full = len(recent) == steps // EVERY
    return full and max(recent) - min(recent) <= 1e-3 * min(recent)


# With noise

NOISE_STEPS, SIGMAS = 1500, (0.1, 1.0, 10.0)


class Noisy(NamedTuple):
    """Of each noise level: the objective, and f - f*, over those of plain projection."""

    objective: list[float]
    suboptimality: list[float]


def noisy(
    problem: Problem,
    rule: Rule,
    gradient_mapping: bool | None,
    seeds: int,
    steps: int,
    **settings: Any,
) -> Tensor:
    """Mean objectives after `steps` steps, over all rows and seeds: (sigmas, 2), f and f - f*.

    The noise is Gaussian; its deviation is sigma times the rms of the gradient at the solution.
    """
    all_rows, scale = with_noise(problem, seeds)
    generator = torch.Generator().manual_seed(2)
    first_lr = rule.first_lr(problem)
    optimizer, x = make(all_rows, rule, gradient_mapping, **settings)
    for done in range(steps):
        optimizer.param_groups[0]["lr"] = first_lr * 0.01 ** (done / steps)
        noise = scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step(optimizer, x, all_rows, noise)
    f = all_rows.objective(x.detach())
    both = torch.stack([f, f - all_rows.best], 1)
    return both.reshape(-1, len(SIGMAS), 2).mean(0)


def with_noise(problem: Problem, seeds: int) -> tuple[Problem, Tensor]:
    """Rows for each noise level and seed, and the deviation of the noise in each, as a column."""
    rows = problem.repeated(seeds * len(SIGMAS))
    sigma = torch.tensor(SIGMAS, dtype=torch.float64).repeat(len(problem.t) * seeds)
    return rows, sigma.reshape(-1, *[1] * len(problem.shape)) * rms_at_best(rows)


def rms_at_best(problem: Problem) -> Tensor:
    """The rms of the gradient at the solution, of each row."""
    gradient = problem.gradient(problem.at_best.reshape(-1, *problem.shape))
    return norm(gradient) / math.sqrt(gradient[0].numel())


def compared(
    problem: Problem,
    rule: Rule,
    mapping: bool | None,
    seeds: int,
    steps: int,
    each: Sequence[dict[str, Any]] = ({},),
) -> list[Noisy]:
    """`mapping`, with each of the settings, against plain projection, with the same noise."""
    plain = noisy(problem, rule, False, seeds, steps)
    ratios = (noisy(problem, rule, mapping, seeds, steps, **one) / plain for one in each)
    return [Noisy(*ratio.T.tolist()) for ratio in ratios]


# Candidates for the step of the mapping

Step = Callable[[Tensor, Tensor, float, float], Tensor]  # of x, g, lr and L: one e per row


def norm(x: Tensor) -> Tensor:
    """Of each row, as a column."""
    return x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))


def reaching(reach: float) -> Step:
    return lambda x, g, lr, L: reach * norm(x) / norm(g)


STEP_RULES: dict[str, Step | None] = {
    "(plain)": None,
    "lr": lambda x, g, lr, L: torch.full_like(norm(x), lr),
    "lr / rms(g)": lambda x, g, lr, L: lr * math.sqrt(x[0].numel()) / norm(g),
    "1 / L": lambda x, g, lr, L: torch.full_like(norm(x), 1 / L),
    **{f"{r:g} \\|x\\| / \\|g\\|": reaching(r) for r in (0.01, 0.1, 1.0, 10.0)},
}


def candidate(problem: Problem, rule: Rule, e: Step | None, steps: int) -> list[float]:
    """With `e` in the mapping: the residual without noise; with noise, (f - f*) / f* by sigma."""
    x = bare(problem, rule, e, steps, rule.tenfold, 0.0)
    rows, scale = with_noise(problem, 2)
    ends = bare(rows, rule, e, NOISE_STEPS, NOISE_STEPS / 2, scale)
    excess = ((rows.objective(ends) - rows.best) / rows.best).reshape(-1, len(SIGMAS)).mean(0)
    return [float(problem.residual(x).amax()), *excess.tolist()]


def bare(
    problem: Problem,
    rule: Rule,
    e: Step | None,
    steps: int,
    tenfold: float,
    scale: Tensor | float,
) -> Tensor:
    """Where the steps end, written without the library's optimizers."""
    x = problem.start().requires_grad_()
    first_lr, L = rule.first_lr(problem), problem.largest_eigenvalue
    optimizer = rule.inner([x], lr=first_lr)
    generator = torch.Generator().manual_seed(3)
    for done in range(steps):
        lr = optimizer.param_groups[0]["lr"] = first_lr * 0.1 ** (done / tenfold)
        with torch.no_grad():
            g = problem.gradient(x)
            g = g + scale * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            if e is not None:
                y = x - e(x, g, lr, L) * g
                g = g + (y - problem.constraint.project(y)) / e(x, g, lr, L)
        x.grad = g
        optimizer.step()
        problem.constraint.project_(x.detach())
    return x.detach()
