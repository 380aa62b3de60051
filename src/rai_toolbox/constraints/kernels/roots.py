"""Roots of monotone functions, one for each row, without synchronizing with a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import is_eager

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points of shape (N, 1) to values and slopes of that shape."""

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


def root(f: Function, low: Tensor, high: Tensor, start: Tensor | None = None) -> Tensor:
    """Root of a continuous, non-increasing function of one number, for each row.

    Each pass tries a Newton step, or else the mean of the bracket, and then the number in the
    middle of the floating-point numbers of the bracket. The bracket holds fewer than 2^b of them
    (b = 64 for float64), and at the middle this number is halved: after at most b passes the
    bracket is one number, or two neighbors, whatever its ends were. So a fixed number of passes
    is enough, and none of them reads a value on the host; on a CPU, where reading costs nothing,
    the loop ends as soon as all rows have converged. Piecewise linear functions converge within a
    few passes.

    Autograd differentiates the root with respect to what `f` depends on.

    Parameters
    ----------
    f : callable
        Gives values and slopes, both of shape (N, 1). A value of 0 settles its row, so `f` is to
        round to 0 what the noise of its own sums hides; see `without_noise`.
    low, high : Tensor, shape (N, 1)
        Finite, with ``f(low) >= 0 >= f(high)``. Where this does not hold, the result is the end
        that comes closest to a root, or its neighbor.
    start : Tensor, shape (N, 1), optional
        What to try first, if it is inside the bracket.

    Returns
    -------
    Tensor, shape (N, 1)
        The root, or the largest number found below it.
    """
    found = _found(f, low, high, start)
    if not torch.is_grad_enabled():
        return found
    # Newton's step, which is 0 but for rounding: it has the derivative of the root.
    value, slope = f(found)
    step = torch.where(slope < 0, value / slope.where(slope < 0, 1.0), 0.0)
    return with_value(found, found - step)


def without_noise(value: Tensor, noise: Tensor) -> Tensor:
    """`value`, with 0 for what is not above the noise; its derivative stays."""
    return torch.where(value.abs() <= noise, value - value.detach(), value)


@torch.no_grad()
def _found(f: Function, low: Tensor, high: Tensor, start: Tensor | None) -> Tensor:
    guess = low / 2 + high / 2 if start is None else start.clamp(low, high)
    for _ in range(torch.finfo(low.dtype).bits):
        value, slope = f(guess)
        low, high = _narrowed(low, high, guess, value)
        if is_eager(low) and bool((low.nextafter(high) >= high).all()):
            break
        middle = _middle(low, high)
        low, high = _narrowed(low, high, middle, f(middle)[0])
        newton = guess - value / slope
        inside = (newton > low) & (newton < high)  # not so for NaN, of a slope of 0
        guess = torch.where(inside, newton, low / 2 + high / 2)
    return low


def _narrowed(low: Tensor, high: Tensor, t: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(value >= 0, t, low), torch.where(value <= 0, t, high)


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """The number in the middle of all floating-point numbers from `low` to `high`."""
    a, b = _ordinal(low), _ordinal(high)
    return _ordinal((a & b) + ((a ^ b) >> 1), low.dtype)  # their mean, which cannot overflow


def _ordinal(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Number the floating-point numbers in their order; or back, to `dtype`.

    Read as integers, the numbers of a sign are in the order of their magnitudes: those below 0
    have all but the sign bit flipped, which is its own inverse.
    """
    bits = x.view(_INTEGERS[x.dtype]) if dtype is None else x
    flipped = torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
    return flipped if dtype is None else flipped.view(dtype)
