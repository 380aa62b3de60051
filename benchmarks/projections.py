"""The cost of a projection, compared with textbook code and with optax.

The rows are standard normal numbers in float32, and the sets are small enough for every row to be
outside. All alternatives read the same tensor and return a new one. Sets whose cost is memory
traffic work in place, and are compared with two `copy_` of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from timing import Progress, compare, measure, silent
from torch import Tensor

from rai_toolbox.constraints import Box, Constraint, L1Ball, L2Ball, LinfBall, Simplex

SIZES = [(1024, 1000), (64, 100_000), (1, 10_000_000)]
TEXTBOOK, EAGER, COMPILED, OPTAX = "sort and cumsum", "ours", "ours, compiled", "optax, jit"
FLOOR, IN_PLACE, FUSED = "two copy_", "ours, in place", "ours, in place, compiled"

FASTER = {EAGER: 2.0, COMPILED: 5.0}  # the least of (textbook / ours)
WITHIN = 1.3  # the most of (ours / two copies)


@dataclass(frozen=True)
class Case:
    """A set, and the size of a batch of rows."""

    constraint: Constraint
    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"{type(self.constraint).__name__}, {self.rows:,} x {self.columns:,}"


SORTED = [Case(s, *size) for s in (Simplex(), L1Ball(1.0)) for size in SIZES]
STREAMED = [
    Case(s, *size) for s in (L2Ball(1.0), LinfBall(0.1), Box(-0.1, 0.2)) for size in SIZES[1:]
]


def textbook_simplex(x: Tensor) -> Tensor:
    """Held et al. (1974), in its usual form."""
    ordered = x.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - 1.0
    number = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    last = (ordered * number > excess).sum(1, keepdim=True)
    threshold = excess.gather(1, last - 1) / last
    return (x - threshold).clamp(min=0)


def textbook_l1(x: Tensor) -> Tensor:
    """Duchi et al. (2008), for rows outside the ball."""
    return textbook_simplex(x.abs()) * x.sign()


def optax_projection(case: Case, x: Tensor) -> Callable[[], object]:
    import jax
    from optax import projections

    array = jax.numpy.asarray(x.numpy())
    one = {
        Simplex: projections.projection_simplex,
        L1Ball: projections.projection_l1_ball,
    }[type(case.constraint)]
    project = jax.jit(jax.vmap(one) if case.rows > 1 else lambda a: one(a[0])[None])
    return lambda: project(array).block_until_ready()


def run_sorted(case: Case, *, budget_s: float, progress: Progress = silent) -> dict[str, Any]:
    """Sets with a threshold: ours, eager and compiled, the textbook code, and optax."""
    x = torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(0))
    textbook = textbook_simplex if isinstance(case.constraint, Simplex) else textbook_l1
    torch.compiler.reset()
    compiled = torch.compile(case.constraint.project, dynamic=False)
    with torch.no_grad():
        steps: dict[str, Callable[[], object]] = {
            TEXTBOOK: lambda: textbook(x),
            EAGER: lambda: case.constraint.project(x),
            COMPILED: lambda: compiled(x),
            OPTAX: optax_projection(case, x),
        }
        exact = textbook(x.double())
        answers = {name: torch.tensor(numpy.asarray(step())) for name, step in steps.items()}
        error = {name: float((y.double() - exact).abs().max()) for name, y in answers.items()}
        rows = compare(measure(steps, budget_s=budget_s, progress=progress), TEXTBOOK)
    for name, row in rows.items():
        row["target"] = FASTER.get(name)
        row["error"] = error[name]
    return {"case": case.name, "faster": True, "rounds": rows[EAGER]["rounds"], "rows": rows}


def run_streamed(case: Case, *, budget_s: float, progress: Progress = silent) -> dict[str, Any]:
    """Sets whose cost is memory traffic: in place, compared with two copies."""
    start = torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(0))
    inside, outside, other = start.clone(), start.clone(), torch.empty_like(start)

    def copies() -> None:
        other.copy_(start)
        other.copy_(start)

    def project_far() -> None:  # the result is inside, so each call starts from a copy
        outside.copy_(start)
        case.constraint.project_(outside)

    torch.compiler.reset()
    compiled = torch.compile(case.constraint.project_, dynamic=False)
    steps: dict[str, Callable[[], object]] = {
        FLOOR: copies,
        IN_PLACE: lambda: case.constraint.project_(inside),
        FUSED: lambda: compiled(inside),
        "one copy_": lambda: other.copy_(start),
        "one copy_, then ours": project_far,
    }
    with torch.no_grad():
        rows = compare(measure(steps, budget_s=budget_s, progress=progress), FLOOR)
    for name, row in rows.items():
        row["target"] = WITHIN if name in (IN_PLACE, FUSED) else None
    return {"case": case.name, "faster": False, "rounds": rows[FLOOR]["rounds"], "rows": rows}
