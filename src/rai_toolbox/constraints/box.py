"""The box: every element between a lower and an upper bound."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.autograd import below_autograd
from rai_toolbox.foreach import are_plain, in_chunks

# Two passes of a foreach kernel (min, then max) are quicker than one `clamp_` per tensor up to
# about this many elements; beyond it the second pass over memory costs more than the dispatch.
_SMALL = 10_000
_FLOAT16_MAX = 65504.0


def clamp_(tensors: list[Tensor], lower: float | None, upper: float | None) -> None:
    """Clamp every element of every tensor to [lower, upper], in place; None leaves a side open.

    The bounds count as rounded to each tensor's dtype. NaN stays NaN.
    """
    if any(bound is not None and _FLOAT16_MAX < abs(bound) < inf for bound in (lower, upper)):
        for tensor in tensors:  # torch refuses bounds that overflow a tensor's dtype
            tensor.clamp_(_rounded(lower, tensor.dtype), _rounded(upper, tensor.dtype))
    elif are_plain(tensors):
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
        torch._foreach_clamp_min_(tensors, lower)
    if upper is not None:
        torch._foreach_clamp_max_(tensors, upper)


def _rounded(bound: float | None, dtype: torch.dtype) -> float | None:
    if bound is None or abs(bound) == inf or abs(bound) <= torch.finfo(dtype).max:
        return bound
    return torch.tensor(bound, dtype=dtype).item()
