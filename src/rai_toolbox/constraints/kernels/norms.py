"""Norms that neither overflow nor underflow, of each sub-tensor of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import in_blocks, wide_dtype

# Elements per block, of which one at a time is copied to float64: an eighth of the tensor, but not
# less, where the calls would cost more than the sums, nor more than what caches hold.
_LEAST, _MOST = 2**16, 2**18

# A long sub-tensor is summed in rows of this length, and then their norms: torch takes half the
# time for many short rows, and blocks of whole rows give the same bits wherever they begin.
_SHORT = 1024

# So many elements are read, to find the norms of their rows, before they are read again.
_IN_CACHE = 2**21

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
    if not in_blocks(x) or x.numel() == 0:
        return reduce(x, p, tuple(range(-ndim, 0)))
    batch = x.shape[: x.ndim - ndim]
    long = x.shape[len(batch) :].numel() >= 4 * _SHORT
    if torch.is_grad_enabled() and x.requires_grad:
        lengths = _of_rows(x.reshape(*batch, -1), p, long, reduce)
    elif not long and x.is_contiguous():  # the same sums, in fewer calls
        rows = x.view(-1, x.shape[len(batch) :].numel())
        found = [reduce(part, p, (-1,)) for part in _parts(rows)]
        lengths = found[0] if len(found) == 1 else torch.cat(found)
    else:
        block = _block(x)
        buffer = x.new_empty(min(block, x.numel()), dtype=_wide(x))
        lengths = _lengths(x, len(batch), block, buffer, lambda r: _of_rows(r, p, long, reduce))
    if long:
        lengths = reduce(lengths, p, (-1,))  # the p-norm of the short rows' p-norms
    return lengths.view(*batch, *(1,) * ndim)


_Reduce = Callable[[Tensor, float, tuple[int, ...]], Tensor]


def _block(x: Tensor) -> int:
    if x.numel() <= 4 * _LEAST:
        return max(x.numel() // 3, _LEAST)
    return min(max(x.numel() // 8, _LEAST), _MOST)


def _parts(rows: Tensor) -> list[Tensor]:
    """The rows in blocks of the same height, as few as there may be."""
    if rows.numel() <= _LEAST:
        return [rows]
    number = math.ceil(len(rows) / max(1, _block(rows) // rows.shape[1]))
    return list(torch.split(rows, math.ceil(len(rows) / number)))


def _lengths(
    x: Tensor, batch: int, block: int, buffer: Tensor, of_rows: Callable[[Tensor], Tensor]
) -> Tensor:
    """`of_rows`, which gives the norms of short rows in the last dim, block by block."""
    dim = next((i for i, size in enumerate(x.shape) if size > 1), 0)
    inner = x.numel() // x.shape[dim] if x.ndim else 1
    unit = 1 if dim < batch else _SHORT // math.gcd(_SHORT, inner)  # so many are whole short rows
    height = max(unit, block // inner // unit * unit)
    if x.numel() <= block or height >= x.shape[dim]:
        # one buffer for all: a new one each time would be new memory, which is slow to touch
        wide = buffer[: x.numel()] if x.numel() <= len(buffer) else buffer.new_empty(x.numel())
        return of_rows(wide.view(x.shape).copy_(x).view(*x.shape[:batch], -1))
    parts = [_lengths(part, batch, block, buffer, of_rows) for part in torch.split(x, height, dim)]
    return torch.cat(parts, min(dim, batch))


def _of_rows(rows: Tensor, p: float, long: bool, reduce: _Reduce) -> Tensor:
    if not long:
        return reduce(rows, p, (-1,))
    whole = rows.shape[-1] - rows.shape[-1] % _SHORT
    lengths = reduce(rows[..., :whole].unflatten(-1, (-1, _SHORT)), p, (-1,)).squeeze(-1)
    if whole == rows.shape[-1]:
        return lengths
    return torch.cat([lengths, reduce(rows[..., whole:], p, (-1,))], -1)


def may_group(batches: list[Tensor]) -> bool:
    """Whether rows of several batches may be scaled together: plain ones on CPU, run eagerly."""
    return all(in_blocks(x) and not (torch.is_grad_enabled() and x.requires_grad) for x in batches)


def alike_rows(batches: list[Tensor]) -> Iterator[list[Tensor]]:
    """The batches that are not empty, by dtype and length of rows, as many as stay in cache."""
    by_kind: dict[tuple[torch.dtype, int], list[Tensor]] = {}
    for x in batches:
        if x.numel() > 0:
            by_kind.setdefault((x.dtype, x.numel() // len(x)), []).append(x)
    for alike in by_kind.values():
        some: list[Tensor] = []
        room = _IN_CACHE
        for x in alike:
            if some and x.numel() > room:
                yield some
                some, room = [], _IN_CACHE
            some.append(x)
            room -= x.numel()
        yield some


def are_surely_shorter(rows: list[Tensor], epsilon: float) -> Tensor:
    """Which rows, of batches (N, n) with the same n, are surely shorter than epsilon.

    That is told by norms in the dtype itself, which take a quarter of the time.
    """
    info, size = torch.finfo(rows[0].dtype), rows[0].shape[1]
    # No sum of so many squares is off by more, nor do squares that underflow hide more; and the
    # bound is rounded to the dtype before it is compared.
    most = (epsilon - math.sqrt(size * info.smallest_normal)) / (1 + (size + 2) * info.eps)
    return torch.cat([torch.linalg.vector_norm(x, dim=1) for x in rows]) < most


def row_norms(batches: list[Tensor]) -> Tensor:
    """The 2-norms of all rows of batches whose rows are alike, one after the other."""
    size = batches[0][0].numel()
    small = sum(map(Tensor.numel, batches)) <= _LEAST
    if small and len(batches) > 1:  # (so little that a copy costs less than a call for each)
        batches = [torch.cat([x.reshape(-1, size) for x in batches])]
    plain = size < 4 * _SHORT and batches[0].dtype != torch.float64
    if not (plain and all(x.is_contiguous() for x in batches)):
        return torch.cat([norm(x, 2, x.ndim - 1).view(-1) for x in batches])
    parts = [part for x in batches for part in _parts(x.view(-1, size))]
    return torch.cat([_vector_norm(part, 2, (1,)) for part in parts]).view(-1)


def _scaled_norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    if x.numel() == 0:
        return _vector_norm(x, p, dim)
    scale = _power_of_two(x.abs().amax(dim, keepdim=True))  # float64 has no wider type above it
    return _vector_norm(x / scale, p, dim) * scale


def _vector_norm(x: Tensor, p: float, dim: tuple[int, ...]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, p, dim=dim, keepdim=True, dtype=_wide(x))
    return length


def _wide(x: Tensor) -> torch.dtype:
    dtype = wide_dtype(x)
    return torch.promote_types(dtype, torch.complex64) if x.is_complex() else dtype


def row_scale(x: Tensor) -> Tensor:
    """A power of two near the largest magnitude of each row, by which to scale without rounding."""
    return _power_of_two(x.detach().abs().amax(1, keepdim=True))


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two at or below each size, by which to scale without rounding; 1 if none."""
    exponent = torch.frexp(size).exponent - 1
    power = torch.exp2(exponent.to(size.dtype))
    return torch.where((size > 0) & size.isfinite(), power, 1.0)
