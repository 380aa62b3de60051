"""The simplex: shares of a total."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import BLOCK, MANY, can_judge, row_blocks
from rai_toolbox.constraints.kernels.l1 import FAR
from rai_toolbox.constraints.kernels.rounding import resolution
from rai_toolbox.constraints.kernels.threshold import lower_, lowered
from rai_toolbox.constraints.sampling import exponential


@dataclass(frozen=True, eq=False)
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

    _bounded: ClassVar[bool] = True
    _for_each: ClassVar[tuple[str, ...]] = ("total",)
    _is_equation: ClassVar[bool] = True

    total: float | Tensor = 1.0
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_setting("total", self.total, least=0)

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        is_narrow = x.dtype == torch.float32 and x.numel() > BLOCK // 8 and x.is_contiguous()
        if not (is_narrow and can_judge(x, self.total) and 1 / FAR < self.total < FAR):
            return super().project_(x)
        self._check_batch(x)
        for rows in row_blocks(x, MANY // 2):
            self._project_rows_(x[rows].view(-1, x.shape[1:].numel()))
        return x

    def _project_rows_(self, rows: Tensor) -> None:
        """In float32, if all of them are surely outside and finite."""
        outside = (rows.amin(1) < 0) & rows.sum(1).isfinite()
        if bool(outside.all()):
            lower_(rows, self.total, torch.empty_like(rows))
        else:
            super().project_(rows)

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        total, size = x.sum(1, keepdim=True), x.shape[1]
        off = (total - self.total).abs() - resolution(total.abs(), size, size, dtype)
        return torch.maximum(off, -x.amin(1, keepdim=True)).clamp(min=0).squeeze(1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return lowered(x, self.total)

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.as_tensor(self.total, dtype=gradient.dtype, device=gradient.device)
        at = gradient.argmin(1, keepdim=True)
        return torch.zeros_like(gradient).scatter_(1, at, total.expand_as(at))

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        shares = exponential(like, generator)
        return shares / shares.sum(1, keepdim=True) * self.total
