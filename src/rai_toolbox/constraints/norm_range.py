"""Norms between two values: spheres, balls, and what is between them."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_order, check_setting
from rai_toolbox.constraints.balls import steepest, uniform_in_ball
from rai_toolbox.constraints.base import Constraint, are_finite, in_float64
from rai_toolbox.constraints.kernels.blocks import Workspace, can_read, is_eager, needs_grad
from rai_toolbox.constraints.kernels.directions import normalize_
from rai_toolbox.constraints.kernels.l1 import project_l1_rows
from rai_toolbox.constraints.kernels.l2 import project_l2_ball_, project_l2_each_, scale_, shrinking
from rai_toolbox.constraints.kernels.norms import (
    LEAST,
    for_each,
    least_and_most,
    norm,
    row_scale,
    scale_dtype,
    wide_norms,
)
from rai_toolbox.constraints.kernels.rounding import as_wide, noise, round_down, round_up, spacing
from rai_toolbox.constraints.kernels.threshold import lowered
from rai_toolbox.constraints.sampling import uniform


@dataclass(frozen=True, eq=False, repr=False)
class MinMaxNorm(Constraint):
    """Sub-tensors whose norm is between two values; not convex unless `min_norm` is 0.

    ``{x : min_norm <= |x|_p <= max_norm}``. For p = 2, P scales x; for p = 1, it decreases
    or increases all magnitudes by a common amount; for p = inf, it clamps, or increases one largest
    magnitude. If x = 0 must move, it moves as if all its elements were equal and positive.
    `sample_` draws directions and radii as those of uniform points of the norm's ball.

    Parameters
    ----------
    min_norm, max_norm : float or Tensor
        The bounds of the norm, ``0 <= min_norm <= max_norm``; a tensor has one per sub-tensor,
        shape (N, 1, ...), or of size 1 along `dim`.
    p : {2, 1, inf}
        Order of the norm.
    dim : int or tuple of int, optional
        Along which dims of the batch the norm is taken, such as 0 for the columns of a matrix. By
        default all but the first.

    Raises
    ------
    ValueError
        If a bound is negative or NaN, ``min_norm > max_norm``, or `p` is none of 1, 2, inf.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import MinMaxNorm
    >>> MinMaxNorm(0.5, 1.0).project_(torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.6]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000],
            [0.0000, 0.6000]])
    """

    _for_each: ClassVar[tuple[str, ...]] = ("min_norm", "max_norm")
    _joins_rows: ClassVar[bool] = True
    _is_equation: ClassVar[bool] = True  # if the bounds are equal; else that does no harm

    min_norm: float | Tensor
    max_norm: float | Tensor
    p: float = field(default=2, kw_only=True)
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("min_norm", self.min_norm, least=0)
        check_setting("max_norm", self.max_norm, least=0, finite=False)
        check_order("min_norm", self.min_norm, "max_norm", self.max_norm)
        if type(self.p) not in (int, float) or self.p not in (1, 2, math.inf):
            raise ValueError(f"`p` must be 1, 2 or inf, got {self.p!r}")
        has_hole = bool(in_float64(min_norm=self.min_norm)[0].any())
        self._derive(convex=not has_hole, bounded=are_finite(self.max_norm))

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if self.p == 2 and can_read(x, self.min_norm, self.max_norm):
            self._project_rows_each_([x], Workspace())
            return x
        if self.p == 2 and not isinstance(self.min_norm, Tensor) and self.min_norm == 0:
            return project_l2_ball_(x, self.max_norm, x.ndim - 1)
        if self.p == 2 and x.numel() > 0 and not needs_grad(x, self.min_norm, self.max_norm):
            self._scale_(x)
            return x
        return super().project_(x)

    def _project_rows_each_(self, batches: list[Tensor], workspace: Workspace) -> None:
        if self.p != 2:
            super()._project_rows_each_(batches, workspace)
        elif self.min_norm == 0:
            project_l2_each_(batches, self.max_norm)
        else:
            self._scale_each_(batches, workspace)

    def _scale_each_(self, batches: list[Tensor], workspace: Workspace) -> None:
        """Project by a factor for each row, or one by one if no factor fits some row."""
        factor = self._factors(wide_norms(batches, workspace), batches[0])
        if factor is None:
            for x in batches:
                self._scale_(x)
            return
        of_rows = for_each(factor.to(scale_dtype(batches[0])), batches)
        for x, some in zip(batches, of_rows, strict=True):
            x.mul_(some)

    def _fitting(self, dtype: torch.dtype) -> tuple[float, float]:
        """Norms between which a factor, to the bounds, is a normal number: others are imprecise."""
        info, low = torch.finfo(dtype), float(self.min_norm)
        least, most = 2 * low / info.max, low / info.smallest_normal / 2
        return max(least, LEAST[torch.float32]), min(most, sys.float_info.max)

    def _scaling(self, length: Tensor, x: Tensor) -> Any:
        if self.p != 2 or not can_read(x, self.min_norm, self.max_norm):
            return super()._scaling(length, x)
        if self.min_norm == 0:
            return shrinking(length, self.max_norm)
        factor = self._factors(length, x)
        return NotImplemented if factor is None else factor

    def _factors(self, length: Tensor, x: Tensor) -> Tensor | None:
        """What the projection multiplies rows by; None if no factor fits one.

        Their norms are overwritten where that spares memory.
        """
        least, most = least_and_most(length)
        shortest, longest = self._fitting(scale_dtype(x))
        if not (shortest < least and most < longest):
            return None
        low, high, missed = self._goals(x)
        if least - self.max_norm > missed:  # as are all rows
            return length.reciprocal_().mul_(high)
        if self.min_norm - most > missed:
            return length.reciprocal_().mul_(low)
        return self._factor(length, length, x)

    def _scale_(self, x: Tensor) -> None:
        """Project by a factor for each row, or in float64 what no factor fits."""
        length = norm(x, 2, x.ndim - 1)
        still = length == 0
        factor = self._factor(length, torch.where(still, 1.0, length), x)
        if is_eager(x):
            info = torch.finfo(scale_dtype(x))
            normal = (factor >= info.smallest_normal) & (factor <= info.max)
            short = length < torch.finfo(length.dtype).smallest_normal  # of few digits, if not 0
            unfit = ~length.isfinite() | short | ~normal
            at = unfit.view(-1).nonzero().view(-1)
            moved = Constraint.project_(self._at_rows(x, at), x.index_select(0, at))
            scale_(x, torch.where(unfit, 1.0, factor))
            x.index_copy_(0, at, moved)
        elif x.dtype == torch.float64:
            Constraint.project_(self, x)  # there is no wider type for the factors of tiny rows
        else:
            still = still & (as_wide(self.min_norm, x) > 0)  # all directions are equally near
            x.masked_fill_(still, 1.0)
            factor = torch.where(still, factor / math.sqrt(x[0].numel()), factor)
            x.mul_(torch.where(length.isfinite(), factor, torch.nan))

    def _factor(self, length: Tensor, divisor: Tensor, x: Tensor) -> Tensor:
        """The nearest norm of the set to each norm of x, over a divisor; 1 for what is inside."""
        low, high, missed = self._goals(x)
        inside = (length - self.max_norm <= missed) & (self.min_norm - length <= missed)
        return length.clamp(low, high).div_(divisor).masked_fill_(inside, 1.0)

    def _goals(self, x: Tensor) -> tuple[Any, Any, Any]:
        """`_range` for the rows of a batch, as numbers if the bounds are."""
        least, most, size = self.min_norm, self.max_norm, x[0].numel()
        if not is_eager(x) or isinstance(least, Tensor) or isinstance(most, Tensor):
            return self._range(x, size, x.dtype)
        return _range_of_numbers(least, most, self.p, size, x.dtype)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        length = norm(x, self.p, 1)
        excess = torch.maximum(length - self.max_norm, self.min_norm - length)
        return (excess - self._range(x, x.shape[1], dtype)[2]).clamp(min=0).squeeze(1)

    def _range(self, x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Norms that stay within the bounds after rounding; how far equal bounds may be missed."""
        low, high = as_wide(self.min_norm, x), as_wide(self.max_norm, x)
        eps = torch.finfo(dtype).eps
        relative = eps / 2 + 8 * noise(size) + min(eps, 2**-23) / 2
        small = spacing(dtype) / 2 * (size if self.p == 1 else math.sqrt(size))
        above, below = low * (1 + relative) + small, high * (1 - relative) - small
        if self.p == math.inf:
            above, below = round_up(low, dtype).to(low), round_down(high, dtype).to(high)
        above = torch.where(low > 0, above, 0.0)
        thin = (low > 0) & (above > below)
        middle = (low + high) / 2
        least = torch.where(thin, middle, above)
        most = torch.where(thin, middle, below.clamp(min=0))
        return least, most, torch.where(thin, 2 * (relative * high + small), 0.0)

    def _projected(self, units: Tensor) -> Tensor:
        if self.p == 1 and self.convex:
            return project_l1_rows(units, self.max_norm)
        return super()._projected(units)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        low, high, _ = self._range(x, x.shape[1], dtype)
        length = norm(x, self.p, 1)
        between = (length > low) & (length < high)
        goal = torch.where(between, length, length.detach().clamp(low, high))
        if self.p == 2:
            x = torch.where(length.detach() == 0, 1.0, x)  # no direction: all are as good
            x = x / row_scale(x)
            return x / norm(x, 2, 1) * goal
        signs = torch.where(x < 0, -1.0, 1.0).to(x)
        size = x.abs()
        if self.p == 1:
            return lowered(size, goal) * signs
        largest = torch.zeros_like(x).scatter_(1, size.argmax(1, keepdim=True), 1.0)
        lifted = (largest > 0) & (length < goal)
        return torch.where(lifted | (size >= goal), goal, size) * signs

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        largest = gradient.abs().amax(1, keepdim=True)
        down = torch.where(largest == 0, 1.0, -gradient)
        return self._nearest(steepest(down, self.p) * self.max_norm, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        direction = uniform_in_ball(like, self.p, generator)
        size = like.shape[1]
        low, high = as_wide(self.min_norm, direction), as_wide(self.max_norm, direction)
        least = (low / torch.where(high > 0, high, 1.0)) ** size  # share of the ball that is empty
        share = least + (1 - least) * uniform(like[:, :1], generator)
        radius = high * share ** (1 / size)
        return self._nearest(normalize_(direction, self.p, 1) * radius, like.dtype)


@lru_cache
def _range_of_numbers(
    least: float, most: float, p: float, size: int, dtype: torch.dtype
) -> tuple[Any, Any, Any]:
    """`MinMaxNorm._range` as numbers, for settings that are numbers."""
    like = torch.empty(0, dtype=torch.float64, device="cpu")
    low, high, missed = MinMaxNorm(least, most, p=p)._range(like, size, dtype)
    return low.item(), high.item(), missed.item()


@dataclass(frozen=True, eq=False, repr=False)
class MaxNorm(MinMaxNorm):
    """Sub-tensors whose norm is at most a given one: a ball, along any dims.

    ``{x : |x|_p <= max_norm}``; ``P(x) = x min(1, max_norm / |x|_2)`` for p = 2, that of `L1Ball`
    for p = 1, a clamp for p = inf.

    Parameters
    ----------
    max_norm, p, dim
        See `MinMaxNorm`.

    Raises
    ------
    ValueError
        If `max_norm` is negative or NaN, or `p` is none of 1, 2, inf.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import MaxNorm
    >>> MaxNorm(1.0, dim=0).project_(torch.tensor([[3.0, 0.3], [4.0, 0.4]]))  # columns
    tensor([[0.6000, 0.3000],
            [0.8000, 0.4000]])
    """

    min_norm: float | Tensor = field(default=0.0, init=False, repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class UnitNorm(MinMaxNorm):
    """Sub-tensors of norm 1, to within rounding: a sphere, which is not convex.

    ``{x : |x|_p = 1}``; ``P(x) = x / |x|_2`` for p = 2; see `MinMaxNorm`, of which it is the case
    of two equal bounds.

    Parameters
    ----------
    p, dim
        See `MinMaxNorm`.

    Raises
    ------
    ValueError
        If `p` is none of 1, 2, inf.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import UnitNorm
    >>> UnitNorm(dim=0).project_(torch.tensor([[3.0, 0.3], [4.0, 0.4]]))  # columns
    tensor([[0.6000, 0.6000],
            [0.8000, 0.8000]])
    """

    min_norm: float | Tensor = field(default=1.0, init=False, repr=False)
    max_norm: float | Tensor = field(default=1.0, init=False, repr=False)
