"""A norm ball within bounds: what a perturbation of an image that stays an image is in."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox._torch import forward_ad_level, function_transforms_active
from rai_toolbox.constraints.balls import Ball, L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels.ball_in_box import clamp_between_, nearest_in_ball_and_box
from rai_toolbox.constraints.kernels.ball_in_box_float64 import (
    least_in_l1,
    least_in_l2,
    least_in_linf,
    nearest_in_l1,
    nearest_in_l2,
    nearest_in_linf,
)
from rai_toolbox.constraints.kernels.blocks import MANY, in_blocks, row_blocks
from rai_toolbox.constraints.kernels.box_hyperplane import (
    as_rows,
    outside_bounds,
    rounded_bounds,
)
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, is_farther, noise


def _in_dtype(bound: float | Tensor | None, dtype: torch.dtype) -> Any:
    """A bound as it counts: rounded to the dtype; what is beyond it is infinite."""
    if isinstance(bound, Tensor):
        return bound.to(dtype)
    if bound is None or abs(bound) <= torch.finfo(dtype).max:
        return bound
    return inf if bound > 0 else -inf


def _larger(a: float | Tensor, b: float | Tensor) -> Any:
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


# By the class of the ball: the order of its norm, its projection and its linear oracle.
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

    ball: Any
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
        self.__dict__["_known"] = (None,) * 4, None  # settings, and these as they count in a dtype
        self.__dict__["_met"] = set()  # shapes that hold a point, and batches that fit
        gap, epsilon = self._gap(), torch.as_tensor(self.ball.epsilon, dtype=torch.float64)
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
        epsilon = torch.as_tensor(self.ball.epsilon, dtype=torch.float64).reshape(-1)
        apart, epsilon = torch.broadcast_tensors(apart, epsilon)
        wrong = apart > epsilon * (1 + 4 * noise(rows.shape[1]))
        if bool(wrong.any()):
            self._refuse(apart[wrong], epsilon[wrong])
        self.__dict__["_met"].add(shape)

    def _gap(self) -> Tensor:
        """How far each entry of the center is outside the bounds."""
        settings = (self.ball.center, 0.0), (self.lower, -inf), (self.upper, inf)
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

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        batch = (x.shape, x.dtype, x.device)
        if batch not in self.__dict__["_met"]:
            self._check_batch(x)
            self.__dict__["_met"].add(batch)
        eager = in_blocks(x)
        if (  # only the general projection, in float64, will do
            x.dtype not in (torch.float32, torch.float64)
            or self.ball.center is not None
            or self.__dict__["_apart"]
            or (torch.is_grad_enabled() and x.requires_grad)
            or (not eager and (function_transforms_active() or forward_ad_level() >= 0))
            or x.numel() == 0
            or x.device.type == "mps"
        ):
            return super().project_(x)
        if eager and isfinite(x.sum().item()):
            return self._project_around_0_(x)
        spoilt = (0 * x).sum(tuple(range(1, x.ndim)), keepdim=True).isnan()
        return self._project_around_0_(x).masked_fill_(spoilt, torch.nan)

    @torch.no_grad()
    def sample_(self, x: Tensor, generator: Generator | None = None) -> Tensor:  # noqa: D102
        self._check_batch(x)
        self.ball.sample_(x, generator)
        return self.project_(x)

    def _settings_in(self, dtype: torch.dtype) -> tuple[Any, Any, Any]:
        """Bounds and radius as they count in `dtype`; those of a Linf ball are within it."""
        settings = (dtype, self.lower, self.upper, self.ball.epsilon)
        known, found = self.__dict__["_known"]
        if (  # (a copy of the set with other settings has the same `__dict__` otherwise)
            known[0] is settings[0]
            and known[1] is settings[1]
            and known[2] is settings[2]
            and known[3] is settings[3]
        ):
            return found  # type: ignore[no-any-return]
        lower, upper = _in_dtype(self.lower, dtype), _in_dtype(self.upper, dtype)
        epsilon = _in_dtype(self.ball.epsilon, dtype)
        if self.ball.p == inf:
            lower = -epsilon if lower is None else _larger(lower, -epsilon)
            upper = epsilon if upper is None else -_larger(-upper, -epsilon)
        if not torch.compiler.is_compiling():
            self.__dict__["_known"] = settings, (lower, upper, epsilon)
        return lower, upper, epsilon

    def _project_around_0_(self, x: Tensor) -> Tensor:
        lower, upper, _ = self._settings_in(x.dtype)
        if self.ball.p == inf:
            return clamp_between_(x, lower, upper)
        if x.numel() <= MANY or not in_blocks(x):
            return x.copy_(self._nearest_around_0(x, lower, upper))
        for rows in row_blocks(x, MANY):
            seen = self._at_rows(x, rows)
            x[rows].copy_(seen._nearest_around_0(x[rows], *seen._settings_in(x.dtype)[:2]))
        return x

    def _nearest_around_0(self, x: Tensor, lower: Any, upper: Any) -> Tensor:
        epsilon = as_wide(self.ball.epsilon, x)
        nearest, unsettled = nearest_in_ball_and_box(x, self.ball.p, epsilon, lower, upper)
        if unsettled is not None and in_blocks(x):
            at = unsettled.view(-1).nonzero().view(-1)
            nearest.index_copy_(0, at, Constraint.project_(self._at_rows(x, at), x[at]))
        return nearest

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        outside: Tensor = self.ball._excess(x, dtype)
        return torch.maximum(
            outside, outside_bounds(x, *rounded_bounds(self.lower, self.upper, x, dtype))
        )

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._float64_settings(x, dtype)
        clamped = x.clamp(lower, upper)
        outside = self.ball._excess(clamped.detach(), dtype)[:, None] > 0
        nearest = self.__dict__["_kind"][2](x - center, lower - center, upper - center, radius)
        nearest = self._placed(nearest, center, radius, lower, upper, dtype)
        return torch.where(outside, nearest, clamped)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._float64_settings(gradient, dtype)
        least = self.__dict__["_kind"][3](gradient, lower - center, upper - center, radius)
        return self._placed(least, center, radius, lower, upper, dtype)

    def _float64_settings(
        self, x: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Center, radius and bounds as they count, in float64, with two dims."""
        epsilon, center, linf = self.ball.epsilon, self.ball.center, self.ball.p == inf
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
        away = is_farther(seen.to(offset.dtype), center, offset.detach().abs())
        # By a difference, which is exact: autograd has no derivative of `nextafter`.
        back = torch.where(away, seen.nextafter(center.to(dtype).expand_as(seen)) - seen, 0.0)
        return (rounded + back).to(offset.dtype).clamp(lower, upper)


def norm_ball_of(constraint: object) -> Any:
    """The norm ball that a constraint is, alone or within bounds; its radius is finite."""
    ball = constraint.ball if isinstance(constraint, BoundedBall) else constraint
    if not isinstance(ball, Ball):
        raise TypeError(
            "`constraint` must be a LinfBall, L2Ball or L1Ball, or a BoundedBall of one, got "
            f"{constraint!r}"
        )
    if not ball.bounded:
        raise ValueError(f"`epsilon` of `constraint` must be finite, got {constraint!r}")
    return ball


def zero_outward_(grad: Tensor, x: Tensor, constraint: Constraint) -> Tensor:
    """Zero the entries of a gradient whose descent leads out of a bound that x is on, in place.

    A sparse step is not to be wasted there.
    """
    if not isinstance(constraint, BoundedBall):
        return grad
    lower, upper = _in_dtype(constraint.lower, x.dtype), _in_dtype(constraint.upper, x.dtype)
    if lower is not None:
        grad.masked_fill_((x <= lower) & (grad > 0), 0.0)
    if upper is not None:
        grad.masked_fill_((x >= upper) & (grad < 0), 0.0)
    return grad
