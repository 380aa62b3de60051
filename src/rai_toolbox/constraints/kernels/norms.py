"""Norms that neither overflow nor underflow, of each sub-tensor of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import BLOCK, in_blocks, needs_grad, wide_dtype
from rai_toolbox.constraints.kernels.rounding import noise

_CHUNK = 128  # entries whose squares are summed in float32
_LEAST = 2.0**-30  # norms above it need no square that float32 does not hold

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
    any entries in float16 and bfloat16, have the norm that they have on paper. Large tensors are
    converted a piece at a time.
    """
    split = x.ndim - ndim
    dims = tuple(range(split, x.ndim))
    if x.numel() <= BLOCK or not in_blocks(x):
        return _wide_norm(x, p, dims)
    rows_fit = split > 0 and x.numel() <= BLOCK * len(x)
    dim = 0 if rows_fit else max(range(x.ndim), key=lambda dim: x.shape[dim])
    height = max(1, BLOCK * x.shape[dim] // x.numel())
    lengths = torch.cat([_wide_norm(part, p, dims) for part in x.split(height, dim)], dim)
    return lengths if dim < split else _wide_norm(lengths, p, dims)


def norm_near(x: Tensor, ndim: int, limit: float | Tensor) -> tuple[Tensor | None, float]:
    """2-norms as by `norm`, but only those close to `limit` are sure to be so exact.

    Returns the norms, or None if all are surely below the limit; and the relative error that the
    others may have. It is that of sums in float32, of few terms each, for large float32 tensors: a
    third of the time.
    """
    size = x.shape[x.ndim - ndim :].numel()
    narrow = x.dtype == torch.float32 and x.numel() > BLOCK and x.is_contiguous()
    fits = not isinstance(limit, Tensor) and limit > 2 * _LEAST
    if not (narrow and fits and in_blocks(x)) or needs_grad(x):
        return norm(x, 2, ndim), noise(size)
    rows = x.view(-1, size)
    largest = float(torch.linalg.vector_norm(rows, dim=1).amax())
    error = _error(size)
    if largest < limit * (1 - error) - error * _LEAST:
        return None, error
    error = _error(min(size, _CHUNK))
    length = _chunked_norm(rows)
    # (relative errors of norms beyond twice the limit are larger, and do not matter)
    close = (length - limit).abs_() <= 2 * error * limit
    if not largest < math.inf:
        close |= ~length.isfinite()
    number = int(close.count_nonzero())
    if 8 * number > len(rows):
        return norm(x, 2, ndim), error
    if number:
        at = close.view(-1).nonzero().view(-1)
        length.view(-1)[at] = norm(rows[at], 2, 1).view(-1)
    return length.view(*x.shape[: x.ndim - ndim], *(1,) * ndim), error


def _error(size: int) -> float:
    """Relative error of the root of a sum of `size` squares in float32.

    A sum of k terms in 4 lanes or more is off by k / 4 + 8 roundings; its root by half of that.
    """
    return (size / 4 + 8) * torch.finfo(torch.float32).eps / 4


def _chunked_norm(rows: Tensor) -> Tensor:
    """2-norms of float32 rows: of chunks in float32, and of these norms in float64."""
    size = rows.shape[1]
    count = math.ceil(size / _CHUNK)
    width = math.ceil(size / count)
    whole = size // width * width
    lengths = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, width)), 2, 2)
    if whole < size:
        rest = torch.linalg.vector_norm(rows[:, whole:], 2, 1, keepdim=True)
        lengths = torch.cat([lengths, rest], 1)
    total: Tensor = torch.linalg.vector_norm(lengths, 2, 1, keepdim=True, dtype=torch.float64)
    return total


def _wide_norm(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    dtype = wide_dtype(x)
    if x.is_complex():
        dtype = torch.promote_types(dtype, torch.complex64)
    elif p == 1 and x.dtype != torch.float64:  # the same in a third of the time
        total: Tensor = x.abs().sum(dims, keepdim=True, dtype=dtype)
        return total
    if x.dtype not in (torch.float64, torch.complex128) or x.numel() == 0:
        length: Tensor = torch.linalg.vector_norm(x, p, dims, keepdim=True, dtype=dtype)
        return length
    scale = _power_of_two(x.abs().amax(dims, keepdim=True))  # there is no wider type
    length = torch.linalg.vector_norm(x / scale, p, dims, keepdim=True)
    return length * scale


def row_scale(x: Tensor) -> Tensor:
    """A power of two near the largest magnitude of each row, by which to scale without rounding."""
    return _power_of_two(x.detach().abs().amax(1, keepdim=True))


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size, by which to scale without rounding; 1 if none."""
    exponent = torch.frexp(size).exponent - 1
    power = torch.exp2(exponent.to(size.dtype))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)
