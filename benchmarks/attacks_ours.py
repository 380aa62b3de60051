"""The attacks of attacks_peers.py, with this library."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from attacks_peers import Solver
from attacks_problems import Problem
from torch import Tensor
from torch.nn.functional import cross_entropy

from rai_toolbox.constraints import BoundedBall, Constraint, L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import APGD, PGD
from rai_toolbox.perturbations import attack, gradient_ascent

BALLS = {math.inf: LinfBall, 2.0: L2Ball, 1.0: L1Ball}


def ball(p: float, epsilon: float) -> Constraint:
    return BALLS[p](epsilon)


def criterion(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")


def pgd(
    problem: Problem, p: float, epsilon: float, steps: int, step: float, **options: Any
) -> Solver:
    """The short form."""
    net, data, target = problem
    settings: dict[str, Any] = {"criterion": criterion, "random_start": False, **options}
    return lambda: (
        attack(
            net,
            data,
            target,
            ball=ball(p, epsilon),
            optimizer=partial(PGD, lr=step),
            steps=steps,
            **settings,
        ).data
    )


def spelled_out(
    problem: Problem, p: float, epsilon: float, steps: int, step: float, **options: Any
) -> Solver:
    """The same with explicit parts, without a copy of the best point or a check of success."""
    net, data, target = problem
    inside = BoundedBall(ball(p, epsilon), lower=-data, upper=1 - data)

    def run() -> Tensor:
        perturbed, _ = gradient_ascent(
            model=net,
            data=data,
            target=target,
            optimizer=partial(PGD, lr=step, constraint=inside),
            steps=steps,
            **options,
        )
        return perturbed

    return run


def apgd(problem: Problem, p: float, epsilon: float, steps: int, **options: Any) -> Solver:
    net, data, target = problem
    settings: dict[str, Any] = {"criterion": criterion, "optimizer": APGD, **options}
    return lambda: attack(net, data, target, ball=ball(p, epsilon), steps=steps, **settings).data
