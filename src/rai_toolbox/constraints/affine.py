"""Several linear equations at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint, check_device
from rai_toolbox.constraints.kernels.blocks import wide_dtype, widened
from rai_toolbox.constraints.kernels.rounding import as_wide, resolution
from rai_toolbox.constraints.linear import PASSES

_PRODUCT = 2**20  # elements of a product of a matrix and all rows, at a time


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

    flat: ClassVar[bool] = True
    _fixed: ClassVar[tuple[str, ...]] = ("matrix",)
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
        for _ in range(PASSES):
            residual = _product(matrix, x) - as_wide(self.offset, x)
            x = x - _product(q, _product(solver, residual))
        return x

    # The settings are of equations, not of elements: they do not broadcast against the batch.

    def to(self, *args: Any, **kwargs: Any) -> Affine:  # noqa: D102
        offset = self.offset
        if isinstance(offset, Tensor):
            offset = offset.to(*args, **kwargs)
        return Affine(self.matrix.to(*args, **kwargs), offset)

    def _check_batch(self, x: Tensor) -> None:
        check_device("matrix", self.matrix, x)
        super()._check_batch(x)

    def _check_fit(self, name: str, setting: Tensor, x: Tensor) -> None:
        if setting.ndim == 2 and len(setting) not in (1, len(x)):
            raise ValueError(
                f"`{name}` must have a row per sub-tensor of the batch of shape "
                f"{tuple(x.shape)}, got shape {tuple(setting.shape)}"
            )

    def _aligned(self, setting: Tensor, x: Tensor, rows: slice) -> Tensor:
        setting = widened(setting).reshape(-1, setting.shape[-1] if setting.ndim else 1)
        return setting[rows] if len(setting) > 1 else setting

    def _whole_dims(self, shape: torch.Size) -> Iterable[int]:
        one_for_all = not isinstance(self.offset, Tensor) or self.offset.ndim < 2
        return super()._whole_dims(shape) if one_for_all else range(len(shape))


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
