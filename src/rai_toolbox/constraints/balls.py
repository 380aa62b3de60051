"""Norm balls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting, wrong
from rai_toolbox.constraints.base import Constraint, are_finite
from rai_toolbox.constraints.kernels.blocks import Workspace, can_read, is_eager, needs_grad
from rai_toolbox.constraints.kernels.directions import largest_sign_, normalize_, sign_
from rai_toolbox.constraints.kernels.l1 import project_l1_each_, project_l1_rows
from rai_toolbox.constraints.kernels.l2 import project_l2_ball_, project_l2_each_, shrinking
from rai_toolbox.constraints.kernels.norms import norm
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide, noise, offset_from
from rai_toolbox.constraints.sampling import exponential, normal, uniform
from rai_toolbox.foreach import clamp_


@dataclass(frozen=True, eq=False, repr=False)
class _Ball(Constraint):
    """Sub-tensors within a distance of a center."""

    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)
    p: ClassVar[float]
    """Order of the norm: 1, 2 or inf."""

    norm_name: ClassVar[str]
    """The norm as it is written: "L1", "L2" or "Linf"."""

    epsilon: float | Tensor
    center: float | Tensor | None = field(default=None, kw_only=True)
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("epsilon", self.epsilon, least=0, finite=False)
        if self.center is not None:
            check_setting("center", self.center)
        self._derive(bounded=are_finite(self.epsilon))

    def _at(self, x: Tensor, dtype: torch.dtype) -> float | Tensor:
        """The center as it counts: rounded to the dtype; in float64."""
        return 0.0 if self.center is None else as_wide(as_rounded(self.center, dtype, x), x)

    def _from_center(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if self.center is None else x - self._at(x, dtype)

    def _placed(self, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """``center + offset``, rounded without leaving any ball that the offset is in."""
        return offset_from(self._at(offset, dtype), offset, dtype)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        length = norm(self._from_center(x, dtype), self.p, 1)
        return (length - self.epsilon).clamp(min=0).squeeze(1)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        # (for other norms the answer is a corner, of no sum with rounding)
        radius = self._inner(gradient.shape[1]) if self.p == 2 else self.epsilon
        return self._placed(steepest(gradient, self.p) * -radius, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        inside = uniform_in_ball(like, self.p, generator) * self._inner(like.shape[1])
        return self._placed(inside, like.dtype)

    def _inner(self, size: int) -> float | Tensor:
        """A radius at which float64 arithmetic on `size` entries cannot leave the ball."""
        return self.epsilon * (1 - 4 * noise(size))


@dataclass(frozen=True, eq=False, repr=False)
class LinfBall(_Ball):
    """Sub-tensors whose elements are all within a distance of the center's.

    ``{x : max |x - center| <= epsilon}``; ``P(x) = min(max(x, center - epsilon), center +
    epsilon)``, elementwise, at the cost of one pass. Without a center the bounds count as rounded
    to the dtype of x. `sample_` is uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        Radius, >= 0; a tensor broadcasts against the batch: one per element, channel or sub-tensor.
    center : float or Tensor, optional
        By default 0; a tensor broadcasts against the batch. Counts as rounded to the dtype of x.

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
    dim: None = field(default=None, init=False, repr=False)  # no entry is bound to another

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if self.center is None and not isinstance(self.epsilon, Tensor):
            clamp_([x], -self.epsilon, self.epsilon)
            return x
        return x.clamp_(*self._bounds(x))

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
        By default 0; a tensor broadcasts against the batch. Counts as rounded to the dtype of x.
    dim : int or tuple of int, optional
        Along which dims of the batch a ball lies; by default all but the first.

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
    _joins_rows: ClassVar[bool] = True

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        if self.center is not None:
            return super().project_(x)
        self._check_batch(x)
        return project_l2_ball_(x, self.epsilon, x.ndim - 1)

    def _scaling(self, length: Tensor, x: Tensor) -> Any:
        if self.center is None and can_read(x, self.epsilon):
            return shrinking(length, self.epsilon)
        return super()._scaling(length, x)

    def _project_rows_each_(self, batches: list[Tensor], workspace: Workspace) -> None:
        if self.center is None:
            project_l2_each_(batches, self.epsilon)
        else:
            super()._project_rows_each_(batches, workspace)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        offset = self._from_center(x, dtype)
        length = norm(offset, 2, 1)
        inside = length <= self.epsilon  # (an infinite radius would have the derivative 0 * inf)
        shrunk = self._inner(x.shape[1]) / torch.where(inside, 1.0, length)
        return self._placed(offset * torch.where(inside, 1.0, shrunk), dtype)


class L1Ball(_Ball):
    """Sub-tensors within a distance of the center, in the sum of magnitudes.

    ``{x : |x - center|_1 <= epsilon}``; ``P(x) = center + sign(d) max(|d| - t, 0)`` with ``d = x -
    center``: the magnitudes are projected onto the simplex, without sorting (Duchi et al., 2008;
    Condat, 2016), mostly in 3 to 8 passes. `sample_` is uniform.

    Parameters
    ----------
    epsilon, center, dim
        See `L2Ball`.

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
        L1Ball.project_each_(self, [x])  # (that of a subclass calls this)
        return x

    def project_each_(self, batches: list[Tensor]) -> None:  # noqa: D102
        for x in batches:
            self._check_batch(x)
        joins = self.center is None and self._dims is None and not isinstance(self.epsilon, Tensor)
        plain = []
        for x in batches:
            if joins and is_eager(x) and not needs_grad(x):
                plain.append(x)
            else:
                super().project_(x)
        if plain:
            project_l1_each_(plain, self.epsilon)

    def _projected(self, units: Tensor) -> Tensor:
        if self.center is None:
            return project_l1_rows(units, self.epsilon)
        return super()._projected(units)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        offset = self._from_center(x, dtype)
        return self._placed(project_l1_rows(offset, self._inner(x.shape[1])), dtype)


Ball = LinfBall | L2Ball | L1Ball

BALLS: dict[float, type[Ball]] = {ball.p: ball for ball in (LinfBall, L2Ball, L1Ball)}
"""The class of norm balls of each order p."""


def check_ball(name: str, value: object) -> Ball:
    """Return `value` if it is a norm ball."""
    if not isinstance(value, Ball):
        raise TypeError(f"`{name}` must be a LinfBall, L2Ball or L1Ball, got {value!r}")
    if value.dim is not None:
        raise wrong(name, "be a ball of whole sub-tensors, without `dim`", value)
    return value


def steepest(gradient: Tensor, p: float) -> Tensor:
    """A direction of p-norm 1 in which each row of a linear function rises most; 0 stays 0."""
    direction = gradient.clone()
    if p == 1:
        return largest_sign_(direction)
    if p == 2:
        return normalize_(direction, 2, 1)
    sign_([direction])
    return direction


def uniform_in_ball(like: Tensor, p: float, generator: Generator | None) -> Tensor:
    """Rows that are uniform in the unit ball of the p-norm."""
    if p == math.inf:
        return 2 * uniform(like, generator) - 1
    if p == 2:
        radius = uniform(like[:, :1], generator) ** (1 / like.shape[1])
        return normalize_(normal(like, generator), 2, 1) * radius
    size = exponential(like, generator)
    rest = exponential(like[:, :1], generator)
    signs = torch.where(uniform(like, generator) < 0.5, -1.0, 1.0)
    return signs * size / (size.sum(1, keepdim=True) + rest)
