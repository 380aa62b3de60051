"""Steepest ascent in a norm: minus the linear minimization oracles of the unit balls, in place.

Non-finite values are never hidden: a NaN entry stays NaN, and where a norm is involved a NaN or an
infinity turns its whole sub-tensor to NaN.
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
from torch import Tensor
from torch.linalg import vector_norm

from rai_toolbox import foreach
from rai_toolbox._torch import foreach_finite, foreach_sign_
from rai_toolbox.autograd import readable
from rai_toolbox.constraints.kernels.blocks import BLOCK, GROUP, MANY, is_eager, needs_grad
from rai_toolbox.constraints.kernels.norms import (
    HELD,
    LEAST,
    fast_norm,
    least_and_most,
    norm,
    scale_dtype,
    sums_fast,
)
from rai_toolbox.constraints.sharding import is_sharded, local_of, local_part

_SMALL = 2**12  # elements up to which one look for NaN is for many tensors
_LARGEST = {
    dtype: torch.full((), torch.finfo(dtype).max, dtype=dtype, device="cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_CHUNK = 2**12  # entries whose squares are summed in float32: right to about 1e-6


def sign_(tensors: list[Tensor]) -> None:
    """Elementwise ``g / |g|``, with 0 -> 0, and NaN -> NaN where `torch.sign` would give 0.

    A zero may lose its sign.
    """
    x, recording = tensors[0], torch.is_grad_enabled()
    if len(tensors) == 1:
        if is_small(x) and not recording:
            sign_small_(x)
        else:
            _sign_alike_(tensors)
    elif is_eager(x) and not recording and _are_plain_floats(tensors):
        small = [x for x in tensors if x.numel() <= _SMALL]
        for chunk in foreach.in_chunks(small):
            if foreach_finite(chunk):
                foreach_sign_(chunk)
            else:  # there may be a NaN, which `torch.sign` would hide
                for x in chunk:
                    sign_([x])
        if len(small) < len(tensors):
            for x in tensors:
                if x.numel() > _SMALL:
                    _sign_plain_(x)
    else:
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for x in tensors:
            alike.setdefault((x.dtype, x.device), []).append(x)
        for some in alike.values():
            _sign_alike_(some)


def _are_plain_floats(tensors: list[Tensor]) -> bool:
    """Whether tensors are plain ones on the CPU, of usual real dtypes."""
    dtypes = set(map(attrgetter("dtype"), tensors))
    on_cpu = all(map(attrgetter("is_cpu"), tensors))
    return on_cpu and dtypes <= _LARGEST.keys() and foreach.are_plain(tensors)


def is_small(x: Tensor) -> bool:
    """Whether `sign_small_` is for a tensor."""
    return x.numel() <= _SMALL and is_eager(x) and not x.is_complex()


def sign_small_(x: Tensor) -> None:
    """`sign_` of a small plain tensor that is not recorded by autograd."""
    if x.equal(x):  # (NaN is not equal)
        x.sgn_()
    else:
        _sign_alike_([x])


def _sign_alike_(tensors: list[Tensor]) -> None:
    """Of tensors of one device and dtype."""
    x = tensors[0]
    if x.is_complex():
        for tensor in tensors:
            _sign_complex_(tensor)
    elif torch.is_grad_enabled():  # a derivative of 0 everywhere, at 0 too
        for tensor in tensors:
            signs = tensor.detach().clone()
            with torch.no_grad():
                sign_([signs])
            tensor.copy_(signs)
    elif len(tensors) == 1 and is_eager(x):
        _sign_plain_(x)
    else:
        _lift_and_clamp_(tensors)


def _sign_plain_(x: Tensor) -> None:
    largest = torch.finfo(x.dtype).max  # as below, in two passes, with what fits the cache
    is_large = x.numel() > GROUP and x.is_contiguous()
    for part in x.view(-1).split(MANY) if is_large else [x]:
        part.addcmul_(part, _LARGEST[x.dtype], value=largest).clamp_(-1.0, 1.0)


def _lift_and_clamp_(tensors: list[Tensor]) -> None:
    # two factors lift even the smallest subnormal number of any dtype beyond 1
    largest = torch.finfo(tensors[0].dtype).max
    foreach.mul_(tensors, largest)
    foreach.mul_(tensors, largest)
    foreach.clamp_(tensors, -1.0, 1.0)


def _sign_complex_(x: Tensor) -> None:
    parts = torch.view_as_real(x)
    size = parts.detach().abs().amax(-1, keepdim=True)  # whose square may not fit the dtype
    parts.div_(size.where((size > 0) & size.isfinite(), 1.0))
    x.sgn_()


def normalize_(x: Tensor, p: float, ndim: int, div_by_zero_eps: float = 0.0) -> Tensor:
    """``x / max(|x|_p, eps)`` over the last `ndim` dims; zeros stay zeros whatever eps is."""
    if ndim == 0:
        normalize_(x.unsqueeze(-1), p, 1, div_by_zero_eps)
        return x
    if ndim == x.ndim - 1 and x.numel() > 0 and is_eager(x) and not needs_grad(x):
        is_row = x.shape[0] == 1 and x.numel() <= BLOCK // 2
        if not (is_row and normalize_row_(x, p, div_by_zero_eps)):
            normalize_each_([x], p, div_by_zero_eps)
        return x
    length = norm(readable(x), p, ndim)
    if is_sharded(x) and not torch.is_grad_enabled():
        _divide_(local_of(x), local_part(length, x), div_by_zero_eps)
        return x
    return _divide_(x, length, div_by_zero_eps)


def normalize_row_(x: Tensor, p: float, div_by_zero_eps: float = 0.0) -> bool:
    """Normalize one short row, of any shape, in few calls, if its dtype holds the norm."""
    if x.dtype == torch.float32:
        length = vector_norm(x, p, dtype=torch.float64)
    else:
        length = norm(x, p, x.ndim).view(())
    value, (least, most) = length.item(), HELD[x.dtype]
    is_held = least < value <= most and div_by_zero_eps < value
    if is_held:
        x.div_(length)
    return bool(is_held)


def normalize_each_(batches: list[Tensor], p: float, div_by_zero_eps: float) -> None:
    """`normalize_` for the rows of plain batches on the CPU, of one length and dtype.

    Each is divided while it is in cache; large ones are multiplied, in half of the time, by
    reciprocals of norms in the dtype of factors. Rows for whose norms these are no normal numbers
    are divided twice.
    """
    dtype = scale_dtype(batches[0])
    least, most = LEAST[dtype], 1 / torch.finfo(dtype).smallest_normal
    if div_by_zero_eps > most:
        for x in batches:
            _divide_(x, norm(x, p, x.ndim - 1), div_by_zero_eps)
        return
    fast = p in (1, 2) and sums_fast(batches, _CHUNK)
    for x in batches:
        length = fast_norm(x, p, _CHUNK) if fast else norm(x, p, x.ndim - 1)
        shortest, longest = least_and_most(length)
        are_held = max(div_by_zero_eps, least) < shortest and longest <= most
        if not are_held:
            at = (~((length > least) & (length <= most))).view(-1).nonzero().view(-1)
            rows = x[at]
            _divide_(rows, norm(rows, p, x.ndim - 1), div_by_zero_eps)
            length.clamp_(max(div_by_zero_eps, least), most)
        divisor = length.to(dtype)
        _ = x.mul_(divisor.reciprocal_()) if fast else x.div_(divisor)
        if not are_held:
            x.index_copy_(0, at, rows)


def _divide_(x: Tensor, length: Tensor, div_by_zero_eps: float) -> Tensor:
    info = torch.finfo(scale_dtype(x))
    length = torch.where(length.isinf(), torch.nan, length)  # a direction that nobody knows
    divisor = torch.where(length == 0, 1.0, length.clamp(min=div_by_zero_eps))
    # Two divisions: a norm can be beyond the numbers that the dtype holds, or holds precisely.
    first = divisor.clamp(info.smallest_normal, info.max)
    return x.div_(first.to(scale_dtype(x))).div_((divisor / first).to(scale_dtype(x)))


def largest_sign_(rows: Tensor) -> Tensor:
    """Keep the sign of one largest-magnitude entry of each row; the rest becomes 0.

    Of tied entries one stays, so that the answer is in the L1 ball.
    """
    if rows.shape[1] == 0:
        return rows
    is_large = rows.numel() > BLOCK // 2 and rows.dtype in _LARGEST
    if is_large and is_eager(rows) and not needs_grad(rows) and _divide_by_largest_(rows):
        return rows
    return _find_largest_sign_(rows)


def _find_largest_sign_(rows: Tensor) -> Tensor:
    index = rows.abs().argmax(dim=1, keepdim=True)
    kept = readable(rows).gather(1, index)
    sign_([kept])
    return rows.zero_().scatter_(1, index, kept)


def _divide_by_largest_(rows: Tensor) -> bool:
    """`largest_sign_` without a search, in a third of the time; False if some row has no quotients.

    The largest entry becomes 1 or -1, and smaller ones less, after rounding too.
    """
    size = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
    (least, most), info = least_and_most(size), torch.finfo(rows.dtype)
    if least == 0:  # rows of 0, which stay
        least = size.masked_fill_(size == 0, 1.0).amin().item()
    if not (info.smallest_normal <= least and most < math.inf):
        return False
    torch.hardshrink(rows.div_(size), 1 - info.eps / 2, out=rows)
    tied = (vector_norm(rows, 2, 1) > 1).nonzero().view(-1)
    if len(tied) > 0:
        rows[tied] = _find_largest_sign_(rows[tied])
    return True


def largest_sign_of_row_(row: Tensor) -> None:
    """`largest_sign_` of one dense plain row that has entries, of any shape."""
    entries = row.view(-1)
    largest = entries[int(entries.abs().argmax())]
    value = largest.item()
    sign = 1.0 if value > 0 else -1.0 if value < 0 else value + 0.0  # (not -0.0)
    entries.zero_()
    largest.fill_(sign)
