"""Two equal CNNs trained side by side on the same batches, one of them with bounded weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from rai_toolbox.cli.digits import Digits
from rai_toolbox.extras import progress
from rai_toolbox.optim import ClampedParameterOptimizer

BATCH = 100
LR = 5e-3  # at the start; it falls to 0 along a cosine


@dataclass
class Run:
    """A net, its optimizer, and how long each step of it took, in seconds."""

    net: nn.Module
    optimizer: Optimizer
    seconds: list[float] = field(default_factory=list)

    def weights(self) -> Tensor:
        """All parameters in one row."""
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def train(digits: Digits, bound: float, epochs: int, seed: int) -> tuple[Run, Run, float]:
    """The bounded run, the unbounded run, and the largest violation of the bound after any step.

    Both use the same batches in turn, so that their step times are measured under equal
    conditions; which one goes first alternates.
    """
    nets = _net(seed), _net(seed)
    params = nets[0].parameters()
    clamped = ClampedParameterOptimizer(params, AdamW, lr=LR, clamp_min=-bound, clamp_max=bound)
    bounded, unbounded = Run(nets[0], clamped), Run(nets[1], AdamW(nets[1].parameters(), lr=LR))

    largest = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    turn = [bounded, unbounded]
    steps = epochs * (len(digits.labels) // BATCH)
    schedules = [CosineAnnealingLR(run.optimizer, T_max=steps) for run in turn]
    with progress("training", total=steps) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(digits.labels), generator=generator)
            for batch in torch.split(order, BATCH):
                for run in turn:
                    run.optimizer.zero_grad()
                    logits = run.net(digits.images[batch])
                    cross_entropy(logits, digits.labels[batch]).backward()
                for run in turn:
                    start = perf_counter()
                    run.optimizer.step()
                    run.seconds.append(perf_counter() - start)
                largest = torch.maximum(largest, violation(bounded.net, bound))  # keeps a NaN
                for schedule in schedules:
                    schedule.step()
                turn.reverse()
                bar.update()
    return bounded, unbounded, largest.item()


def violation(net: nn.Module, bound: float) -> Tensor:
    """The largest distance of a parameter from [-bound, bound], in float64; 0 inside."""
    excess = [p.detach().double().abs().max() - bound for p in net.parameters()]
    return torch.stack(excess).max().clamp(min=0)


@torch.no_grad()
def accuracy(net: nn.Module, digits: Digits) -> float:
    """The share of `digits` that `net` classifies correctly."""
    correct: Tensor = net(digits.images).argmax(1) == digits.labels
    return correct.double().mean().item()


def _net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
