"""The threshold that brings the sum of rows down: projection onto simplices and L1 balls."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import (
    BLOCK,
    Workspace,
    is_eager,
    needs_grad,
    wide_dtype,
)

_WIDE = 128  # entries of a row for which a search among some of them pays
_FIRST_STEPS = 3  # of that search


def lowered(v: Tensor, total: float | Tensor) -> Tensor:
    r"""``max(v - t, 0)`` with the t for which each row sums to `total`; shape (N, n), total >= 0.

    The sum is a convex, decreasing, piecewise linear function of t, whose root Newton's method
    finds from the left: each step solves for the entries that are above the threshold now
    (Michelot, 1986; Condat, 2016). With the excess h and the number g of entries above, convexity
    gives ``h'/h + g'/g <= 1`` after a step. As g falls from n to 1 at most, K steps leave no more
    than ``(1 - n^(-1/K))^K`` of an excess that was ``n total`` at most, whatever the values are: so
    many steps are taken as are enough for the dtype. `lower_`, which may look at the results, ends
    when the entries above stay the same, mostly after 2 to 5 steps.

    The row's maximum is taken off first, so that float32 is as good as the entries are: those
    above the threshold are then no larger than `total`. A last factor, near 1, makes the sum right
    to within the rounding of its terms. Autograd can differentiate the result.
    """
    if is_eager(v) and not needs_grad(v, total):
        return lower_(v.clone(), total, torch.empty_like(v))
    below = v - v.detach().amax(1, keepdim=True)
    goal = total.to(v.dtype) if isinstance(total, Tensor) else total
    with torch.no_grad():
        t = _least(below, goal)
        for _ in range(steps_needed(v.shape[1], torch.finfo(v.dtype).eps / 4)):
            t = torch.maximum(t, _newton(below, t, goal))
    over = below - with_value(t, _newton(below, t, goal))
    with torch.no_grad():  # the digits that t has no room for, and what the steps have left over
        missed = total - over.clamp(min=0).sum(1, keepdim=True, dtype=wide_dtype(v))
        rest = missed / (over > 0).sum(1, keepdim=True).clamp(min=1)
    soft = (over + rest.to(v.dtype)).relu()
    with torch.no_grad():
        factor = _last_factor(soft.sum(1, keepdim=True, dtype=wide_dtype(v)), total)
    return soft * factor.to(v.dtype)


def lower_(v: Tensor, total: float | Tensor, buffer: Tensor) -> Tensor:
    """`lowered`, in place, of a plain tensor on the CPU; `buffer` is memory in the shape of v."""
    goal = torch.as_tensor(total, dtype=v.dtype, device=v.device).expand(len(v), 1)
    v.sub_(v.amax(1, keepdim=True))
    t = _near(v, goal, buffer) if v.shape[1] >= _WIDE else _least(v, goal)
    t, number = _settled(v, t, goal, buffer)
    over = v.sub_(t)
    missed = total - positive_sum(over, buffer)
    over.add_((missed / number.clamp(min=1)).to(v.dtype)).relu_()
    # Where no entry has come or gone the sum is right.
    kept = torch.gt(over, v.new_zeros(()), out=buffer).sum(1, keepdim=True)
    right = (kept == number) & (missed.abs() <= goal)
    if bool(right.all()):
        return v
    factor = _last_factor(positive_sum(v, buffer), total).masked_fill_(right, 1.0)
    return v.mul_(factor.to(v.dtype))


def in_one_memory(
    piece: list[Tensor], dtype: torch.dtype, workspace: Workspace
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Memory for the rows of several batches: for those of each, for all of them, and a buffer.

    Batches are joined up to `MANY` elements, for which small operators cost little.
    """
    heights = list(map(len, piece))
    size = piece[0].shape[1:].numel()
    buffer, rows = workspace[(2, sum(heights), size), dtype]
    return rows.split(heights), rows, buffer


def _last_factor(reached: Tensor, total: float | Tensor) -> Tensor:
    return torch.where(reached > 0, total / reached.where(reached > 0, 1.0), 1.0)


def positive_sum(rows: Tensor, buffer: Tensor) -> Tensor:
    """Sums of the positive entries of rows in float64, shape (N, 1); the wide ones go to a buffer.

    This begins at an even place of its memory.
    """
    height = len(rows) // 2
    if rows.numel() <= BLOCK // 2 or rows.dtype == torch.float64 or height == 0:
        return torch.clamp(rows, min=0, out=buffer).sum(1, keepdim=True, dtype=torch.float64)
    size = height * rows.shape[1]
    wide = buffer.view(-1)[: 2 * size].view(torch.float64).view(height, -1)
    sums = []
    for some in rows.split(height):
        sums.append(wide[: len(some)].copy_(some).relu_().sum(1, keepdim=True))
    return torch.cat(sums)


def _least(below: Tensor, goal: float | Tensor) -> Tensor:
    """A threshold that is not above the right one, for rows whose maximum is 0."""
    mean = below.mean(1, keepdim=True)
    return torch.maximum(mean - goal / below.shape[1], torch.zeros_like(mean) - goal)


def _near(v: Tensor, goal: Tensor, buffer: Tensor) -> Tensor:
    """A threshold that is not above the right one: that of the largest of every four entries."""
    width = v.shape[1] // 4
    some, buffer = buffer.view(-1)[: 2 * width * len(v)].view(2, len(v), width)
    torch.amax(v[:, : 4 * width].unflatten(1, (4, width)), 1, out=some)
    t = _least(some, goal)
    for _ in range(_FIRST_STEPS):
        t, _ = _stepped(some, t, goal, buffer)
    return t


def _settled(v: Tensor, t: Tensor, goal: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold that is right for the entries above it, from one below; their number."""
    t, number = _stepped(v, t, goal, buffer)
    while True:
        farther, now = _stepped(v, t, goal, buffer)
        moving = now < number
        count = int(moving.count_nonzero())
        if count == 0:
            return t, number
        t, number = farther, now
        if 4 * count < len(v) and v.numel() > BLOCK // 8:
            at = moving.view(-1).nonzero().view(-1)
            t[at], number[at] = _settled(v[at], t[at], goal[at], buffer[:count])
            return t, number


def _stepped(v: Tensor, t: Tensor, goal: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold that is right for the entries above t; their number."""
    over = torch.sub(v, t, out=buffer).relu_()
    excess = over.sum(1, keepdim=True).sub_(goal)
    number = over.gt_(v.new_zeros(())).sum(1, keepdim=True)  # (a number would be made a tensor)
    return excess.div_(number.clamp(min=1)).clamp_(min=0).add_(t), number


def _newton(v: Tensor, t: Tensor, goal: float | Tensor) -> Tensor:
    """The threshold that is right for the entries above t."""
    over = (v - t).clamp(min=0)
    number = over.detach().sign().sum(1, keepdim=True).clamp(min=1)  # if goal is 0, none is above
    return t + (over.sum(1, keepdim=True) - goal) / number


def steps_needed(size: int, precision: float) -> int:
    """How many steps bring an excess of ``size * total`` down to ``precision * total``."""
    steps = 1
    while (1 - size ** (-1 / steps)) ** steps > precision / size:
        steps += 1
    return steps
