"""Norms that neither overflow nor underflow, of each sub-tensor of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rai_toolbox.constraints.blocks import in_blocks, wide_dtype

# Elements per block, of which there is no more than one float64 copy at a time.
_BLOCK = 2**18

_SHORT = 1024  # torch sums many rows of this length in half the time of one long row

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
    reduce = _scaled_norm if x.dtype in (torch.float64, torch.complex128) else _vector_norm
    if in_blocks(x):
        return _blockwise(x, p, ndim, reduce)
    return reduce(x, p, tuple(range(-ndim, 0)))


_Reduce = Callable[[Tensor, float, tuple[int, ...]], Tensor]


def _blockwise(x: Tensor, p: float, ndim: int, reduce: _Reduce) -> Tensor:
    if x.numel() <= _BLOCK:
        return _in_short_rows(x, p, ndim, reduce)
    dim = next(i for i, size in enumerate(x.shape) if size > 1)
    height = max(1, _BLOCK * x.shape[dim] // x.numel())
    lengths = torch.cat([_blockwise(b, p, ndim, reduce) for b in torch.split(x, height, dim)], dim)
    if dim < x.ndim - ndim:
        return lengths
    return reduce(lengths, p, (dim,))  # the p-norm of the blocks' p-norms


def _in_short_rows(x: Tensor, p: float, ndim: int, reduce: _Reduce) -> Tensor:
    x = x.contiguous()
    size = x.shape[x.ndim - ndim :].numel()
    if size < 4 * _SHORT:
        return reduce(x, p, tuple(range(-ndim, 0)))
    rows = x.view(-1, size)
    whole = size - size % _SHORT
    lengths = reduce(rows[:, :whole].reshape(-1, _SHORT), p, (1,)).view(len(rows), -1)
    if whole < size:
        lengths = torch.cat([lengths, reduce(rows[:, whole:], p, (1,))], 1)
    return reduce(lengths, p, (1,)).view(*x.shape[: x.ndim - ndim], *(1,) * ndim)


def _scaled_norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    if x.numel() == 0:
        return _vector_norm(x, p, dim)
    scale = _power_of_two(x.abs().amax(dim, keepdim=True))  # float64 has no wider type above it
    return _vector_norm(x / scale, p, dim) * scale


def _vector_norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    dtype = wide_dtype(x)
    dtype = torch.promote_types(dtype, torch.complex64) if x.is_complex() else dtype
    length: Tensor = torch.linalg.vector_norm(x, p, dim=dim, keepdim=True, dtype=dtype)
    return length


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size, by which to scale without rounding; 1 if none."""
    exponent = torch.frexp(size).exponent - 1
    power = torch.exp2(exponent.to(size.dtype))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)
