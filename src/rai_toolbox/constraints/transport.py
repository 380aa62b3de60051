"""Plans of transport: matrices >= 0 of given row and column sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting, check_type, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.kernels.rounding import as_wide, noise, resolution
from rai_toolbox.constraints.kernels.transport import cheapest_plan, nearest_plan, scaled_plan
from rai_toolbox.constraints.sampling import exponential

_SINKHORN_STEPS = 30  # for a sample, of which no distribution is promised


class _Plans(Constraint):
    """Matrices >= 0 whose sums are what `sums` says."""

    _of_matrices: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    _is_equation: ClassVar[bool] = True

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of the rows, (N, m), and of the columns, (N, k), of x (N, m, k) in float64."""
        raise NotImplementedError

    def _check_shape(self, shape: torch.Size) -> None:
        if len(shape) != 3:
            raise wrong("x", "have the shape (N, m, k)", f"shape {tuple(shape)}")

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        off = -x.amin((-2, -1))
        # Sums of rows and of columns are alike only to within the rounding of their total.
        rounding = 4 * noise(sum(x.shape[-2:])) * x.abs().sum((-2, -1)).unsqueeze(-1)
        for dim, goal in zip((-1, -2), self.sums(x), strict=True):
            size = x.shape[dim]
            allowed = resolution(x.abs().sum(dim), size, size, dtype) + rounding
            off = torch.maximum(off, ((x.sum(dim) - goal).abs() - allowed).amax(-1))
        return off.clamp(min=0.0)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return nearest_plan(x, *self.sums(x))

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return cheapest_plan(gradient, *self.sums(gradient))

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        logits = exponential(like, generator).log()
        return scaled_plan(logits, *self.sums(logits), _SINKHORN_STEPS)


@dataclass(frozen=True, eq=False, repr=False)
class Birkhoff(_Plans):
    """Square matrices >= 0 whose rows and columns all have the same sum: doubly stochastic ones.

    ``{X >= 0 : X 1 = total 1, X^T 1 = total 1}``, the convex hull of the permutation matrices times
    `total`. ``P(X) = max(X - a 1^T - 1 b^T, 0)``, where a and b maximize the smooth dual, by a
    semismooth Newton method (Li, Sun & Toh, 2020) with systems of n equations, until the sums are
    right to 1e-14; it reads values on the host. `lmo` solves the assignment problem, by scipy if
    that is installed (Crouse, 2016), else by shortest augmenting paths (Ford & Fulkerson, 1962).
    Samples have all entries > 0: exponential numbers, scaled by Sinkhorn's algorithm.

    Parameters
    ----------
    total : float or Tensor
        The sum, >= 0; a tensor has one per matrix, shape (N, 1, 1).

    Raises
    ------
    ValueError
        If `total` is negative, NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Birkhoff
    >>> x = torch.tensor([[[0.9, 0.3], [0.2, 0.4]]])
    >>> Birkhoff().project(x)
    tensor([[[0.7000, 0.3000],
             [0.3000, 0.7000]]])
    >>> Birkhoff().lmo(x)
    tensor([[[0., 1.],
             [1., 0.]]])
    """

    _for_each: ClassVar[tuple[str, ...]] = ("total",)

    total: float | Tensor = 1.0

    def _check_settings(self) -> None:
        check_setting("total", self.total, least=0.0)

    def _check_shape(self, shape: torch.Size) -> None:
        super()._check_shape(shape)
        if shape[-1] != shape[-2]:
            raise wrong("x", "have square matrices", f"a batch of shape {tuple(shape)}")

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        total = as_wide(self.total, x)
        each = (total[..., 0] if total.ndim else total).expand(x.shape[:-1])
        return each, each

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        solve = _assignment_solver()
        if solve is None:
            return super()._minimizer(gradient, dtype)
        columns = [solve(cost)[1].tolist() for cost in gradient.cpu().numpy()]
        at = torch.tensor(columns, device=gradient.device).unsqueeze(-1)
        total = self.sums(gradient)[0].unsqueeze(-1)
        return torch.zeros_like(gradient).scatter_(-1, at, total)


@dataclass(frozen=True, eq=False, repr=False)
class Transport(_Plans):
    """Matrices >= 0 of given row and column sums: plans that move one distribution to another.

    ``{X >= 0 : X 1 = rows, X^T 1 = columns}``, the transportation polytope; `Birkhoff` is that of
    equal sums, and documents the methods. `lmo` is the cheapest plan, whose cost is that of optimal
    transport.

    Parameters
    ----------
    rows : Tensor, shape (m,) or (N, m, 1)
        The sums of the rows, >= 0.
    columns : Tensor, shape (k,) or (N, 1, k)
        The sums of the columns, >= 0, of the same total; the total of the rows counts.

    Raises
    ------
    TypeError, ValueError
        If a sum is negative, NaN or infinite, a shape is another one, or totals differ by more than
        rounding.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Transport
    >>> plans = Transport(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.25, 0.5]))
    >>> plans.project(torch.zeros(1, 2, 3))
    tensor([[[0.1250, 0.1250, 0.2500],
             [0.1250, 0.1250, 0.2500]]])
    >>> plans.lmo(torch.tensor([[[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]]))
    tensor([[[0.2500, 0.0000, 0.2500],
             [0.0000, 0.2500, 0.2500]]])
    """

    rows: Tensor
    columns: Tensor

    def _check_settings(self) -> None:
        for name, of_one, at in (("rows", "(m,)", -1), ("columns", "(k,)", -2)):
            sums = getattr(self, name)
            check_type(name, sums, Tensor, "be a tensor")
            check_setting(name, sums, least=0.0)
            if sums.ndim == 1 and at == -1:  # as it is stored, to broadcast against a batch
                self.__dict__[name] = sums = sums.unsqueeze(-1)
            shape = tuple(sums.shape)
            if sums.ndim not in (1, 2, 3) or (sums.ndim > 1 and shape[at] != 1):
                of_each = "(N, m, 1)" if at == -1 else "(N, 1, k)"
                raise wrong(name, f"have the shape {of_one} or {of_each}", f"shape {shape}")
        rows, columns = widened(self.rows).sum(-2), widened(self.columns).sum(-1)
        narrow = [s.dtype for s in (self.rows, self.columns) if s.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in narrow or [torch.float64])
        count = self.rows.shape[-2] + self.columns.shape[-1]
        if bool(((rows - columns).abs() > eps * count * rows.abs()).any()):
            got = f"{columns.flatten().tolist()} and {rows.flatten().tolist()}"
            raise wrong("columns", "have the total of `rows`", got)

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        rows = as_wide(self.rows, x).squeeze(-1).expand(x.shape[:-1])
        columns = as_wide(self.columns, x)
        columns = (columns.squeeze(-2) if columns.ndim > 1 else columns).expand(len(x), x.shape[-1])
        total, found = rows.sum(-1, keepdim=True), columns.sum(-1, keepdim=True)
        return rows, columns * (total / torch.where(found > 0, found, 1.0))

    def _check_shape(self, shape: torch.Size) -> None:
        super()._check_shape(shape)
        sizes = self.rows.shape[-2], self.columns.shape[-1]
        if tuple(shape[1:]) != sizes:  # (sums of one row or column would broadcast)
            raise wrong("x", f"have matrices of shape {sizes}", f"a batch of shape {tuple(shape)}")


@lru_cache
def _assignment_solver() -> Callable[[Any], Any] | None:
    """The function of scipy, if that is installed; it is slow to import."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError:
        return None
    return linear_sum_assignment
