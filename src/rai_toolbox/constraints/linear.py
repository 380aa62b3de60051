"""One linear equation or inequality: hyperplanes and half-spaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.rounding import as_wide, resolution

# Each pass solves for what rounding left of the residual by the one before it, and so gains up to
# 16 digits: four bring 1e20 to an offset of 1e-20, where a single pass would leave 1e4.
PASSES = 4


@dataclass(frozen=True, eq=False)
class Hyperplane(Constraint):
    """Every sub-tensor on a hyperplane: one linear equation.

    ``{x : w.x = c}``; ``P(x) = x - (w.x - c) / |w|^2 * w``, solved again for its own residual
    (iterative refinement: Wilkinson, 1963), at the cost of a few passes.

    Parameters
    ----------
    normal : float or Tensor
        The weights w of the entries; a number is the weight of each of them. A sub-tensor with
        weights 0 and an offset other than 0 has no solution: its projection is NaN.
    offset : float or Tensor
        The value c of the weighted sum, one per sub-tensor.

    Raises
    ------
    ValueError
        If a setting is not finite, or `normal` is 0 everywhere.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Hyperplane
    >>> Hyperplane(1.0, 2.0).project_(torch.tensor([[1.0, 4.0]]))
    tensor([[-0.5000,  2.5000]])
    """

    flat: ClassVar[bool] = True
    _is_equation: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("offset",)

    normal: float | Tensor
    offset: float | Tensor

    def _check_settings(self) -> None:
        _check_normal(self.normal)
        check_setting("offset", self.offset)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights = _weights(self.normal, x)
        gap = (_dot(weights, x) - as_wide(self.offset, x)).abs() - _slack(weights, x, dtype)
        return _distance(gap, weights)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights, offset = _weights(self.normal, x), as_wide(self.offset, x)
        for _ in range(PASSES):
            x = _shifted(x, weights, _dot(weights, x) - offset)
        return x


@dataclass(frozen=True, eq=False)
class HalfSpace(Constraint):
    """Every sub-tensor on one side of a hyperplane: one linear inequality.

    ``{x : w.x <= c}``; ``P(x) = x - max(w.x - c, 0) / |w|^2 * w``, solved again for its own
    residual (iterative refinement: Wilkinson, 1963), at the cost of a few passes. Results aim
    inside by what rounding can add, so that they satisfy the inequality exactly.

    Parameters
    ----------
    normal : float or Tensor
        The weights w of the entries; a number is the weight of each of them. A sub-tensor with
        weights 0 and an offset below 0 has no solution: its projection is NaN.
    offset : float or Tensor
        The largest value c of the weighted sum, one per sub-tensor.

    Raises
    ------
    ValueError
        If a setting is not finite, or `normal` is 0 everywhere.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import HalfSpace
    >>> HalfSpace(torch.tensor([3.0, 4.0]), 5.0).project_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    tensor([[0.2800, 1.0400],
            [0.0000, 0.0000]])
    """

    _for_each: ClassVar[tuple[str, ...]] = ("offset",)

    normal: float | Tensor
    offset: float | Tensor

    def _check_settings(self) -> None:
        _check_normal(self.normal)
        check_setting("offset", self.offset)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights = _weights(self.normal, x)
        return _distance(_dot(weights, x) - as_wide(self.offset, x), weights)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights, offset = _weights(self.normal, x), as_wide(self.offset, x)
        for _ in range(PASSES):
            aim = offset - _slack(weights, x.detach(), dtype)
            x = _shifted(x, weights, _dot(weights, x) - aim)
        return x


def _check_normal(normal: float | Tensor) -> None:
    check_setting("normal", normal)
    if isinstance(normal, Tensor):
        if normal.numel() and not bool(normal.any()):
            raise ValueError(
                "`normal` must not be 0 everywhere, got a tensor of zeros of the shape "
                f"{tuple(normal.shape)}"
            )
    elif normal == 0:
        raise ValueError(f"`normal` must not be 0, got {normal!r}")


def _weights(normal: float | Tensor, x: Tensor) -> Tensor:
    """The weights of the entries of each row of `x`, or of all rows alike."""
    weights = as_wide(normal, x)
    return weights.reshape(-1, weights.shape[-1] if weights.ndim else 1).expand(-1, x.shape[1])


def _dot(weights: Tensor, x: Tensor) -> Tensor:
    return (weights * x).sum(1, keepdim=True)


def _slack(weights: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the weighted sum may be off when `x` is rounded to `dtype`."""
    sizes = weights.abs()
    return resolution(_dot(sizes, x.abs()), sizes.sum(1, keepdim=True), x.shape[1], dtype)


def _direction(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights over their largest, which has a square in range, and the largest."""
    largest = weights.abs().amax(1, keepdim=True)
    return weights / largest, largest


def _distance(gap: Tensor, weights: Tensor) -> Tensor:
    """The distance to a hyperplane at which the weighted sum is off by `gap`; 0 if below."""
    direction, largest = _direction(weights)
    distance = gap / largest / _dot(direction, direction).sqrt()
    # with weights 0 there is no direction: what has a gap is at no finite distance
    distance = torch.where(largest > 0, distance, torch.inf)
    return torch.where(gap <= 0, 0.0, distance).squeeze(1)


def _shifted(x: Tensor, weights: Tensor, gap: Tensor) -> Tensor:
    """`x` moved along the weights so that the weighted sum is less by `gap`."""
    direction, largest = _direction(weights)
    return x - gap / largest / _dot(direction, direction) * direction
