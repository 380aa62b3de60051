"""Digits by Adam, and by `Scion` in norm balls: test accuracy of the best of five learning rates.

An MLP of two hidden layers of 128, 600 mini-batches of 64, the mean of five seeds; every learning
rate of both is tried in the same way. `python benchmarks/norm_constrained.py` takes about five
minutes. The largest violation of any set, after each step, is printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rai_toolbox.optim import Scion, norm_groups

RATES = {"Adam": (0.001, 0.003, 0.01, 0.03, 0.1), "Scion": (0.001, 0.002, 0.004, 0.008, 0.016)}
RADIUS, HEAD_RADIUS = 4.0, 100.0


def adam(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr)


def scion(net: nn.Module, lr: float) -> Scion:
    groups = norm_groups(net, RADIUS, head_radius=HEAD_RADIUS, verbose=False)
    return Scion(groups, lr=lr)


def digits() -> tuple[Tensor, Tensor]:
    """All digits, shuffled: the last 500 are to test on."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def trained(
    make: Callable[[nn.Module, float], torch.optim.Optimizer], lr: float, seed: int, steps: int
) -> tuple[float, float]:
    """The test accuracy, and the largest violation."""
    x, y = digits()
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optim = make(net, lr)
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for _ in range(steps):
        batch = torch.randint(len(y) - 500, (64,), generator=generator)
        optim.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optim.step()
        if isinstance(optim, Scion):
            largest = max(largest, *map(float, optim.violation()))
    with torch.no_grad():
        right = net(x[-500:]).argmax(1) == y[-500:]
    return right.float().mean().item(), largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    for name, make in (("Adam", adam), ("Scion", scion)):
        found = {}
        for lr in RATES[name]:
            runs = [trained(make, lr, seed, args.steps) for seed in range(args.seeds)]
            found[lr] = sum(accuracy for accuracy, _ in runs) / len(runs)
            largest = max(violation for _, violation in runs)
            print(
                f"{name:6} lr={lr:<6} accuracy {found[lr]:.4f}, violation {largest:g}", flush=True
            )
        best = max(found, key=found.__getitem__)
        print(f"{name:6} best: {found[best]:.4f} with lr={best}", flush=True)


if __name__ == "__main__":
    main()
