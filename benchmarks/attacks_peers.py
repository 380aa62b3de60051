"""The same attack with other libraries, each written as its documentation recommends.

All start at the data and take `steps` steps of length `step`. The packages are imported in the
functions; `make bench-attacks` installs them.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import torch
from attacks_problems import Problem
from torch import Tensor
from torch.nn.functional import cross_entropy

Solver = Callable[[], Tensor]  # gives the perturbed data


def floor(problem: Problem, steps: int) -> Solver:
    """The minimum work of a gradient attack: forward and backward passes only."""
    net, data, target = problem

    def run() -> Tensor:
        x = data.clone().requires_grad_()
        for _ in range(steps):
            x.grad = None
            cross_entropy(net(x), target, reduction="sum").backward()
        return x.detach()

    return run


def by_hand(problem: Problem, p: float, epsilon: float, steps: int, step: float) -> Solver:
    """A loop written without a library: project onto the ball, then clip to the box."""
    net, data, target = problem

    def run() -> Tensor:
        x = data.clone()
        for _ in range(steps):
            x.requires_grad_()
            loss = cross_entropy(net(x), target, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                if p == math.inf:
                    delta = (x + step * gradient.sign() - data).clamp(-epsilon, epsilon)
                else:
                    norms = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
                    delta = x + step * gradient / norms.view(-1, 1, 1, 1) - data
                    norms = delta.flatten(1).norm(dim=1).clamp(min=1e-12)
                    delta *= (epsilon / norms).clamp(max=1).view(-1, 1, 1, 1)
                x = (data + delta).clamp(0, 1)
        return x

    return run


def foolbox(problem: Problem, p: float, epsilon: float, steps: int, step: float) -> Solver:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy's names, deprecated
        import foolbox

    net, data, target = problem
    model = foolbox.PyTorchModel(net, bounds=(0, 1))
    kind = foolbox.attacks.LinfPGD if p == math.inf else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=step, steps=steps, random_start=False)
    return lambda: attack(model, data, target, epsilons=epsilon)[1]


def torchattacks(problem: Problem, p: float, epsilon: float, steps: int, step: float) -> Solver:
    import torchattacks

    net, data, target = problem
    kind = torchattacks.PGD if p == math.inf else torchattacks.PGDL2
    attack = kind(net, eps=epsilon, alpha=step, steps=steps, random_start=False)
    return lambda: attack(data, target)


def art(problem: Problem, p: float, epsilon: float, steps: int, step: float) -> Solver:
    logging.getLogger("art").setLevel(logging.ERROR)
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    net, data, target = problem
    classifier = PyTorchClassifier(
        net,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(data.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier,
        norm=p,
        eps=epsilon,
        eps_step=step,
        max_iter=steps,
        num_random_init=0,
        batch_size=len(data),
        verbose=False,
    )
    images, labels = data.numpy(), target.numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels))


def pyautoattack(
    problem: Problem,
    p: float,
    epsilon: float,
    steps: int,
    *,
    larger_first: bool = False,
    seed: int = 0,
) -> Solver:
    """Its Auto-PGD; with `larger_first` also in balls of 3 and 2 epsilon, before epsilon's."""
    from pyautoattack.autopgd_base import APGDAttack

    net, data, target = problem
    norm = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}[p]
    attack = APGDAttack(
        net, n_iter=steps, norm=norm, eps=epsilon, seed=seed, use_largereps=larger_first
    )

    def run() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return attack.perturb(data, target)

    return run


PEERS = {
    "foolbox 3.3.4": foolbox,
    "torchattacks 3.5.1": torchattacks,
    "ART 1.20.1": art,
}
