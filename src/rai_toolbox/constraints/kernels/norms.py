"""Norms that neither overflow nor underflow, of each sub-tensor of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from rai_toolbox.constraints.kernels.blocks import BLOCK, Workspace, is_eager, is_plain, wide_dtype

_SCALES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex32: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_LANES = 8 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 4
"""How many sums of squares in float32 torch adds up side by side, at least.

With AVX512, too: it has no kernel of its own for norms.
"""

EXACT_CHUNK = 64 * _LANES
"""Entries whose squares are summed in float32 with an error of 96 roundings: 2.9e-6."""

_MOST = 2**18  # elements of a piece: more leave the cache, fewer cost more calls

LEAST = {dtype: torch.finfo(dtype).tiny ** 0.25 for dtype in (torch.float32, torch.float64)}
"""Norms from which on squares that the dtype does not hold have no share in them."""

HELD = {dtype: (LEAST[scale], torch.finfo(scale).max) for dtype, scale in _SCALES.items()}
"""The norms, by which a tensor of a dtype may be divided, lie between these two numbers."""


def scale_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a factor or divisor for `x`: its own real one, but float32 for half precision.

    A factor of 8 or 11 bits would miss a radius, and the norms of half-precision tensors do not
    fit their range; torch multiplies in float32 then, and rounds once.
    """
    return _SCALES[x.dtype]


