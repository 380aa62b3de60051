"""The feasible set of an attack: a ball around each example, within the range of the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from rai_toolbox.checks import wrong
from rai_toolbox.constraints import BoundedBall, LinfBall
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import BLOCK, row_blocks
from rai_toolbox.constraints.kernels.rounding import as_wide, is_farther, noise
from rai_toolbox.perturbations.grid import Grid
from rai_toolbox.perturbations.inputs import Range, bounds_of, check_ball, expanded
from rai_toolbox.perturbations.models.additive import check_mask


@dataclass(frozen=True)
class FeasibleSet:
    """A ball around each example, within bounds.

    What is optimized is the perturbation: numbers near 0 are finer than those of the data. Rounding
    its sum with the data may leave the set, so that `project` has the last word on the sum.
    """

    data: Tensor
    ball: Ball
    data_range: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    levels: int | None = None

    @staticmethod
    def around(
        data: Tensor, ball: Ball, data_range: Range, mask: Tensor | None, levels: int | None = None
    ) -> FeasibleSet:
        """Check the settings, and expand them to the shape of the data, (N, ...)."""
        check_ball(ball)
        if not ball.bounded:
            raise wrong("epsilon` of `ball", "be finite", ball)
        if data.ndim < 2:
            raise wrong("data", "have the shape (N, ...)", tuple(data.shape))
        bounds = bounds_of(data, data_range)
        if mask is not None:
            check_mask(mask)
            mask = expanded("mask", mask, data)
        if isinstance(ball.epsilon, Tensor) and ball.epsilon.ndim > 0:
            shape = (len(data), *(1,) * (data.ndim - 1))  # that sets require
            if ball.epsilon.numel() != len(data) or len(ball.epsilon) != len(data):
                rule = f"be a number or have one value for each example, shape ({len(data)},)"
                raise wrong("epsilon", rule, f"shape {tuple(ball.epsilon.shape)}")
            ball = replace(ball, epsilon=ball.epsilon.to(data.device).reshape(shape))
        if bounds is not None and _is_wider(ball, *bounds):
            warnings.warn(f"`ball` is wider than the data range: {ball}", stacklevel=3)
        if levels is not None:
            Grid.of(data, bounds, levels)
        return FeasibleSet(data, ball, bounds, mask, levels)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Lower and upper bound of each element: the datum itself where the mask is False."""
        if self.mask is None:
            return self.data_range
        lower, upper = self.data_range or (self.data - inf, self.data + inf)
        return torch.where(self.mask, lower, self.data), torch.where(self.mask, upper, self.data)

    def rows(self, rows: Tensor | slice) -> FeasibleSet:
        """The set of some of the examples."""
        of_all = self.data_range
        data_range = None if of_all is None else (of_all[0][rows], of_all[1][rows])
        mask = None if self.mask is None else self.mask[rows]
        ball = self.ball._at_rows(self.data, rows)
        return FeasibleSet(self.data[rows], ball, data_range, mask, self.levels)

    def on_grid(self, change: Tensor) -> Tensor:
        """The points of the grid nearest to data plus a change that are exactly in the set."""
        ends = None
        if isinstance(self.ball, LinfBall):
            ends = self.data + self._changes[0], self.data + self._changes[1]
        radius = as_wide(self.ball.epsilon, change)
        return self.grid.nearest_in_ball(change, self.ball.p, radius, ends)

    def nearest(self, change: Tensor) -> Tensor:
        """Points exactly in the set, and nearest to data plus a change but for rounding."""
        change = self._safe_changes.project(change)
        if self.levels is not None:
            return self.on_grid(change)
        points = (self.data + change).to(self.data.dtype)
        return self.project(points if self.bounds is None else points.clamp(*self.bounds))

    def of_perturbations(self) -> Constraint:
        """The set of perturbations whose sums with the data are in the set, up to rounding."""
        if self.bounds is None:
            return self.ball
        if isinstance(self.ball, LinfBall):  # elementwise: here the rounded sums are all inside
            return BoundedBall.around_0(self.ball, *self._changes)
        lower, upper = self.bounds
        return BoundedBall.around_0(self.ball, lower - self.data, upper - self.data)

    @torch.no_grad()
    def project(self, perturbed: Tensor) -> Tensor:
        """The nearest perturbed data that are exactly in the set."""
        if isinstance(self.ball, LinfBall) and self.bounds is not None:
            return perturbed.clamp(*(self.data + change for change in self._changes))
        change = (perturbed.double() - self.data.double()).flatten(1)
        norms = norms_of(change, self.ball.p)
        radii = as_wide(self.ball.epsilon, change).reshape(-1) * (1 - 4 * noise(change.shape[1]))
        inside = (norms <= radii).all()  # by more than the rounding of the norms
        if self.bounds is not None:
            inside &= (perturbed == perturbed.clamp(*self.bounds)).all()
        if bool(inside):  # spares the projection, which takes longer
            return perturbed
        ball = replace(self.ball, center=self.data)
        allowed = ball if self.bounds is None else BoundedBall(ball, *self.bounds)
        return allowed.project(perturbed)

    def feasible(self, perturbed: Tensor) -> Tensor:
        """Perturbed data of any origin, projected; on the grid, if there is one."""
        if self.levels is None:
            return self.project(perturbed)
        return self.nearest(perturbed.double() - self.data.double())

    @cached_property
    def grid(self) -> Grid:
        """The grid of the levels."""
        assert self.data_range is not None and self.levels is not None
        return Grid(self.data, *self.data_range, self.levels)

    @cached_property
    def _safe_changes(self) -> Constraint:
        """The set of perturbations, but for those whose rounded sums may leave the ball."""
        if isinstance(self.ball, LinfBall) or self.levels is not None:
            return self.of_perturbations()
        unit = torch.finfo(self.data.dtype).eps
        rounding = norms_of(unit * self.data.double(), self.ball.p)
        column = (len(self.data), *(1,) * (self.data.ndim - 1))
        epsilon = torch.as_tensor(self.ball.epsilon, dtype=torch.float64, device=self.data.device)
        smaller = (epsilon - rounding.view(column) - unit * epsilon).maximum(epsilon / 2)
        return replace(self, ball=replace(self.ball, epsilon=smaller)).of_perturbations()

    @cached_property
    def _changes(self) -> tuple[Tensor, Tensor]:
        """In an Linf ball, the largest changes down and up whose rounded sums are in the set."""
        if self.data.numel() <= BLOCK:
            return self._changes_at_once()
        parts = [self.rows(rows)._changes_at_once() for rows in row_blocks(self.data, BLOCK // 2)]
        down, up = map(torch.cat, zip(*parts, strict=True))
        return down, up

    def _changes_at_once(self) -> tuple[Tensor, Tensor]:
        assert self.bounds is not None
        data, wide = self.data, as_wide(self.data, self.data)
        epsilon = as_wide(self.ball.epsilon, data).expand(data.shape)
        offsets = torch.stack([-epsilon, epsilon])
        ends = (wide + offsets).to(data.dtype)  # (`offset_from` would keep gradients)
        away = is_farther(ends.to(wide.dtype), wide, epsilon)
        ends = torch.where(away, ends.nextafter(data), ends).clamp(*self.bounds)
        changes = ends - data
        beyond = (data + changes - ends) * offsets > 0  # as the difference was rounded
        down, up = torch.where(beyond, changes.nextafter(changes.new_zeros(())), changes)
        return down, up


def _is_wider(ball: Ball, lower: Tensor, upper: Tensor) -> bool:
    """Whether a ball is wider than bounds of the shape (N, ...) for any example."""
    size = norms_of(upper - lower, ball.p)
    return bool((as_wide(ball.epsilon, size).reshape(-1) > 1.01 * size).any())


def norms_of(examples: Tensor, p: float) -> Tensor:
    """The norm of each example, in float64: 0 of those without elements, whatever p is."""
    rows = examples.double().flatten(1)
    return torch.linalg.vector_norm(rows, p, dim=1) if rows.shape[1] else rows.sum(1)


class Change:
    """A perturbation of the data of a set: 0 at first, kept where a mask is True, and on a grid.

    The gradient is that without the grid. (It is no module: to make and call one takes longer.)
    """

    per_datum = True

    def __init__(self, allowed: FeasibleSet) -> None:
        self.allowed = allowed
        self.delta = allowed.data.new_zeros(allowed.data.shape).requires_grad_()

    def parameters(self) -> list[Tensor]:  # noqa: D102
        return [self.delta]

    def __call__(self, data: Tensor) -> Tensor:  # noqa: D102
        allowed, change = self.allowed, self.delta
        if allowed.mask is not None:
            change = change * allowed.mask
        if allowed.levels is None:
            return data + change
        return allowed.on_grid(change.detach()) + (change - change.detach())
