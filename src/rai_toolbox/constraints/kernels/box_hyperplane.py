"""Rows within bounds and with a given weighted sum: the nearest one, and the cheapest one.

The functions take float64 tensors with two dims: rows, or settings that broadcast against them.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.roots import Function, root, without_noise
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, noise

_SHIFTS = 3  # each gains 52 bits: enough for entries 1e40 times as large as those of the result


def nearest_with_sum(
    x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Project rows onto ``{weight . x = total, lower <= x <= upper}``; bounds may be infinite.

    The result is ``clamp(x - t weight, lower, upper)``. To shift x along the weight changes no
    result. So x is shifted by the root t found, and the root that is left is found again: then
    the precision is that of the result, however far away x is.
    """
    for _ in range(_SHIFTS):
        f = _excess_of_sum(x, weight, total, lower, upper)
        t = root(f, *_bracket(f, x, weight, lower, upper), torch.zeros_like(total))
        x = x - t * weight
    return x.clamp(lower, upper)


def _excess_of_sum(
    x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor
) -> Function:
    """``t -> weight . clamp(x - t weight, lower, upper) - total``, and its slope."""

    def f(t: Tensor) -> tuple[Tensor, Tensor]:
        moved = x - t * weight
        terms = weight * moved.clamp(lower, upper)
        between = (moved > lower) & (moved < upper)
        slope = -(weight * weight * between).sum(1, keepdim=True)
        # What was added up, and what cancels where x is moved far.
        size = terms.abs().sum(1, keepdim=True) + total.abs() + 2 * (t * slope).abs()
        excess = terms.sum(1, keepdim=True) - total
        return without_noise(excess, noise(x.shape[1]) * size), slope

    return f


@torch.no_grad()
def _bracket(
    f: Function, x: Tensor, weight: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The first and the last kink; or farther, to where a line through them has its root."""
    first, last = torch.where(weight > 0, upper, lower), torch.where(weight > 0, lower, upper)
    kinks = torch.cat([(x - first) / weight, (x - last) / weight], 1)
    finite = kinks.isfinite()
    low = kinks.where(finite, inf).amin(1, keepdim=True)
    high = kinks.where(finite, -inf).amax(1, keepdim=True)
    low, high = low.where(low <= high, 0.0), high.where(low <= high, 0.0)
    # The slopes beyond the kinks, where only entries without a bound on that side move.
    fall, rise = (-(weight.square() * end.isinf()).sum(1, keepdim=True) for end in (first, last))
    short, over = f(low)[0].clamp(max=0), f(high)[0].clamp(min=0)
    return (
        torch.where(fall < 0, low - short / fall, low),
        torch.where(rise < 0, high - over / rise, high),
    )


def corner(gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The corner of the box that minimizes ``gradient . z``; where that is 0, what is nearest 0."""
    start = torch.zeros_like(gradient).clamp(lower, upper)
    return torch.where(gradient > 0, lower, upper).where(gradient != 0, start)


def fill_cheapest(price: Tensor, most: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Fill entries up to `most` in the order of rising prices, until the amount is used.

    Also returns the index of the entry that was filled last.
    """
    order = price.argsort(dim=1, stable=True)
    most = torch.minimum(most, amount).gather(1, order)
    used = most.cumsum(1)
    before = torch.nn.functional.pad(used[:, :-1], (1, 0))
    filled = torch.minimum((amount - before).clamp(min=0), most)
    last = (used < amount).sum(1, keepdim=True).clamp(max=most.shape[1] - 1)
    return torch.empty_like(filled).scatter_(1, order, filled), order.gather(1, last)


def moved_to_sum(
    x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor, p: float
) -> Tensor:
    """The point of ``{weight . z = total, lower <= z <= upper}`` nearest in the norm of order p.

    p is 1, 2 or inf, and rows of x are within the bounds. Where no point within them has that sum,
    the one that comes nearest to it, of those with the smallest distance.
    """
    missing = total - (weight * x).sum(1, keepdim=True)
    way, size, missing = weight.sign() * missing.sign(), weight.abs(), missing.abs()
    room = torch.where(way > 0, upper - x, x - lower).where(way != 0, 0.0)
    if p == 1:  # the entries that gain most
        most = torch.where(way != 0, size * room, 0.0)
        filled, _ = fill_cheapest(1 / size, most, missing)
        # (not by a division where all is used: it would not give the bound)
        return x + way * torch.where(filled < most, filled / size, room)
    # All entries at once, at the same speed or at that of the weight, until each is at its bound.
    speed = size if p == 2 else torch.ones_like(size)
    time, order = torch.where(way != 0, room / speed, 0.0).sort(1)
    gained = torch.where(way != 0, size * room, 0.0).gather(1, order).cumsum(1)
    rate = torch.where(way != 0, size * speed, 0.0).gather(1, order)
    rates = rate.flip(1).cumsum(1).flip(1)  # of those that move still
    stopped = (gained + time * (rates - rate) < missing).sum(1, keepdim=True)
    before, last = (stopped - 1).clamp(min=0), stopped.clamp(max=x.shape[1] - 1)
    already = torch.where(stopped > 0, gained.gather(1, before), 0.0)
    end = (missing - already) / rates.gather(1, last)
    end = torch.where(stopped == x.shape[1], inf, end)
    step = torch.minimum(end * speed, room)
    return x + way * step.where(way != 0, 0.0)


def rounded_bounds(
    lower: float | Tensor | None, upper: float | Tensor | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bounds rounded to `dtype`, in float64 with two dims; infinite where a side is open."""
    low, high = -inf if lower is None else lower, inf if upper is None else upper
    return as_rows(as_rounded(low, dtype, like), like), as_rows(as_rounded(high, dtype, like), like)


def outside_bounds(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """How far each row is outside the bounds; 0 inside."""
    return torch.maximum(lower - x, x - upper).clamp(min=0).amax(1)


def as_rows(setting: float | Tensor | None, like: Tensor) -> Tensor:
    """A setting in float64 on the device of `like`, with two dims."""
    tensor = as_wide(setting, like)
    return tensor if tensor.ndim == 2 else tensor.reshape(1, 1)
