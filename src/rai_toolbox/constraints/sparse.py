"""Sparse sub-tensors: all but a few entries are zero."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.checks import check_non_negative
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import is_eager, needs_grad, row_halves

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as an entry, in bytes


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Constraint):
    """At most `k` entries of each sub-tensor are not zero.

    ``{x : |x|_0 <= k}``. The projection keeps the `k` entries of largest magnitude as they are
    (hard thresholding; Blumensath and Davies, 2009), at the cost of a selection. The set is not
    convex: where magnitudes tie, several points are nearest, and the one that keeps the lowest
    indices is taken. It is unbounded and has no `lmo`. The violation is the largest magnitude
    after the `k` largest.

    Parameters
    ----------
    k : int
        How many entries may be other than zero; the size of a sub-tensor, or more, allows all.
    dim : int or tuple of int, optional
        Along which dims of the batch they are counted; by default all but the first.

    Raises
    ------
    TypeError
        If `k` is not an int.
    ValueError
        If `k` is negative.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import TopK
    >>> TopK(2).project_(torch.tensor([[1.0, -3.0, 2.0], [1.0, 1.0, 1.0]]))
    tensor([[ 0., -3.,  2.],
            [ 1.,  1.,  0.]])
    """

    convex: ClassVar[bool] = False
    _is_equation: ClassVar[bool] = True  # of the entries that are 0

    k: int
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_non_negative("k", self.k)
        if not isinstance(self.k, int):
            raise TypeError(f"`k` must be an int, got {self.k!r}")

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.k >= x.shape[1]:
            return x.new_zeros(len(x))
        return x.abs().topk(self.k + 1, dim=1, sorted=False).values.amin(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(are_largest(x, self.k), x, 0.0)


def keep_largest_(rows: Tensor, k: int) -> Tensor:
    """Keep the `k` entries of largest magnitude of each row, in place; the rest becomes 0.

    See `are_largest`. `rows` has the shape (N, n).
    """
    for half in row_halves(rows):
        _keep_largest_(half, k)
    return rows


def _keep_largest_(rows: Tensor, k: int) -> None:
    if 0 < k < rows.shape[1] and is_eager(rows) and not needs_grad(rows):
        order, least = _order_and_least(rows, k)
        smaller = order < least
        if int(smaller.count_nonzero()) == rows.numel() - k * len(rows):  # there are no ties
            rows.masked_fill_(smaller, 0.0)
            return
    rows.masked_fill_(~are_largest(rows, k), 0.0)


def keep_largest_of_row_(row: Tensor, k: int) -> bool:
    """`keep_largest_`, for a plain batch (1, n) of one row and 0 < k < n.

    Returns whether k entries are not 0, if there is no NaN.
    """
    largest = row.abs().topk(k + 1, dim=1).values
    least, next_one = largest[0, k - 1 :].tolist()
    if least > next_one:
        row.copy_(torch.hardshrink(row, next_one))
        return True
    row.masked_fill_(~are_largest(row, k), 0.0)  # there are ties, or NaN
    return False


def _order_and_least(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Integers in the order of magnitudes, with NaN on top; the `k`-th largest of each row."""
    # The bits of a magnitude, read as an integer, have the order of magnitudes.
    sizes = rows.abs()
    order = sizes.view(_INTEGERS[sizes.element_size()])
    return order, order.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


@torch.no_grad()
def are_largest(rows: Tensor, k: int) -> Tensor:
    """Whether an entry is one of the `k` of largest magnitude in its row of (N, n).

    Exactly `k` of a row are, or all n if they are fewer. Of tied entries those of the lowest
    indices are, on every device; NaN counts as the largest magnitude.
    """
    if k >= rows.shape[1]:
        return torch.ones_like(rows, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    # Which of tied entries `topk` finds differs between devices, but not how large they are.
    order, least = _order_and_least(rows.detach(), k)
    above, tied = order > least, order == least
    vacant = k - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= vacant))
