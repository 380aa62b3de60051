"""The line search: a step that lowers the loss enough, and its slope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import copysign, inf, isfinite, nan, sqrt

from torch import Tensor

from rai_toolbox.optim.lbfgs.memory import dot

_ARMIJO, _WOLFE = 1e-3, 0.9
_MOST_TRIALS = 20


@dataclass(eq=False, repr=False)
class Place:
    """What is known of a place on a line ``x + t d``."""

    time: float
    change: float
    """Of the loss, from the start of the line on."""

    slope: float


@dataclass(eq=False, repr=False)
class Trial:
    """A point at which the closure has been evaluated."""

    x: Tensor
    loss: float
    gradient: Tensor


@dataclass(eq=False, repr=False)
class Found:
    """A trial, and its place on the line."""

    trial: Trial
    place: Place


def search(
    start: Trial,
    direction: Tensor,
    first: float,
    longest: Callable[[], float],
    trial_at: Callable[[float], Trial | None],
    precision: float,
) -> Found | None:
    """A trial on a line with a lower loss and a flatter slope, by cubic interpolation.

    The strong Wolfe conditions hold for it, unless it is the `longest` step, at least 1, or trials
    have come to an end: `trial_at` returns None. None if no trial is lower. A trial with a
    loss or a gradient that is not finite counts as too far away.

    Differences of losses that are within rounding, as the relative `precision` of a loss says, are
    computed from the slopes instead: these are the approximate Wolfe conditions of Hager & Zhang
    (2005).
    """
    initial = Place(0.0, 0.0, dot(start.gradient, direction))
    previous, low, high = initial, initial, None
    lowest = None
    end = 1.0 if first <= 1 else longest()
    time, noise = min(first, end), precision * abs(start.loss)
    for _ in range(_MOST_TRIALS):
        trial = trial_at(time)
        if trial is None:
            break
        place = Place(time, trial.loss - start.loss, dot(trial.gradient, direction))
        if abs(place.change) <= noise:
            place.change = time * (initial.slope + place.slope) / 2
        if not isfinite(place.change + place.slope):
            place.change = inf
        if place.change > _ARMIJO * time * initial.slope or place.change >= low.change:
            high = place
        else:
            lowest = Found(trial, place)
            if abs(place.slope) <= -_WOLFE * initial.slope:
                break
            if high is None and place.slope < 0 and time >= end:
                end = longest()
                if time >= end:
                    break
            previous, low = low, place
            if place.slope * ((inf if high is None else high.time) - time) > 0:
                high = previous
        time = min(_beyond(previous, low), end) if high is None else _between(low, high)
        if time in (low.time, place.time):
            break  # they differ by rounding
        del trial  # its vectors, before those of the next one are made
    return lowest


def _beyond(previous: Place, low: Place) -> float:
    """A larger step: 1.1 to 4 times the last way further."""
    way = low.time - previous.time
    guess = _minimum_of_cubic(previous, low)
    if not guess > low.time:
        return low.time + 4 * way
    return min(max(guess, low.time + 1.1 * way), low.time + 4 * way)


def _between(low: Place, high: Place) -> float:
    """A step between two, not too near to either."""
    way = high.time - low.time
    if high.change == inf:
        return low.time + 0.1 * way
    share = (_minimum_of_cubic(low, high) - low.time) / way
    return low.time + (min(max(share, 0.01), 0.9) if isfinite(share) else 0.5) * way


def _minimum_of_cubic(a: Place, b: Place) -> float:
    """Where the cubic with the values and slopes of two places has its minimum; NaN if nowhere."""
    way = b.time - a.time
    mean = a.slope + b.slope - 3 * (b.change - a.change) / way
    square = mean * mean - a.slope * b.slope
    if not square >= 0:
        return nan
    root = copysign(sqrt(square), way)
    divisor = b.slope - a.slope + 2 * root
    return b.time - way * (b.slope + root - mean) / divisor if divisor else nan
