"""The threshold that brings the sum of rows down: projection onto simplices and L1 balls."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import BLOCK, is_eager, needs_grad, wide_dtype

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
        missed = total - wide_sum(over.clamp(min=0))
        rest = missed / (over > 0).sum(1, keepdim=True).clamp(min=1)
    soft = (over + rest.to(v.dtype)).relu()
    return soft * _last_factor(soft, total)


def lower_(v: Tensor, total: float | Tensor, buffer: Tensor) -> Tensor:
    """`lowered`, in place, of a plain tensor on the CPU; `buffer` is memory in the shape of v."""
    goal = torch.as_tensor(total, dtype=v.dtype, device=v.device).expand(len(v), 1)
    v.sub_(v.amax(1, keepdim=True))
    t = _near(v, goal, buffer) if v.shape[1] >= _WIDE else _least(v, goal)
    t, number = _settled(v, t, goal, buffer)
    over = v.sub_(t)
    missed = total - wide_sum(torch.clamp(over, min=0, out=buffer))
    over.add_((missed / number.clamp(min=1)).to(v.dtype)).relu_()
    # Where no entry has come or gone the sum is right.
    kept = torch.gt(over, v.new_zeros(()), out=buffer).sum(1, keepdim=True)
    right = (kept == number) & (missed.abs() <= goal)
    return v if bool(right.all()) else v.mul_(_last_factor(v, total).masked_fill_(right, 1.0))


def in_one_memory(
    piece: list[Tensor], dtype: torch.dtype, memory: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Memory for the rows of several batches: for those of each, for all of them, and a buffer.

    Batches are joined up to `MANY` elements, for which small operators cost little. All pieces use
    the same memory, which comes first, because new memory is slow to touch.
    """
    heights, size = list(map(len, piece)), sum(map(Tensor.numel, piece))
    if memory.dtype != dtype or len(memory) < 2 * size:
        memory = piece[0].new_empty(2 * size, dtype=dtype)
    rows, buffer = memory[: 2 * size].view(2, sum(heights), -1)
    return memory, rows.split(heights), rows, buffer


@torch.no_grad()
def _last_factor(soft: Tensor, total: float | Tensor) -> Tensor:
    reached = wide_sum(soft)
    factor = torch.where(reached > 0, total / reached.where(reached > 0, 1.0), 1.0)
    return factor.to(soft.dtype)


def wide_sum(rows: Tensor) -> Tensor:
    """Sums of rows in float64, shape (N, 1); converted some rows at a time."""
    dtype = wide_dtype(rows)
    if rows.numel() <= BLOCK // 2 or rows.dtype == dtype or not is_eager(rows):
        return rows.sum(1, keepdim=True, dtype=dtype)
    height = max(1, BLOCK // 2 // rows.shape[1])
    return torch.cat([some.sum(1, keepdim=True, dtype=dtype) for some in rows.split(height)])


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
