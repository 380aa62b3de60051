"""The threshold that brings the sum of rows down: projection onto simplices and L1 balls."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import BLOCK, in_blocks, needs_grad, wide_dtype


def lowered(
    v: Tensor,
    total: float | Tensor,
    out: Tensor | None = None,
    buffer: Tensor | None = None,
) -> Tensor:
    r"""``max(v - t, 0)`` with the t for which each row sums to `total`; shape (N, n), total >= 0.

    The sum is a convex, decreasing, piecewise linear function of t, whose root Newton's method
    finds from the left: each step solves for the entries that are above the threshold now
    (Michelot, 1986; Condat, 2016). With the excess h and the number g of entries above, convexity
    gives ``h'/h + g'/g <= 1`` after a step. As g falls from n to 1 at most, K steps leave no more
    than ``(1 - n^(-1/K))^K`` of an excess that was ``n total`` at most, whatever the values are: so
    many steps are taken as are enough for the dtype. Where a look at the result is free the loop
    ends when the entries above stay the same, mostly after 2 to 5 steps.

    The row's maximum is taken off first, so that float32 is as good as the entries are: those
    above the threshold are then no larger than `total`. A last factor, near 1, makes the sum right
    to within the rounding of its terms. `out`, which may be v, takes the result; `out` and
    `buffer`, of the shape of v, spare new memory, which is slow to touch. Autograd can
    differentiate the result where none is given.
    """
    eager = in_blocks(v) and not needs_grad(v)
    if eager and buffer is None:
        buffer = torch.empty_like(v)
    with torch.no_grad():
        top = v.amax(1, keepdim=True)
        below = torch.sub(v, top, out=out)
        narrow = total.to(v.dtype) if isinstance(total, Tensor) else total
        t = _threshold(below, narrow, buffer)
    if eager:
        over = below.sub_(t)
    else:
        below = v - top
        over = below - with_value(t, _newton(below, t, narrow)[0])
    with torch.no_grad():  # the digits that t has no room for, and what the loop has left over
        above = torch.clamp(over, min=0, out=buffer)
        missed = total - wide_sum(above)
        rest = missed / above.sign_().sum(1, keepdim=True).clamp(min=1)
    soft = over.add_(rest.to(v.dtype)).relu_()
    with torch.no_grad():
        reached = wide_sum(soft)
        factor = torch.where(reached > 0, total / reached.where(reached > 0, 1.0), 1.0)
    factor = factor.to(v.dtype)
    return soft.mul_(factor) if eager else soft * factor


def wide_sum(rows: Tensor) -> Tensor:
    """Sums of rows in float64, shape (N, 1); converted some rows at a time."""
    dtype = wide_dtype(rows)
    if rows.numel() <= BLOCK // 4 or rows.dtype == dtype or not in_blocks(rows):
        return rows.sum(1, keepdim=True, dtype=dtype)
    height = max(1, BLOCK // 4 // rows.shape[1])
    return torch.cat([some.sum(1, keepdim=True, dtype=dtype) for some in rows.split(height)])


def _threshold(below: Tensor, total: float | Tensor, buffer: Tensor | None) -> Tensor:
    size = below.shape[1]
    t = torch.maximum(below.mean(1, keepdim=True) - total / size, below.new_zeros(()) - total)
    if buffer is not None and size >= 128:
        # The threshold of some entries is never above that of all; the largest of every few are
        # mostly enough.
        half = size // 2
        some = torch.maximum(below[:, :half], below[:, half : 2 * half], out=buffer[:, :half])
        levels = []
        for _ in range(3):
            half //= 2
            some = torch.maximum(some[:, :half], some[:, half : 2 * half])
            levels.append(some)
        for some in levels[::-2]:
            t = _iterated(some, t, total, 4, torch.empty_like(some))
    return _iterated(below, t, total, steps_needed(size, torch.finfo(below.dtype).eps / 4), buffer)


def _iterated(
    v: Tensor, t: Tensor, total: float | Tensor, steps: int, buffer: Tensor | None
) -> Tensor:
    number = torch.full_like(t, v.shape[1] + 1)
    for _ in range(steps):
        before, (step, number) = number, _newton(v, t, total, buffer)
        t = torch.maximum(t, step)
        if buffer is not None and bool((number >= before).all()):  # solved for the entries above
            break
    return t


def _newton(
    v: Tensor, t: Tensor, total: float | Tensor, buffer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The threshold that is right for the entries above t; their number."""
    over = (v - t).clamp(min=0) if buffer is None else torch.sub(v, t, out=buffer).clamp_(min=0)
    excess = over.sum(1, keepdim=True) - total
    signs = over.detach().sign() if buffer is None else over.sign_()
    number = signs.sum(1, keepdim=True)
    return t + excess / number.clamp(min=1), number  # if total is 0, none is above


def steps_needed(size: int, precision: float) -> int:
    """How many steps bring an excess of ``size * total`` down to ``precision * total``."""
    steps = 1
    while (1 - size ** (-1 / steps)) ** steps > precision / size:
        steps += 1
    return steps
