"""Operators over lists of tensors: one call for a whole parameter group."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import torch
from torch import Tensor

from rai_toolbox._torch import foreach_add_, foreach_clamp_max_, foreach_clamp_min_, foreach_mul_
from rai_toolbox.autograd import below_autograd

_PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}

# Two passes of a foreach kernel (min, then max) are quicker than one `clamp_` per tensor up to
# about this many elements; beyond it the second pass over memory costs more than the dispatch.
_SMALL = 10_000
_FLOAT16_MAX = 65504.0


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


def with_gradients(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have gradients, and these."""
    moving: list[Tensor] = []
    grads: list[Tensor] = []
    for param in params:
        grad = param.grad  # (a look that takes as long as the rest)
        if grad is not None:
            moving.append(param)
            grads.append(grad)
    return moving, grads


def in_chunks(tensors: list[Tensor], size: int = 64) -> Iterator[list[Tensor]]:
    """Yield the list in pieces that stay in cache between two passes."""
    for start in range(0, len(tensors), size):
        yield tensors[start : start + size]


def cache_sized(tensors: list[Tensor], size: int = 2**18, most: int = 2**20) -> Iterator[slice]:
    """Yield the slices of a list that have about `size` elements, and so stay in cache.

    Of large tensors several go together, up to `most` elements, because each slice costs calls.
    """
    start = total = 0
    for stop, tensor in enumerate(tensors, 1):
        total += tensor.numel()
        is_full = total >= (size if stop - start >= 8 else most)
        if is_full or stop == len(tensors):
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


def clamp_(tensors: list[Tensor], lower: float | None, upper: float | None) -> None:
    """Clamp every element of every tensor to [lower, upper], in place; None leaves a side open.

    The bounds count as rounded to each tensor's dtype. NaN stays NaN.
    """
    if _FLOAT16_MAX < abs(lower or 0.0) < inf or _FLOAT16_MAX < abs(upper or 0.0) < inf:
        for tensor in tensors:  # torch refuses bounds that overflow a tensor's dtype
            tensor.clamp_(in_dtype(lower, tensor.dtype), in_dtype(upper, tensor.dtype))
    elif together(tensors):
        with below_autograd():
            for chunk in in_chunks(tensors):
                _clamp_chunk_(chunk, lower, upper)
    else:
        for tensor in tensors:
            tensor.clamp_(lower, upper)


def _clamp_chunk_(tensors: list[Tensor], lower: float | None, upper: float | None) -> None:
    # Asking every tensor for its size takes a tenth of the time; a wrong guess costs only time.
    if max(map(Tensor.numel, tensors[::7])) > _SMALL:
        for tensor in tensors:
            tensor.clamp_(lower, upper)
        return
    if lower is not None:
        foreach_clamp_min_(tensors, lower)
    if upper is not None:
        foreach_clamp_max_(tensors, upper)


def in_dtype(bound: float | Tensor | None, dtype: torch.dtype) -> Any:
    """A bound as a number or tensor that torch takes with a dtype: one beyond it is infinite."""
    if isinstance(bound, Tensor):
        return bound.to(dtype)
    if bound is None or abs(bound) == inf or abs(bound) <= torch.finfo(dtype).max:
        return bound
    return torch.tensor(bound, dtype=dtype).item()
