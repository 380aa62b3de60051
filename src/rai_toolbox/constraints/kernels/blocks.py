"""Wide arithmetic a piece at a time: in cache, and without a wide copy of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rai_toolbox._torch import forward_ad_level, function_transforms_active

BLOCK = 2**16
"""Elements per piece of rows, for each thread; a tensor of more is large."""

MANY = 2**19
"""Elements per piece of rows where many passes over it have many small operators between them."""

_PLAIN = (Tensor, torch.nn.Parameter)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float64, which holds squares and sums of all narrower numbers."""
    if x.device.type == "mps":  # which has no float64
        return torch.float32
    return torch.float64


def widened(x: Tensor) -> Tensor:
    """`x` in float64, contiguous."""
    return x.to(wide_dtype(x)).contiguous()


def in_blocks(x: Tensor) -> bool:
    """Whether to go by pieces and to read values: a plain CPU tensor, in eager mode.

    A compiler fuses, and a tensor of `torch.func` does not know its values.
    """
    return (
        type(x) in _PLAIN
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not function_transforms_active()
        and forward_ad_level() < 0
    )


def needs_grad(*values: object) -> bool:
    """Whether autograd records what is done to any of the values, such as x and the settings."""
    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", 0) for value in values)


def row_blocks(x: Tensor, size: int | None = None) -> Iterator[slice]:
    """Slices of the first dim of `x`, of about `size` elements but at least one row.

    By default they have `BLOCK` elements per thread.
    """
    height = len(x)
    if in_blocks(x) and not needs_grad(x):
        size = torch.get_num_threads() * BLOCK if size is None else size
        height = max(1, size * len(x) // max(1, x.numel()))
    for start in range(0, len(x), max(1, height)):
        yield slice(start, start + height)


def joined(batches: list[Tensor], size: int) -> list[list[Tensor]]:
    """Rows of the batches, in lists of up to `size` elements of one dtype and length of rows."""
    pieces: list[list[Tensor]] = []
    last: dict[tuple[torch.dtype, int], tuple[list[Tensor], int]] = {}  # and the room left in it
    for x in batches:
        if x.numel() == 0:
            continue
        kind = (x.dtype, x.numel() // len(x))
        for part in [x] if x.numel() <= size else [x[rows] for rows in row_blocks(x, size)]:
            piece, room = last.get(kind, ([], 0))
            if part.numel() > room:
                piece, room = [], size
                pieces.append(piece)
            piece.append(part)
            last[kind] = piece, room - part.numel()
    return pieces


def in_groups(batches: list[Tensor], act_: Callable[[Tensor], object]) -> None:
    """Let `act_` change the rows of each batch in place; small batches are joined for it.

    Batches of the same dtype and length of rows are joined up to `BLOCK` elements: one call then
    costs what it would for one of them, and stays in cache.
    """
    small = []
    for x in batches:
        if x.numel() > BLOCK // 2 or len(batches) == 1 or not in_blocks(x) or needs_grad(x):
            act_(x)
        else:
            small.append(x)
    for group in joined(small, BLOCK):
        rows = torch.cat([x.reshape(len(x), -1) for x in group])
        act_(rows)
        for x, part in zip(group, rows.split([len(x) for x in group]), strict=True):
            x.copy_(part.view(x.shape))
