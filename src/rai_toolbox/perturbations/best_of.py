"""The best of several trials for each example: of iterates, of restarts, or of target classes."""

from __future__ import annotations

from dataclasses import dataclass

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
        self.last_cost = cost
        take = torch.ones_like(success)
        if self.best:
            valid = take  # no NaN is kept, whatever the model predicts for it
            for tensor in tensors:
                entries = tensor.detach().unsqueeze(-1).flatten(take.ndim)
                valid = valid & ~entries.sum(-1).isnan()
            success = success & valid
            lower = (cost < self.cost) | (self.cost.isnan() & ~cost.isnan())
            take = valid & ((success > self.success) | ((success >= self.success) & lower))
        if self.stop:
            take = (take | success) > self.success
        self.success = torch.where(take, success, self.success)
        self.cost = torch.where(take, cost, self.cost.to(cost.dtype))
        for kept, tensor in zip(self.tensors, tensors, strict=True):
            mask = take.reshape(take.shape + (1,) * (tensor.ndim - take.ndim))
            torch.where(mask, tensor.detach(), kept, out=kept)

    def rows_without_success(self) -> Tensor:
        """The indices of the examples that no trial succeeded for; synchronizes with the host."""
        return self.success.logical_not().nonzero().squeeze(1)
