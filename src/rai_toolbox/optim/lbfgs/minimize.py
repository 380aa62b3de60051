"""The iterations of L-BFGS inside a set, from a start to a reason to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.optim.lbfgs.cauchy import cauchy_point
from rai_toolbox.optim.lbfgs.flat import FlatProblem
from rai_toolbox.optim.lbfgs.memory import Memory, dot
from rai_toolbox.optim.lbfgs.search import Trial, search
from rai_toolbox.optim.lbfgs.spg import model_minimum
from rai_toolbox.optim.lbfgs.subspace import longest_step, subspace_minimum

_SHARE = 1e-6  # of the loss: what a first step is to change at least

REASONS = (
    "gradient",
    "change",
    "max_iter",
    "max_eval",
    "no decrease",
    "not finite",
    "closure raised",
)
"""Why iterations end."""


class Minimizer:
    """The iterations on a problem, with a memory that they read and write."""

    def __init__(self, problem: FlatProblem, memory: Memory, settings: Mapping[str, Any]) -> None:
        self._problem, self._memory, self._settings = problem, memory, settings
        self._bounds = problem.bounds()
        self.iterations = 0

    def run(self) -> str:
        """Leave the parameters at the lowest point found; return why there is no more iteration."""
        problem, settings = self._problem, self._settings
        now = problem.evaluate(problem.project_(problem.point()))
        finite = isfinite(now.loss) and bool(now.gradient.isfinite().all())
        status = "" if finite else self._failure("not finite")
        while not status:
            if self._residual(now) <= settings["tolerance_grad"]:
                status = "gradient"
            elif self.iterations == settings["max_iter"]:
                status = "max_iter"
            elif problem.ended:
                status = "max_eval"
            else:
                new = self._next(now)
                if new is None:
                    status = self._failure("no decrease")
                    break
                if -new.change <= settings["tolerance_change"] * abs(now.loss):
                    status = "change"
                now = new
        problem.restore_(now)
        return status

    def _failure(self, otherwise: str) -> str:
        if self._problem.error is not None:
            return "closure raised"
        return "max_eval" if self._problem.ended else otherwise

    def _next(self, now: Trial) -> Trial | None:
        """The next iterate, which is lower; None if none is found, with all pairs forgotten."""
        new = self._searched(now)
        if new is None and self._memory.count > 0 and not self._problem.ended:
            self._memory.clear()  # may have been wrong: once more along the gradient
            new = self._searched(now)
        if new is not None:
            self.iterations += 1
        return new

    def _searched(self, now: Trial) -> Trial | None:
        memory, bounds = self._memory, self._bounds
        target = self._target(now)
        direction = target - now.x
        start = replace(now, time=0.0, change=0.0, slope=dot(now.gradient, direction))
        if not start.slope < 0:
            return None
        is_first = memory.count == 0  # and the model has no scale
        length = dot(direction, direction) ** 0.5
        first = min(1.0, _first_length(now) / length) if is_first else 1.0

        def longest() -> float:
            if is_first or bounds is None:
                return 1.0
            return longest_step(now.x, direction, *bounds)

        def trial_at(time: float) -> Trial | None:
            if self._problem.ended:
                return None
            x = target if time == 1 else torch.lerp(now.x, target, time)
            return self._problem.evaluate(x if time == 1 else self._projected_(x))

        first *= float(self._settings["lr"])
        new = search(start, direction, first, longest, trial_at, self._problem.precision)
        if new is not None:
            step, change = new.x - now.x, new.gradient - now.gradient
            if not bool(step.any()):
                return None  # all that is left is rounding
            product = dot(step, change)
            if product > -torch.finfo(step.dtype).eps * new.time * start.slope:
                memory.add(step, change, product)
        return new

    def _target(self, now: Trial) -> Tensor:
        """Where to search: about the minimum over the set of the model of the memory."""
        x, gradient, memory = now.x, now.gradient, self._memory
        if memory.count == 0:
            scale = max(1.0, _first_length(now) / dot(gradient, gradient) ** 0.5)
            return self._projected_(torch.sub(x, gradient, alpha=scale))
        if self._bounds is None:
            return model_minimum(x, gradient, memory, self._projected_)
        cauchy = cauchy_point(x, gradient, *self._bounds, memory)
        return subspace_minimum(x, gradient, *self._bounds, cauchy, memory)

    def _residual(self, now: Trial) -> float:
        """``|x - P(x - g)|``, of the largest entry."""
        if self._bounds is None:
            away = now.x - self._projected_(now.x - now.gradient)
        else:  # without a sum, in which a small gradient may be lost
            lower, upper = self._bounds
            away = torch.clamp(now.gradient, now.x - upper, now.x - lower)
        lowest, highest = away.aminmax()
        return float(torch.maximum(-lowest, highest))

    def _projected_(self, x: Tensor) -> Tensor:
        return self._problem.project_(x) if self._bounds is None else x.clamp_(*self._bounds)


def _first_length(now: Trial) -> float:
    """The length of the first step: 1, but longer where that would hardly change the loss."""
    slope: float = dot(now.gradient, now.gradient) ** 0.5
    return max(1.0, _SHARE * abs(now.loss) / slope)
