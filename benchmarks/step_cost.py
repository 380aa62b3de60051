"""What a constraint adds to the step of the optimizer that it is wrapped around.

All alternatives of a case work on the same parameters and gradients, so they differ in nothing but
the step. The gradients point outwards: at each step, about a third of the elements leave the box
and are clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from memory import peak_bytes
from timing import Progress, compare, measure, silent
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from rai_toolbox.optim import ClampedParameterOptimizer

LOW, HIGH = -1.0, 1.0
LR = 1e-4  # tiny: what is timed must not change while it is timed

BARE = "bare"
BARE_AGAIN = "bare, again"  # a second bare optimizer: how far its ratio is from 1 is the noise
OURS = "ours, two bounds"
OURS_ONE = "ours, one bound"
LOOP = "loop, two bounds"
LOOP_ONE = "loop, one bound"
FOREACH = "foreach, two bounds"

# Where a bare optimizer differs by more from another, nothing has been measured: its median ratio,
# and the distance of the quartiles.
NOISE, SPREAD = 0.03, 0.2

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """An inner optimizer on `count` tensors of `numel` floats, and the ratios to stay below."""

    inner: type[SGD] | type[AdamW]
    count: int
    numel: int
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.inner.__name__}, {self.count:,} x {self.numel:,}"


CASES = [
    Case(SGD, 2_000, 1_000, {OURS: 1.15}),
    Case(SGD, 1, 16_000_000, {OURS: 1.75}),
    Case(AdamW, 2_000, 1_000, {OURS: 1.05}),
    Case(AdamW, 1, 16_000_000),
]


def parameters(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(case.count):
        param = torch.randn(case.numel, generator=generator)
        param.grad = -param
        params.append(param.requires_grad_())
    return params


def loop(optimizer: Optimizer, params: list[Tensor], **bounds: Any) -> Step:
    """What one writes by hand."""

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            for param in params:
                param.clamp_(**bounds)

    return step


def foreach(optimizer: Optimizer, params: list[Tensor]) -> Step:
    """The same by one call for all tensors a bound; it passes over the memory twice."""

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_clamp_min_(params, LOW)
            torch._foreach_clamp_max_(params, HIGH)

    return step


def alternatives(case: Case, params: list[Tensor]) -> dict[str, Step]:
    def bare() -> Optimizer:
        return case.inner(params, lr=LR)

    def ours(**bounds: Any) -> Optimizer:
        return ClampedParameterOptimizer(params, case.inner, lr=LR, **bounds)

    return {
        BARE: bare().step,
        BARE_AGAIN: bare().step,
        OURS: ours(clamp_min=LOW, clamp_max=HIGH).step,
        LOOP: loop(bare(), params, min=LOW, max=HIGH),
        FOREACH: foreach(bare(), params),
        OURS_ONE: ours(clamp_max=HIGH).step,
        LOOP_ONE: loop(bare(), params, max=HIGH),
    }


def run(case: Case, *, budget_s: float, progress: Progress = silent) -> dict[str, Any]:
    """Times, ratios to bare and peak memory of all alternatives of a case, as plain data."""
    params = parameters(case)
    steps = alternatives(case, params)
    rows = compare(measure(steps, budget_s=budget_s, progress=progress), BARE)
    for name, row in rows.items():
        row["target"] = case.targets.get(name)
        row["peak_bytes"] = peak_bytes(steps[name])
    low, high = rows[BARE_AGAIN]["ratio_quartiles"]
    return {
        "case": case.name,
        "inner": case.inner.__name__,
        "tensors": case.count,
        "numel": case.numel,
        "largest_parameter_bytes": max(p.nbytes for p in params),
        "noisy": abs(rows[BARE_AGAIN]["ratio"] - 1) > NOISE or high - low > SPREAD,
        "rows": rows,
    }
