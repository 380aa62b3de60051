"""The threshold that brings a sum down: where simplex and L1 ball projections come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import column_blocks, in_blocks
from rai_toolbox.constraints.kernels.rounding import noise

Values = Callable[[], Tensor]
"""Gives a piece of some columns of the values, in float64; called once per pass."""

_SHORT = 1024
_GROUP = 16  # so many entries stand behind the largest of them, where a first guess is made


def each(f: Callable[..., Tensor], *tensors: Tensor) -> list[Values]:
    """``f(*tensors)`` by pieces of columns, computed when asked for; a single piece is kept."""
    pieces = column_blocks(*tensors)
    if len(pieces) == 1:
        whole = f(*tensors)
        return [lambda: whole]
    return [lambda piece=piece: f(*piece) for piece in pieces]  # type: ignore[misc]


def row_sum(values: list[Values]) -> Tensor:
    """Sum of each row, shape (N, 1)."""
    total = sum_rows(values[0]())
    for piece in values[1:]:
        total = total + sum_rows(piece())
    return total


def sum_rows(x: Tensor) -> Tensor:
    """Sum of each row, with the same bits on any number of threads and beside any other rows.

    Torch splits the sum of a single long row between its threads, but not those of short ones.
    """
    whole = x.shape[1] // _SHORT * _SHORT
    if whole < 16 * _SHORT or not in_blocks(x):
        return x.sum(1, keepdim=True)
    short: Tensor = x[:, :whole].unflatten(1, (-1, _SHORT)).sum(2)
    return short.sum(1, keepdim=True) + x[:, whole:].sum(1, keepdim=True)


def threshold(
    values: list[Values], total: float | Tensor, dtype: torch.dtype
) -> tuple[list[Values], Tensor]:
    r"""Solve ``sum_i max(v_i - top - t, 0) = total`` for t, of each row; total >= 0.

    Newton's method from the left on a convex, decreasing, piecewise linear function: each step
    solves for the entries that are above the threshold now (Michelot, 1986; Condat, 2016). With
    the excess h and the number g of entries above, convexity gives ``h'/h + g'/g <= 1`` after a
    step. As g falls from n to 1 at most, K steps leave no more than ``(1 - n^(-1/K))^K`` of an
    excess that was ``n total`` at most, whatever the values are: so many steps are taken as are
    enough for `precision`. Where a look at the result is free the loop ends when the excess is as
    small as that, mostly after 1 to 4 steps: it starts there at the threshold of some of the
    entries, which are mostly all that count, and whose threshold is never above that of all.

    The row's maximum `top` is taken off first: values that are far from 0 then lose nothing.

    Parameters
    ----------
    values : list of callables
        Each gives some columns of the values, shape (N, .), float64.
    total : float or Tensor, shape (N, 1)
    dtype : torch.dtype
        That of the result, which says how precise it has to be; see `precision`.

    Returns
    -------
    below : list of callables
        The values minus `top`.
    t : Tensor, shape (N, 1)
        The threshold minus `top`. The sum at t is not less than `total` but for rounding.
        Autograd can differentiate both.
    """
    with torch.no_grad():
        found = [(_largest(v), v.shape[1]) for v in (piece() for piece in values)]
        large, size = torch.cat([some for some, _ in found], 1), sum(n for _, n in found)
        top = large.amax(1, keepdim=True)
        below = _minus(values, top)
        t = torch.maximum((row_sum(below) - total) / size, torch.zeros_like(top) - total)
        steps, enough = steps_needed(size, precision(dtype)), max(precision(dtype), noise(size))
        if large.shape[1] < size:
            start = _iterate(_minus([lambda: large], top), t, total, steps, enough)
            t = torch.maximum(t, start)
        t = _iterate(below, t, total, steps, enough)
    if torch.is_grad_enabled():
        below = _minus(values, top)
        t = with_value(t, _newton(below, t, total)[0])
    return below, t


def _iterate(
    values: list[Values], t: Tensor, total: float | Tensor, steps: int, precision: float
) -> Tensor:
    done = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(steps):
        before, (better, excess) = t, _newton(values, t, total)
        if not in_blocks(t):
            t = better
            continue
        t = torch.where(done, t, better)  # a row's bits must not depend on the other rows
        done = done | ~((better > before) & (excess > precision * total))
        if bool(done.all()):
            break
    return t


def _largest(v: Tensor) -> Tensor:
    """Some of the columns: the largest of every few, so that the row's maximum is among them."""
    size = v.shape[1] // _GROUP
    if size == 0 or not in_blocks(v):
        return v
    groups, rest = v[:, : size * _GROUP].unflatten(1, (_GROUP, size)), v[:, size * _GROUP :]
    return torch.cat([groups.amax(1), rest], 1)


def steps_needed(size: int, precision: float) -> int:
    """How many steps bring an excess of ``size * total`` down to ``precision * total``."""
    steps = 1
    while (1 - size ** (-1 / steps)) ** steps > precision / size:
        steps += 1
    return steps


def precision(dtype: torch.dtype) -> float:
    """Relative excess that `threshold` may leave in the sum."""
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 4


def _minus(values: list[Values], top: Tensor) -> list[Values]:
    if len(values) == 1:
        below = values[0]() - top
        return [lambda: below]
    return [lambda piece=piece: piece() - top for piece in values]  # type: ignore[misc]


def _newton(values: list[Values], t: Tensor, total: float | Tensor) -> tuple[Tensor, Tensor]:
    """The threshold that is right for the entries that are above t; the excess of the sum at t."""
    excess, number = torch.zeros_like(t) - total, torch.zeros_like(t)
    for piece in values:
        over, above = _above(piece(), t)
        excess, number = excess + over, number + above
    return t + excess / number.clamp(min=1), excess  # none is above where the total is 0


def _above(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the entries above t are so, in sum, and their number."""
    if in_blocks(v) and not torch.is_grad_enabled():  # the quickest operators, one by one
        over = (v - t).clamp_(min=0)
        total = sum_rows(over)
        return total, over.gt_(0).sum(1, keepdim=True)
    over = v - t  # the quickest when compiled
    one = torch.ones((), dtype=torch.float32 if v.shape[1] <= 2**24 else v.dtype, device=v.device)
    total = torch.where(over > 0, over, 0.0).sum(1, keepdim=True)
    return total, torch.where(over > 0, one, 0.0).sum(1, keepdim=True)
