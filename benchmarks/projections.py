"""What a projection costs, beside what one would write or use otherwise.

The rows are standard normal numbers of float32, and the sets are small enough for every row to be
outside. All alternatives read the same tensor and give a new one, but for the sets whose cost is
that of memory traffic: these work in place, on values that stay outside however often they are
projected, and are compared with two `copy_` of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import Progress, compare, measure, silent
from torch import Tensor

from rai_toolbox.constraints import Box, Constraint, L1Ball, L2Ball, LinfBall, Simplex

SIZES = [(1024, 1000), (64, 100_000), (1, 10_000_000)]
TEXTBOOK, EAGER, COMPILED, OPTAX = "sort and cumsum", "ours", "ours, compiled", "optax, jit"
FLOOR = "two copy_"

# "Faster than the textbook by": the least ratio (textbook / ours).
FASTER = {EAGER: 2.0, COMPILED: 5.0}
WITHIN = 1.3  # of the two copies


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
    """Held et al. (1974), as it is mostly written."""
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
    """Thresholds: ours in eager mode and compiled, the textbook's, and optax."""
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
        error = {
            name: float((torch.as_tensor(y).double() - exact).abs().max())
            for name, y in [(n, f()) for n, f in steps.items() if n != OPTAX]
        }
        rows = compare(measure(steps, budget_s=budget_s, progress=progress), TEXTBOOK)
    for name, row in rows.items():
        row["times_faster"] = 1 / row["ratio"]
        row["target"] = FASTER.get(name)
        row["error"] = error.get(name)
    return {"case": case.name, "rows": rows}


def run_streamed(case: Case, *, budget_s: float, progress: Progress = silent) -> dict[str, Any]:
    """Sets whose cost is that of passes over memory: in place, beside two copies."""
    start = torch.randn(case.rows, case.columns, generator=torch.Generator().manual_seed(0))
    x, y = start.clone(), torch.empty_like(start)
    with torch.no_grad():

        def ours() -> None:
            case.constraint.project_(x)

        def copies() -> None:
            y.copy_(start)
            y.copy_(start)

        def outside() -> None:
            x.copy_(start)
            case.constraint.project_(x)

        rows = compare(
            measure(
                {
                    FLOOR: copies,
                    "ours, inside": ours,
                    "ours after a copy_": outside,
                    "one copy_": lambda: y.copy_(start),
                },
                budget_s=budget_s,
                progress=progress,
            ),
            FLOOR,
        )
    return {"case": case.name, "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(2)
    for case in SORTED:
        result = run_sorted(case, budget_s=8.0)
        print(
            result["case"],
            {
                n: (round(r["median_ms"], 2), round(r["times_faster"], 2), r["error"])
                for n, r in result["rows"].items()
            },
            flush=True,
        )
    for case in STREAMED:
        result = run_streamed(case, budget_s=4.0)
        print(
            result["case"],
            {
                n: (round(r["median_ms"], 2), round(r["ratio"], 2))
                for n, r in result["rows"].items()
            },
            flush=True,
        )
