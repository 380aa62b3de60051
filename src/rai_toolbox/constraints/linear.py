"""Linear equations and inequalities: hyperplanes, half-spaces, affine subspaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.blocks import wide_dtype, widened
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.rounding import as_wide, resolution

# Each pass solves for what rounding left of the residual by the one before it, and so gains up to
# 16 digits: four bring 1e20 to an offset of 1e-20, where a single pass would leave 1e4.
_PASSES = 4
_PRODUCT = 2**20  # elements of a product of a matrix and all rows, at a time


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
        for _ in range(_PASSES):
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
        for _ in range(_PASSES):
            aim = offset - _slack(weights, x.detach(), dtype)
            x = _shifted(x, weights, _dot(weights, x) - aim)
        return x


@dataclass(frozen=True, eq=False)
class Affine(Constraint):
    """Every sub-tensor in an affine subspace: several linear equations.

    ``{x : A x = b}`` for the flattened sub-tensor x; ``P(x) = x - Q R^-T (A x - b)`` with
    ``A^T = Q R``, solved again for its own residual (Golub and Van Loan, Matrix Computations,
    2013, 5.3 and 5.6). The matrix is factorized once, when the set is made, as a constant for
    autograd; each of a few passes costs 2 m n operations per sub-tensor.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        One equation per row, for sub-tensors of n elements.
    offset : float or Tensor, shape (m,) or (N, m)
        The right-hand side b, which sub-tensors share or have one each of.

    Raises
    ------
    ValueError
        If a setting is not finite or of the wrong shape, or the rows of the matrix are linearly
        dependent, as far as its dtype tells.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Affine
    >>> sum_1_and_first_two_equal = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
    >>> halves = Affine(sum_1_and_first_two_equal, torch.tensor([1.0, 0.0]))
    >>> halves.project_(torch.tensor([[2.0, 1.0, -1.0]]))
    tensor([[ 1.1667,  1.1667, -1.3333]])
    """

    _is_equation: ClassVar[bool] = True

    matrix: Tensor
    offset: float | Tensor

    def _check_settings(self) -> None:
        if not isinstance(self.matrix, Tensor):
            raise TypeError(f"`matrix` must be a tensor, got {self.matrix!r}")
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or not 0 < shape[0] <= shape[1]:
            raise ValueError(f"`matrix` must have the shape (m, n), 1 <= m <= n, got {shape}")
        check_setting("matrix", self.matrix)
        check_setting("offset", self.offset)
        if isinstance(self.offset, Tensor) and self.offset.ndim:
            of_offset = tuple(self.offset.shape)
            if len(of_offset) > 2 or of_offset[-1] != shape[0]:
                raise ValueError(
                    f"`offset` must have the shape ({shape[0]},) or (N, {shape[0]}), one value "
                    f"per row of `matrix`, got {of_offset}"
                )
        factors = _factors(self.matrix)
        for name, factor in zip(("_wide", "_q", "_solver"), factors, strict=True):
            object.__setattr__(self, name, factor)

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        if self.matrix.device != x.device:
            raise ValueError(
                f"`matrix` must be on the device of the batch, {x.device}, "
                f"got {self.matrix.device}; see `to`"
            )

    def _check_shape(self, shape: torch.Size) -> None:
        if shape[1:].numel() != self.matrix.shape[1]:
            raise ValueError(
                f"`matrix` must have one column per element of a sub-tensor, "
                f"{shape[1:].numel()} for the batch of shape {tuple(shape)}, "
                f"got shape {tuple(self.matrix.shape)}"
            )

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        matrix: Tensor = self.__dict__["_wide"]
        sizes = matrix.abs()
        terms = _product(sizes, x.abs())
        slack = resolution(terms, sizes.sum(1), x.shape[1], dtype)
        gap = (_product(matrix, x) - as_wide(self.offset, x)).abs() - slack
        distances: Tensor = gap.clamp(min=0.0) / torch.linalg.vector_norm(matrix, dim=1)
        return distances.amax(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        matrix, q, solver = (self.__dict__[name] for name in ("_wide", "_q", "_solver"))
        for _ in range(_PASSES):
            residual = _product(matrix, x) - as_wide(self.offset, x)
            x = x - _product(q, _product(solver, residual))
        return x

    # The settings are of equations, not of elements: they do not broadcast against the batch.

    def to(self, *args: Any, **kwargs: Any) -> Affine:  # noqa: D102
        offset = self.offset
        if isinstance(offset, Tensor):
            offset = offset.to(*args, **kwargs)
        return Affine(self.matrix.to(*args, **kwargs), offset)

    def _map(self, change: Callable[..., Tensor]) -> Affine:
        if not isinstance(self.offset, Tensor):
            return self
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, offset=change("offset", self.offset))
        return other

    def _reshaped(self, setting: Tensor, x: Tensor) -> Tensor:
        return widened(setting).reshape(-1, setting.shape[-1] if setting.ndim else 1)

    def _checked(self, name: str, setting: Tensor, x: Tensor) -> Tensor:
        if setting.ndim == 2 and len(setting) not in (1, len(x)):
            raise ValueError(
                f"`{name}` must have a row per sub-tensor of the batch of shape "
                f"{tuple(x.shape)}, got shape {tuple(setting.shape)}"
            )
        if setting.device != x.device:
            raise ValueError(
                f"`{name}` must be on the device of the batch, {x.device}, got {setting.device}; "
                "see `to`"
            )
        return setting


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


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``Q`` and ``R^-T`` in float64, such that ``Q R^-T r`` is the least `x` of A x = r."""
    wide = widened(matrix.detach())
    size = wide.abs().amax(1, keepdim=True)
    scale = torch.where(size > 0, size, 1.0)  # equations of any scale are alike
    scaled = wide / scale
    singular = torch.linalg.svdvals(scaled)
    dtype = matrix.dtype if matrix.is_floating_point() else wide_dtype(matrix)
    least = singular.amax() * torch.finfo(dtype).eps * max(wide.shape)
    rank = int((singular > least).sum())
    if rank < len(wide):
        raise ValueError(
            "`matrix` must have linearly independent rows, got one of numerical rank "
            f"{rank} with m={len(wide)} rows"
        )
    q, r = torch.linalg.qr(scaled.T)
    solver = torch.linalg.solve_triangular(r.T, torch.diag(1 / scale.squeeze(1)), upper=False)
    return wide, q.contiguous(), solver.contiguous()


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` for each row of `x`, each summed alike however many rows there are.

    A matrix product would sum in an order that depends on how many there are.
    """
    height = max(1, _PRODUCT // max(1, x.numel()))
    products = [(some * x.unsqueeze(1)).sum(2) for some in matrix.split(height)]
    return products[0] if len(products) == 1 else torch.cat(products, 1)
