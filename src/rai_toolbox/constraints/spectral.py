"""Balls of matrices: bounds on the singular values, one by one or summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.randomness import normal, uniform
from rai_toolbox.constraints.rounding import spacing

ALIGNED = 8
"""Float64 numbers in 64 bytes, where the registers of any CPU of today begin anew."""


@dataclass(frozen=True, eq=False)
class _SingularValueBall(Constraint):
    """A ball of a norm of matrices that is a norm of their singular values."""

    _of_matrices: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)

    epsilon: float | Tensor

    @property
    def bounded(self) -> bool:
        """Always."""
        return True

    def _norm(self, values: Tensor) -> Tensor:
        """The norm of singular values, in the last dim."""
        raise NotImplementedError

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The nearest values of norm `radius`; which move with their own; whether all share."""
        raise NotImplementedError

    def _extreme(self, values: Tensor) -> Tensor:
        """Values of norm 1 whose inner product with `values` is largest."""
        raise NotImplementedError

    def _check_settings(self) -> None:
        check_setting("epsilon", self.epsilon, least=0.0)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        size, radius = self._size(x), self._radius(x)
        return torch.where(size > radius * (1 + noise_of(x)), size - radius, 0.0).squeeze(-1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        u, values, vh = svd(aligned(x.detach()))
        radius = self._inward(
            lambda r: cut(recomposed(u, self._shrunk(values, r)[0], vh), x), x, dtype
        )
        epsilon = self._radius(x)
        radius = radius + (epsilon - epsilon.detach())  # 0, for the sake of its derivative
        shrunk, moving, shared = self._shrunk(values, radius)
        y = Recomposed.apply(aligned(x), u, values, vh, shrunk, moving, shared)  # type: ignore[no-untyped-call]
        return within_range(cut(y, x), dtype)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        u, values, vh = svd(aligned(-gradient))
        corner = cut(recomposed(u, self._extreme(values), vh), gradient)
        radius = self._inward(lambda r: corner * r.unsqueeze(-1), gradient, dtype)
        return within_range(corner * radius.unsqueeze(-1), dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        direction = normal(like, generator)
        size = self._size(direction)
        share = uniform(size, generator) ** (1 / (like.shape[-2] * like.shape[-1])) / size
        point = direction * share.unsqueeze(-1)
        radius = self._inward(lambda r: point * r.unsqueeze(-1), direction, like.dtype)
        return within_range(point * radius.unsqueeze(-1), like.dtype)

    def _radius(self, x: Tensor) -> Tensor:
        """The radius of each matrix, to broadcast against its singular values."""
        if isinstance(self.epsilon, Tensor):
            return self.epsilon[..., 0]
        return x.new_full((1,) * (x.ndim - 1), self.epsilon)

    @torch.no_grad()
    def _inward(self, compose: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
        """The largest of three radii at which ``compose(radius)`` rounds into the ball.

        The first takes off the noise of float64 alone; the second, somewhat more than what
        rounding then was seen to add. The third needs no trial: rounding moves a matrix Y by at
        most ``u |Y|_F``, and so its norm by at most ``u sqrt(min(m, k)) epsilon``.
        """
        epsilon, least = self._radius(x), min(x.shape[-2:])
        unit = torch.finfo(dtype).eps / 2
        first = epsilon * (1 - noise_of(x))
        exact = within_range(compose(first), dtype)
        rounded = exact.to(dtype).to(x.dtype)
        size, error = self._size(rounded), self._size(rounded - exact)
        second = (first - (size - first).clamp(min=0.0) - error / 2).clamp(min=0.0)
        retried = within_range(compose(second), dtype).to(dtype).to(x.dtype)
        lost = sqrt(least * x.shape[-2] * x.shape[-1]) * spacing(dtype)
        third = (epsilon * (1 - noise_of(x) - sqrt(least) * unit) - lost).clamp(min=0.0)
        inner = torch.where(self._size(retried) <= epsilon, second, third)
        return torch.where(size <= epsilon, first, inner)

    def _size(self, x: Tensor) -> Tensor:
        return self._norm(singular_values(x)).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class SpectralBall(_SingularValueBall):
    """Matrices whose largest singular value is at most `epsilon`.

    ``{X : s_1(X) <= epsilon}``, matrices in the last two dims of a batch (N, ..., m, k);
    ``P(X) = U diag(min(s, epsilon)) V^T`` for ``X = U diag(s) V^T`` (von Neumann 1937; Lewis
    1995), at the cost of a singular value decomposition in float64, O(m k min(m, k)), which waits
    for a GPU. The derivative is exact, also where singular values are equal or 0. Samples are
    normal matrices, each scaled to the norm ``epsilon t^(1/(m k))``, t uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        The radius, finite and >= 0.

    Raises
    ------
    ValueError
        If `epsilon` is negative, infinite or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints.spectral import SpectralBall
    >>> SpectralBall(1.0).project_(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
    tensor([[[1.0000, 0.0000],
             [0.0000, 0.5000]]])
    """

    def _norm(self, values: Tensor) -> Tensor:
        return values.amax(-1)

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, bool]:
        return torch.minimum(values, radius), values < radius, False

    def _extreme(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)


@dataclass(frozen=True, eq=False)
class NuclearBall(_SingularValueBall):
    """Matrices whose singular values sum up to at most `epsilon`.

    ``{X : sum_i s_i(X) <= epsilon}``, the convex hull of the matrices of rank one in it, in the
    last two dims of a batch (N, ..., m, k); ``P(X) = U diag(max(s - theta, 0)) V^T`` for
    ``X = U diag(s) V^T``, with the theta that makes the sum epsilon (Cai, Candes & Shen 2010;
    Duchi et al. 2008), at the cost of a singular value decomposition in float64,
    O(m k min(m, k)), which waits for a GPU. The derivative is exact, also where singular values
    are equal or 0. Samples are normal matrices, each scaled to the norm ``epsilon t^(1/(m k))``,
    t uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        The radius, finite and >= 0.

    Raises
    ------
    ValueError
        If `epsilon` is negative, infinite or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints.spectral import NuclearBall
    >>> NuclearBall(3.0).project_(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
    tensor([[[2., 0.],
             [0., 1.]]])
    """

    def _norm(self, values: Tensor) -> Tensor:
        return values.sum(-1)

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, bool]:
        shrunk = _l1_of_sorted(values, radius)
        return shrunk, shrunk > 0, True

    def _extreme(self, values: Tensor) -> Tensor:
        first = torch.zeros_like(values)
        first[..., 0] = 1.0  # one pair of vectors, also where more have the largest value
        return first


def _l1_of_sorted(values: Tensor, radius: Tensor) -> Tensor:
    """``max(values - theta, 0)`` of sum `radius`, or less, for values >= 0 in falling order."""
    largest = values[..., :1]
    below = values - largest  # sums of these lose nothing to a large common part
    count = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    theta = ((below.cumsum(-1) - radius) / count).amax(-1, keepdim=True)
    return torch.minimum((below - theta).clamp(min=0.0), values)


def noise_of(x: Tensor) -> float:
    """Relative error of the largest singular value or eigenvalue, or of the sum of all."""
    return torch.finfo(x.dtype).eps * (8 + x.shape[-2] + x.shape[-1])


def aligned(x: Tensor) -> Tensor:
    """`x` with zero rows and columns up to multiples of 8.

    The bits that BLAS and LAPACK give depend on where in a cache line a matrix begins: without
    these, on its place in the batch. Nonzero singular values and vectors stay as they are.
    """
    rows, columns = x.shape[-2:]
    return torch.nn.functional.pad(x, (0, -columns % ALIGNED, 0, -rows % ALIGNED))


def cut(y: Tensor, like: Tensor) -> Tensor:
    """`y` without the rows and columns that `like` does not have."""
    return y[..., : like.shape[-2], : like.shape[-1]]


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, s, V^T`` of each matrix, s falling; U and V^T with as many vectors as there are s."""
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    return u, values, vh


def singular_values(x: Tensor) -> Tensor:
    """The singular values of each matrix, and zeros."""
    values: Tensor = torch.linalg.svdvals(aligned(x))
    return values


def recomposed(u: Tensor, values: Tensor, vh: Tensor) -> Tensor:
    """``U diag(values) V^T``."""
    return (u * values.unsqueeze(-2)) @ vh


def within_range(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y`, scaled down where an entry would be infinite in `dtype`: toward 0, which balls hold."""
    most = torch.finfo(dtype).max
    return y * (most / y.abs().amax((-2, -1), keepdim=True).clamp(min=most))


class Recomposed(torch.autograd.Function):
    """``Y = U diag(f) V^T`` as a function of ``X = U diag(s) V^T``, where f is one of s.

    The values of f that are `moving` have the derivative 1 with respect to their own value of s,
    others 0; if `shared`, the mean of all moving ones is taken off. The derivative of Y is made
    of divided differences (Lewis & Sendov 2001; Yang 2009) and, other than those of U and V, has
    no poles where values of s are equal. It is its own adjoint. What f depends on otherwise, such
    as a radius, gets its part through f.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        u: Tensor,
        values: Tensor,
        vh: Tensor,
        f: Tensor,
        moving: Tensor,
        shared: bool,
    ) -> Tensor:
        ctx.save_for_backward(u, values, vh, f, moving.to(f.dtype))
        ctx.shared = shared
        return recomposed(u, f, vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        u, values, vh, f, slope = ctx.saved_tensors
        right, left = grad @ vh.mT, u.mT @ grad
        inner = u.mT @ right
        even, odd = (inner + inner.mT) / 2, (inner - inner.mT) / 2
        core = divided_differences(values, f, slope) * even + _divided_sums(values, f, slope) * odd
        if ctx.shared:
            moved = (slope * even.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
            mean = moved / slope.sum(-1, keepdim=True).clamp(min=1.0)
            core = core - torch.diag_embed(slope * mean)
        # What is outside of the span of U, or of V, turns that value's vector.
        ratio = _ratio(f, values, slope)
        outer = recomposed(right - u @ inner, ratio, vh) + recomposed(u, ratio, left - inner @ vh)
        of_f = even.diagonal(dim1=-2, dim2=-1)
        return u @ core @ vh + outer, None, None, None, of_f, None, None


def divided_differences(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """``(f_i - f_j) / (values_i - values_j)``, which is the slope where both have the same."""
    same = slope.unsqueeze(-1) == slope.unsqueeze(-2)
    step = torch.where(same, 1.0, values.unsqueeze(-1) - values.unsqueeze(-2))
    quotient = (f.unsqueeze(-1) - f.unsqueeze(-2)) / step
    return torch.where(same, slope.unsqueeze(-1), quotient)


def _divided_sums(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    of_f, of_values = (v.unsqueeze(-1) + v.unsqueeze(-2) for v in (f, values))
    return _ratio(of_f, of_values, slope.unsqueeze(-1))


def _ratio(f: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """``f / values``; where f is 0, as it is at 0 for all but the polar factor, no 0 / 0."""
    zero = (f == 0) & (values == 0)
    return torch.where(zero, slope, f / torch.where(zero, 1.0, values))
