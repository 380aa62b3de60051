"""What a solver knows of each datum: its best iterate, and whether it is still being perturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rai_toolbox.perturbations.additive import AdditivePerturbation
from rai_toolbox.perturbations.protocol import PerturbationModel

Success = Callable[[Tensor, Tensor], Tensor]
"""From what a model gives and the target to a bool for each datum: whether it may stop."""


class Kept:
    """For each datum the tensors of one of its iterates: the best, or the one that stopped it.

    All is done by masks, so that nothing waits for a device.

    Parameters
    ----------
    cost : Tensor, shape (N,)
        What is minimized, for the first iterate.
    points : list of Tensor, shape (N, ...)
        What is to be kept of the first iterate; copied.
    success : Tensor of bool, shape (N,), optional
        Where the first iterate has succeeded; what has is better than what has not.
    best : bool
        Keep the best iterate, rather than the last one before the datum stopped.
    stop : bool
        Whether a datum stops as soon as it has succeeded.
    """

    def __init__(
        self,
        cost: Tensor,
        points: Sequence[Tensor],
        success: Tensor | None,
        *,
        best: bool,
        stop: bool,
    ) -> None:
        self.cost, self.success = cost, success
        self.last_cost = cost
        self.points = [point.detach().clone() for point in points]
        self._best, self._stop = best, stop

    def update_(
        self,
        cost: Tensor,
        points: Sequence[Tensor],
        success: Tensor | None,
        rows: Tensor | None = None,
    ) -> None:
        """Take over what is better of the next iterate, of which cost and success may be of rows.

        `last_cost` has the last cost of every datum.
        """
        if rows is not None:
            cost = self.last_cost.index_copy(0, rows, cost)
            if success is not None and self.success is not None:
                success = self.success.index_copy(0, rows, success)
        self.last_cost = cost
        if self._best:
            take = better(cost, self.cost, success, self.success)
            for point in points:  # no NaN is kept, whatever the model says of it
                take = take & ~_has_nan(point.detach(), take)
        else:
            take = torch.ones_like(cost, dtype=torch.bool)
        if success is not None and self.success is not None:
            if self._stop:
                take = (take | success) > self.success
            self.success = torch.where(take, success, self.success)
        self.cost = torch.where(take, cost, self.cost)
        for kept, point in zip(self.points, points, strict=True):
            torch.where(column(take, point), point.detach(), kept, out=kept)

    def open_rows(self) -> Tensor:
        """The indices of the data that have not succeeded; waits for the device."""
        done = (
            torch.zeros_like(self.cost, dtype=torch.bool) if self.success is None else self.success
        )
        return done.logical_not().nonzero().squeeze(1)


def better(
    cost: Tensor, than: Tensor, success: Tensor | None = None, their: Tensor | None = None
) -> Tensor:
    """Where success is new, or the cost is lower with no success lost; any number beats NaN."""
    lower = (cost < than) | (than.isnan() & ~cost.isnan())
    if success is None or their is None:
        return lower
    return (success > their) | ((success >= their) & lower)


def _has_nan(point: Tensor, like: Tensor) -> Tensor:
    """Of each datum, by a sum: one pass."""
    return (point.flatten(like.ndim).sum(-1) if point.ndim > like.ndim else point).isnan()


def column(of_data: Tensor, like: Tensor) -> Tensor:
    """One value for each datum, to broadcast against a tensor with more dims."""
    return of_data.reshape(of_data.shape + (1,) * (like.ndim - of_data.ndim))


def check_per_datum(name: str, value: Tensor, data: Tensor, why: str) -> None:
    """Raise unless there is one value for each datum."""
    if value.shape != data.shape[:1]:
        raise ValueError(
            f"`{name}` must give one value for each datum, shape {tuple(data.shape[:1])}, with "
            f"{why}, got shape {tuple(value.shape)}"
        )


def parameters_of_data(
    model: PerturbationModel, params: Sequence[Tensor], data: Tensor
) -> list[Tensor] | None:
    """The parameters, if each has a row for each datum, and these are independent."""
    if not getattr(model, "per_datum", False) or data.ndim == 0:
        return None
    if isinstance(model, AdditivePerturbation) and model.delta.shape != data.shape:
        return None
    if any(param.ndim == 0 or len(param) != len(data) for param in params):
        return None
    return list(params)


def without_gradient(params: Sequence[Tensor], data: Tensor, per_datum: bool) -> Tensor:
    """Whether the gradient of each datum is 0, shape (N,); of all together if they share it."""
    flat = torch.ones(data.shape[:1], dtype=torch.bool, device=data.device)
    for param in params:
        if param.grad is None or param.grad.numel() == 0:
            continue
        grad = param.grad.detach()
        size = grad.flatten(1).abs().amax(1) if per_datum and grad.ndim > 1 else grad.abs()
        flat = flat & (size == 0 if per_datum else size.amax() == 0)
    return flat
