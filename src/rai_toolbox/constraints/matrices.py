"""Kinds of matrices: positive semidefinite ones, of orthonormal columns or rows, of low rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels import svd
from rai_toolbox.constraints.kernels.rounding import resolution, spacing
from rai_toolbox.constraints.sampling import normal

_LARGE = 1e150
"""Sums of squares of numbers up to this stay finite in float64."""


class PSD(Constraint):
    """Symmetric matrices without negative eigenvalues.

    ``{X : X = X^T, v^T X v >= 0 for all v}``, matrices in the last two dims of a batch
    (N, ..., n, n); ``P(X) = Q diag(max(s, 0)) Q^T`` for ``(X + X^T) / 2 = Q diag(s) Q^T`` (Higham
    1988), at the cost of an eigendecomposition in float64, O(n^3), which synchronizes with a GPU.
    The result is exactly symmetric, and its eigenvalues are raised by what rounding takes off. An
    eigenvalue counts as negative if it is less than what rounding to float64, relative to the
    largest, can explain.
    The derivative is exact, also where eigenvalues are equal.

    Raises
    ------
    ValueError
        From methods, if a batch is not one of square matrices.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import PSD
    >>> PSD().project_(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    tensor([[[1.5000, 1.5000],
             [1.5000, 1.5000]]])
    """

    _is_equation: ClassVar[bool] = True  # of the symmetric part
    _of_matrices: ClassVar[bool] = True

    def _check_shape(self, shape: torch.Size) -> None:
        if shape[-1] != shape[-2]:
            raise ValueError(f"PSD takes square matrices, got a batch of shape {tuple(shape)}")

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        depth = _depth(_symmetric(x), svd.noise_of(x))
        return torch.maximum((x - x.mT).abs().amax((-2, -1)), depth)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = _symmetric(x)
        parts = q, values, qt = svd.decomposed(x, symmetric=True)

        noise = svd.noise_of(x) / 2  # half of what `_excess` allows, so that the result is inside
        # Rounding moves a matrix Y, and so its eigenvalues, by u |Y|_F at most; twice that holds
        # for the raised matrix too, while u sqrt(n) <= 1/2.
        lost = torch.finfo(dtype).eps * sqrt(x.shape[-1]) * values[..., -1:].clamp(min=0.0)
        floor = svd.rounding_margin(
            lambda floor: _symmetric(svd.composed(q, torch.maximum(values, floor), qt)),
            lambda y: _depth(y, noise).unsqueeze(-1),
            lost + x.shape[-1] * spacing(dtype),
            dtype,
        )
        y = svd.composed_of(x, parts, torch.maximum(values, floor), values > floor, symmetric=True)
        return svd.within_range(_symmetric(y), dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Stiefel(Constraint):
    """Matrices with orthonormal columns, or, if they have more columns than rows, rows; not convex.

    ``{X : X^T X = I}``, or ``{X : X X^T = I}`` for m < k, for the matrices of a batch (N, m, k);
    ``P(X) = U V^T`` for ``X = U diag(s) V^T``, the polar factor (Fan &
    Hoffman 1955; Schonemann 1966), at the cost of a singular value decomposition in float64,
    O(m k min(m, k)), which synchronizes with a GPU. A matrix of lower rank has many nearest points,
    of which one is returned; there the derivative is NaN or infinite. Samples are uniform (Haar):
    polar factors of normal matrices (Chikuse 2003).

    Parameters
    ----------
    flatten : int, optional
        See `SpectralBall`.

    Raises
    ------
    TypeError, ValueError
        If `flatten` is not an int >= 1; from methods, if a batch is not one of matrices.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Stiefel
    >>> Stiefel().project_(torch.tensor([[[0.0, -2.0], [3.0, 0.0], [0.0, 0.0]]]))
    tensor([[[ 0., -1.],
             [ 1.,  0.],
             [ 0.,  0.]]])
    """

    _is_equation: ClassVar[bool] = True
    convex: ClassVar[bool] = False
    _of_matrices: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    flatten: int | None = field(default=None, kw_only=True)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.mT if x.shape[-2] < x.shape[-1] else x
        columns = x.clamp(-_LARGE, _LARGE)
        magnitudes = columns.abs()
        gram, terms = columns.mT @ columns, magnitudes.mT @ magnitudes
        sums = magnitudes.sum(-2)
        off = (gram - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs()
        # Each entry of X^T X is a sum of products of two rounded numbers.
        weights = sums.unsqueeze(-1) + sums.unsqueeze(-2)
        allowed = resolution(2 * terms, weights, x.shape[-2], dtype) + svd.noise_of(x)
        length = gram.diagonal(dim1=-2, dim2=-1).amax(-1).sqrt()  # of the longest column
        return torch.where(off > allowed, off, 0.0).amax((-2, -1)) / (1 + length)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        parts = svd.decomposed(x)
        return svd.composed_of(x, parts, torch.ones_like(parts[1]), torch.zeros_like(parts[1]))

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return self._nearest(-gradient, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        return self._nearest(normal(like, generator), like.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Rank(Constraint):
    """Matrices of at most a given rank; not convex.

    ``{X : rank X <= r}``, for the matrices of a batch (N, m, k). The projection keeps the r largest
    singular values (Eckart & Young, 1936; Mirsky, 1960), at the cost of a singular value
    decomposition in float64, O(m k min(m, k)), which synchronizes with a GPU; where they tie, one
    of several nearest points. Singular values count as 0 if they are no more than what rounding the
    entries to the dtype of X can explain. The violation is the largest singular value after the r
    largest. The set is unbounded, and has no `lmo`.

    Parameters
    ----------
    rank : int
        The largest rank r, >= 0.
    flatten : int, optional
        See `SpectralBall`.

    Raises
    ------
    TypeError, ValueError
        If `rank` is not an int >= 0.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Rank
    >>> Rank(1).project_(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
    tensor([[[3., 0.],
             [0., 0.]]])
    """

    _is_equation: ClassVar[bool] = True
    convex: ClassVar[bool] = False
    _of_matrices: ClassVar[bool] = True

    rank: int
    flatten: int | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_count("rank", self.rank, 0)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.linalg.svdvals(x)
        if self.rank >= values.shape[-1]:
            return torch.zeros_like(values[..., 0])
        first, length = values[..., 0], torch.linalg.vector_norm(values, dim=-1)
        entries = x.shape[-2] * x.shape[-1]
        # Twice what rounding to nearest can add to any singular value.
        rounding = torch.finfo(dtype).eps * length + sqrt(entries) * spacing(dtype)
        after = values[..., self.rank]
        return torch.where(after > rounding + svd.noise_of(x) * first, after, 0.0)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        parts = svd.decomposed(x)
        values = parts[1]
        kept = torch.arange(values.shape[-1], device=x.device) < self.rank
        y = svd.composed_of(x, parts, torch.where(kept, values, 0.0), kept.expand(values.shape))
        return svd.within_range(y, dtype)


def _symmetric(x: Tensor) -> Tensor:
    return x / 2 + x.mT / 2


def _depth(x: Tensor, noise: float) -> Tensor:
    """How negative the lowest eigenvalue of each matrix is; 0 within `noise` of the largest."""
    values = torch.linalg.eigvalsh(x)
    depth = -values[..., 0]
    return torch.where(depth > noise * values.abs().amax(-1), depth, 0.0)
