"""The box: every element between a lower and an upper bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_order, check_setting
from rai_toolbox.constraints.base import Constraint, are_finite
from rai_toolbox.constraints.kernels.box_hyperplane import corner
from rai_toolbox.constraints.kernels.rounding import as_rounded, as_wide
from rai_toolbox.constraints.sampling import uniform
from rai_toolbox.foreach import clamp_


@dataclass(frozen=True, eq=False, repr=False)
class Box(Constraint):
    """Every element between a lower and an upper bound.

    ``{x : lower <= x <= upper}``, elementwise; ``P(x) = min(max(x, lower), upper)``, at the cost
    of one pass. Bounds count as rounded to the dtype of x.

    Parameters
    ----------
    lower, upper : float or Tensor or None
        The bounds; a tensor broadcasts against the batch (N, ...). None, or an infinity, leaves a
        side open.

    Raises
    ------
    ValueError
        If no bound is given, one is NaN, or ``lower > upper`` anywhere.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Box
    >>> Box(0.0, torch.tensor([1.0, 2.0])).project_(torch.tensor([[-1.0, 3.0]]))
    tensor([[0., 2.]])
    """

    elementwise: ClassVar[bool] = True

    lower: float | Tensor | None
    upper: float | Tensor | None

    def _check_settings(self) -> None:
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            if bound is not None:
                check_setting(name, bound, finite=False)
        if self.lower is None and self.upper is None:
            raise ValueError("`lower` or `upper` must be given, got lower=None and upper=None")
        check_order("lower", self.lower, "upper", self.upper)
        self._derive(bounded=are_finite(self.lower, self.upper))

    def project_(self, x: Tensor) -> Tensor:  # noqa: D102
        self._check_batch(x)
        if isinstance(self.lower, Tensor) or isinstance(self.upper, Tensor):
            return x.clamp_(*self._bounds(x, x.dtype))
        clamp_([x], self.lower, self.upper)
        return x

    def project_each_(self, batches: list[Tensor]) -> None:  # noqa: D102
        if isinstance(self.lower, Tensor) or isinstance(self.upper, Tensor):
            super().project_each_(batches)
        else:
            clamp_(batches, self.lower, self.upper)

    def _bounds(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        lower, upper = self.lower, self.upper
        return (
            None if lower is None else as_rounded(lower, dtype, x).to(x.dtype),
            None if upper is None else as_rounded(upper, dtype, x).to(x.dtype),
        )

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        nearest = self._nearest(x, dtype)
        return torch.where(x == nearest, 0.0, (x - nearest).abs()).amax(-1)

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.clamp(*self._bounds(x, dtype))

    def _minimizer(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        lower, upper = (as_wide(bound, gradient) for bound in (self.lower, self.upper))
        return torch.where(gradient.isnan(), gradient, corner(gradient, lower, upper))

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        lower, upper = (as_wide(bound, like) for bound in (self.lower, self.upper))
        share = uniform(like, generator)
        return ((1 - share) * lower + share * upper).clamp(lower, upper)


@dataclass(frozen=True, eq=False, repr=False)
class NonNegative(Box):
    """Every element non-negative.

    ``{x : x >= 0}``, elementwise; ``P(x) = max(x, 0)``, at the cost of one pass.

    Raises
    ------
    TypeError
        From methods, if a batch is not of a real floating-point dtype.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import NonNegative
    >>> NonNegative().project_(torch.tensor([[-1.0, 3.0]]))
    tensor([[0., 3.]])
    """

    lower: float | Tensor | None = field(default=0.0, init=False, repr=False)
    upper: float | Tensor | None = field(default=None, init=False, repr=False)


OPEN = Box(-inf, inf)
"""The box of all numbers."""


def checked_box(lower: float | Tensor | None, upper: float | Tensor | None) -> Any:
    """The box of bounds that have been checked, which reads their values; None without bounds."""
    if lower is None and upper is None:
        return None
    bounds = {"lower": lower, "upper": upper}
    tensors = tuple(name for name, bound in bounds.items() if isinstance(bound, Tensor))
    return OPEN._replaced({**bounds, "_tensors": tensors})
