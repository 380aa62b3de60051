"""The threshold that brings a sum down: where simplex and L1 ball projections come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.constraints.blocks import column_blocks, in_blocks

Values = Callable[[], Tensor]
"""Gives a piece of some columns of the values, in float64; called once per pass."""


def each(f: Callable[..., Tensor], *tensors: Tensor) -> list[Values]:
    """``f(*tensors)`` by pieces of columns, computed when asked for; a single piece is kept."""
    pieces = column_blocks(*tensors)
    if len(pieces) == 1:
        whole = f(*tensors)
        return [lambda: whole]
    return [lambda piece=piece: f(*piece) for piece in pieces]  # type: ignore[misc]


def row_sum(values: list[Values]) -> Tensor:
    """Sum of each row, shape (N, 1)."""
    return sum((piece().sum(1, keepdim=True) for piece in values[1:]), values[0]().sum(1, True))


def threshold(
    values: list[Values], total: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    r"""Solve ``sum_i max(v_i - top - t, 0) = total`` for t, of each row; total >= 0.

    Newton's method from the left on a convex, decreasing, piecewise linear function: each step
    solves for the entries that are above the threshold now (Michelot, 1986; Condat, 2016). With
    the excess h and the number g of entries above, convexity gives ``h'/h + g'/g <= 1`` after a
    step. As g falls from n to 1 at most, K steps leave no more than ``(1 - n^(-1/K))^K`` of an
    excess that was ``n total`` at most, whatever the values are: so many steps are taken as are
    enough for `precision`. Where a look at the result is free the loop ends when nothing moves,
    mostly after 3 to 8 steps.

    The maximum `top` is taken off first: values that are far from 0 then lose nothing.

    Parameters
    ----------
    values : list of callables
        Each gives some columns of the values, shape (N, .), float64.
    total : float or Tensor, shape (N, 1)
    dtype : torch.dtype
        That of the result, which says how precise it has to be; see `precision`.

    Returns
    -------
    top, t : Tensor, shape (N, 1)
        The row's maximum, and the threshold minus it. The sum at t is not less than `total` but
        for rounding. Autograd can differentiate t.
    """
    with torch.no_grad():
        maxima = [(v.amax(1, keepdim=True), v.shape[1]) for v in (piece() for piece in values)]
        top = maxima[0][0]
        for other, _ in maxima[1:]:
            top = torch.maximum(top, other)
        size = sum(n for _, n in maxima)
        shifted = _minus(values, top)
        t = torch.maximum((row_sum(shifted) - total) / size, torch.zeros_like(top) - total)
        for _ in range(_steps(size, precision(dtype))):
            before, t = t, _newton(shifted, t, total)
            if in_blocks(t) and not bool((t > before).any()):
                break
    if torch.is_grad_enabled():
        t = _newton(_minus(values, top), t, total)
    return top, t


def _steps(size: int, precision: float) -> int:
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


def _newton(values: list[Values], t: Tensor, total: float | Tensor) -> Tensor:
    """The threshold that is right for the entries that are above t."""
    kept, number = torch.zeros_like(t) - total, torch.zeros_like(t)
    for piece in values:
        some, how_many = _above(piece(), t)
        kept, number = kept + some, number + how_many
    return kept / number.clamp(min=1)  # none is above where the total is 0


def _above(v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the entries above t."""
    if in_blocks(v) and not torch.is_grad_enabled():  # the quickest operators, one by one
        over = (v - t).clamp_(min=0)
        excess = over.sum(1, keepdim=True)
        number = over.gt_(0).sum(1, keepdim=True)
        return excess + t * number, number
    above = v > t  # the quickest when compiled
    kept = torch.where(above, v, 0.0).sum(1, keepdim=True)
    one = torch.ones((), dtype=torch.float32 if v.shape[1] <= 2**24 else v.dtype, device=v.device)
    return kept, torch.where(above, one, 0.0).sum(1, keepdim=True)
