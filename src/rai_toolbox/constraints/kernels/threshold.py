"""The threshold that brings the sum of rows down: projection onto simplices and L1 balls."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import in_blocks, needs_grad, wide_dtype
from rai_toolbox.constraints.kernels.rounding import noise

_GROUP = 16  # so many entries stand behind the largest of them, where a first guess is made


def lowered(v: Tensor, total: float | Tensor) -> Tensor:
    r"""``max(v - t, 0)`` with the t for which each row sums to `total`; shape (N, n), total >= 0.

    The sum is a convex, decreasing, piecewise linear function of t, whose root Newton's method
    finds from the left: each step solves for the entries that are above the threshold now
    (Michelot, 1986; Condat, 2016). With the excess h and the number g of entries above, convexity
    gives ``h'/h + g'/g <= 1`` after a step. As g falls from n to 1 at most, K steps leave no more
    than ``(1 - n^(-1/K))^K`` of an excess that was ``n total`` at most, whatever the values are: so
    many steps are taken as are enough for the dtype. Where a look at the result is free the loop
    ends when rounding hides the excess, mostly after 1 to 4 steps.

    The row's maximum is taken off first, so that float32 is as good as the entries are: those
    above the threshold are then no larger than `total`. A last factor, near 1, makes the sum right
    to within the rounding of its terms. Autograd can differentiate the result.
    """
    wide = wide_dtype(v)
    with torch.no_grad():
        top = v.amax(1, keepdim=True)
        below = v - top
        narrow = total.to(v.dtype) if isinstance(total, Tensor) else total
        t = _threshold(below, narrow)
    if needs_grad(v) or not in_blocks(v):
        below = v - top
        t = with_value(t, _newton(below, t, narrow)[0])
        over = below - t
    else:
        over = below.sub_(t)
    with torch.no_grad():  # the digits that t has no room for, and what the loop has left over
        missed = total - over.clamp(min=0).sum(1, keepdim=True, dtype=wide)
        rest = missed / _number_above(over).clamp(min=1)
    soft = over.add_(rest.to(v.dtype)).clamp_(min=0)
    with torch.no_grad():
        reached = soft.sum(1, keepdim=True, dtype=wide)
        factor = torch.where(reached > 0, total / reached.where(reached > 0, 1.0), 1.0)
    return soft.mul_(factor.to(v.dtype))


def _threshold(below: Tensor, total: float | Tensor) -> Tensor:
    size, eps = below.shape[1], torch.finfo(below.dtype).eps
    t = torch.maximum(below.sum(1, keepdim=True) / size - total / size, below.new_zeros(()) - total)
    groups = size // _GROUP
    if groups and in_blocks(below):
        # The threshold of some entries is never above that of all; the largest are mostly enough.
        some = below[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amax(1)
        t = _iterated(some, t, total, eps, size)
    return _iterated(below, t, total, eps, size)


def _iterated(v: Tensor, t: Tensor, total: float | Tensor, eps: float, size: int) -> Tensor:
    enough = max(eps, noise(size))
    for _ in range(steps_needed(size, eps / 4)):
        before, (t, excess) = t, _newton(v, t, total)
        t = torch.maximum(t, before)
        if in_blocks(v) and not bool(((t > before) & (excess > enough * total)).any()):
            break
    return t


def _newton(v: Tensor, t: Tensor, total: float | Tensor) -> tuple[Tensor, Tensor]:
    """The threshold that is right for the entries above t; the excess of the sum at t."""
    over = (v - t).clamp(min=0)
    excess = over.sum(1, keepdim=True) - total
    return t + excess / _number_above(over).clamp(min=1), excess  # none is above if total is 0


def _number_above(over: Tensor) -> Tensor:
    """The number of entries above 0 of each row."""
    number: Tensor = torch.gt(over.detach(), 0).sum(1, keepdim=True)
    return number


def steps_needed(size: int, precision: float) -> int:
    """How many steps bring an excess of ``size * total`` down to ``precision * total``."""
    steps = 1
    while (1 - size ** (-1 / steps)) ** steps > precision / size:
        steps += 1
    return steps
