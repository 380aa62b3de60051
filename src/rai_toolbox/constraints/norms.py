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
    any entries in float16 and bfloat16, have the norm that they have on paper. The order of the
    sums is that of the indices, so that the result does not depend on strides, bit for bit.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return _norm(x, p, tuple(range(-ndim, 0)))  # no blocks: of shards, or in a fused kernel
    return _blockwise(x, p, ndim)


def _blockwise(x: Tensor, p: float, ndim: int) -> Tensor:
    if x.numel() <= _BLOCK:
        return _norm(x.contiguous(), p, tuple(range(-ndim, 0)))
    dim = next(i for i, size in enumerate(x.shape) if size > 1)
    height = max(1, _BLOCK * x.shape[dim] // x.numel())
    lengths = torch.cat([_blockwise(b, p, ndim) for b in torch.split(x, height, dim)], dim)
    if dim < x.ndim - ndim:
        return lengths
    return _norm(lengths, p, (dim,))  # the p-norm of the blocks' p-norms


def _norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    dtype = torch.complex128 if x.is_complex() else torch.float64
    if x.device.type == "mps":  # which has no float64
        dtype = torch.float32
    if x.dtype is not dtype or x.numel() == 0:
        return _vector_norm(x, p, dim, dtype)
    scale = _power_of_two(x.abs().amax(dim, keepdim=True))  # float64 has no wider type above it
    return _vector_norm(x / scale, p, dim, dtype) * scale


def _vector_norm(x: Tensor, p: float, dim: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, p, dim=dim, keepdim=True, dtype=dtype)
    return length


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size, by which to scale without rounding; 1 if none."""
    exponent = torch.frexp(size).exponent - 1
    power = torch.exp2(exponent.to(size.dtype))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)
