"""Gradient transforms: what turns a gradient into a direction, in place.

They act on lists of tensors of one device and dtype. The sub-tensors of a tensor are its last
``sub_ndim(tensor.ndim, param_ndim)`` dims. Non-finite values are never hidden: a NaN entry stays
NaN, and where a norm is involved a NaN or an infinity turns its whole sub-tensor to NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from rai_toolbox.batch import batch_shape, sub_ndim, view_or_copy
from rai_toolbox.constraints.kernels import directions
from rai_toolbox.constraints.sharding import is_sharded, local_of, on_shards_
from rai_toolbox.constraints.sparse import keep_largest_


def normalize_(
    grads: list[Tensor], p: float, param_ndim: int | None, div_by_zero_eps: float
) -> None:
    """``g / max(|g|_p, div_by_zero_eps)`` for each sub-tensor; zeros stay zeros whatever eps is."""
    for grad in grads:
        directions.normalize_(grad, p, sub_ndim(grad.ndim, param_ndim), div_by_zero_eps)


def top_q_(grad: Tensor, q: float, param_ndim: int | None) -> None:
    """Keep the ``round((1 - q) * n)`` largest magnitudes of each sub-tensor of n entries.

    Exactly so many; of tied entries those of the lowest indices stay. The rest becomes 0. NaN
    counts as the largest magnitude.
    """
    if is_sharded(grad):
        _on_whole_sub_tensors_(grad, param_ndim, lambda shard: top_q_(shard, q, param_ndim))
        return
    rows, copied = _rows(grad, param_ndim)
    keep = round((1.0 - q) * rows.shape[1])
    if keep == rows.shape[1]:
        return
    keep_largest_(rows, keep)
    if copied:
        grad.copy_(rows.view(grad.shape))


def largest_sign_(grad: Tensor, param_ndim: int | None) -> None:
    """Keep the sign of one largest-magnitude entry of each sub-tensor; the rest becomes 0.

    That is minus the linear minimization oracle of the unit L1 ball. Of tied entries one stays,
    so that the answer is in the ball.
    """
    if is_sharded(grad):
        _on_whole_sub_tensors_(grad, param_ndim, lambda shard: largest_sign_(shard, param_ndim))
        return
    rows, copied = _rows(grad, param_ndim)
    directions.largest_sign_(rows)
    if copied:
        grad.copy_(rows.view(grad.shape))


def _rows(grad: Tensor, param_ndim: int | None) -> tuple[Tensor, bool]:
    shape = batch_shape(grad.shape, param_ndim)
    return view_or_copy(grad, (shape[0], prod(shape[1:])))


def _on_whole_sub_tensors_(
    grad: Tensor, param_ndim: int | None, transform_: Callable[[Tensor], None]
) -> None:
    """Apply what has no sharding rule to a DTensor: shard by shard, of whole sub-tensors."""

    def transformed(whole: Any) -> Tensor:
        local = local_of(whole)
        transform_(local)
        return local

    on_shards_(grad, range(grad.ndim - sub_ndim(grad.ndim, param_ndim), grad.ndim), transformed)
