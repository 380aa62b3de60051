"""Data of few levels, such as 8-bit images: points of a grid, which stay in the ball."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.kernels.rounding import noise


@dataclass(frozen=True)
class Grid:
    """The values ``lower + k (upper - lower) / (levels - 1)``, elementwise.

    The value of an element's own level is that of the data, which may be off by rounding.
    """

    data: Tensor
    lower: Tensor
    upper: Tensor
    levels: int

    @staticmethod
    def of(data: Tensor, data_range: tuple[Tensor, Tensor] | None, levels: int) -> Grid:
        """Check that there is a grid, and that the data are on it."""
        check_count("levels", levels, 2)
        if data_range is None or not all(bool(bound.isfinite().all()) for bound in data_range):
            raise wrong("data_range", "be finite where there are `levels`", data_range)
        grid = Grid(data, *data_range, levels)
        unit, width = grid._unit, grid._unit * (levels - 1)
        largest = torch.maximum(grid.lower.abs(), grid.upper.abs()).double().maximum(width)
        rounding = torch.finfo(data.dtype).eps * largest
        if bool(((4 * rounding > unit) & (unit > 0)).any()):
            raise wrong("levels", f"be few enough for data of {data.dtype}", levels)
        allowed = (2 * rounding).minimum(unit / 8)  # of `k / 255 * width + lower`
        off = (grid._value(grid._own).double() - data.double()).abs() > allowed
        if bool(off.any()):
            at = tuple(off.nonzero()[0].tolist())
            steps = levels - 1
            rule = f"be on the grid of {levels} levels of `data_range` (images of floats in [0, 1]:"
            rule += f" `(data * {steps}).round() / {steps}`)"
            raise wrong("data", rule, f"{float(data[at]):g} at {at}")
        return grid

    def nearest(self, points: Tensor) -> Tensor:
        """The nearest points of the grid."""
        return self._at(self._position(points).round())

    def nearest_in_ball(
        self, change: Tensor, p: float, radius: Tensor, ends: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The points of the grid nearest to data plus change that are exactly in the ball.

        Each element is first half a level nearer to its example, at least; then as many as the
        radius allows go to their nearest level, first those that are rounded up by the least. In an
        Linf ball those go there that are between the `ends`.
        """
        levels = (change.double() / self._unit).nan_to_num(0.0, 0.0, 0.0)
        most = levels.abs().round()
        least = (most - 1).clamp(min=0)
        near, far = (self._at(self._own + levels.sign() * number) for number in (least, most))
        if ends is not None:
            return torch.where((ends[0] <= far) & (far <= ends[1]), far, near)
        cost, more = (
            (point.double() - self.data.double()).abs().flatten(1) ** p for point in (near, far)
        )
        more = more - cost
        limit = (radius.reshape(-1) * (1 - 16 * noise(cost.shape[1]))) ** p - cost.sum(1)
        order = (levels.abs() - least).flatten(1).argsort(1, descending=True)
        fits = more.gather(1, order).cumsum(1) <= limit.unsqueeze(1)
        fits = torch.zeros_like(fits).scatter(1, order, fits)
        return torch.where(fits.view_as(far), far, near)

    @cached_property
    def _unit(self) -> Tensor:
        return (self.upper.double() - self.lower.double()) / (self.levels - 1)

    @cached_property
    def _own(self) -> Tensor:
        """The levels of the data."""
        return self._position(self.data).round()

    def _position(self, points: Tensor) -> Tensor:
        # (elements whose range is one value have one level)
        return ((points.double() - self.lower.double()) / self._unit).nan_to_num(0.0, 0.0, 0.0)

    def _value(self, level: Tensor) -> Tensor:
        lower, upper = self.lower.double(), self.upper.double()
        value = lower + level * (upper - lower) / (self.levels - 1)
        return value.to(self.data.dtype).clamp(self.lower, self.upper)

    def _at(self, level: Tensor) -> Tensor:
        return torch.where(level == self._own, self.data, self._value(level))
