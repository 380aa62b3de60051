"""The digits of a ball around each digit that a net reads worst, found by a plain training loop."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from rai_toolbox import frozen
from rai_toolbox.cli.digits import Digits
from rai_toolbox.optim import L2ProjectedOptim, LinfProjectedOptim

__all__ = ["L2", "LINF", "Ball", "perturb"]


class Ball(NamedTuple):
    """A norm and the optimizer whose parameter stays in a ball of it."""

    name: str
    order: float
    optimizer: type[LinfProjectedOptim] | type[L2ProjectedOptim]

    def norms(self, delta: Tensor) -> Tensor:
        """The norm of each perturbation, shape (N,), in float64 and apart from the optimizer."""
        norms: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), self.order, dim=1)
        return norms


LINF = Ball("Linf", float("inf"), LinfProjectedOptim)
L2 = Ball("L2", 2.0, L2ProjectedOptim)


def perturb(net: nn.Module, digits: Digits, ball: Ball, epsilon: float, steps: int) -> Tensor:
    """A perturbation of each image, at most `epsilon` large, that raises the net's cross entropy.

    The optimizer keeps it in the ball. The net is shown images clipped to [0, 1], which can only
    make a perturbation smaller.
    """
    delta = torch.zeros_like(digits.images, requires_grad=True)
    optimizer = ball.optimizer(
        [delta], SGD, lr=2.5 * epsilon / steps, maximize=True, epsilon=epsilon
    )
    with frozen(net):
        for _ in range(steps):
            optimizer.zero_grad()
            logits = net((digits.images + delta).clamp(0, 1))
            cross_entropy(logits, digits.labels, reduction="sum").backward()
            optimizer.step()
    return delta.detach()
