"""A norm ball within bounds: what a perturbation of an image that stays an image is in."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.roots import root
from rai_toolbox.constraints.rounding import as_rounded, as_wide, noise
from rai_toolbox.constraints.section import beyond, bounds, fill, nearest_in_section, pieces, wide

_FAR = 1e290  # a square that float64 holds, and sums of very many of them, too

# The pure functions see offsets d from the center, and the bounds of offsets: float64, two dims.


def nearest_in_linf(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{max |z_i| <= epsilon, lower <= z <= upper}``."""
    return d.clamp(-epsilon, epsilon).clamp(lower, upper)


def nearest_in_l2(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way from 0 to d."""
    nearest = d.clamp(lower, upper)
    unit = _power_of_two(d.detach())
    shorter = along(d / unit, lower, upper, epsilon, unit)
    return torch.where(_longer(nearest, epsilon), shorter, nearest)


def nearest_in_l1(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{sum |z_i| <= epsilon, lower <= z <= upper}``.

    Where a sign is free it is that of d; else the bounds force it. The magnitudes then have
    bounds of their own, and a given sum: they are in a section of a box.
    """
    nearest = d.clamp(lower, upper)
    sign = torch.where((lower > 0) | ((d > 0) & (upper > 0)), 1.0, -1.0)
    least = torch.maximum(lower, -upper).clamp(min=0)
    most = torch.where(sign > 0, upper, -lower)
    one = torch.ones_like(epsilon[:1])
    outside = nearest.detach().abs().sum(1, keepdim=True) > epsilon
    magnitude = nearest_in_section(sign * d, one, epsilon, least, most)
    nearest = torch.where(outside, sign * magnitude, nearest)
    forced = least.sum(1, keepdim=True) >= epsilon  # there is nothing to choose
    return torch.where(forced, torch.zeros_like(d).clamp(lower, upper), nearest)


def along(
    direction: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor, farthest: Tensor
) -> Tensor:
    """``clamp(t direction, lower, upper)`` of length epsilon, or with t at `farthest` if shorter.

    The square of the length is a piecewise linear function of t^2; all is in units of epsilon.
    """
    unit = epsilon.where(epsilon > 0, 1.0)
    lower, upper, goal = lower / unit, upper / unit, (epsilon > 0).to(epsilon)

    def f(square: Tensor) -> tuple[Tensor, Tensor]:
        t, length, slope = square.sqrt(), torch.zeros_like(square), torch.zeros_like(square)
        for part, low, high in pieces(direction, lower, upper):
            moved = t * part
            free = (moved > low) & (moved < high)
            length = length + moved.clamp(low, high).square().sum(1, keepdim=True)
            slope = slope - torch.where(free, part * part, 0.0).sum(1, keepdim=True)
        short = goal - length
        hidden = short.abs() <= noise(direction.shape[1]) * (goal + length)
        return torch.where(hidden, 0.0, short), slope

    with torch.no_grad():
        last = (farthest / unit).square().clamp(max=_FAR)
        t = root(f, torch.zeros_like(last), last, last).sqrt()
    if torch.is_grad_enabled() and direction.requires_grad:
        # Newton's last step: of no size, but with the derivative of the root.
        moved = t * direction
        free = (moved > lower) & (moved < upper)
        push = (torch.where(free, direction, 0.0).square().sum(1, keepdim=True) * 2 * t).detach()
        over = moved.clamp(lower, upper).square().sum(1, keepdim=True) - goal
        t = t - torch.where(push > 0, over / push.where(push > 0, 1.0), 0.0)
    return (t * direction).clamp(lower, upper) * unit


def least_in_linf(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{max |z_i| <= epsilon, lower <= z <= upper}``: a corner."""
    return _corner(g, lower, upper).clamp(-epsilon, epsilon).clamp(lower, upper)


def least_in_l2(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way along -g."""
    corner = _corner(g, lower, upper)
    way = along(-g / _power_of_two(g), lower, upper, epsilon, torch.full_like(g[:, :1], inf))
    return torch.where(_longer(corner, epsilon), way, corner)


def least_in_l1(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{sum |z_i| <= epsilon, lower <= z <= upper}``: fill by ``|g|``."""
    start, corner = torch.zeros_like(g).clamp(lower, upper), _corner(g, lower, upper)
    room = (corner - start).abs()
    amount = epsilon - start.abs().sum(1, keepdim=True)
    filled, _ = fill(-g.abs(), room, amount.clamp(min=0))
    return torch.where(filled < room, start + (corner - start).sign() * filled, corner)


def _corner(g: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The corner of the box that minimizes ``g . z``; where g is 0, what is closest to 0."""
    start = torch.zeros_like(g).clamp(lower, upper)
    return torch.where(g > 0, lower, upper).where(g != 0, start)


def _longer(z: Tensor, epsilon: Tensor) -> Tensor:
    unit = epsilon.where(epsilon > 0, 1.0)
    return (z.detach() / unit).square().sum(1, keepdim=True) > (epsilon > 0).to(epsilon)


def _farther(point: Tensor, center: Tensor, distance: Tensor) -> Tensor:
    """Whether ``|point - center| > distance`` exactly: what rounding takes off counts (Knuth)."""
    minus = -center
    gap = point + minus
    part = gap - point
    lost = (point - (gap - part)) + (minus - part)
    beyond_it = (gap.abs() == distance) & (gap.sign() * lost > 0)
    return (gap.abs() > distance) | beyond_it


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two at the largest magnitude of each row, by which to scale without rounding."""
    largest = x.abs().amax(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(mantissa), exponent).where(largest > 0, 1.0)


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
        return torch.maximum(outside, beyond(x, *bounds(self.lower, self.upper, x, dtype)))

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
            epsilon = as_rounded(epsilon, dtype)
        radius = wide(epsilon, x)
        if not linf:  # what sums of float64 may be off
            radius = radius * (1 - 8 * noise(x.shape[1]))
        middle = wide(as_rounded(0.0 if center is None else center, dtype), x)
        return middle, radius.expand(len(x), 1), *bounds(self.lower, self.upper, x, dtype)

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
