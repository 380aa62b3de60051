"""A norm ball within bounds: what a perturbation of an image that stays an image is in."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels.box_hyperplane import (
    as_rows,
    outside_bounds,
    rounded_bounds,
)
from rai_toolbox.constraints.kernels.offsets import (
    least_in_l1,
    least_in_l2,
    least_in_linf,
    nearest_in_l1,
    nearest_in_l2,
    nearest_in_linf,
)
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, noise


def _farther(point: Tensor, center: Tensor, distance: Tensor) -> Tensor:
    """Whether ``|point - center| > distance`` exactly: what rounding takes off counts (Knuth)."""
    minus = -center
    gap = point + minus
    part = gap - point
    lost = (point - (gap - part)) + (minus - part)
    beyond_it = (gap.abs() == distance) & (gap.sign() * lost > 0)
    return (gap.abs() > distance) | beyond_it


_KINDS: tuple[tuple[type[Constraint], float, Any, Any], ...] = (
    (LinfBall, inf, nearest_in_linf, least_in_linf),
    (L2Ball, 2, nearest_in_l2, least_in_l2),
    (L1Ball, 1, nearest_in_l1, least_in_l1),
)


@dataclass(frozen=True, eq=False)
class BoundedBall(Constraint):
    """A norm ball with bounds on the elements, intersected exactly.

    ``{x : |x - center| <= epsilon, lower <= x <= upper}`` in the norm of the ball. With the offset
    ``d = x - center`` and bounds that are taken from the center, the nearest offset is for

    - Linf: ``clamp(clamp(d, -epsilon, epsilon), lower, upper)``, at the cost of two passes;
    - L2: ``clamp(t d, lower, upper)`` with the t in [0, 1] that makes it as long as epsilon;
    - L1: ``clamp(sign(d) max(|d| - t, 0), lower, upper)`` likewise.

    Both t are roots of piecewise linear functions, found by Newton's method in a bracket within
    some ten passes. `lmo` is a corner; for L2 a point on the way to it, by the same search; for L1
    filled in the order of ``|gradient|``, after a sort. `sample_` projects a uniform point of the
    ball. Bounds and center count as rounded to the dtype of x; where this leaves no point that is
    in both, the projection is within the bounds, closest to the center.

    Parameters
    ----------
    ball : LinfBall or L2Ball or L1Ball
        The ball, whose radius is finite.
    lower, upper : float or Tensor or None
        The bounds; None, or an infinity, leaves a side open.

    Raises
    ------
    TypeError
        If `ball` is of another class.
    ValueError
        If its radius is infinite, no bound is given, one is NaN, or ``lower > upper`` anywhere.
        Also, as soon as the number of entries tells it, if no point of the ball is within bounds.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import BoundedBall, L1Ball
    >>> pixels = BoundedBall(L1Ball(1.0), lower=0.0, upper=0.4)
    >>> pixels.project_(torch.tensor([[0.9, 0.5, 0.3]]))
    tensor([[0.4000, 0.4000, 0.2000]])
    """

    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)

    ball: Constraint
    lower: float | Tensor | None
    upper: float | Tensor | None

    @property
    def bounded(self) -> bool:
        """True: the ball is."""
        return True

    def _check_settings(self) -> None:
        kind = next((kind for kind in _KINDS if isinstance(self.ball, kind[0])), None)
        if kind is None:
            raise TypeError(f"`ball` must be a LinfBall, L2Ball or L1Ball, got {self.ball!r}")
        if not self.ball.bounded:
            raise ValueError(f"`epsilon` of `ball` must be finite, got {self.ball!r}")
        Box(self.lower, self.upper)  # which checks them
        self.__dict__["_kind"] = kind
        self.__dict__["_met"] = set()  # shapes of which it is known that they hold a point
        gap, epsilon = self._gap(), torch.as_tensor(self._ball.epsilon, dtype=torch.float64)
        self.__dict__["_apart"] = bool((gap > 0).any())
        try:
            wrong = gap > epsilon
        except RuntimeError:
            raise ValueError(
                "`epsilon`, `center`, `lower` and `upper` must broadcast against each other, got "
                f"shapes {tuple(epsilon.shape)} and {tuple(gap.shape)}"
            ) from None
        if bool(wrong.any()):
            self._refuse(gap.expand(wrong.shape)[wrong], epsilon.expand(wrong.shape)[wrong])

    def _check_shape(self, shape: torch.Size) -> None:
        if not self.__dict__["_apart"] or 0 in shape or shape in self.__dict__["_met"]:
            return
        gap = self._gap()
        rows = gap.expand(len(gap) if gap.ndim == len(shape) else 1, *shape[1:]).flatten(1)
        apart = torch.linalg.vector_norm(rows, self.__dict__["_kind"][1], dim=1)
        epsilon = torch.as_tensor(self._ball.epsilon, dtype=torch.float64).reshape(-1)
        apart, epsilon = torch.broadcast_tensors(apart, epsilon)
        wrong = apart > epsilon * (1 + 4 * noise(rows.shape[1]))
        if bool(wrong.any()):
            self._refuse(apart[wrong], epsilon[wrong])
        self.__dict__["_met"].add(shape)

    def _gap(self) -> Tensor:
        """How far each entry of the center is outside the bounds."""
        settings = (self._ball.center, 0.0), (self.lower, -inf), (self.upper, inf)
        center, lower, upper = (
            torch.as_tensor(default if s is None else s, dtype=torch.float64)
            for s, default in settings
        )
        try:
            return torch.maximum(lower - center, center - upper).clamp(min=0)
        except RuntimeError:
            shapes = [tuple(s.shape) for s in (center, lower, upper)]
            raise ValueError(
                "`center`, `lower` and `upper` must broadcast against each other, got shapes "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
            ) from None

    def _refuse(self, apart: Tensor, epsilon: Tensor) -> None:
        raise ValueError(
            "`epsilon` must be at least the distance of the center from the bounds, "
            f"{apart[0].item():.7g}, got {epsilon[0].item()!r}"
        )

    @property
    def _ball(self) -> Any:
        return self.ball

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        outside: Tensor = self._ball._excess(x, dtype)
        return torch.maximum(
            outside, outside_bounds(x, *rounded_bounds(self.lower, self.upper, x, dtype))
        )

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._beside(x, dtype)
        clamped = x.clamp(lower, upper)
        outside = self._ball._excess(clamped.detach(), dtype)[:, None] > 0
        nearest = self.__dict__["_kind"][2](x - center, lower - center, upper - center, radius)
        nearest = self._placed(nearest, center, radius, lower, upper, dtype)
        return torch.where(outside, nearest, clamped)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._beside(gradient, dtype)
        least = self.__dict__["_kind"][3](gradient, lower - center, upper - center, radius)
        return self._placed(least, center, radius, lower, upper, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        point = self._ball._sampled(like, generator)
        return self._nearest(point.to(as_wide(0.0, like)), like.dtype)

    def _beside(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Center, radius and bounds as they count, in float64, with two dims."""
        epsilon, center, linf = (
            self._ball.epsilon,
            self._ball.center,
            self.__dict__["_kind"][1] == inf,
        )
        if linf and center is None:  # then the ball is a box, whose bounds count as rounded
            epsilon = as_rounded(epsilon, dtype, x)
        radius = as_rows(epsilon, x)
        if not linf:  # what sums of float64 may be off
            radius = radius * (1 - 8 * noise(x.shape[1]))
        middle = as_rows(as_rounded(0.0 if center is None else center, dtype, x), x)
        return middle, radius.expand(len(x), 1), *rounded_bounds(self.lower, self.upper, x, dtype)

    def _placed(
        self,
        offset: Tensor,
        center: Tensor,
        radius: Tensor,
        lower: Tensor,
        upper: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """``center + offset``, rounded without leaving the ball or the bounds.

        Entries are rounded toward the center, which no bound is passed by that it is within; a
        bound that it is beyond is no farther from it than the offset.
        """
        largest = torch.finfo(dtype).max
        rounded = (center + offset).clamp(-largest, largest).to(dtype)
        seen = rounded.detach()
        away = _farther(seen.to(offset.dtype), center, offset.detach().abs())
        # By a difference, which is exact: autograd has no derivative of `nextafter`.
        back = torch.where(away, seen.nextafter(center.to(dtype).expand_as(seen)) - seen, 0.0)
        return (rounded + back).to(offset.dtype).clamp(lower, upper)