def norm(x: Tensor, p: float, ndim: int) -> Tensor:
    """p-norm over the last `ndim` >= 1 dims, which are kept with size 1.

    It is accumulated and returned in float64, so that entries of 1e20 or 1e-25 in float32, and
    any entries in float16 and bfloat16, have the norm that they have on paper. Large tensors are
    converted a piece at a time.
    """
    split = x.ndim - ndim
    dims = tuple(range(split, x.ndim))
    if x.numel() <= BLOCK or not is_eager(x):
        return wide_norm(x, p, dims)
    piece = max(BLOCK, min(_MOST, x.numel() // 8))  # in float64, a quarter of float32 `x`
    rows_fit = split > 0 and x.numel() <= piece * len(x)
    dim = 0 if rows_fit else max(range(x.ndim), key=lambda dim: x.shape[dim])
    height = max(1, piece * x.shape[dim] // x.numel())
    lengths = torch.cat([wide_norm(part, p, dims) for part in x.split(height, dim)], dim)
    return lengths if dim < split else wide_norm(lengths, p, dims)


def row_norm(x: Tensor, p: float) -> float:
    """The p-norm of a plain batch of one short row; in two calls, mostly."""
    if x.dtype == torch.float32:
        length: float = vector_norm(x, p, dtype=torch.float64).item()
        return length
    return norm(x, p, x.ndim - 1).item()


def sums_fast(batches: Sequence[Tensor], chunk: int) -> bool:
    """Whether `fast_norms` takes batches (N, ...): large ones of real numbers, on the CPU.

    Their rows have one length, and must be dense: torch sums other ones term by term, without
    lanes (see `sum_error`).
    """
    x = batches[0]
    if x.is_complex() or x.shape[1:].numel() > BLOCK:
        return False
    return is_eager(x) and all(is_plain(x) and _is_large_and_dense(x, chunk) for x in batches)


def _is_large_and_dense(x: Tensor, chunk: int) -> bool:
    if x.numel() <= BLOCK // 2:
        return False
    return x.is_contiguous() or (
        x.shape[1:].numel() <= chunk
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def fast_norms(batches: list[Tensor], p: float, chunk: int) -> Tensor:
    """p-norms, p = 1 or 2, of all rows of some batches, shape (N,), without wide sums of entries.

    The rows have one length and dtype. Sums of up to `chunk` entries have the dtype of factors.
    Norms are right, to within `sum_error`, from `LEAST` on and where they are finite.
    """
    return _joined([fast_norm(x, p, chunk).view(-1) for x in batches])


def fast_norm(x: Tensor, p: float, chunk: int) -> Tensor:
    """`fast_norms` of one batch, shape (N, 1, ...), in the dtype of factors."""
    dtype, dims, size = scale_dtype(x), tuple(range(1, x.ndim)), x.shape[1:].numel()
    if p == 1:  # (torch sums pairwise; its 1-norm takes twice the time)
        parts = x.split(max(1, 2 * BLOCK // size))
        memory = torch.empty_like(parts[0])  # one, because it is slow to touch
        sizes = (torch.abs(part, out=memory[: len(part)]) for part in parts)
        return torch.cat([each.sum(dims, keepdim=True, dtype=dtype) for each in sizes])
    if size <= chunk or x.dtype == torch.float64:
        return vector_norm(x, 2, dims, keepdim=True, dtype=dtype)
    number = math.ceil(size / chunk)
    width = math.ceil(size / number)
    ones = (1,) * (x.ndim - 2)
    if width * number == size:
        roots = vector_norm(x.view(-1, number, *ones, width), 2, -1, dtype=dtype)
    else:
        rows, whole = x.view(-1, size), size // width * width
        roots = vector_norm(rows[:, :whole].unflatten(1, (-1, width)), 2, 2, dtype=dtype)
        rest = vector_norm(rows[:, whole:], 2, 1, keepdim=True, dtype=dtype)
        roots = torch.cat([roots, rest], 1).view(len(x), -1, *ones)
    # (nine more roundings are allowed for)
    if number > 8:
        return vector_norm(roots, 2, 1, keepdim=True, dtype=torch.float64).to(dtype)
    return vector_norm(roots, 2, 1, keepdim=True)


def wide_norms(batches: list[Tensor], workspace: Workspace) -> Tensor:
    """Euclidean norms of all rows of some plain batches (N, ...) in float64, shape (N,).

    Large ones go by equal pieces, whose wide copies take at most as much memory as a batch has.
    """
    lengths = []
    for x in batches:
        size, height = x.numel(), x.shape[0]
        number = max(8 // x.element_size(), math.ceil(size / _MOST))
        small = size <= BLOCK or height < number
        if small or x.dtype == torch.float64 or not x.is_contiguous():
            lengths.append(norm(x, 2, x.ndim - 1).view(-1))
            continue
        dims = tuple(range(1, x.ndim))
        for part in x.split(math.ceil(height / number)):
            wide = workspace[part.shape, torch.float64].copy_(part)
            lengths.append(vector_norm(wide, 2, dims))
    return _joined(lengths)


def fast_products(batches: list[Tensor], others: list[Tensor], workspace: Workspace) -> Tensor:
    """Inner products of all rows of batches with those of others, shape (N,), as `fast_norms`."""
    size, products = batches[0].shape[1:].numel(), []
    quarter = sum(x.numel() for x in batches) // 4
    height = max(2 * BLOCK, min(_MOST, quarter)) // size
    for x, y in zip(batches, others, strict=True):
        parts = [(x, y)]
        if x.shape[0] > height:
            parts = list(zip(x.split(height), y.split(height), strict=True))
        for x, y in parts:  # (in any strides)
            product = torch.mul(x, y, out=workspace[x.shape, x.dtype])
            products.append(product.view(-1, size).sum(1))
    return torch.cat(products)


def for_each(of_rows: Tensor, batches: list[Tensor]) -> list[Tensor]:
    """What `of_rows`, shape (N,), has for the rows of each batch, to broadcast against it."""
    column = of_rows.view(-1, 1)
    parts = column.split([x.shape[0] for x in batches]) if len(batches) > 1 else [column]
    return [
        part if x.ndim == 2 else part.view(-1, *(1,) * (x.ndim - 1))
        for part, x in zip(parts, batches, strict=True)
    ]


def _joined(lengths: list[Tensor]) -> Tensor:
    return lengths[0] if len(lengths) == 1 else torch.cat(lengths)


def least_and_most(lengths: Tensor) -> tuple[float, float]:
    """The smallest and the largest number of a tensor; NaN if there is one."""
    if lengths.numel() == 1:
        value = lengths.item()
        return value, value
    least, most = lengths.aminmax()
    return least.item(), most.item()


def sum_error(size: int) -> float:
    """Relative error of the root of a sum of `size` squares in float32.

    Each lane is off by a rounding per term, the sum of up to 16 lanes and of what is left over by
    two per lane, and the root by half of that.
    """
    return (size / _LANES + 32) * torch.finfo(torch.float32).eps / 4


def wide_norm(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """`norm` over some dims in one call, which takes a wide copy."""
    if p == 2 and x.dtype == torch.float32 and x.is_cpu:  # as below, in fewer calls
        return vector_norm(x, 2, dims, keepdim=True, dtype=torch.float64)
    dtype = wide_dtype(x)
    if x.is_complex():
        dtype = torch.promote_types(dtype, torch.complex64)
    elif p == 1 and x.dtype != torch.float64:  # the same in a third of the time
        return x.abs().sum(dims, keepdim=True, dtype=dtype)
    if x.dtype not in (torch.float64, torch.complex128) or x.numel() == 0:
        return vector_norm(x, p, dims, keepdim=True, dtype=dtype)
    scale = _power_of_two(x.abs().amax(dims, keepdim=True))  # there is no wider type
    length = vector_norm(x / scale, p, dims, keepdim=True)
    return length * scale


def row_scale(x: Tensor) -> Tensor:
    """A power of two near the largest magnitude of each row, by which to scale without rounding."""
    return _power_of_two(x.detach().abs().amax(1, keepdim=True))


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size, by which to scale without rounding; 1 if none."""
    exponent = torch.frexp(size).exponent - 1
    power = torch.exp2(exponent.to(size.dtype))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)
