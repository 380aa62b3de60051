"""Balls of matrices: bounds on the singular values, one by one or summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.rounding import spacing
from rai_toolbox.constraints.kernels.svd import (
    Recomposed,
    aligned,
    cut,
    noise_of,
    recomposed,
    singular_values,
    svd,
    within_range,
)
from rai_toolbox.constraints.sampling import normal, uniform


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
    >>> from rai_toolbox.constraints import SpectralBall
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
    >>> from rai_toolbox.constraints import NuclearBall
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
