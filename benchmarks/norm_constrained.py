"""Digits by Adam, Muon and `Scion`: test accuracy of the best of five learning rates of each.

An MLP of two hidden layers of 128, 600 mini-batches of 64, the mean of five seeds; every learning
rate of all is tried in the same way. `python benchmarks/norm_constrained.py` takes about ten
minutes. The largest violation of any set, after each step, is printed beside it. With `--plot` it
only draws docs/norm_constrained/digits.svg: loss and largest singular values in one run of each
with its best learning rate, in about a minute. With `--robust` it only prints Lipschitz bound and
robust accuracy of nets trained with the best learning rates, in about a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import mean

import torch
from sklearn.datasets import load_digits
from tables import save_svg, svg_figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Muon, Optimizer

from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import Scion, norm_groups
from rai_toolbox.perturbations import attack

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "norm_constrained" / "digits.svg"
RADIUS, HEAD_RADIUS = 4.0, 100.0
ATTACK = 0.5

Make = Callable[[nn.Module, float], list[Optimizer]]


def adam(net: nn.Module, lr: float) -> list[Optimizer]:
    return [Adam(net.parameters(), lr=lr)]


def muon(net: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the hidden matrices, as is usual, and Adam with its best rate for all else."""
    hidden = [net[0].weight, net[2].weight]
    rest = [p for p in net.parameters() if all(p is not weight for weight in hidden)]
    return [Muon(hidden, lr=lr), Adam(rest, lr=0.01)]


def scion(net: nn.Module, lr: float) -> list[Optimizer]:
    return [Scion(norm_groups(net, RADIUS, head_radius=HEAD_RADIUS, verbose=False), lr=lr)]


def unconstrained(net: nn.Module, lr: float) -> list[Optimizer]:
    groups = norm_groups(net, RADIUS, head_radius=HEAD_RADIUS, verbose=False)
    return [Scion(groups, lr=lr, unconstrained=True)]


RUNS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "Adam": (adam, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "Muon": (muon, (0.002, 0.005, 0.01, 0.03, 0.1)),
    "Scion": (scion, (0.001, 0.002, 0.004, 0.008, 0.016)),
    "Scion, unconstrained": (unconstrained, (0.0005, 0.001, 0.002, 0.004, 0.008)),
}
BEST = {"Adam": 0.01, "Muon": 0.005, "Scion": 0.002, "Scion, unconstrained": 0.001}


def digits() -> tuple[Tensor, Tensor]:
    """All digits, shuffled: the last 500 are to test on."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]


def trained(
    make: Make, lr: float, seed: int, steps: int, see: Callable[[nn.Module, float], None] | None
) -> tuple[float, float]:
    """The test accuracy, and the largest violation; `see` gets net and loss after each step."""
    x, y = digits()
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizers = make(net, lr)
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for _ in range(steps):
        batch = torch.randint(len(y) - 500, (64,), generator=generator)
        net.zero_grad()
        loss = cross_entropy(net(x[batch]), y[batch])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            if isinstance(optimizer, Scion) and not optimizer.param_groups[0]["unconstrained"]:
                largest = max(largest, *map(float, optimizer.violation()))
        if see is not None:
            see(net, loss.item())
    with torch.no_grad():
        right = net(x[-500:]).argmax(1) == y[-500:]
    return right.float().mean().item(), largest


def search(name: str, seeds: int, steps: int) -> None:
    """Print the accuracy of each learning rate."""
    make, rates = RUNS[name]
    found = {}
    for lr in rates:
        runs = [trained(make, lr, seed, steps, None) for seed in range(seeds)]
        found[lr] = sum(accuracy for accuracy, _ in runs) / len(runs)
        largest = max(violation for _, violation in runs)
        print(f"{name:20} lr={lr:<6} accuracy {found[lr]:.4f}, violation {largest:g}", flush=True)
    best = max(found, key=found.__getitem__)
    print(f"{name:20} best: {found[best]:.4f} with lr={best}", flush=True)


def robust(name: str, seeds: int, steps: int) -> None:
    """Print the product of the largest singular values, and accuracies without and with attack."""
    x, y = digits()
    clean, bounds, attacked = [], [], []
    for seed in range(seeds):
        nets: list[nn.Module] = []
        see = lambda net, loss, nets=nets: nets.append(net)  # noqa: E731
        clean.append(trained(RUNS[name][0], BEST[name], seed, steps, see)[0])
        net = nets[-1]
        weights = [layer.weight.detach() for layer in (net[0], net[2], net[4])]
        bounds.append(prod(torch.linalg.matrix_norm(w, 2).item() for w in weights))
        found = attack(net, x[-500:], y[-500:], ball=L2Ball(ATTACK), steps=20)
        attacked.append(1 - found.fooled.float().mean().item())
    print(
        f"{name:20} lr={BEST[name]:<6} accuracy {mean(clean):.4f}, Lipschitz bound "
        f"{mean(bounds):.0f}, accuracy with L2 <= {ATTACK} {mean(attacked):.4f}",
        flush=True,
    )


def plot(steps: int) -> None:
    """Draw loss and largest singular values of the three layers, in one run of each."""
    figure = svg_figure(10, 5.2)
    axes = figure.subplots(2, 2).flatten()
    for name, (make, _) in RUNS.items():
        losses: list[float] = []
        values: list[list[float]] = []

        def see(
            net: nn.Module,
            loss: float,
            losses: list[float] = losses,
            values: list[list[float]] = values,
        ) -> None:
            losses.append(loss)
            if len(losses) % 10 == 1:
                weights = [layer.weight.detach() for layer in (net[0], net[2], net[4])]
                values.append([torch.linalg.matrix_norm(w, 2).item() for w in weights])

        trained(make, BEST[name], 0, steps, see)
        smooth = torch.tensor(losses).unfold(0, 20, 10).mean(1).clamp(min=1e-5)
        axes[0].semilogy(range(20, 20 + 10 * len(smooth), 10), smooth, label=name)
        for i, curve in enumerate(zip(*values, strict=True), start=1):
            axes[i].plot(range(1, steps + 1, 10), curve)
    axes[0].set_title("training loss, mean of 20 steps")
    axes[0].legend(frameon=False)
    for i, layer in enumerate(("first layer", "second layer", "head"), start=1):
        axes[i].set_title(f"largest singular value, {layer}")
    axes[1].axhline(RADIUS * 2**0.5, color="gray", linewidth=0.7)
    axes[2].axhline(RADIUS, color="gray", linewidth=0.7)
    for each in axes[2:]:
        each.set_xlabel("steps")
    FIGURE.parent.mkdir(exist_ok=True)
    save_svg(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--robust", action="store_true")
    args = parser.parse_args()
    if args.plot:
        plot(args.steps)
        return
    for name in [args.only] if args.only else RUNS:
        (robust if args.robust else search)(name, args.seeds, args.steps)


if __name__ == "__main__":
    main()
