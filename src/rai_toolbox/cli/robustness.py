"""How robust the demo's bounded net is, by the strongest search that the library has."""

from __future__ import annotations

from functools import partial

from torch import nn

from rai_toolbox.cli.digits import Digits
from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations import RobustnessReport, attack, evaluate_robustness

__all__ = ["RIVALS", "evaluate"]

LINF, L2 = (1 / 32, 1 / 16, 1 / 8), (0.5, 1.0, 2.0)
RIVALS = 2  # a run for each of so many of the most likely other classes
BATCH = 100


def evaluate(net: nn.Module, digits: Digits, steps: int, seed: int) -> RobustnessReport:
    """Accuracy on the digits, and on the worst found near them."""
    balls: list[LinfBall | L2Ball] = [*map(LinfBall, LINF), *map(L2Ball, L2)]
    batches = list(zip(*(tensor.split(BATCH) for tensor in digits), strict=True))
    return evaluate_robustness(
        net, batches, balls=balls, solver=partial(attack, rivals=RIVALS), steps=steps, seed=seed
    )
