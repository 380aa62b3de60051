"""The set that perturbed data are in: a ball around the data, within the range of data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints import BoundedBall, Box, L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.rounding import as_wide
from rai_toolbox.perturbations.additive import check_mask

__all__ = ["DataSet"]

Ball = LinfBall | L2Ball | L1Ball
Range = tuple[float | Tensor, float | Tensor] | None


@dataclass(frozen=True)
class DataSet:
    """A ball around each datum, within bounds; both as seen by the data and by a perturbation.

    What is optimized is the perturbation: near 0 its numbers are close to each other, and all
    projections start from 0. The sum with the data is rounded, by which it may leave the set; so
    the set of the sum has the last word, in `placed`.
    """

    data: Tensor
    ball: Ball
    lower: Tensor | None
    upper: Tensor | None

    @classmethod
    def around(cls, data: Tensor, ball: Ball, data_range: Range, mask: Tensor | None) -> DataSet:
        """Check all of it, and fit it to the shape of the data, (N, ...)."""
        _check_ball(ball)
        if data.ndim < 2:
            raise ValueError(f"`data` must have the shape (N, ...), got {tuple(data.shape)}")
        if not bool(data.isfinite().all()):
            raise ValueError("`data` must be finite, got NaN or infinity among them")
        lower, upper = _range(data, data_range)
        if mask is not None:
            check_mask(mask)
            mask = _fitted("mask", mask, data)
            free = torch.full((), inf, dtype=data.dtype, device=data.device)
            lower = torch.where(mask, -free if lower is None else lower, data)
            upper = torch.where(mask, free if upper is None else upper, data)
        return cls(data, replace(ball, epsilon=_per_datum(ball.epsilon, data)), lower, upper)

    def of_data(self) -> Constraint:
        """The set of perturbed data."""
        ball = replace(self.ball, center=self.data)
        return ball if self.lower is None else BoundedBall(ball, self.lower, self.upper)

    def of_perturbations(self) -> Constraint:
        """The set of perturbations, as far as they can be told from the data: by rounding."""
        if self.lower is None or self.upper is None:
            return self.ball
        if isinstance(self.ball, LinfBall):  # then the sums can be in the set, all of them
            return BoundedBall(self.ball, -self._reach(self.lower, -1), self._reach(self.upper, 1))
        return BoundedBall(self.ball, self.lower - self.data, self.upper - self.data)

    def _reach(self, bound: Tensor, sign: int) -> Tensor:
        """How far entries can go towards a bound, so that rounded sums are in ball and range."""
        epsilon = as_wide(self.ball.epsilon, bound)
        reach = (sign * (bound - self.data)).minimum(epsilon.to(bound.dtype))
        end = self.data + sign * reach
        distance = as_wide(end, bound) - as_wide(self.data, bound)
        beyond = (sign * distance > epsilon) | (sign * end > sign * bound)
        end = torch.where(beyond, end.nextafter(self.data), end)
        reach = torch.where(beyond, sign * (end - self.data), reach)
        again = sign * (self.data + sign * reach) > sign * end  # as the difference was rounded, too
        return torch.where(again, reach.nextafter(torch.zeros_like(reach)), reach)

    def placed(self, perturbed: Tensor) -> Tensor:
        """Perturbed data, off by no more than rounding, exactly in the set."""
        return self.of_data().project(perturbed)

    def rows(self, rows: Tensor) -> DataSet:
        """The set of some of the data."""
        epsilon = self.ball.epsilon
        if isinstance(epsilon, Tensor) and epsilon.ndim > 0:
            epsilon = epsilon[rows]
        bounds = (None if b is None else b[rows] for b in (self.lower, self.upper))
        return DataSet(self.data[rows], replace(self.ball, epsilon=epsilon), *bounds)


def _check_ball(ball: object) -> None:
    if not isinstance(ball, (LinfBall, L2Ball, L1Ball)):
        raise TypeError(f"`ball` must be a LinfBall, L2Ball or L1Ball, got {ball!r}")
    if ball.center is not None:
        raise ValueError(
            f"`ball` must have no center, for the data are its center, got {ball.center!r}"
        )
    if not ball.bounded:
        raise ValueError(f"`epsilon` of `ball` must be finite, got {ball!r}")


def _per_datum(epsilon: float | Tensor, data: Tensor) -> float | Tensor:
    """A radius for each datum in the shape (N, 1, ...) that sets ask for."""
    if not isinstance(epsilon, Tensor) or epsilon.ndim == 0:
        return epsilon
    if epsilon.numel() != len(data) or len(epsilon) != len(data):
        raise ValueError(
            f"`epsilon` must be a number or have one value for each datum, shape ({len(data)},), "
            f"got shape {tuple(epsilon.shape)}"
        )
    return epsilon.to(data.device).reshape(-1, *(1,) * (data.ndim - 1))


def _range(data: Tensor, given: Range) -> tuple[Tensor | None, Tensor | None]:
    if given is None:
        return None, None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"`data_range` must be a pair (lower, upper) or None, got {given!r}")
    Box(*given)  # which checks them
    lower, upper = (
        _fitted("data_range", torch.as_tensor(bound, dtype=data.dtype, device=data.device), data)
        for bound in given
    )
    outside = (data < lower) | (data > upper)
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"`data` must be within `data_range`, [{lower[at].item():g}, {upper[at].item():g}], "
            f"got {data[at].item():g} at {at}"
        )
    return lower, upper


def _fitted(name: str, setting: Tensor, data: Tensor) -> Tensor:
    try:
        return setting.to(data.device).expand(data.shape)
    except RuntimeError:
        raise ValueError(
            f"`{name}` must broadcast against the data of shape {tuple(data.shape)}, got shape "
            f"{tuple(setting.shape)}"
        ) from None
