"""A linear reader of digits whose weights stay in L1 balls, with the gradient mapping and without.

The loss is convex and all digits are in every step: there is no noise, and what is left of the KKT
residual at the end is due to the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

__all__ = ["MAPPINGS", "Fit", "broken", "fit_each", "summary", "to_report"]

RADIUS = 16.0
LR = 0.1
LR_DECAY = 1e-2  # the last learning rate as a share of the first
SMALL = 0.01  # of the largest weight of the class
MAPPINGS = {"default": None, "plain": False}  # what `gradient_mapping` is


@dataclass
class Fit:
    """A linear reader, its KKT residual before each step and after the last, and its loss."""

    net: nn.Module
    residuals: list[float] = field(default_factory=list)
    loss: float = float("nan")
    violation: float = 0.0  # the largest after any step

    def weights(self) -> Tensor:
        """One row of weights per class."""
        weights: Tensor = self.net.get_parameter("1.weight").detach()
        return weights


def fit_each(digits: Digits, steps: int, radius: float = RADIUS) -> dict[str, Fit]:
    """One fit with each of `MAPPINGS`, all else being equal: start, learning rates, digits."""
    with progress("fitting", total=len(MAPPINGS) * steps) as bar:
        return {name: _fit(digits, steps, radius, how, bar) for name, how in MAPPINGS.items()}


def _fit(digits: Digits, steps: int, radius: float, mapping: bool | None, bar: Bar) -> Fit:
    fit = Fit(_net())
    groups = constrain(fit.net, {"1.weight": L1Ball(radius)})
    optim = ProjectedOptimizer(
        groups,
        Adam,
        gradient_mapping=mapping,
        averaging=0.0,  # gradients of full batches are exact
        lr=LR,
    )
    schedule = ExponentialLR(optim, LR_DECAY ** (1 / steps))
    worst = torch.zeros((), dtype=torch.float64)

    def look() -> None:
        optim.zero_grad()
        loss = cross_entropy(fit.net(digits.images), digits.labels)
        loss.backward()
        fit.loss = loss.item()
        fit.residuals.append(_largest(optim.kkt_residual()).item())

    for _ in range(steps):
        look()
        optim.step()
        schedule.step()
        worst = torch.maximum(worst, _largest(optim.violation()))  # keeps a NaN
        bar.update()
    look()  # so that loss and residual are those of the final weights
    fit.violation = worst.item()
    return fit


def _largest(of_groups: list[Tensor]) -> Tensor:
    """Of weights and biases; the biases are free and count as 0."""
    return torch.stack(of_groups).max()


def _net() -> nn.Sequential:
    """Softmax regression from 0; no random numbers are drawn."""
    linear = skip_init(nn.Linear, 28 * 28, 10)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Flatten(), linear)


def to_report(fits: dict[str, Fit], radius: float, test_digits: Digits) -> dict[str, Any]:
    """What is reported of the fits."""
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
                "share_of_weights_nonzero": 1 - _share_at_most(fit.weights(), 0.0),
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


def summary(report: dict[str, Any]) -> str:
    """The table of `to_report`."""
    settings, runs = report["settings"], [report["runs"][name] for name in MAPPINGS]
    rows = [
        (f"L1 ball, radius {settings['radius']:g}", *MAPPINGS),
        ("KKT residual of the weights", *(f"{run['kkt_residual']:.2g}" for run in runs)),
        ("loss on training digits", *(f"{run['loss']:.4f}" for run in runs)),
        ("accuracy on test digits", *(f"{run['test_accuracy']:.1%}" for run in runs)),
        ("weights exactly 0", *(f"{run['share_of_weights_zero']:.1%}" for run in runs)),
        (
            f"<= {settings['small']:.0%} of class's largest",
            *(f"{run['share_of_weights_small']:.1%}" for run in runs),
        ),
        ("largest violation", *(f"{run['largest_violation']:g}" for run in runs)),
    ]
    return "\n".join(f"{label:<30}{left:>12}{right:>12}" for label, left, right in rows)


def broken(report: dict[str, Any]) -> list[str]:
    """What is wrong, one line for each run whose weights left their balls."""
    return [
        f"the weights of the {name} fit left their L1 ball by {run['largest_violation']:g}"
        for name, run in report["runs"].items()
        if run["largest_violation"] != 0
    ]
