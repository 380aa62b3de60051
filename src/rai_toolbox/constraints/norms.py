"""Norms that neither overflow nor underflow, of each sub-tensor of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements per block: its float64 copy stays in cache and is returned to the allocator at once.
_BLOCK = 2**16

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32}
_REAL[torch.complex128] = torch.float64


def scale_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a factor or divisor for `x`: its own real one, but float32 for half precision.

    A factor of 8 or 11 bits would miss a radius, and the norms of half-precision tensors do not
    fit their range; torch multiplies in float32 then, and rounds once.
    """
    return torch.promote_types(_REAL.get(x.dtype, x.dtype), torch.float32)


def norm(x: Tensor, p: float, ndim: int) -> Tensor:
    """p-norm over the last `ndim` >= 1 dims, which are kept with size 1.

    It is accumulated and returned in float64, so that entries of 1e20 or 1e-25 in float32, and
    any entries in float16 and bfloat16, have the norm that they have on paper.
    """
    blocks = max(1, x.numel() // _BLOCK)
    if blocks == 1 or x.ndim < 2 or type(x) not in (Tensor, torch.nn.Parameter):
        return _norm(x, p, ndim)
    rows = max(1, x.shape[0] // blocks)
    parts = [_norm(block, p, ndim) for block in torch.split(x, rows)]
    if ndim < x.ndim:
        return torch.cat(parts)
    return _norm(torch.cat(parts), p, ndim)  # the p-norm of the blocks' p-norms


def _norm(x: Tensor, p: float, ndim: int) -> Tensor:
    dtype = torch.complex128 if x.is_complex() else torch.float64
    if x.device.type == "mps":  # which has no float64
        dtype = torch.float32
    dim = tuple(range(-ndim, 0))
    length: Tensor = torch.linalg.vector_norm(x, p, dim=dim, keepdim=True, dtype=dtype)
    return length
