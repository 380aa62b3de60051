"""What is attacked: real digits, and nets that are trained on them in seconds with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from rai_toolbox.cli.digits import Digits, load_digits

BATCH = 100

Shown = Callable[[nn.Module, Tensor, Tensor], Tensor]  # images, as used in training


class Problem(NamedTuple):
    """A frozen net in eval mode, the images, shape (N, 1, 28, 28), and labels it is attacked on."""

    net: nn.Sequential
    data: Tensor
    target: Tensor


def wide_net() -> nn.Sequential:
    """A CNN of 169,026 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 104),
        nn.ReLU(),
        nn.Linear(104, 10),
    )


def small_net() -> nn.Sequential:
    """A CNN of 18,378 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, kernel_size=5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def linear_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))


def as_they_are(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return images


def trained(
    make: Callable[[], nn.Sequential],
    digits: Digits,
    *,
    epochs: int,
    shown: Shown = as_they_are,
    lr: float = 2e-3,
    seed: int = 0,
) -> nn.Sequential:
    """A net trained on `shown` of the digits; frozen, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = make()
    generator = torch.Generator().manual_seed(seed)
    optimizer = Adam(net.parameters(), lr=lr)
    steps = epochs * (len(digits.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(digits.labels), generator=generator)
        for rows in order.split(BATCH):
            images, labels = digits.images[rows], digits.labels[rows]
            images = shown(net, images, labels)
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def problem(
    make: Callable[[], nn.Sequential], number: int, *, epochs: int = 3, shown: Shown = as_they_are
) -> Problem:
    train, test = load_digits()
    test = test.first(number)
    return Problem(trained(make, train, epochs=epochs, shown=shown), test.images, test.labels)
