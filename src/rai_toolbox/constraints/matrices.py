"""Kinds of matrices: positive semidefinite ones, and those with orthonormal columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.norms import norm
from rai_toolbox.constraints.kernels.rounding import resolution, spacing
from rai_toolbox.constraints.kernels.svd import (
    ALIGNED,
    Recomposed,
    aligned,
    cut,
    divided_differences,
    noise_of,
    recomposed,
    svd,
    within_range,
)
from rai_toolbox.constraints.sampling import normal

_LARGE = 1e150
"""Sums of squares of numbers up to this stay finite in float64."""


@dataclass(frozen=True, eq=False)
class PSD(Constraint):
    """Symmetric matrices without negative eigenvalues.

    ``{X : X = X^T, v^T X v >= 0 for all v}``, matrices in the last two dims of a batch
    (N, ..., n, n); ``P(X) = Q diag(max(s, 0)) Q^T`` for ``(X + X^T) / 2 = Q diag(s) Q^T`` (Higham
    1988), at the cost of an eigendecomposition in float64, O(n^3), which waits for a GPU. The
    result is symmetric to the bit, and its eigenvalues are raised by what rounding takes off. An
    eigenvalue is negative where it is so beyond the rounding of float64, relative to the largest.
    The derivative is exact, also where eigenvalues are equal.

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
        depth = _depth(_symmetric(x), noise_of(x))
        return torch.maximum((x - x.mT).abs().amax((-2, -1)), depth)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = _symmetric(x)
        values, q = torch.linalg.eigh(aligned(x.detach()))

        def raised(floor: Tensor) -> Tensor:
            y = recomposed(q, torch.maximum(values, floor), q.mT)
            return torch.where(_all_above(values, floor), x.detach(), _symmetric(cut(y, x)))

        floor = _floor(raised, values, x, dtype)
        y = _Raised.apply(aligned(x), values, q, floor)  # type: ignore[no-untyped-call]
        kept = _all_above(values, floor)
        return within_range(torch.where(kept, x, _symmetric(cut(y, x))), dtype)


@dataclass(frozen=True, eq=False)
class Stiefel(Constraint):
    """Matrices with orthonormal columns; not convex.

    ``{X : X^T X = I}``, matrices of at least as many rows as columns in the last two dims of a
    batch (N, ..., m, k); ``P(X) = U V^T`` for ``X = U diag(s) V^T``, the polar factor (Fan &
    Hoffman 1955; Schonemann 1966), at the cost of a singular value decomposition in float64,
    O(m k^2), which waits for a GPU. A matrix of lower rank has many nearest points, of which it
    gives one; there the derivative is NaN or infinite. Samples are uniform (Haar): polar factors
    of normal matrices (Chikuse 2003).

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

    @property
    def bounded(self) -> bool:
        """Always."""
        return True

    def _check_shape(self, shape: torch.Size) -> None:
        if shape[-2] < shape[-1]:
            raise ValueError(
                "Stiefel takes matrices of at least as many rows as columns, got a batch of shape "
                f"{tuple(shape)}; transpose it (`x.mT`) for orthonormal rows"
            )

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        columns = aligned(x).clamp(-_LARGE, _LARGE)
        magnitudes = columns.abs()
        size = x.shape[-1]
        gram, terms = ((y.mT @ y)[..., :size, :size] for y in (columns, magnitudes))
        sums = cut(magnitudes, x).sum(-2)
        off = (gram - torch.eye(size, dtype=x.dtype, device=x.device)).abs()
        # Each entry of X^T X is a sum of products of two rounded numbers.
        weights = sums.unsqueeze(-1) + sums.unsqueeze(-2)
        allowed = resolution(2 * terms, weights, x.shape[-2], dtype) + noise_of(x)
        length = gram.diagonal(dim1=-2, dim2=-1).amax(-1).sqrt()  # of the longest column
        return torch.where(off > allowed, off, 0.0).amax((-2, -1)) / (1 + length)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        whole = _bordered(x)
        u, values, vh = svd(whole.detach())
        ones, still = torch.ones_like(values), torch.zeros_like(values)
        y = Recomposed.apply(whole, u, values, vh, ones, still, False)  # type: ignore[no-untyped-call]
        return cut(y, x)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return self._nearest(-gradient, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        return self._nearest(normal(like, generator), like.dtype)


def _symmetric(x: Tensor) -> Tensor:
    return x / 2 + x.mT / 2


def _depth(x: Tensor, noise: float) -> Tensor:
    """How negative the lowest eigenvalue of each matrix is; 0 within `noise` of the largest."""
    values = torch.linalg.eigvalsh(aligned(x))
    depth = -values[..., 0]
    return torch.where(depth > noise * values.abs().amax(-1), depth, 0.0)


def _all_above(values: Tensor, floor: Tensor) -> Tensor:
    return (values >= floor).all(-1)[..., None, None]


def _floor(
    raised: Callable[[Tensor], Tensor], values: Tensor, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """The lowest of three bounds of eigenvalues at which ``raised(bound)`` rounds into the cone.

    The first is 0; the second, somewhat more than what rounding then was seen to take off. The
    third needs no trial while ``u sqrt(n) <= 1/2``: rounding moves a matrix Y, and so each of its
    eigenvalues, by at most ``u |Y|_F``.
    """
    noise = noise_of(x) / 2  # half of what is allowed, so that it still fits when seen again
    first = torch.zeros_like(values[..., :1])
    exact = within_range(raised(first), dtype)
    rounded = exact.to(dtype).to(x.dtype)
    depth = _depth(rounded, noise).unsqueeze(-1)
    error = torch.linalg.eigvalsh(aligned(rounded - exact)).abs().amax(-1, keepdim=True)
    second = depth + error / 2
    retried = within_range(raised(second), dtype).to(dtype).to(x.dtype)
    lost = torch.finfo(dtype).eps * norm(values.clamp(min=0.0), 2, 1)
    third = lost + x.shape[-1] * spacing(dtype)
    inner = torch.where(_depth(retried, noise).unsqueeze(-1) == 0, second, third)
    return torch.where(depth == 0, first, inner)


def _bordered(x: Tensor) -> Tensor:
    """`x` with multiples of 8 rows and columns: a block of the identity beside it, then zeros.

    Columns of zeros, as those of `aligned`, would mix with what x itself has no rank for.
    """
    columns = -x.shape[-1] % ALIGNED
    whole = aligned(torch.nn.functional.pad(x, (0, columns, 0, columns)))
    largest = x.detach().abs().amax((-2, -1)).unsqueeze(-1)
    block = whole.diagonal(x.shape[-1] - x.shape[-2], -2, -1)[..., x.shape[-1] :]
    block.copy_(torch.where(largest > 0, largest, 1.0).expand_as(block))
    return whole


class _Raised(torch.autograd.Function):
    """``Q diag(max(s, floor)) Q^T`` as a function of ``X = Q diag(s) Q^T``.

    Its derivative (Loewner 1934) is made of divided differences, which other than the derivative
    of Q have no poles where eigenvalues are equal, and is its own adjoint.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, q: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(values, q, floor)
        return recomposed(q, torch.maximum(values, floor), q.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, q, floor = ctx.saved_tensors
        slope = (values > floor).to(values.dtype)
        differences = divided_differences(values, torch.maximum(values, floor), slope)
        return q @ (differences * (q.mT @ grad @ q)) @ q.mT, None, None, None
