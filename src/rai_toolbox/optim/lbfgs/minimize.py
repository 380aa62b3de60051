"""The iterations of L-BFGS inside a set, from a start to a reason to end."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.optim.lbfgs.cauchy import cauchy_point
from rai_toolbox.optim.lbfgs.flat import FlatProblem
from rai_toolbox.optim.lbfgs.memory import Memory, dot
from rai_toolbox.optim.lbfgs.search import Found, Trial, search
from rai_toolbox.optim.lbfgs.spg import model_minimum
from rai_toolbox.optim.lbfgs.subspace import longest_step, subspace_minimum
from rai_toolbox.optim.settings import TINY

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
                found = self._next(now)
                if found is None:
                    status = self._failure("no decrease")
                    break
                if -found.place.change <= settings["tolerance_change"] * abs(now.loss):
                    status = "change"
                now = found.trial
        problem.restore_(now)
        return status

    def _failure(self, otherwise: str) -> str:
        if self._problem.error is not None:
            return "closure raised"
        return "max_eval" if self._problem.ended else otherwise

    def _next(self, now: Trial) -> Found | None:
        """The next iterate, which is lower; None if none is found, with all pairs forgotten."""
        found = self._searched(now)
        if found is None and self._memory.count > 0 and not self._problem.ended:
            self._memory.clear()  # may have been wrong: once more along the gradient
            found = self._searched(now)
        if found is not None:
            self.iterations += 1
        return found

    def _searched(self, now: Trial) -> Found | None:
        problem, memory, bounds = self._problem, self._memory, self._bounds
        target = self._target(now)
        direction = target - now.x
        slope = dot(now.gradient, direction)
        if not slope < 0:
            return None
        is_first = memory.count == 0  # and the model has no scale

        def longest() -> float:
            if is_first or bounds is None:
                return 1.0
            return longest_step(now.x, direction, *bounds)

        def trial_at(time: float) -> Trial | None:
            if problem.ended:
                return None
            if time == 1:
                return problem.evaluate(target)
            return problem.evaluate(self._projected_(torch.lerp(now.x, target, time)))

        first = min(1.0, _first_length(now) / _length(direction)) if is_first else 1.0
        first *= float(self._settings["lr"])
        found = search(now, direction, first, longest, trial_at, problem.precision)
        if found is None:
            return None
        step = torch.sub(found.trial.x, now.x, out=direction)
        change = found.trial.gradient - now.gradient
        if _largest(step) == 0:
            return None  # all that is left is rounding
        product = dot(step, change)
        if product > -torch.finfo(step.dtype).eps * found.place.time * slope:
            memory.add(step, change, product)
        return found

    def _target(self, now: Trial) -> Tensor:
        """Where to search: about the minimum over the set of the model of the memory."""
        x, gradient, memory = now.x, now.gradient, self._memory
        if memory.count == 0:
            scale = max(1.0, _first_length(now) / _length(gradient))
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
            away = torch.minimum(now.gradient, now.x - lower).clamp_(min=now.x - upper)
        return _largest(away)

    def _projected_(self, x: Tensor) -> Tensor:
        return self._problem.project_(x) if self._bounds is None else x.clamp_(*self._bounds)


def _first_length(now: Trial) -> float:
    """The length of the first step: 1, but longer where that would hardly change the loss."""
    return max(1.0, _SHARE * abs(now.loss) / _length(now.gradient))


def _length(vector: Tensor) -> float:
    return max(float(dot(vector, vector) ** 0.5), TINY)


def _largest(vector: Tensor) -> float:
    lowest, highest = vector.aminmax()
    return float(torch.maximum(-lowest, highest))
