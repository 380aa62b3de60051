"""Clamping to numbers, with few calls for many tensors."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from rai_toolbox._torch import foreach_clamp_max_, foreach_clamp_min_
from rai_toolbox.autograd import below_autograd
from rai_toolbox.foreach import in_chunks, together

# Two passes of a foreach kernel (min, then max) are quicker than one `clamp_` per tensor up to
# about this many elements; beyond it the second pass over memory costs more than the dispatch.
_SMALL = 10_000
_FLOAT16_MAX = 65504.0


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
