"""Gradient transforms: what turns a gradient into a direction, in place.

They act on lists of tensors of one device and dtype. The sub-tensors of a tensor are its last
``sub_ndim(tensor.ndim, param_ndim)`` dims. Non-finite values are never hidden: a NaN entry stays
NaN, and where a norm is involved a NaN or an infinity turns its whole sub-tensor to NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.batch import batch_shape, sub_ndim, view_or_copy
from rai_toolbox.constraints.box import clamp_
from rai_toolbox.constraints.norms import norm, scale_dtype
from rai_toolbox.foreach import mul_


def sign_(grads: list[Tensor]) -> None:
    """Elementwise ``g / |g|``, with 0 -> 0, and NaN -> NaN where `torch.sign` would give 0."""
    if grads[0].is_complex():
        for grad in grads:
            _sign_complex_(grad)
    elif torch.is_grad_enabled():  # a derivative of 0 everywhere, at 0 too
        for grad in grads:
            signs = grad.detach().clone()
            with torch.no_grad():
                sign_([signs])
            grad.copy_(signs)
    else:  # two factors lift even the smallest subnormal number of any dtype beyond 1
        largest = torch.finfo(grads[0].dtype).max
        mul_(grads, largest)
        mul_(grads, largest)
        clamp_(grads, -1.0, 1.0)


def _sign_complex_(grad: Tensor) -> None:
    parts = torch.view_as_real(grad)
    size = parts.detach().abs().amax(-1, keepdim=True)  # whose square may not fit the dtype
    parts.div_(size.where((size > 0) & size.isfinite(), 1.0))
    grad.sgn_()


def normalize_(
    grads: list[Tensor], p: float, param_ndim: int | None, div_by_zero_eps: float
) -> None:
    """``g / max(|g|_p, div_by_zero_eps)`` for each sub-tensor; zeros stay zeros whatever eps is."""
    for grad in grads:
        _normalize_(grad, p, sub_ndim(grad.ndim, param_ndim), div_by_zero_eps)


def _normalize_(grad: Tensor, p: float, ndim: int, div_by_zero_eps: float) -> None:
    if ndim == 0:
        grad, ndim = grad.unsqueeze(-1), 1
    length = norm(readable(grad), p, ndim)
    length = torch.where(length.isinf(), torch.nan, length)  # a direction that nobody knows
    divisor = torch.where(length == 0, 1.0, length.clamp(min=div_by_zero_eps))
    info = torch.finfo(scale_dtype(grad))
    # Two divisions: a norm can be beyond the numbers that the dtype holds, or holds precisely.
    first = divisor.clamp(info.smallest_normal, info.max)
    grad.div_(first.to(scale_dtype(grad))).div_((divisor / first).to(scale_dtype(grad)))


def top_q_(grad: Tensor, q: float, param_ndim: int | None) -> None:
    """Keep the ``round((1 - q) * n)`` largest magnitudes of each sub-tensor of n entries.

    Exactly so many, ties or not; the rest becomes 0. NaN counts as the largest magnitude.
    """
    if _is_divided(grad, param_ndim):
        _as_a_whole_(grad, lambda whole: top_q_(whole, q, param_ndim))
        return
    rows, copied = _rows(grad, param_ndim)
    keep = round((1.0 - q) * rows.shape[1])
    if keep == rows.shape[1]:
        return
    index = rows.detach().abs().topk(keep, dim=1, sorted=False).indices
    kept = readable(rows).gather(1, index)
    rows.zero_().scatter_(1, index, kept)
    if copied:
        grad.copy_(rows.view(grad.shape))


def largest_sign_(grad: Tensor, param_ndim: int | None) -> None:
    """Keep the sign of one largest-magnitude entry of each sub-tensor; the rest becomes 0.

    That is minus the linear minimization oracle of the unit L1 ball. Of tied entries one stays,
    so that the answer is in the ball.
    """
    if _is_divided(grad, param_ndim):
        _as_a_whole_(grad, lambda whole: largest_sign_(whole, param_ndim))
        return
    rows, copied = _rows(grad, param_ndim)
    if rows.shape[1] == 0:
        return
    index = rows.detach().abs().argmax(dim=1, keepdim=True)
    kept = readable(rows).gather(1, index)
    sign_([kept])
    rows.zero_().scatter_(1, index, kept)
    if copied:
        grad.copy_(rows.view(grad.shape))


def _rows(grad: Tensor, param_ndim: int | None) -> tuple[Tensor, bool]:
    shape = batch_shape(grad.shape, param_ndim)
    return view_or_copy(grad, (shape[0], prod(shape[1:])))


def _is_divided(grad: Any, param_ndim: int | None) -> bool:
    """Whether a DTensor holds parts of sub-tensors in different places."""
    batch_ndim = grad.ndim - sub_ndim(grad.ndim, param_ndim)
    return not all(
        placement.is_replicate() or (placement.is_shard(0) and batch_ndim == 1)
        for placement in getattr(grad, "placements", ())
    )


def _as_a_whole_(grad: Any, transform_: Callable[[Tensor], None]) -> None:
    """Apply what has no sharding rule to a DTensor: gathered, and divided again."""
    from torch.distributed.tensor import DTensor

    whole = grad.full_tensor()
    transform_(whole)
    everywhere = DTensor.from_local(whole, grad.device_mesh, run_check=False)
    grad.copy_(everywhere.redistribute(placements=grad.placements))
