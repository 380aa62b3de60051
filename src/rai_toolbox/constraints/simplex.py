"""The simplex, shares of a total, and what of it is sparse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count, check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import BLOCK, MANY, Workspace, can_read, joined
from rai_toolbox.constraints.kernels.l1 import FAR
from rai_toolbox.constraints.kernels.rounding import resolution
from rai_toolbox.constraints.kernels.threshold import in_one_memory, lower_, lowered
from rai_toolbox.constraints.sampling import exponential, uniform


@dataclass(frozen=True, eq=False, repr=False)
class Simplex(Constraint):
    """Elements that are not negative and have a given sum.

    ``{x : x >= 0, sum x = total}``; ``P(x) = max(x - t, 0)``, where the threshold t is found by
    Newton's method without sorting (Michelot, 1986; Condat, 2016), mostly in 3 to 8 passes.
    `sample_` is uniform.

    Parameters
    ----------
    total : float or Tensor
        The sum, >= 0; a tensor has one per sub-tensor, shape (N, 1, ...), or of size 1 along `dim`.
    dim : int or tuple of int, optional
        Along which dims of the batch the sum is taken, such as 0 for a column-stochastic matrix. By
        default all but the first.

    Raises
    ------
    ValueError
        If `total` is negative, NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Simplex
    >>> Simplex().project_(torch.tensor([[0.5, 2.1, -3.5], [0.6, 0.5, 0.3]]))
    tensor([[0.0000, 1.0000, 0.0000],
            [0.4667, 0.3667, 0.1667]])
    >>> Simplex(dim=0).project_(torch.tensor([[0.5, 3.0], [2.5, 0.0]]))  # columns
    tensor([[0., 1.],
            [1., 0.]])
    """

    bounded: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("total",)
    _is_equation: ClassVar[bool] = True
    _joins_rows: ClassVar[bool] = True

    total: float | Tensor = 1.0
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("total", self.total, least=0)

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        is_large = x.numel() > BLOCK // 8 and x.is_contiguous()
        if not (is_large and x.dtype == torch.float32 and can_read(x, self.total)):
            return super().project_(x)
        self._check_batch(x)
        self._project_rows_each_([x], Workspace())
        return x

    def _project_rows_each_(self, batches: list[Tensor], workspace: Workspace) -> None:
        if batches[0].dtype != torch.float32 or not 1 / FAR < self.total < FAR:
            for x in batches:
                super().project_(x)
            return
        for piece in joined(batches, MANY):
            parts, rows, buffer = in_one_memory(piece, torch.float32, workspace)
            for x, part in zip(piece, parts, strict=True):
                part.view(x.shape).copy_(x)
            self._project_narrow_(rows, buffer)
            for x, part in zip(piece, parts, strict=True):
                x.copy_(part.view(x.shape))

    def _project_narrow_(self, rows: Tensor, buffer: Tensor) -> None:
        """In float32, but for rows that are not surely outside, or not finite."""
        sums, error = rows.sum(1), (rows.shape[1] + 4) * torch.finfo(rows.dtype).eps
        outside = (sums - self.total).abs() > error * self.total
        if not bool(outside.all()):
            outside |= rows.amin(1) < 0
        others = (outside & sums.isfinite()).logical_not_().nonzero().view(-1)
        exact = super().project_(rows[others]) if len(others) > 0 else None
        if len(others) < len(rows):
            lower_(rows, self.total, buffer)
        if exact is not None:
            rows[others] = exact

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _off_simplex(x, self.total, dtype)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return lowered(x, self.total)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return _vertex(gradient, self.total)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        shares = exponential(like, generator)
        return shares / shares.sum(1, keepdim=True) * self.total


@dataclass(frozen=True, eq=False, repr=False)
class SparseSimplex(Constraint):
    """Elements that are not negative, have a given sum, and at most `k` of which are not zero.

    ``{x : x >= 0, sum x = total, |x|_0 <= k}``; not convex. The projection keeps the `k` largest
    entries, of those that tie the first, and projects them onto the simplex (Kyrillidis, Becker,
    Cevher & Koch, 2013), at the cost of a sort. `lmo` is that of `Simplex`. Samples are uniform
    on the simplex of `k` random entries.

    Parameters
    ----------
    k : int
        How many entries may be other than zero, >= 1.
    total, dim
        See `Simplex`.

    Raises
    ------
    TypeError, ValueError
        If `k` is not an int >= 1, or `total` is negative, NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import SparseSimplex
    >>> SparseSimplex(2).project_(torch.tensor([[0.6, 0.5, 0.3], [0.5, 2.1, -3.5]]))
    tensor([[0.5500, 0.4500, 0.0000],
            [0.0000, 1.0000, 0.0000]])
    """

    convex: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("total",)
    _is_equation: ClassVar[bool] = True

    k: int
    total: float | Tensor = 1.0
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_count("k", self.k, 1)
        check_setting("total", self.total, least=0)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        off = _off_simplex(x, self.total, dtype)
        if self.k >= x.shape[1]:
            return off
        return torch.maximum(off, x.abs().topk(self.k + 1, dim=1, sorted=False).values.amin(1))

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        at = x.detach().sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        return torch.zeros_like(x).scatter(1, at, lowered(x.gather(1, at), self.total))

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return _vertex(gradient, self.total)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        kept = uniform(like, generator).argsort(1)[:, : self.k]
        shares = exponential(like, generator).gather(1, kept)
        shares = shares / shares.sum(1, keepdim=True) * self.total
        return torch.zeros_like(like, dtype=shares.dtype).scatter(1, kept, shares)


def _off_simplex(x: Tensor, goal: float | Tensor, dtype: torch.dtype) -> Tensor:
    """How far each row is off the sum, or below 0."""
    total, size = x.sum(1, keepdim=True), x.shape[1]
    off = (total - goal).abs() - resolution(total.abs(), size, size, dtype)
    return torch.maximum(off, -x.amin(1, keepdim=True)).clamp(min=0).squeeze(1)


def _vertex(gradient: Tensor, total: float | Tensor) -> Tensor:
    """All of the total at the least entry of each row."""
    wide = torch.as_tensor(total, dtype=gradient.dtype, device=gradient.device)
    at = gradient.argmin(1, keepdim=True)
    return torch.zeros_like(gradient).scatter_(1, at, wide.expand_as(at))
