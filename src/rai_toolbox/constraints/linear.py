"""Linear equations and inequalities: hyperplanes, half-spaces and affine subspaces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting, check_type, wrong
from rai_toolbox.constraints.base import Constraint, check_device, in_float64
from rai_toolbox.constraints.kernels.blocks import wide_dtype, widened
from rai_toolbox.constraints.kernels.box_hyperplane import as_rows
from rai_toolbox.constraints.kernels.norms import row_scale
from rai_toolbox.constraints.kernels.rounding import as_wide, resolution

# Each pass solves for the rounding error that the pass before it left in the residual, and so gains
# up to 16 digits: four bring 1e20 to an offset of 1e-20, where a single pass would leave 1e4.
_PASSES = 4


@dataclass(frozen=True, eq=False, repr=False)
class _Linear(Constraint):
    """One equation or inequality on the weighted sum of each sub-tensor."""

    _for_each: ClassVar[tuple[str, ...]] = ("offset",)

    normal: float | Tensor
    offset: float | Tensor
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("normal", self.normal)
        check_setting("offset", self.offset)
        zero = in_float64(normal=self.normal)[0] == 0
        if zero.numel() and bool(zero.all()):
            where = " everywhere" if zero.ndim else ""
            raise wrong("normal", f"not be 0{where}", self.normal)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and offset, divided by a power of two so that squares of weights are in range."""
        weights = as_rows(self.normal, x)
        scale = row_scale(weights)
        return (weights / scale).expand(-1, x.shape[1]), as_wide(self.offset, x) / scale

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights, offset = self._terms(x)
        gap = _dot(weights, x) - offset
        if self._is_equation:
            gap = gap.abs() - _rounding(weights, x, dtype)
        # Infinite where all weights are 0, as no point has another sum.
        distance = gap / torch.linalg.vector_norm(weights, dim=1, keepdim=True)
        return torch.where(gap <= 0, 0.0, distance).squeeze(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        weights, offset = self._terms(x)
        for _ in range(_PASSES):
            inward = 0.0 if self._is_equation else _rounding(weights, x.detach(), dtype)
            gap = _dot(weights, x) - (offset - inward)
            x = x - gap / _dot(weights, weights) * weights
        return x


class Hyperplane(_Linear):
    """Every sub-tensor on a hyperplane: one linear equation.

    ``{x : w.x = c}``; ``P(x) = x - (w.x - c) / |w|^2 * w``, repeated on its own residual
    (iterative refinement: Wilkinson, 1963), at the cost of a few passes.

    Parameters
    ----------
    normal : float or Tensor
        The weights w of the entries; a tensor broadcasts against the batch (N, ...). A sub-tensor
        with weights 0 and an offset other than 0 has no solution: its projection is NaN.
    offset : float or Tensor
        The value c of the weighted sum, one per sub-tensor: shape (N, 1, ...).
    dim : int or tuple of int, optional
        Along which dims of the batch the sum is taken; by default all but the first.

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


class HalfSpace(_Linear):
    """Every sub-tensor on one side of a hyperplane: one linear inequality.

    ``{x : w.x <= c}``; ``P(x) = x - max(w.x - c, 0) / |w|^2 * w``, repeated on its own
    residual (iterative refinement: Wilkinson, 1963), at the cost of a few passes. Results aim
    inside by what rounding can add, so that they satisfy the inequality exactly.

    Parameters
    ----------
    normal : float or Tensor
        The weights w of the entries; a tensor broadcasts against the batch (N, ...). A sub-tensor
        with weights 0 and an offset below 0 has no solution: its projection is NaN.
    offset : float or Tensor
        The largest value c of the weighted sum, one per sub-tensor: shape (N, 1, ...).
    dim
        See `Hyperplane`.

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


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Constraint):
    """Every sub-tensor in an affine subspace: several linear equations.

    ``{x : A x = b}`` for the flattened sub-tensor x; ``P(x) = x - A^+ (A x - b)`` with the
    pseudoinverse ``A^+``, repeated on its own residual (Golub and Van Loan, Matrix Computations,
    2013, 5.3 and 5.5). The pseudoinverse is computed once, when the set is made, as a constant for
    autograd; each of a few passes costs 2 m n operations per sub-tensor.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        One equation per row, for sub-tensors of n elements.
    offset : float or Tensor, shape (m,) or (N, m)
        The right-hand side b, which sub-tensors share or have one each of.
    dim : int or tuple of int, optional
        Along which dims of the batch the n elements lie; by default all but the first.

    Raises
    ------
    ValueError
        If a setting is not finite or of the wrong shape, or the rows of the matrix are linearly
        dependent, to the precision of its dtype.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Affine
    >>> sum_1_and_first_two_equal = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
    >>> halves = Affine(sum_1_and_first_two_equal, torch.tensor([1.0, 0.0]))
    >>> halves.project_(torch.tensor([[2.0, 1.0, -1.0]]))
    tensor([[ 1.1667,  1.1667, -1.3333]])
    """

    flat: ClassVar[bool] = True
    _unaligned: ClassVar[tuple[str, ...]] = ("matrix",)
    _is_equation: ClassVar[bool] = True
    _wide: ClassVar[Tensor]  # of each instance: the matrix in float64
    _inverse: ClassVar[Tensor]  # and its pseudoinverse

    matrix: Tensor
    offset: float | Tensor
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_type("matrix", self.matrix, Tensor, "be a tensor")
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or not 0 < shape[0] <= shape[1]:
            raise wrong("matrix", "have the shape (m, n), 1 <= m <= n", shape)
        check_setting("matrix", self.matrix)
        check_setting("offset", self.offset)
        if isinstance(self.offset, Tensor) and self.offset.ndim:
            rows, of_offset = shape[0], tuple(self.offset.shape)
            if len(of_offset) > 2 or of_offset[-1] != rows:
                rule = f"have the shape ({rows},) or (N, {rows}), one value per row of `matrix`"
                raise wrong("offset", rule, of_offset)
        wide, inverse = _with_inverse(self.matrix.detach())
        self.__dict__.update(_wide=wide, _inverse=inverse)

    def _check_shape(self, shape: torch.Size) -> None:
        if shape[1:].numel() != self.matrix.shape[1]:
            count = f"{shape[1:].numel()} for the batch of shape {tuple(shape)}"
            rule = f"have one column per element of a sub-tensor, {count}"
            raise wrong("matrix", rule, f"shape {tuple(self.matrix.shape)}")

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        matrix, sizes = self._wide, self._wide.abs()
        rounding = resolution(x.abs() @ sizes.T, sizes.sum(1), x.shape[1], dtype)
        gap = (x @ matrix.T - as_wide(self.offset, x)).abs() - rounding
        distances: Tensor = gap.clamp(min=0.0) / torch.linalg.vector_norm(matrix, dim=1)
        return distances.amax(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        for _ in range(_PASSES):
            x = x - (x @ self._wide.T - as_wide(self.offset, x)) @ self._inverse.T
        return x

    # The settings belong to equations, not elements: they do not broadcast against the batch.

    def _of_rows(self, _: Any) -> Affine:
        return self._replaced({"_dims": None})

    def to(self, *args: Any, **kwargs: Any) -> Constraint:  # noqa: D102
        return replace(super().to(*args, **kwargs))  # with an inverse of its own

    def _check_batch(self, x: Tensor) -> None:
        check_device("matrix", self.matrix, x)
        super()._check_batch(x)

    def _check_fit(self, name: str, setting: Tensor, x: Tensor) -> None:
        if self._dims is None and setting.ndim == 2 and len(setting) not in (1, len(x)):
            rule = f"have a row per sub-tensor of the batch of shape {tuple(x.shape)}"
            raise wrong(name, rule, f"shape {tuple(setting.shape)}")

    def _aligned(self, x: Tensor, rows: slice, name: str, setting: Tensor) -> Tensor:
        setting = widened(setting).reshape(-1, setting.shape[-1] if setting.ndim else 1)
        return setting[rows] if len(setting) > 1 else setting

    def _whole_dims(self, shape: torch.Size) -> Iterable[int]:
        one_for_all = not isinstance(self.offset, Tensor) or self.offset.ndim < 2
        return super()._whole_dims(shape) if one_for_all else range(len(shape))


def _dot(weights: Tensor, x: Tensor) -> Tensor:
    return (weights * x).sum(1, keepdim=True)


def _rounding(weights: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far the weighted sum may be off when `x` is rounded to `dtype`."""
    sizes = weights.abs()
    return resolution(_dot(sizes, x.abs()), sizes.sum(1, keepdim=True), x.shape[1], dtype)


def _with_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and its pseudoinverse in float64."""
    wide = widened(matrix)
    scale = row_scale(wide)  # equations of any scale are alike
    scaled = wide / scale
    dtype = matrix.dtype if matrix.is_floating_point() else wide_dtype(matrix)
    least = torch.finfo(dtype).eps * max(wide.shape)
    rank = int(torch.linalg.matrix_rank(scaled, rtol=least))
    if rank < len(wide):
        got = f"one of numerical rank {rank} with m={len(wide)} rows"
        raise wrong("matrix", "have linearly independent rows", got)
    return wide, torch.linalg.pinv(scaled) / scale.T
