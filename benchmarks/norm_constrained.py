"""An MLP, a CNN and a small transformer by Adam, Muon and `Scion`: results, curves and norms.

`python benchmarks/norm_constrained.py cnn` writes table and plot of the CNN to
docs/norm_constrained/; without a name those of all three, in about ten minutes on one core. The
learning rates of each optimizer are tried with some seeds, and the best one is run with others.
The rates fall linearly to 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from norm_constrained_models import TASKS, Task
from tables import markdown, save_svg, svg_figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Muon, Optimizer
from torch.optim.lr_scheduler import LinearLR

from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import Scion, norm_groups
from rai_toolbox.perturbations import attack

OUT = Path(__file__).resolve().parents[1] / "docs" / "norm_constrained"
EVERY = 10  # steps: how often norms and violations are recorded
ATTACK = 0.5


# Optimizers


class MuonOfKernels(Muon):
    """Torch's Muon takes matrices only: kernels are given to it as matrices in the same memory."""

    def __init__(self, weights: list[nn.Parameter], lr: float) -> None:
        self.weights = weights
        super().__init__([nn.Parameter(weight.detach().flatten(1)) for weight in weights], lr=lr)

    def step(self, closure: None = None) -> None:
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            matrix.grad = weight.grad.flatten(1)
        super().step()


