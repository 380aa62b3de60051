"""A linear classifier of digits with weights in L1 balls, with the gradient mapping and without.

The loss is convex and every step uses all digits: there is no noise, so the KKT residual that
remains at the end is due to the optimizer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from rai_toolbox.cli.digits import Digits
from rai_toolbox.cli.training import accuracy
from rai_toolbox.constraints import L1Ball
from rai_toolbox.extras import Bar, progress
from rai_toolbox.optim import ProjectedOptimizer, constrain

RADIUS = 16.0
LR = 0.1
LR_DECAY = 1e-2  # last learning rate / first learning rate
SMALL = 0.01  # as a share of the largest weight of the class
MAPPINGS = {"default": None, "plain": False}  # the values of `gradient_mapping`


class Fit(NamedTuple):
    """A linear classifier, its KKT residual before each step and after the last, and its loss."""

    net: nn.Module
    residuals: list[float]
    loss: float
    violation: float  # the largest after any step

    def weights(self) -> Tensor:
        """One row of weights per class."""
        return self.net.get_parameter("1.weight").detach()


def fit_each(digits: Digits, steps: int, radius: float = RADIUS) -> dict[str, Fit]:
    """One fit with each of `MAPPINGS`; start, learning rates and digits are the same."""
    with progress("fitting", total=len(MAPPINGS) * steps) as bar:
        return {name: _fit(digits, steps, radius, how, bar) for name, how in MAPPINGS.items()}


def _fit(digits: Digits, steps: int, radius: float, mapping: bool | None, bar: Bar) -> Fit:
    linear = skip_init(nn.Linear, 28 * 28, 10)  # draws no random numbers
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    net = nn.Sequential(nn.Flatten(), linear)
    groups = constrain(net, {"1.weight": L1Ball(radius)})
    # Without averaging: gradients of full batches are exact.
    optim = ProjectedOptimizer(groups, Adam, gradient_mapping=mapping, averaging=0.0, lr=LR)
    schedule = ExponentialLR(optim, LR_DECAY ** (1 / steps))
    largest, residuals = torch.zeros((), dtype=torch.float64), list[float]()
    while True:
        optim.zero_grad()
        loss = cross_entropy(net(digits.images), digits.labels)
        loss.backward()
        # Over weights and biases; the biases are unconstrained and count as 0.
        residuals.append(torch.stack(optim.kkt_residual()).max().item())
        if len(residuals) > steps:  # loss and residual are those of the final weights
            return Fit(net, residuals, loss.item(), largest.item())
        optim.step()
        schedule.step()
        largest = torch.maximum(largest, torch.stack(optim.violation()).max())  # keeps a NaN
        bar.update()


def to_report(fits: dict[str, Fit], radius: float, test_digits: Digits) -> dict[str, Any]:
    """Settings and results of the fits as plain data."""
    return {
        "settings": {
            "constraint": L1Ball.__name__,
            "radius": radius,
            "optimizer": Adam.__name__,
            "steps": len(fits["default"].residuals) - 1,
            "lr": LR,
            "lr_decay": LR_DECAY,
            "small": SMALL,
        },
        "runs": {
            name: {
                "kkt_residual": fit.residuals[-1],
                "loss": fit.loss,
                "test_accuracy": accuracy(fit.net, test_digits),
                "share_of_weights_zero": _share_at_most(fit.weights(), 0.0),
                "share_of_weights_small": _share_at_most(fit.weights(), SMALL),
                "largest_violation": fit.violation,
            }
            for name, fit in fits.items()
        },
    }


def _share_at_most(weights: Tensor, share: float) -> float:
    """The share of weights that are at most `share` of the largest of their class."""
    sizes = weights.abs()
    return (sizes <= share * sizes.amax(1, keepdim=True)).double().mean().item()
