"""Wide arithmetic, a piece at a time: the pieces stay in cache, and no wide copy of all is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rai_toolbox._torch import in_function_transform

BLOCK = 2**16
"""Elements per piece of rows, for each thread."""

COLUMNS = 2**18
"""Elements per piece of a row; fixed, so that sums have the same bits on any number of threads."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float64, which holds squares and sums of all narrower numbers."""
    if x.device.type == "mps":  # which has no float64
        return torch.float32
    return torch.float64


def widened(x: Tensor) -> Tensor:
    """`x` in float64 and in the order of its indices, whatever its strides are."""
    return x.to(wide_dtype(x)).contiguous()


def in_blocks(x: Tensor) -> bool:
    """Whether to go by pieces, and look at values: on CPU, where all is run as it is written.

    A compiler fuses, and a tensor of `torch.func` does not know its values.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return False
    return not (torch.compiler.is_compiling() or in_function_transform())


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dim of `x`, of about `BLOCK` elements per thread but at least one row."""
    height = len(x)
    if in_blocks(x) and not (torch.is_grad_enabled() and x.requires_grad):
        height = max(1, torch.get_num_threads() * BLOCK * len(x) // max(1, x.numel()))
    for start in range(0, len(x), max(1, height)):
        yield slice(start, start + height)


def column_blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The (N, n) tensors, where n is large, in pieces of columns; a column of its own is whole."""
    x = tensors[0]
    if x.shape[1] <= COLUMNS or not in_blocks(x):
        return [tensors]
    split = [t.split(COLUMNS, 1) if t.shape[1] > 1 else None for t in tensors]
    return [
        tuple(t if s is None else s[i] for t, s in zip(tensors, split, strict=True))
        for i in range(-(-x.shape[1] // COLUMNS))
    ]
