"""Budgets: a box intersected with a hyperplane."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting, wrong
from rai_toolbox.constraints.base import Constraint, in_float64
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels import box_hyperplane as kernel
from rai_toolbox.constraints.kernels.rounding import noise, resolution
from rai_toolbox.constraints.sampling import uniform


@dataclass(frozen=True, eq=False, repr=False)
class BoxSection(Constraint):
    """Entries between bounds, with a given weighted sum.

    ``{x : weight . x = total, lower <= x <= upper}``; ``P(x) = clamp(x - t weight, lower, upper)``
    with the t for which the sum is right: the root of a piecewise linear function, found by
    Newton's method in a bracket (Cominetti, Mascarenhas and Silva, 2014) within some ten passes
    over x. `lmo` raises entries in the order of ``gradient / weight`` (Dantzig, 1957), after a
    sort. `sample_` projects a uniform point of the box. Bounds count as rounded to the dtype of x.

    Parameters
    ----------
    weight : float or Tensor
        The weight of each entry, of any sign, or 0; a tensor broadcasts against the batch (N, ...).
    total : float or Tensor
        The weighted sum; a tensor has one value per sub-tensor, shape (N, 1, ...).
    lower, upper : float or Tensor or None
        The bounds; a tensor broadcasts likewise. None, or an infinity, leaves a side open. `lmo`
        and `sample_` need both.
    dim : int or tuple of int, optional
        Along which dims of the batch the sum is taken; by default all but the first.

    Raises
    ------
    ValueError
        If a setting is NaN, `weight` or `total` is not finite, or ``lower > upper`` anywhere.
        Also if no point of the box has the sum, once the number of entries is known.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import BoxSection
    >>> budget = BoxSection(torch.tensor([1.0, 2.0, 3.0]), 1.0, lower=0.0, upper=0.8)
    >>> budget.project_(torch.tensor([[1.2, 3.0, 0.7]]))
    tensor([[0.0000, 0.5000, 0.0000]])
    """

    _is_equation: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("total",)
    _feasible: ClassVar[set[Any]]  # of each instance: shapes that have a point of it in a dtype

    weight: float | Tensor
    total: float | Tensor
    lower: float | Tensor | None
    upper: float | Tensor | None
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("weight", self.weight)
        check_setting("total", self.total)
        is_open = self.lower is None and self.upper is None
        self._derive(bounded=not is_open and Box(self.lower, self.upper).bounded)  # checks
        self.__dict__["_feasible"] = set()
        least, most = self._least_and_most()
        if least.ndim < 2:  # a row, which a sub-tensor may hold more than once
            coarsest = torch.finfo(torch.bfloat16).eps  # that a batch may have
            self._check_total(least.reshape(1, -1), most.reshape(1, -1), coarsest, repeated=True)

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        shape, batch = x.shape, (x.shape, x.dtype)
        if self._dims is not None or 0 in shape or batch in self._feasible:
            return
        least, most = (
            end.expand(len(end) if end.ndim == len(shape) else 1, *shape[1:]).flatten(1)
            for end in self._least_and_most()
        )
        self._check_total(least, most, torch.finfo(x.dtype).eps)
        self._feasible.add(batch)

    def _check_total(self, least: Tensor, most: Tensor, eps: float, repeated: bool = False) -> None:
        """Raise where no point has the sum; NaN, of bounds that are infinite, is no point either.

        Sums may be off by what rounding to a dtype of that eps may hide, as for `violation`.
        """
        slack = eps + 4 * noise(least.shape[1])
        low = least.sum(1) - slack * least.abs().sum(1)
        high = most.sum(1) + slack * most.abs().sum(1)
        if repeated:
            low, high = low.where(~(low < 0), -inf), high.where(~(high > 0), inf)
        total = in_float64(total=self.total)[0].reshape(-1).to(low.device)
        low, high, total = torch.broadcast_tensors(low, high, total)
        outside = ~((low <= total) & (total <= high))
        if bool(outside.any()):
            first, last, sought = (t[outside][0].item() for t in (low, high, total))
            rule = "be between the least and the largest weighted sum within the bounds"
            raise wrong("total", f"{rule}, {first:.7g} and {last:.7g}", sought)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weight, total, lower, upper = self._rows(x, dtype)
        terms = weight * x
        off = (terms.sum(1) - total.squeeze(1)).abs()
        right = off <= resolution(terms.abs().sum(1), weight.abs().sum(1), x.shape[1], dtype)
        distance = torch.where(right, 0.0, off / torch.linalg.vector_norm(weight, dim=1))
        return torch.maximum(distance, kernel.outside_bounds(x, lower, upper))

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return kernel.nearest_with_sum(x, *self._rows(x, dtype))

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        weight, total, lower, upper = self._rows(gradient, dtype)
        # From the least sum, raise the entries that cost least for what they add to the sum.
        least = kernel.corner(torch.where(weight != 0, weight, gradient), lower, upper)
        most = torch.where(weight != 0, kernel.corner(-weight, lower, upper), least)
        price = torch.where(weight != 0, gradient / weight, inf)
        missing = (total - (weight * least).sum(1, keepdim=True)).clamp(min=0)
        room = (weight * (most - least)).abs()
        filled, last = kernel.fill_cheapest(price, room, missing)
        point = torch.where(filled < room, least + filled / weight, most)
        # The entry that was filled last makes up for the rounding of the sum.
        left = (weight * point).sum(1, keepdim=True) - total
        of_last = weight.expand_as(point).gather(1, last)
        step = torch.where(of_last != 0, left / of_last, 0.0)
        return point.scatter_add(1, last, -step).clamp(lower, upper)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        *_, lower, upper = rows = self._rows(like, like.dtype)
        share = uniform(like, generator)
        return kernel.nearest_with_sum((1 - share) * lower + share * upper, *rows)

    def _rows(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, total and bounds in float64, with two dims."""
        weight = kernel.as_rows(self.weight, x).expand(-1, x.shape[1])
        total = kernel.as_rows(self.total, x).expand(len(x), 1)
        return weight, total, *kernel.rounded_bounds(self.lower, self.upper, x, dtype)

    def _least_and_most(self) -> tuple[Tensor, Tensor]:
        """The least and the largest that each entry can add to the sum."""
        weight, lower, upper = in_float64(
            weight=self.weight,
            lower=-inf if self.lower is None else self.lower,
            upper=inf if self.upper is None else self.upper,
        )
        ends = [(weight * bound).where(weight != 0, 0.0) for bound in (lower, upper)]
        return torch.minimum(*ends), torch.maximum(*ends)
