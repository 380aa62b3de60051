"""Rows of L1 balls and their like by arithmetic in float32: where it is as exact as in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rai_toolbox._torch import in_function_transform
from rai_toolbox.constraints.kernels.blocks import COLUMNS
from rai_toolbox.constraints.kernels.norms import alike_rows, may_group
from rai_toolbox.constraints.kernels.rounding import noise, round_down, round_up
from rai_toolbox.constraints.kernels.threshold import precision, steps_needed, sum_rows

_NARROW = (torch.float32, torch.float16, torch.bfloat16)

IN_CACHE = 2**19
"""Elements per piece of rows; so many that the calls on one number a row cost little."""

_AHEAD = (0.2, 0.2, 0.0, 0.0, 0.0)
"""Steps of the search in float32: where between the bounds of the threshold each of them looks.

They are enough for all of 1,000 rows of 100 to 4,096 normal numbers, of their cubes, and of what
projected steps lead to; five from the lower bound are not for 4,096.
"""


def are_narrow(batches: list[Tensor]) -> bool:
    """Whether the search may be in float32: on CPU, and nothing is to be differentiated."""
    return (
        may_group(batches)
        and not in_function_transform()
        and all(x.dtype in _NARROW and x.numel() <= COLUMNS * len(x) for x in batches)
    )


def in_float32(batches: list[Tensor]) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Pieces of batches with rows of the same length; these rows in float32; room for as many.

    Rows and room are the same memory for all pieces: new memory is slow to touch.
    """
    memory = torch.empty(0, dtype=torch.float32, device="cpu")  # whatever the defaults are
    for some in alike_rows(batches):
        size = some[0][0].numel()
        for piece in _pieces(some, max(1, IN_CACHE // size)):
            heights = [len(x) for x in piece]
            number = sum(heights) * size
            if len(memory) < 4 * number:
                memory = memory.new_empty(4 * number)
            rows = memory[3 * number : 4 * number].view(-1, size)
            for x, part in zip(piece, rows.split(heights), strict=True):
                part.view(x.shape).copy_(x)
            yield piece, rows, memory[: 3 * number]


def _pieces(batches: list[Tensor], height: int) -> Iterator[list[Tensor]]:
    """The same rows, in lists of `height` of them."""
    piece: list[Tensor] = []
    room = height
    for x in batches:
        start = 0
        while start < len(x):
            piece.append(x[start : start + room])
            start += len(piece[-1])
            room -= len(piece[-1])
            if room == 0:
                yield piece
                piece, room = [], height
    if piece:
        yield piece


def shrunk(
    size: Tensor, epsilon: float | Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor | None:
    """Magnitudes of the nearest points of L1 balls, in `dtype`, from those of float32 rows.

    None stands for the same ones: all rows are inside.
    """
    lost = torch.finfo(size.dtype).eps
    rough = sum_rows(size)
    if bool((rough * (1 + size.shape[1] * lost) < epsilon).all()):
        return None
    room = size.new_empty(3 * size.numel()) if room is None else room
    near, rest = narrow_threshold(size, _radius(epsilon, size.shape[1], dtype), room)
    soft = torch.sub(size, near, out=room[2 * size.numel() :].view(size.shape))
    # (a rest that is rounded up keeps the entries at the threshold from being above it)
    soft = soft.sub_(round_up(rest, size.dtype)).clamp_(min=0)
    soft = soft if soft.dtype == dtype else round_down(soft, dtype)
    outside = (rough * (1 - size.shape[1] * lost) > epsilon) & rough.isfinite()
    return soft if bool(outside.all()) else _where_outside(size, epsilon, soft)


def _radius(epsilon: float | Tensor, size: int, dtype: torch.dtype) -> float | Tensor:
    """What the sum is to be, so that it is in the ball after two roundings to nearest."""
    lost = 4 * noise(size) + 2 * precision(dtype) + torch.finfo(torch.float32).eps
    return epsilon * (1 - lost)


def _where_outside(size: Tensor, epsilon: float | Tensor, soft: Tensor) -> Tensor:
    excess = (sum_rows(size.double()) - epsilon).clamp(min=0)
    return soft.where(excess > 0, size.to(soft.dtype)).where(excess.isfinite(), torch.nan)


def narrow_threshold(v: Tensor, total: float | Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """`threshold` of float32 rows: a float32 number near t, and the rest ``t - near`` in float64.

    A few steps in float32 tell which entries are above t. The threshold that is right for these is
    found in float64; where as many are above that one, it is right. For the other rows there are
    more steps in float64, with the same bound on their number as in `threshold`.

    The differences ``v - near`` lose nothing that counts: they are exact for numbers that are
    close to each other, and rounded relative to themselves for others.
    """
    wide = room[: 2 * v.numel()].view(torch.float64)  # (first, for it must be aligned)
    narrow = room[2 * v.numel() :].view(v.shape)
    goal = torch.as_tensor(total, dtype=torch.float64, device=v.device)
    near, number = _search(v, goal.to(v.dtype), narrow)
    goal = goal.expand_as(near)
    near, rest, number, wrong = _exact(v, near, number, goal, (narrow, wide.view(v.shape)))
    for _ in range(steps_needed(v.shape[1], precision(torch.float32))):
        if not bool(wrong.any()):
            break
        at = wrong.view(-1).nonzero().view(-1)  # a row's bits do not depend on the other rows
        some = v[at]
        spare = narrow[: len(at)], wide[: some.numel()].view(some.shape)
        found = _exact(some, near[at], number[at], goal[at], spare)
        for known, better in zip((near, rest, number, wrong), found, strict=True):
            known[at] = better
    return near, rest


def _search(v: Tensor, total: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """A threshold that is right but for rounding, mostly; the number of entries above it."""
    top = v.amax(1, keepdim=True)
    total = total.clamp(max=torch.finfo(v.dtype).max)  # inf - inf would be NaN
    least = torch.maximum((sum_rows(v) - total) / v.shape[1], top - total).minimum(top)
    most = top
    for ahead in _AHEAD:
        t = torch.lerp(least, most, ahead) if ahead else least
        over, number = _above(v, t, room)
        excess = over - total
        if ahead:
            most = torch.where(excess < 0, t, most)
        # on the left, wherever t is
        least = torch.addcdiv(t, excess, number.clamp(min=1)).maximum(least)
    t = least.minimum(top)
    return t, _number(v, t, room)


def _above(v: Tensor, t: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """By how much the entries above t are so, in sum, and their number."""
    if room is None:  # the quickest when compiled
        over = v - t
        return sum_rows(torch.where(over > 0, over, 0.0)), _number(v, t, None)
    over = torch.sub(v, t, out=room).clamp_(min=0)
    total = sum_rows(over)
    return total, sum_rows(over.gt_(v.new_zeros(())))  # (a number would be cast to a tensor)


def _number(v: Tensor, t: Tensor, room: Tensor | None) -> Tensor:
    return sum_rows(
        torch.gt(v, t, out=room) if room is not None else torch.where(v > t, v.new_ones(()), 0.0)
    )


def _exact(
    v: Tensor,
    near: Tensor,
    number: Tensor,
    total: Tensor,
    room: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton's step in float64: the threshold in two parts, the number above, whether it is wrong.

    `number` is that of the entries above `near`, or, of those in a second step, also of the
    entries at `near`, which add nothing to the sum.
    """
    before = near.to(total.dtype)
    narrow = None if room is None else room[0]
    above = torch.maximum(v, near, out=narrow)
    wide = above.to(total.dtype) - before if room is None else room[1].copy_(above).sub_(before)
    change = (sum_rows(wide) - total) / number.clamp(min=1)
    near = (before + change).clamp(min=0).to(near.dtype)  # (a step from above may go too far)
    rest = change - (near.to(total.dtype) - before)
    lower = near.nextafter(torch.full_like(near, -math.inf))
    now = _number(v, torch.where(rest < 0, lower, near), narrow)
    # (an entry between the two thresholds counts for no more than the change)
    wrong = (now - number).abs() * change.abs() > precision(torch.float32) * total
    return near, rest, now, wrong
