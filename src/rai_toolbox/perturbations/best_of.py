"""The best of several trials for each example: of iterates, of restarts, or of target classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass
class BestOf:
    """For each example, what to keep of several trials: one that succeeded, then the least cost.

    Selection is by masks, without synchronizing with the host. A number is better than NaN.

    Parameters
    ----------
    cost : Tensor, shape (N,)
        Of the first trial; what is minimized.
    success : Tensor of bool, shape (N,)
        Where the first trial succeeded.
    tensors : list of Tensor, shape (N, ...)
        What to keep of the first trial; copied.
    best : bool
        Keep the best trial, else the last one.
    stop : bool
        Keep the first trial that succeeded, if there is one.
    """

    cost: Tensor
    success: Tensor
    tensors: list[Tensor]
    best: bool = True
    stop: bool = False

    def __post_init__(self) -> None:
        self.last_cost = self.cost
        self.tensors = [tensor.detach().clone() for tensor in self.tensors]

    def update_(
        self, cost: Tensor, success: Tensor, tensors: list[Tensor], rows: Tensor | None = None
    ) -> None:
        """Take over what is better in another trial.

        With `rows`, cost and success are those of some examples only; the others keep their last
        ones. `last_cost` is the last cost of each example.
        """
        if rows is not None:
            cost = self.last_cost.to(cost.dtype).index_copy(0, rows, cost)
            success = self.success.index_copy(0, rows, success)
        self.last_cost, kept_cost, kept = cost, self.cost.to(cost.dtype), self.success
        taken = torch.ones_like(success)
        if self.best:
            lower = (cost < kept_cost) | ((cost == cost) & (kept_cost != kept_cost))  # (as NaN is)
            taken = (success > kept) | ((success == kept) & lower)
            taken.masked_fill_(_spoilt(tensors, cost.ndim), False)
        if self.stop:
            taken &= ~kept
        self.cost, self.success = cost.where(taken, kept_cost), success.where(taken, kept)
        for old, new in zip(self.tensors, tensors, strict=True):
            column = taken.view(taken.shape + (1,) * (old.ndim - taken.ndim))
            torch.where(column, new.detach(), old, out=old)

    def choose_(
        self, costs: list[Tensor], successes: list[Tensor], trials: list[list[Tensor]]
    ) -> None:
        """Take over the best of some trials, as updates by one after the other would."""
        if len(costs) == 1 or self.stop or not self.best:
            for trial in zip(costs, successes, trials, strict=True):
                self.update_(*trial)
            return
        cost, success = torch.stack(costs), torch.stack(successes)
        tensors = [torch.stack(each) for each in zip(*trials, strict=True)]
        rank = (2 * success + (cost == cost)).masked_fill_(_spoilt(tensors, cost.ndim), 0)
        top = rank == rank.amax(0)
        least = cost.where(top, torch.inf).amin(0)
        at = ((cost > least) < top).byte().argmax(0, keepdim=True)  # the first one that is on top
        chosen = []
        for each in (cost, success, *tensors):
            column = at.view(at.shape + (1,) * (each.ndim - at.ndim))
            chosen.append(each.take_along_dim(column, 0)[0])
        self.update_(chosen[0], chosen[1], chosen[2:])
        self.last_cost = costs[-1]

    def rows_without_success(self) -> Tensor:
        """The indices of the examples that no trial succeeded for; synchronizes with the host."""
        return self.success.logical_not().nonzero().squeeze(1)


def _spoilt(tensors: list[Tensor], ndim: int) -> Tensor:
    """Where tensors hold NaN, which is not kept, whatever the model predicts for it."""
    sums = [each.unsqueeze(-1).flatten(ndim).sum(-1) for each in tensors]
    return reduce(torch.logical_or, map(torch.isnan, sums))
