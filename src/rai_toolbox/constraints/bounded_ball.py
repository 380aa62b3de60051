"""A norm ball within bounds: what a perturbation of an image that stays an image is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox._torch import forward_ad_level, function_transforms_active
from rai_toolbox.checks import wrong
from rai_toolbox.constraints.balls import Ball, LinfBall, check_ball
from rai_toolbox.constraints.base import Constraint, in_float64
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels import ball_in_box as fast
from rai_toolbox.constraints.kernels import ball_in_box_float64 as exact
from rai_toolbox.constraints.kernels.blocks import BLOCK, MANY, is_eager, row_blocks
from rai_toolbox.constraints.kernels.box_hyperplane import as_rows, outside_bounds, rounded_bounds
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, noise, offset_from
from rai_toolbox.constraints.sharding import PLAIN
from rai_toolbox.foreach import in_dtype

# By the order of the norm.
_PROJECTIONS = {inf: exact.nearest_in_linf, 2: exact.nearest_in_l2, 1: exact.nearest_in_l1}
_ORACLES = {inf: exact.least_in_linf, 2: exact.least_in_l2, 1: exact.least_in_l1}


@dataclass(frozen=True, eq=False, repr=False)
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
        The bounds; a tensor broadcasts against the batch (N, ...). None, or an infinity, leaves a
        side open.

    Raises
    ------
    TypeError
        If `ball` is of another class.
    ValueError
        If its radius is infinite, no bound is given, one is NaN, or ``lower > upper`` anywhere.
        Also if no point of the ball is within bounds; from methods, where that depends on the
        number of entries.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import BoundedBall, L1Ball
    >>> pixels = BoundedBall(L1Ball(1.0), lower=0.0, upper=0.4)
    >>> pixels.project_(torch.tensor([[0.9, 0.5, 0.3]]))
    tensor([[0.4000, 0.4000, 0.2000]])
    """

    bounded: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)
    # Of each instance:
    _known: ClassVar[dict[Any, Any]]  # the bounds as they count in a dtype
    _met: ClassVar[dict[Any, bool]]  # shapes that hold a point, and batches that fit
    _apart: ClassVar[bool]  # whether the center is outside the bounds, where that is to be checked

    ball: Any
    lower: float | Tensor | None
    upper: float | Tensor | None

    @staticmethod
    def around_0(ball: Any, lower: Tensor, upper: Tensor) -> BoundedBall:
        """The set of a ball around 0 and bounds that hold 0, whose values are not read."""
        names = ("ball", "lower", "upper") if ball._tensors else ("lower", "upper")
        made = {"ball": ball, "lower": lower, "upper": upper, "_tensors": names}
        return _around_0()._replaced(made)

    def _check_settings(self) -> None:
        check_ball("ball", self.ball)
        if not self.ball.bounded:
            raise ValueError(f"`epsilon` of `ball` must be finite, got {self.ball!r}")
        Box(self.lower, self.upper)  # which checks them
        epsilon, gap = self._radius_and_gap()
        apart = bool((gap > 0).any()) and self.ball.p < inf
        self.__dict__.update(_known={}, _met={}, _apart=apart)
        _check_reach(epsilon, gap)

    def _check_shape(self, shape: torch.Size) -> None:
        if not self._apart or 0 in shape or shape in self._met:
            return
        epsilon, gap = self._radius_and_gap()
        rows = gap.expand(len(gap) if gap.ndim == len(shape) else 1, *shape[1:]).flatten(1)
        apart = torch.linalg.vector_norm(rows, self.ball.p, dim=1)
        _check_reach(epsilon.reshape(-1), apart, 4 * noise(rows.shape[1]))
        self._met[shape] = True

    def _radius_and_gap(self) -> tuple[Tensor, Tensor]:
        """The radius, and how far each entry of the center is outside the bounds, in float64."""
        epsilon, center, lower, upper = in_float64(
            epsilon=self.ball.epsilon,
            center=0.0 if self.ball.center is None else self.ball.center,
            lower=-inf if self.lower is None else self.lower,
            upper=inf if self.upper is None else self.upper,
        )
        return epsilon, torch.maximum(lower - center, center - upper).clamp(min=0)

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        eager = is_eager(x)
        if (
            not self._is_around_0(x)
            or (x.requires_grad and torch.is_grad_enabled())
            or (not eager and (function_transforms_active() or forward_ad_level() >= 0))
        ):
            return super().project_(x)
        if eager and isfinite(x.sum().item()):
            return self._project_around_0_(x, eager)
        not_finite = (0 * x).sum(tuple(range(1, x.ndim)), keepdim=True).isnan()
        return self._project_around_0_(x, eager).masked_fill_(not_finite, torch.nan)

    def projection_like(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project_` of finite batches like `x`, which is a plain one on the CPU."""
        if not self._is_around_0(x):
            return self.project_
        if self.ball.p == inf:
            lower, upper, *_ = self._settings_in(x, True)
            return lambda batch: batch.clamp_(lower, upper)
        return lambda batch: self._project_around_0_(batch, True)

    def _is_around_0(self, x: Tensor) -> bool:
        """Whether batches like x need not have the general projection, in float64; once checked."""
        batch, met = (x.shape, x.dtype, x.device), self._met
        if batch not in met:
            self._check_batch(x)
            settings = (self.lower, self.upper, self.ball.epsilon)
            met[batch] = (
                x.dtype in (torch.float32, torch.float64)
                and self.ball.center is None
                and not self._apart
                and not any(getattr(setting, "requires_grad", False) for setting in settings)
                and x.numel() > 0
                and x.device.type != "mps"
            )
        return met[batch]

    @torch.no_grad()
    def sample_(self, x: Tensor, generator: Generator | None = None) -> Tensor:  # noqa: D102
        self._check_batch(x)
        self.ball.sample_(x, generator)
        return self.project_(x)

    def _settings_in(self, x: Tensor, eager: bool) -> tuple[Any, Any, Tensor, bool]:
        """The bounds as they count in the dtype of x, the radius, and if all radii fit float32.

        The bounds of a Linf ball are within it: its projection needs no more. Torch clamps by two
        numbers or by two tensors.
        """
        kind = (x.dtype, x.device)
        lasts = eager or (type(x) in PLAIN and not torch.compiler.is_compiling())
        known = self._known if lasts else {}
        if kind not in known:
            lower, upper = in_dtype(self.lower, x.dtype), in_dtype(self.upper, x.dtype)
            if self.ball.p == inf:
                epsilon = in_dtype(self.ball.epsilon, x.dtype)
                lower = -epsilon if lower is None else _larger(lower, -epsilon)
                upper = epsilon if upper is None else _smaller(upper, epsilon)
            if isinstance(lower, Tensor) != isinstance(upper, Tensor):
                lower, upper = _as_tensor(lower, x), _as_tensor(upper, x)
            epsilon = as_wide(self.ball.epsilon, x)
            fits = eager and self.ball.p < inf and fast.all_fit(epsilon)
            known[kind] = lower, upper, epsilon, fits
        return known[kind]

    def _replaced(self, settings: dict[str, Any]) -> BoundedBall:
        return super()._replaced({"_known": {}, "_met": {}, **settings})

    def _project_around_0_(self, x: Tensor, eager: bool) -> Tensor:
        lower, upper, epsilon, fits = self._settings_in(x, eager)
        if self.ball.p == inf:
            return x.clamp_(lower, upper)
        if eager and x.numel() > MANY and len(x) > 1:
            for rows in row_blocks(x, MANY):
                self._at_rows(x, rows)._project_around_0_(x[rows], eager)
            return x
        if eager and fits and self.ball.p == 2 and len(x) == 1 and x.numel() <= BLOCK:
            found = fast.nearest_row_in_l2_and_box(x, epsilon.item(), lower, upper)
            return Constraint.project_(self, x) if found is None else x.copy_(found)
        radius = epsilon, fits
        nearest, unsettled = fast.nearest_in_ball_and_box(
            x, self.ball.p, radius, lower, upper, eager
        )
        if unsettled is not None:
            at = unsettled.view(-1).nonzero().view(-1)
            nearest.index_copy_(0, at, Constraint.project_(self._at_rows(x, at), x[at]))
        return torch.copysign(nearest, x, out=x)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        outside: Tensor = self.ball._excess(x, dtype)
        return torch.maximum(
            outside, outside_bounds(x, *rounded_bounds(self.lower, self.upper, x, dtype))
        )

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._float64_settings(x, dtype)
        clamped = x.clamp(lower, upper)
        outside = self.ball._excess(clamped.detach(), dtype)[:, None] > 0
        project = _PROJECTIONS[self.ball.p]
        offset = project(x - center, lower - center, upper - center, radius)
        nearest = _placed(offset, center, lower, upper, dtype)
        return torch.where(outside, nearest, clamped)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        center, radius, lower, upper = self._float64_settings(gradient, dtype)
        oracle = _ORACLES[self.ball.p]
        offset = oracle(gradient, lower - center, upper - center, radius)
        return _placed(offset, center, lower, upper, dtype)

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
        return middle, radius.expand(len(x), -1), *rounded_bounds(self.lower, self.upper, x, dtype)


def _as_tensor(bound: float | Tensor | None, x: Tensor) -> Tensor | None:
    return x.new_full((), bound) if isinstance(bound, (int, float)) else bound


def _larger(a: float | Tensor, b: float | Tensor) -> Any:
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def _smaller(a: float | Tensor, b: float | Tensor) -> Any:
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _check_reach(epsilon: Tensor, apart: Tensor, slack: float = 0.0) -> None:
    """Raise where a ball does not reach the bounds, from which its center is apart."""
    epsilon, apart = torch.broadcast_tensors(epsilon, apart)
    short = apart > epsilon * (1 + slack)
    if bool(short.any()):
        distance, radius = apart[short][0].item(), epsilon[short][0].item()
        rule = f"be at least the distance of the center from the bounds, {distance:.7g}"
        raise wrong("epsilon", rule, radius)


def _placed(
    offset: Tensor, center: Tensor, lower: Tensor, upper: Tensor, dtype: torch.dtype
) -> Tensor:
    """``center + offset``, rounded without leaving the ball or the bounds.

    Entries are rounded toward the center, which no bound is passed by that it is within; a bound
    that it is beyond is no farther from it than the offset.
    """
    return offset_from(center, offset, dtype).to(offset.dtype).clamp(lower, upper)


def norm_ball_of(constraint: object) -> Any:
    """The norm ball that a constraint is, alone or within bounds; its radius is finite."""
    ball = constraint.ball if isinstance(constraint, BoundedBall) else constraint
    if not isinstance(ball, Ball):
        rule = "be a LinfBall, L2Ball or L1Ball, or a BoundedBall of one"
        raise wrong("constraint", rule, repr(constraint), TypeError)
    check_ball("constraint", ball)
    if not ball.bounded:
        raise ValueError(f"`epsilon` of `constraint` must be finite, got {constraint!r}")
    return ball


def zero_outward_(grad: Tensor, x: Tensor, constraint: Constraint) -> Tensor:
    """Zero the entries of a gradient whose descent leads out of a bound that x is on, in place.

    A sparse step is not to be wasted there.
    """
    if not isinstance(constraint, BoundedBall):
        return grad
    lower, upper = in_dtype(constraint.lower, x.dtype), in_dtype(constraint.upper, x.dtype)
    if lower is not None:
        grad.masked_fill_((x <= lower) & (grad > 0), 0.0)
    if upper is not None:
        grad.masked_fill_((x >= upper) & (grad < 0), 0.0)
    return grad


@cache
def _around_0() -> BoundedBall:
    return BoundedBall(LinfBall(1.0), -1.0, 1.0)
