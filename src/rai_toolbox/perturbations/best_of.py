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
        self.choose_([cost], [success], [tensors])

    def choose_(
        self, costs: list[Tensor], successes: list[Tensor], trials: list[list[Tensor]]
    ) -> None:
        """Take over the best of some trials, as updates by one after the other would."""
        self.last_cost = costs[-1]
        cost = torch.stack([self.cost.to(costs[0].dtype), *costs])  # in the first row the best yet
        success = torch.stack([self.success, *successes])
        tensors = [
            torch.stack(each) if len(each) > 1 else each[0].detach().unsqueeze(0)
            for each in zip(*trials, strict=True)
        ]
        if self.best:
            # no NaN is kept, whatever the model predicts for it
            spoilt = [each.unsqueeze(-1).flatten(cost.ndim).sum(-1).isnan() for each in tensors]
            for each in spoilt:
                success[1:].masked_fill_(each, False)
            rank = 2 * success + (cost == cost)  # (NaN does not equal itself)
            for each in spoilt:
                rank[1:].masked_fill_(each, 0)
            top = rank == rank.amax(0)
            least = cost.where(top, torch.inf).amin(0)
            number = ((cost > least) < top).byte().argmax(0)  # the first one that is on top
        else:
            number = torch.full_like(self.success, len(trials), dtype=torch.long)
        if self.stop:
            number = torch.where(success.any(0), success.byte().argmax(0), number)
        at = number.unsqueeze(0)
        self.cost, self.success = cost.gather(0, at)[0], success.gather(0, at)[0]
        for kept, tensor in zip(self.tensors, tensors, strict=True):
            column = number.view(number.shape + (1,) * (kept.ndim - number.ndim))
            new = tensor[0]
            if len(trials) > 1:
                new = tensor.take_along_dim((column - 1).clamp(min=0).unsqueeze(0), 0)[0]
            torch.where(column > 0, new, kept, out=kept)

    def rows_without_success(self) -> Tensor:
        """The indices of the examples that no trial succeeded for; synchronizes with the host."""
        return self.success.logical_not().nonzero().squeeze(1)