def matrices(net: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of linear layers and convolutions; the last one is the head."""
    return {
        name: layer.weight
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def adam(net: nn.Module, lr: float, task: Task) -> list[Optimizer]:
    return [Adam(net.parameters(), lr=lr)]


def muon(net: nn.Module, lr: float, task: Task) -> list[Optimizer]:
    """Muon for the hidden matrices, as is usual, and Adam for all else."""
    hidden = list(matrices(net).values())[:-1]
    rest = [p for p in net.parameters() if all(p is not weight for weight in hidden)]
    return [MuonOfKernels(hidden, lr=lr), Adam(rest, lr=task.rest_rate)]


def scion(net: nn.Module, lr: float, task: Task) -> list[Optimizer]:
    groups = norm_groups(net, task.radius, head_radius=task.head_radius, verbose=False)
    return [Scion(groups, lr=lr)]


def unconstrained(net: nn.Module, lr: float, task: Task) -> list[Optimizer]:
    groups = norm_groups(net, task.radius, head_radius=task.head_radius, verbose=False)
    return [Scion(groups, lr=lr, unconstrained=True)]


MAKE: dict[str, Callable[[nn.Module, float, Task], list[Optimizer]]] = {
    "Adam": adam,
    "Muon": muon,
    "Scion": scion,
    "Scion, unconstrained": unconstrained,
}


# Runs


@dataclass
class Run:
    net: nn.Module
    losses: list[float] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    violation: float = 0.0
    held_out: float = 0.0  # accuracy, or mean loss
    attacked: float = 0.0  # accuracy


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x).flatten(0, -2), y.flatten())


def trained(task: Task, name: str, lr: float, seed: int) -> Run:
    torch.manual_seed(seed)
    run = Run(task.net())
    optimizers = MAKE[name](run.net, lr, task)
    schedules = [LinearLR(each, 1.0, 0.0, total_iters=task.steps) for each in optimizers]
    generator = torch.Generator().manual_seed(seed)
    for step in range(task.steps):
        run.net.zero_grad()
        loss = loss_of(run.net, *task.batch(generator))
        loss.backward()
        for each in (*optimizers, *schedules):
            each.step()
        run.losses.append(loss.item())
        if step % EVERY == 0:
            weights = [weight.detach().flatten(1) for weight in matrices(run.net).values()]
            run.norms.append([torch.linalg.matrix_norm(w, 2).item() for w in weights])
            if name == "Scion":
                run.violation = max(run.violation, *map(float, optimizers[0].violation()))
    with torch.no_grad():
        x, y = task.held_out()
        if task.classifies:
            run.held_out = (run.net(x).argmax(1) == y).float().mean().item()
        else:
            run.held_out = loss_of(run.net, x, y).item()
    return run


def lipschitz_bound(net: nn.Module, x: Tensor) -> float:
    """The product of the largest singular values of all layers, convolutions as maps of images."""
    gains = []
    for layer in net:
        if hasattr(layer, "weight"):
            units = torch.eye(x[0].numel()).reshape(-1, *x.shape[1:])
            images = (layer(units) - layer(torch.zeros_like(units))).flatten(1)
            gains.append(torch.linalg.matrix_norm(images, 2).item())
        x = layer(x)
    return prod(gains)


def best_rate(task: Task, name: str) -> tuple[float, float]:
    """The best learning rate of an optimizer, and its mean result."""
    found = {}
    for lr in task.rates[name]:
        runs = [trained(task, name, lr, seed) for seed in range(task.search_seeds)]
        found[lr] = mean(run.held_out for run in runs)
        last = mean(mean(run.losses[-20:]) for run in runs)
        print(f"{name:20} lr={lr:<6} {found[lr]:.4f}, training loss {last:.4f}", flush=True)
    best = (max if task.classifies else min)(found, key=found.__getitem__)
    return best, found[best]


# Pages


def compared(task: Task, name: str) -> tuple[list[str], Run]:
    """The row of an optimizer, and one run with its best rate."""
    best, found = best_rate(task, name)
    seeds = range(task.search_seeds, task.search_seeds + task.other_seeds)
    runs = [trained(task, name, best, seed) for seed in seeds]
    shown = "{:.1%}" if task.classifies else "{:.3f}"
    cells = [
        "Muon, and Adam for the rest" if name == "Muon" else name,
        ", ".join(f"{lr:g}" for lr in task.rates[name]),
        f"{best:g}",
        shown.format(found),
        shown.format(mean(run.held_out for run in runs)),
    ]
    if task.classifies:
        x, y = task.held_out()
        with torch.no_grad():
            bound = mean(lipschitz_bound(run.net, x[:1]) for run in runs)
        fooled = [attack(run.net, x, y, ball=L2Ball(ATTACK), steps=20).fooled for run in runs]
        cells += [f"{bound:.0f}", f"{1 - torch.stack(fooled).float().mean():.0%}"]
    violation = max(run.violation for run in runs)
    print(f"{' | '.join(cells)}, violation {violation:g}", flush=True)
    return cells, runs[0]


def plot(task: Task, runs: dict[str, Run], path: Path) -> None:
    """Draw the loss, and for each optimizer the largest singular values, of one run of each."""
    figure = svg_figure(10, 5.6)
    axes: Any = figure.subplots(2, 3).flatten()
    shapes = {name: weight.flatten(1).shape for name, weight in matrices(task.net()).items()}
    labels = [f"{name}, {m} x {k}" for name, (m, k) in shapes.items()]
    steps = range(1, task.steps + 1, EVERY)
    values = [value for run in runs.values() for norms in run.norms for value in norms]
    for panel, (name, run) in zip(axes[1:], runs.items(), strict=False):
        smooth = torch.tensor(run.losses).unfold(0, 20, 10).mean(1).clamp(min=1e-5)
        axes[0].plot(range(20, 20 + 10 * len(smooth), 10), smooth, label=name)
        for i, curve in enumerate(zip(*run.norms, strict=True)):
            panel.semilogy(steps, curve, color=f"C{i}", label=labels[i])
        panel.set(title=name, ylim=(0.9 * min(values), 1.1 * max(values)))
    axes[0].set_title("training loss, mean of 20 steps")
    if task.classifies:
        axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    axes[1].set_ylabel("largest singular value")
    axes[3].set_ylabel("largest singular value")
    for panel in axes[2:5]:
        panel.set_xlabel("steps")
    axes[5].axis("off")
    axes[5].legend(
        *axes[1].get_legend_handles_labels(), loc="center", frameon=False, title="weight of layer"
    )
    save_svg(figure, path)


def write(name: str, results: dict[str, tuple[list[str], Run]]) -> None:
    task = TASKS[name]
    result = "accuracy" if task.classifies else "loss"
    header = ["optimizer", "learning rates", "best", f"{result}, search", f"{result}, other seeds"]
    if task.classifies:
        header += ["Lipschitz bound", f"attacked, L2 <= {ATTACK}"]
    OUT.mkdir(exist_ok=True)
    table = markdown(header, [row for row, _ in results.values()])
    (OUT / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    plot(task, {optimizer: run for optimizer, (_, run) in results.items()}, OUT / f"{name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {list(TASKS)}; default: all")
    for name in parser.parse_args().tasks or TASKS:
        write(name, {optimizer: compared(TASKS[name], optimizer) for optimizer in MAKE})


if __name__ == "__main__":
    main()
