"""Operators over lists of tensors: one call for a whole parameter group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rai_toolbox._torch import foreach_add_, foreach_mul_

_PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}


def are_plain(tensors: list[Tensor]) -> bool:
    """Whether torch's foreach operators may take these tensors together.

    They refuse lists that mix subclasses (DTensor, say) with plain tensors. Under compilation
    the compiler fuses on its own, so that the simplest form is the best one.
    """
    return not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, tensors))


def together(tensors: list[Tensor]) -> bool:
    """Whether to use a foreach operator: for one tensor the plain one takes a tenth of the time.

    In half precision both must be the same one, as only one of them rounds numbers to the dtype.
    """
    alone = len(tensors) == 1 and tensors[0].dtype in (torch.float32, torch.float64)
    return not alone and are_plain(tensors)


def in_chunks(tensors: list[Tensor], size: int = 64) -> Iterator[list[Tensor]]:
    """Yield the list in pieces that stay in cache between two passes."""
    for start in range(0, len(tensors), size):
        yield tensors[start : start + size]


def cache_sized(tensors: list[Tensor], size: int = 2**18) -> Iterator[slice]:
    """Yield the slices of a list that have about `size` elements, and so stay in cache."""
    start = total = 0
    for stop, tensor in enumerate(tensors, 1):
        total += tensor.numel()
        if total >= size or stop == len(tensors):
            yield slice(start, stop)
            start, total = stop, 0


def mul_(tensors: list[Tensor], factor: float) -> None:
    """Multiply every tensor by a number, in place."""
    if together(tensors):
        foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)


def add_(tensors: list[Tensor], term: float) -> None:
    """Add a number to every tensor, in place."""
    if together(tensors):
        foreach_add_(tensors, term)
    else:
        for tensor in tensors:
            tensor.add_(term)


def add_multiples_(tensors: list[Tensor], others: list[Tensor], factor: float) -> None:
    """Add a multiple of another tensor to every tensor, in place."""
    if len(tensors) == 1:
        tensors[0].add_(others[0], alpha=factor)
    elif tensors:
        foreach_add_(tensors, others, alpha=factor)
