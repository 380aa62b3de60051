"""Rows within bounds, with a weighted sum: the nearest one, and the cheapest one.

The functions see float64 tensors with two dims, of rows or to broadcast against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import BLOCK, in_blocks
from rai_toolbox.constraints.kernels.roots import Function, root
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, noise

_WIDTH = BLOCK // 4  # columns per piece: torch sums so many in one thread, always in one order
_SHIFTS = 3  # each gains 52 bits: enough for entries 1e40 times as large as what is left of them


def nearest_in_section(
    x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:
    """Project float64 rows onto ``{weight . x = total, lower <= x <= upper}``.

    All tensors have two dims; bounds may be infinite. A shift of x along the weight changes
    nothing, so that x is shifted by the root found, and the root of what is left is found: then
    its precision is that of the result, however far away x is.
    """
    for _ in range(_SHIFTS):
        with torch.no_grad():
            f = balance(x, weight, total, lower, upper)
            low, high = _bracket(f, x, weight, lower, upper)
            t = root(f, low, high, torch.zeros_like(low))
        x = x - t * weight
    if torch.is_grad_enabled() and x.requires_grad:
        x = x - _last_step(x, weight, total, lower, upper) * weight
    return x.clamp(lower, upper)


def balance(x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Function:
    """``t -> weight . clamp(x - t weight, lower, upper) - total``, and its slope."""

    def f(t: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, size = -total, torch.zeros_like(t), total.abs()
        for part, w, low, high in pieces(x, weight, lower, upper):
            moved = part - t * w
            terms = w * moved.clamp(low, high)
            free = (moved > low) & (moved < high)
            value = value + terms.sum(1, keepdim=True)
            size = size + terms.abs().sum(1, keepdim=True)
            slope = slope - (w * w * free).sum(1, keepdim=True)
        size = size + 2 * (t * slope).abs()  # of what cancels where x is moved far
        return torch.where(value.abs() <= noise(x.shape[1]) * size, 0.0, value), slope

    return f


def _bracket(
    f: Function, x: Tensor, weight: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Between the first and the last kink, or where the line goes on that leads there."""
    low, high = torch.full_like(x[:, :1], inf), torch.full_like(x[:, :1], -inf)
    fall, rise = torch.zeros_like(low), torch.zeros_like(low)  # slopes before and after all kinks
    for part, w, bottom, top in pieces(x, weight, lower, upper):
        first = torch.where(w > 0, top, bottom)
        last = torch.where(w > 0, bottom, top)
        for end in (first, last):
            kink = (part - end) / w
            low = torch.minimum(low, kink.where(kink.isfinite(), inf).amin(1, keepdim=True))
            high = torch.maximum(high, kink.where(kink.isfinite(), -inf).amax(1, keepdim=True))
        square = (w * w).expand_as(part)
        fall = fall - (square * first.isinf()).sum(1, keepdim=True)
        rise = rise - (square * last.isinf()).sum(1, keepdim=True)
    low, high = low.where(low <= high, 0.0), high.where(low <= high, 0.0)
    short, over = f(low)[0].clamp(max=0), f(high)[0].clamp(min=0)
    return (
        torch.where(fall < 0, low - short / fall, low),
        torch.where(rise < 0, high - over / rise, high),
    )


def _last_step(x: Tensor, weight: Tensor, total: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The root in closed form, given which entries are free: what autograd differentiates."""
    free = (x > lower) & (x < upper)
    square = (weight * weight * free).sum(1, keepdim=True)
    value = (weight * x.clamp(lower, upper)).sum(1, keepdim=True) - total
    return torch.where(square > 0, value / square.where(square > 0, 1.0), 0.0)


def fill(price: Tensor, room: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Fill rooms in the order of rising prices until the amount is used; which was the last."""
    order = price.argsort(dim=1, stable=True)
    room = torch.minimum(room, amount).gather(1, order)
    used = room.cumsum(1)
    before = torch.nn.functional.pad(used[:, :-1], (1, 0))
    filled = torch.minimum((amount - before).clamp(min=0), room)
    last = (used < amount).sum(1, keepdim=True).clamp(max=room.shape[1] - 1)
    return torch.empty_like(filled).scatter_(1, order, filled), order.gather(1, last)


def bounds(
    lower: float | Tensor | None, upper: float | Tensor | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bounds as they count, in float64, with two dims; infinite where a side is open."""
    low, high = -inf if lower is None else lower, inf if upper is None else upper
    return wide(as_rounded(low, dtype, like), like), wide(as_rounded(high, dtype, like), like)


def beyond(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """By how much each row is outside the bounds; 0 inside."""
    return torch.maximum(lower - x, x - upper).clamp(min=0).amax(1)


def wide(setting: float | Tensor | None, like: Tensor) -> Tensor:
    """A setting in float64 beside `like`, with two dims."""
    tensor = as_wide(setting, like)
    return tensor if tensor.ndim == 2 else tensor.reshape(1, 1)


def pieces(x: Tensor, *settings: Tensor) -> Iterator[list[Tensor]]:
    """Pieces of the columns, of a width that is always summed in the same order."""
    width = _WIDTH if in_blocks(x) else x.shape[1]
    for start in range(0, x.shape[1], width):
        at = slice(start, start + width)
        yield [t[:, at] if t.shape[1] > 1 else t for t in (x, *settings)]
