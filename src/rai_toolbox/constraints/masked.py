"""A set for some of the entries; the others are unconstrained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.checks import check_type, wrong
from rai_toolbox.constraints.base import Constraint, check_device


@dataclass(frozen=True, eq=False, repr=False)
class Masked(Constraint):
    """Some entries of every sub-tensor in a set; the others are unconstrained.

    ``{x : x[mask] in C}``; ``P(x)[mask] = P_C(x[mask])``, and all other entries do not change, at
    the cost of a projection of the selected entries. An elementwise set is applied to the whole
    batch. Any other set is applied to the selected entries, in their order, as a batch (N, m):
    its tensor settings broadcast against that.

    Parameters
    ----------
    constraint : Constraint
        The set C, not one of matrices.
    mask : Tensor of bool, shape (...) or (1, ...) or (N, ...)
        True where an entry is constrained: a mask that all sub-tensors share, or one for each.
        Unless the set is elementwise, it has the shape of the sub-tensor and selects as many
        entries of one as of another.

    Raises
    ------
    TypeError
        If `constraint` is no constraint, or `mask` does not hold bools.
    ValueError
        If the set is one of matrices.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Hyperplane, Masked
    >>> first_two = torch.tensor([True, True, False])
    >>> Masked(Hyperplane(1.0, 1.0), first_two).project_(torch.tensor([[1.0, 1.0, 7.0]]))
    tensor([[0.5000, 0.5000, 7.0000]])
    """

    # Of each instance: where the constrained entries are, if the mask is that of one sub-tensor, or
    # that of a batch (which the batch decides); None where rows differ in their number.
    _of_one: ClassVar[Any]
    _of_each: ClassVar[Any]

    constraint: Constraint
    mask: Tensor

    def _check_settings(self) -> None:
        check_type("constraint", self.constraint, Constraint, "be a constraint")
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            got = self.mask.dtype if isinstance(self.mask, Tensor) else repr(self.mask)
            raise wrong("mask", "be a tensor of bools", got, TypeError)
        of_rows = self.constraint._dims is None and self.constraint.coupled_dims(2) == (1,)
        if self.constraint._of_matrices or not of_rows:
            rule = "not be a set of matrices, or of other dims, which a mask takes apart"
            raise wrong("constraint", rule, self.constraint)
        elementwise = self.constraint.elementwise
        self.__dict__.update(convex=self.constraint.convex, elementwise=elementwise)
        if not elementwise:
            of_one, of_each = _selected(self.mask.unsqueeze(0)), _selected(self.mask)
            self.__dict__.update(_of_one=of_one, _of_each=of_each)

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if self.elementwise:
            return x.copy_(torch.where(self.mask, self.constraint.project(x), readable(x)))
        index = self._index(x)
        if index.numel() == 0:
            return x
        rows = readable(x).flatten(1)
        nearest = self.constraint.project(rows.gather(1, index))
        return x.copy_(rows.scatter(1, index, nearest).view(x.shape))

    @torch.no_grad()
    def violation(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if self.elementwise:
            inside = self.constraint.project(torch.zeros_like(x))
            return self.constraint.violation(torch.where(self.mask, x, inside))
        index = self._index(x)
        if index.numel() == 0:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return self.constraint.violation(x.flatten(1).gather(1, index))

    def _index(self, x: Tensor) -> Tensor:
        """Where the constrained entries of each row are, shape (N, m)."""
        index = self._of_each if self.mask.ndim == x.ndim else self._of_one
        return index.expand(len(x), -1)

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        given = x if self.elementwise else x.new_empty(self._index(x).shape)
        if given.numel() > 0:  # else there is nothing that settings could fit
            self.constraint._check_batch(given)

    def _check_tensors(self, x: Tensor) -> None:
        self._check_fit("mask", self.mask, x)
        check_device("mask", self.mask, x)

    def _check_shape(self, shape: torch.Size) -> None:
        if self.elementwise:
            return
        of_mask = self.mask.shape
        per_batch = len(of_mask) == len(shape)
        if (of_mask[1:] if per_batch else of_mask) != shape[1:]:
            raise ValueError(
                "`mask` must have the shape of the sub-tensor for a set that is not elementwise, "
                f"{tuple(shape[1:])} for the batch of shape {tuple(shape)}, with or without N "
                f"before it, got {tuple(of_mask)}"
            )
        if per_batch and self._of_each is None:
            counts = self.mask.flatten(1).sum(1)
            rule = "select as many entries of one sub-tensor as of another"
            raise wrong("mask", rule, f"from {int(counts.min())} to {int(counts.max())}")

    def to(self, *args: Any, **kwargs: Any) -> Masked:  # noqa: D102
        mask = self.mask.to(*args, **kwargs).to(torch.bool)  # a dtype is for numbers only
        return Masked(self.constraint.to(*args, **kwargs), mask)

    def _whole_dims(self, shape: torch.Size) -> Iterable[int]:
        one_for_all = self.mask.ndim < len(shape) and not self.constraint._tensors
        coupled = self.elementwise or one_for_all
        return super()._whole_dims(shape) if coupled else range(len(shape))


def _selected(mask: Tensor) -> Tensor | None:
    """The indices of True in each row, shape (N, m); None if rows differ in their number."""
    rows = mask.flatten(1) if mask.ndim > 1 else mask.reshape(-1, 1)
    counts = rows.sum(1).tolist()
    if len(set(counts)) > 1:
        return None
    return rows.nonzero()[:, 1].reshape(len(rows), max(counts, default=0))
