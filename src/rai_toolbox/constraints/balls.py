"""Norm balls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox import foreach
from rai_toolbox.autograd import readable
from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import clamp_
from rai_toolbox.constraints.kernels.blocks import column_blocks, in_blocks, widened
from rai_toolbox.constraints.kernels.directions import largest_sign_, normalize_, sign_
from rai_toolbox.constraints.kernels.l1 import (
    are_narrow,
    in_float32,
    shrunk,
)
from rai_toolbox.constraints.kernels.norms import (
    alike_rows,
    are_surely_shorter,
    may_group,
    norm,
    row_norms,
    scale_dtype,
)
from rai_toolbox.constraints.kernels.rounding import (
    as_rounded,
    as_wide,
    noise,
    offset_from,
    round_down,
    spacing,
)
from rai_toolbox.constraints.kernels.threshold import (
    Values,
    each,
    precision,
    row_sum,
    threshold,
)
from rai_toolbox.constraints.sampling import exponential, normal, uniform
from rai_toolbox.constraints.sharding import is_sharded, local_of, local_part


@dataclass(frozen=True, eq=False)
class _Ball(Constraint):
    """Sub-tensors within a distance of a center."""

    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)
    p: ClassVar[float]
    """Order of the norm: 1, 2 or inf."""

    norm_name: ClassVar[str]
    """The norm as it is written: "L1", "L2" or "Linf"."""

    _corners: ClassVar[bool] = True  # where the oracle's answers are, of no sum with rounding

    epsilon: float | Tensor
    center: float | Tensor | None = None

    @property
    def bounded(self) -> bool:
        """Whether the radius is finite."""
        return bool(self.__dict__["_bounded"])

    def _check_settings(self) -> None:
        check_setting("epsilon", self.epsilon, least=0, finite=False)
        if self.center is not None:
            check_setting("center", self.center)
        finite = bool(torch.as_tensor(self.epsilon, dtype=torch.float64).isfinite().all())
        object.__setattr__(self, "_bounded", finite)

    def _from_center(self, x: Tensor) -> Tensor:
        """``x - center`` in float64; the center counts as rounded to the dtype of x."""
        return widened(x) if self.center is None else widened(x) - self._at(x, x.dtype)

    def _at(self, x: Tensor, dtype: torch.dtype) -> float | Tensor:
        return 0.0 if self.center is None else as_wide(as_rounded(self.center, dtype, x), x)

    def _placed(self, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """``center + offset``, rounded without leaving any ball that the offset is in."""
        center = self._at(offset, dtype)
        return offset_from(center, offset, dtype)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        radius = self.epsilon if self._corners else self._inner(gradient.shape[1])
        return self._placed(self._direction(gradient) * -radius, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        inside = self._uniform(like, generator) * self._inner(like.shape[1])
        return self._placed(inside, like.dtype)

    def _inner(self, size: int) -> float | Tensor:
        """A radius at which float64 arithmetic on `size` entries cannot leave the ball."""
        return self.epsilon * (1 - 4 * noise(size))

    def _direction(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError

    def _uniform(self, like: Tensor, generator: Generator | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class LinfBall(_Ball):
    """Sub-tensors whose elements are all within a distance of the center's.

    ``{x : max |x - center| <= epsilon}``; ``P(x) = min(max(x, center - epsilon), center +
    epsilon)``, elementwise, at the cost of one pass. Without a center the bounds count as rounded
    to the dtype of x. `sample_` is uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        Radius, >= 0; a tensor has one per sub-tensor, shape (N, 1, ...).
    center : float or Tensor, optional
        By default 0. Counts as rounded to the dtype of x.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN, or `center` is not finite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> LinfBall(0.5, center=1.0).project_(torch.tensor([[2.0, -1.0, 1.25]]))
    tensor([[1.5000, 0.5000, 1.2500]])
    """

    p: ClassVar[float] = math.inf
    norm_name: ClassVar[str] = "Linf"
    elementwise: ClassVar[bool] = True

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if self.center is None and not isinstance(self.epsilon, Tensor):
            clamp_([x], -self.epsilon, self.epsilon)
            return x
        lower, upper = self._bounds(x)
        return x.clamp_(lower, upper)

    def project_each_(self, batches: list[Tensor]) -> None:  # noqa: D102
        if self.center is None and not isinstance(self.epsilon, Tensor):
            clamp_(batches, -self.epsilon, self.epsilon)
        else:
            super().project_each_(batches)

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        epsilon = as_wide(self.epsilon, x)
        if self.center is None:
            return (-epsilon).to(x.dtype), epsilon.to(x.dtype)
        center = self._at(x, x.dtype)
        return offset_from(center, -epsilon, x.dtype), offset_from(center, epsilon, x.dtype)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        lower, upper = (bound.to(x.dtype) for bound in self._bounds(x.to(dtype)))
        nearest = x.clamp(lower, upper)
        return torch.where(x == nearest, 0.0, (x - nearest).abs()).amax(-1)

    def _direction(self, gradient: Tensor) -> Tensor:
        direction = gradient.clone()
        sign_([direction])
        return direction

    def _uniform(self, like: Tensor, generator: Generator | None) -> Tensor:
        return 2 * uniform(like, generator) - 1


@dataclass(frozen=True, eq=False)
class L2Ball(_Ball):
    """Sub-tensors within a Euclidean distance of the center.

    ``{x : |x - center|_2 <= epsilon}``; ``P(x) = center + d min(1, epsilon / |d|_2)`` with ``d =
    x - center``, at the cost of a pass that reads and one that writes. Norms are accumulated in
    float64. `sample_` is uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        Radius, >= 0; a tensor has one per sub-tensor, shape (N, 1, ...).
    center : float or Tensor, optional
        By default 0. Counts as rounded to the dtype of x.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN, or `center` is not finite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> L2Ball(1.0).project_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """

    p: ClassVar[float] = 2
    norm_name: ClassVar[str] = "L2"
    _corners: ClassVar[bool] = False

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.center is not None:
            return super().project_(x)
        self._check_batch(x)
        return project_l2_ball_(x, self.epsilon, x.ndim - 1)

    def project_each_(self, batches: list[Tensor]) -> None:  # noqa: D102
        if self.center is None and not isinstance(self.epsilon, Tensor) and may_group(batches):
            for x in batches:
                self._check_batch(x)
            project_l2_balls_(batches, self.epsilon)
        else:
            super().project_each_(batches)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        length = norm(self._from_center(x.to(dtype)), 2, 1)
        return (length - self.epsilon).clamp(min=0).squeeze(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        offset = self._from_center(x.to(dtype))
        length = norm(offset, 2, 1)
        inside = length <= self.epsilon  # (an infinite radius would have the derivative 0 * inf)
        shrunk = self._inner(x.shape[1]) / torch.where(inside, 1.0, length)
        return self._placed(offset * torch.where(inside, 1.0, shrunk), dtype)

    def _direction(self, gradient: Tensor) -> Tensor:
        return normalize_(gradient.clone(), 2, 1)

    def _uniform(self, like: Tensor, generator: Generator | None) -> Tensor:
        radius = uniform(like[:, :1], generator) ** (1 / like.shape[1])
        return normalize_(normal(like, generator), 2, 1) * radius


@dataclass(frozen=True, eq=False)
class L1Ball(_Ball):
    """Sub-tensors within a distance of the center, in the sum of magnitudes.

    ``{x : |x - center|_1 <= epsilon}``; ``P(x) = center + sign(d) max(|d| - t, 0)`` with ``d = x -
    center``: the magnitudes are projected onto the simplex, without sorting (Duchi et al., 2008;
    Condat, 2016), mostly in 3 to 8 passes. `sample_` is uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        Radius, >= 0; a tensor has one per sub-tensor, shape (N, 1, ...).
    center : float or Tensor, optional
        By default 0. Counts as rounded to the dtype of x.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN, or `center` is not finite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L1Ball
    >>> L1Ball(2.0).project_(torch.tensor([[1.0, -2.0, 0.5]]))
    tensor([[ 0.5000, -1.5000,  0.0000]])
    """

    p: ClassVar[float] = 1
    norm_name: ClassVar[str] = "L1"

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self.project_each_([x])
        return x

    def project_each_(self, batches: list[Tensor]) -> None:  # noqa: D102
        for x in batches:
            self._check_batch(x)
        numbers = self.center is None and not isinstance(self.epsilon, Tensor)
        if not (numbers and are_narrow(batches)):
            for x in batches:
                super().project_(x)
            return
        for piece, rows, room in in_float32(batches):
            magnitudes = shrunk(rows.abs_(), self.epsilon, piece[0].dtype, room)
            if magnitudes is None:
                continue
            parts = magnitudes.split([len(x) for x in piece])
            for x, part in zip(piece, parts, strict=True):
                torch.copysign(part.view(x.shape), x, out=x)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._beyond(self._magnitudes(x, dtype)).squeeze(1)

    def _beyond(self, magnitudes: list[Values]) -> Tensor:
        return (row_sum(magnitudes) - self.epsilon).clamp(min=0)

    def _projected(self, units: Tensor) -> Tensor:
        if self.center is None and are_narrow([units]):
            found = shrunk(units.abs().float().contiguous(), self.epsilon, units.dtype)
            return units.clone() if found is None else found.copysign(units)
        dtype = units.dtype
        magnitudes = self._magnitudes(units, dtype)
        excess = self._beyond(magnitudes).detach()
        total = self._inner(units.shape[1]) * (1 - 2 * precision(dtype))
        below, t = threshold(magnitudes, total, dtype)
        t = torch.where(excess.isfinite(), t, torch.nan)
        result = []
        for value, (piece, at) in zip(below, self._pieces(units), strict=True):
            soft = (value() - t).relu_()
            if self.center is None:
                placed = torch.copysign(round_down(soft, dtype), piece)
            else:
                placed = offset_from(at, torch.copysign(soft, widened(piece) - at), dtype)
            result.append(torch.where(excess <= 0, piece, placed))
        return result[0] if len(result) == 1 else torch.cat(result, 1)

    def _magnitudes(self, x: Tensor, dtype: torch.dtype) -> list[Values]:
        if self.center is None:
            return each(lambda piece: widened(piece.abs()), x)
        return each(lambda piece, at: (widened(piece) - at).abs(), x, self._centers(x, dtype))

    def _pieces(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        return column_blocks(x, self._centers(x, x.dtype))

    def _centers(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        center = as_wide(self._at(x, dtype), x)
        return center if center.ndim else center.expand(1, 1)

    def _direction(self, gradient: Tensor) -> Tensor:
        return largest_sign_(gradient.clone())

    def _uniform(self, like: Tensor, generator: Generator | None) -> Tensor:
        size = exponential(like, generator)
        rest = exponential(like[:, :1], generator)
        signs = torch.where(uniform(like, generator) < 0.5, -1.0, 1.0)
        return signs * size / (size.sum(1, keepdim=True) + rest)


Ball = LinfBall | L2Ball | L1Ball

BALLS: dict[float, type[Ball]] = {ball.p: ball for ball in (LinfBall, L2Ball, L1Ball)}
"""The class of norm balls of each order p."""


def check_ball(name: str, value: object) -> Ball:
    """Return `value` if it is a norm ball."""
    if not isinstance(value, Ball):
        raise TypeError(f"`{name}` must be a LinfBall, L2Ball or L1Ball, got {value!r}")
    return value


def project_l2_ball_(x: Tensor, epsilon: float | Tensor, ndim: int) -> Tensor:
    """Project each sub-tensor (the last `ndim` dims) onto the L2 ball of radius `epsilon`.

    ``P(x) = x * min(1, epsilon / |x|_2)``, in place; bitwise the identity inside the ball.
    The result is in the ball after rounding to the dtype too: the radius aimed at is smaller by
    what rounding the factor and the products can add. A sub-tensor with a NaN becomes NaN.
    Whether x is inside is told by its norm in float64, to within the rounding of that.
    """
    if ndim == 0:
        project_l2_ball_(x.unsqueeze(-1), epsilon, 1)
        return x
    if isinstance(epsilon, Tensor):
        epsilon = widened(epsilon)
    size = x.shape[x.ndim - ndim :].numel()
    length = norm(readable(x), 2, ndim)
    if in_blocks(x) and not torch.is_grad_enabled() and bool((length <= epsilon).all()):
        return x
    factor = _shrinking(length, epsilon, x, size)
    part = x
    if is_sharded(x) and not torch.is_grad_enabled():
        part, factor = local_of(x), local_part(factor, x)
    if part.device.type != "cpu":
        part.mul_(factor)  # in wide arithmetic, in one pass
        return x
    for narrow in _narrowed(factor, part):
        part.mul_(narrow)
    return x


def project_l2_balls_(batches: list[Tensor], epsilon: float) -> None:
    """`project_l2_ball_` of the rows of several batches, with the same bits, in fewer calls."""
    for some in alike_rows(batches):
        x, size = some[0], some[0][0].numel()
        if x.dtype == torch.float32 and all(batch.is_contiguous() for batch in some):
            rows = [batch.view(-1, size) for batch in some]
            inside = are_surely_shorter(rows, epsilon)
            number = len(inside) - int(inside.sum())
            if 4 * number <= len(inside):
                if number:
                    _project_some_(rows, ~inside, epsilon)
                continue
        factor = _shrinking(row_norms(some), epsilon, x, size)
        heights = [len(batch) for batch in some]
        for narrow in _narrowed(factor, x):
            parts = narrow.split(heights)
            shapes = [(-1, *(1,) * (batch.ndim - 1)) for batch in some]
            foreach.mul_each_(
                some, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            )


def _project_some_(batches: list[Tensor], chosen: Tensor, epsilon: float) -> None:
    """Project the chosen rows, and do not so much as read the others."""
    for x, part in zip(batches, chosen.split([len(x) for x in batches]), strict=True):
        at = part.nonzero().view(-1)
        if len(at):
            x.index_copy_(0, at, project_l2_ball_(x.index_select(0, at), epsilon, 1))


def _shrinking(length: Tensor, epsilon: float | Tensor, x: Tensor, size: int) -> Tensor:
    """What brings sub-tensors of `size` elements, like those of x, into the ball: float64."""
    inside = length <= epsilon
    outer = torch.where(inside, 1.0, length)  # no division by 0, for the derivative's sake too
    factor = _inward(epsilon, x, size) / outer
    factor = torch.where(length.isinf(), torch.nan, factor)  # a direction that nobody knows
    return torch.where(inside, 1.0, factor)


def _narrowed(factor: Tensor, x: Tensor) -> list[Tensor]:
    """The same in one or two narrow factors, as a wide one would take a wide copy of x on CPU.

    A narrow one is as good, but where it is too small to have all its digits.
    """
    dtype = scale_dtype(x)
    least = torch.finfo(dtype).smallest_normal
    if in_blocks(x) and bool((factor >= least).all()):
        return [factor.to(dtype)]
    rest = factor / least * (1 - 2 * torch.finfo(x.dtype).eps)  # which rounds once more
    first = factor.clamp(min=least).to(dtype)
    return [first, torch.where(factor < least, rest.to(dtype), 1.0)]


def _inward(epsilon: float | Tensor, x: Tensor, size: int) -> float | Tensor:
    """Largest radius at which `size` products, and their factor, may be rounded to nearest."""
    dtype = scale_dtype(x)
    of_factor = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    margin = torch.finfo(x.dtype).eps / 2 + of_factor + noise(size)
    radius = epsilon * (1.0 - margin) - spacing(x.dtype) * math.sqrt(size)
    return radius.clamp(min=0) if isinstance(radius, Tensor) else max(radius, 0.0)
