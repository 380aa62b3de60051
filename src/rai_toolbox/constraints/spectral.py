"""Balls of matrices: bounds on the singular values, one by one or summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels import svd
from rai_toolbox.constraints.kernels.rounding import as_wide, spacing
from rai_toolbox.constraints.sampling import normal, uniform


@dataclass(frozen=True, eq=False, repr=False)
class _SingularValueBall(Constraint):
    """A ball of a norm of matrices that is a p-norm of their singular values."""

    _p: ClassVar[float]
    _of_matrices: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("epsilon",)

    epsilon: float | Tensor
    flatten: int | None = field(default=None, kw_only=True)

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest values of norm `radius`; which of them change with their own value."""
        raise NotImplementedError

    def _extreme(self, values: Tensor) -> Tensor:
        """Values of norm 1 whose inner product with `values` is largest."""
        raise NotImplementedError

    def _check_settings(self) -> None:
        check_setting("epsilon", self.epsilon, least=0.0)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        size, radius = self._size(x), self._radius(x)
        return torch.where(size > radius * (1 + svd.noise_of(x)), size - radius, 0.0).squeeze(-1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        parts = svd.decomposed(x)
        return self._at_radius(
            lambda radius: svd.composed_of(x, parts, *self._shrunk(parts[1], radius)), x, dtype
        )

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        u, values, vh = svd.decomposed(-gradient)
        unit = svd.composed(u, self._extreme(values), vh)
        return self._at_radius(lambda radius: unit * radius.unsqueeze(-1), gradient, dtype)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        direction = normal(like, generator)
        size = self._size(direction)
        share = uniform(size, generator) ** (1 / (like.shape[-2] * like.shape[-1])) / size
        point = direction * share.unsqueeze(-1)
        return self._at_radius(lambda radius: point * radius.unsqueeze(-1), point, like.dtype)

    def _radius(self, x: Tensor) -> Tensor:
        """The radius of each matrix, to broadcast against its singular values."""
        radius = as_wide(self.epsilon, x)
        return radius[..., 0] if radius.ndim else radius

    def _at_radius(
        self, compose: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """``compose(radius)`` at a radius that is smaller by as little as rounding makes it.

        Rounding moves a matrix Y by at most ``u |Y|_F``, and so its norm by at most
        ``u sqrt(min(m, k)) epsilon``; subnormal numbers move by half of their spacing.
        """
        m, k = x.shape[-2:]
        least = min(m, k)
        epsilon = self._radius(x)
        most = epsilon * (sqrt(least) * torch.finfo(dtype).eps / 2)
        most = (most + sqrt(least * m * k) * spacing(dtype)).expand(*x.shape[:-2], 1)

        def radius(margin: Tensor) -> Tensor:
            return (epsilon * (1 - svd.noise_of(x)) - margin).clamp(min=0.0)

        def excess(y: Tensor) -> Tensor:
            return (self._size(y) - epsilon).clamp(min=0.0)

        margin = svd.rounding_margin(lambda m: compose(radius(m)), excess, most, dtype)
        return svd.within_range(compose(radius(margin)), dtype)

    def _size(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(torch.linalg.svdvals(x), self._p, -1, keepdim=True)


class SpectralBall(_SingularValueBall):
    """Matrices whose largest singular value is at most `epsilon`.

    ``{X : s_1(X) <= epsilon}``, for the matrices of a batch (N, m, k);
    ``P(X) = U diag(min(s, epsilon)) V^T`` for ``X = U diag(s) V^T`` (von Neumann 1937; Lewis
    1995), at the cost of a singular value decomposition in float64, O(m k min(m, k)), which
    synchronizes with a GPU. The derivative is exact, also where singular values are equal or 0.
    Samples are normal matrices, each scaled to the norm ``epsilon t^(1/(m k))``, t uniform.

    Parameters
    ----------
    epsilon : float or Tensor
        The radius, finite and >= 0; a tensor has one per matrix, shape (N, 1, 1).
    flatten : int, optional
        How many dims of a sub-tensor make the rows of one matrix, all others its columns: 1 for the
        weight of a convolution, with ``param_ndim=None``. By default a sub-tensor has 2 dims.

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

    _p: ClassVar[float] = inf

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(values, radius), values < radius

    def _extreme(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)


class NuclearBall(_SingularValueBall):
    """Matrices whose singular values sum up to at most `epsilon`.

    ``{X : sum_i s_i(X) <= epsilon}``, the convex hull of the matrices of rank one in it, for those
    of a batch (N, m, k); ``P(X) = U diag(max(s - theta, 0)) V^T`` for
    ``X = U diag(s) V^T``, with the theta that makes the sum epsilon (Cai, Candes & Shen 2010;
    Duchi et al. 2008), at the cost of a singular value decomposition in float64,
    O(m k min(m, k)), which synchronizes with a GPU. The derivative is exact, also where singular
    values are equal or 0. Samples are normal matrices, each scaled to the norm
    ``epsilon t^(1/(m k))``, t uniform.

    Parameters
    ----------
    epsilon, flatten
        See `SpectralBall`.

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

    _p: ClassVar[float] = 1

    def _shrunk(self, values: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        shrunk = _l1_of_sorted(values, radius)
        return shrunk, shrunk > 0

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
    return (below - theta).clamp(min=0.0).clamp(max=values.detach())
