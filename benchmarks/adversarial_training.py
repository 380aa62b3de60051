"""A CNN trained adversarially, under attacks of increasing strength.

`python benchmarks/adversarial_training.py` trains it and checks orderings that any
correct attack satisfies: with more steps, a better step rule, a larger ball or more restarts,
fewer digits are classified correctly. Writes `docs/attacks/orderings.md` and `orderings.svg` in
a few minutes; the seeds are fixed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attacks_problems as problems
import machine
import torch
from attacks_problems import Problem
from tables import markdown, save_svg, svg_figure
from timing import progress_bar
from torch import Tensor, nn

from rai_toolbox.constraints import BoundedBall, Constraint, L2Ball, LinfBall
from rai_toolbox.optim import APGD, PGD
from rai_toolbox.perturbations import attack, gradient_ascent

DOCS = Path(__file__).resolve().parents[1] / "docs" / "attacks"

EPOCHS = 8
TRAINED_FOR = 0.2  # the radius of the Linf balls of training
STEPS = 7

NORMS: dict[str, Callable[[float], Constraint]] = {"Linf": LinfBall, "L2": L2Ball}
EPSILONS = {"Linf": [0.05, 0.1, 0.15, 0.2, 0.25, 0.3], "L2": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]}
RESTARTS = [1, 2, 4]

Accuracies = dict[str, list[float]]  # of each attack, over the radii


def worst_seen(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The perturbed images of adversarial training (Madry et al., 2018)."""
    inside = BoundedBall(LinfBall(TRAINED_FOR), lower=-images, upper=1 - images)
    perturbed, _ = gradient_ascent(
        model=net,
        data=images,
        target=labels,
        optimizer=partial(PGD, lr=2.5 * TRAINED_FOR / STEPS, constraint=inside),
        steps=STEPS,
    )
    return perturbed


def robust_problem(number: int, *, epochs: int = EPOCHS) -> Problem:
    return problems.problem(problems.small_net, number, epochs=epochs, shown=worst_seen)


def accuracy(problem: Problem, points: Tensor) -> float:
    """Computed in float64, independently of the attack."""
    net, _, target = problem
    correct = net.double()(points.double()).argmax(1) == target
    net.float()
    return correct.double().mean().item()


def attacked(
    problem: Problem, ball: Constraint, *, steps: int, adaptive: bool = False, **options: Any
) -> float:
    """The accuracy after an attack by PGD or Auto-PGD on the margin.

    The margin is positive exactly where a digit is misclassified, so a higher maximum is never a
    weaker attack. The cross entropy can rise while a digit is still classified correctly.
    """
    net, data, target = problem
    # The same step however many there are: a longer run then contains the shorter one.
    lr = (2.5 / 40 if steps > 1 else 2) * float(ball.epsilon)
    found = attack(
        net,
        data,
        target,
        ball=ball,
        optimizer=APGD if adaptive else partial(PGD, lr=lr),
        steps=steps,
        **options,
    )
    return accuracy(problem, found.data)


ATTACKS: dict[str, Callable[[Problem, Constraint], float]] = {
    "clean": lambda problem, ball: accuracy(problem, problem.data),
    "FGSM": partial(attacked, steps=1, random_start=False),
    "PGD-40": partial(attacked, steps=40, random_start=False),
    "PGD-100": partial(attacked, steps=100, random_start=False),
    "APGD-100": partial(attacked, steps=100, adaptive=True, random_start=False),
}


def over_radii(problem: Problem, norm: str) -> Accuracies:
    with progress_bar(f"attacks, {norm}") as progress:
        found: Accuracies = {name: [] for name in ATTACKS}
        total = len(ATTACKS) * len(EPSILONS[norm])
        for name, run in ATTACKS.items():
            for epsilon in EPSILONS[norm]:
                found[name].append(run(problem, NORMS[norm](epsilon)))
                progress(sum(map(len, found.values())), total)
    return found


def over_restarts(problem: Problem, norm: str) -> list[float]:
    ball = NORMS[norm](EPSILONS[norm][-3])
    return [
        attacked(
            problem,
            ball,
            steps=20,
            restarts=restarts,
            random_start=True,
            generator=torch.Generator().manual_seed(0),
        )
        for restarts in RESTARTS
    ]


def never_rises(values: list[float]) -> bool:
    return all(a >= b for a, b in zip(values, values[1:], strict=False))


def broken(found: dict[str, Accuracies], restarts: dict[str, list[float]]) -> list[str]:
    """The orderings that do not hold, in words."""
    wrong = []
    for norm, rows in found.items():
        for i, epsilon in enumerate(EPSILONS[norm]):
            column = [rows[name][i] for name in ATTACKS]
            if not never_rises(column):
                wrong.append(f"{norm}, {epsilon:g}: a stronger attack does less: {column}")
        for name, row in rows.items():
            if not never_rises(row):
                wrong.append(f"{norm}, {name}: a larger ball does less: {row}")
        if not never_rises(restarts[norm]):
            wrong.append(f"{norm}: more restarts do less: {restarts[norm]}")
    return wrong


def page(found: dict[str, Accuracies], restarts: dict[str, list[float]], number: int) -> str:
    about = machine.describe()
    lines = [
        f"Measured {about['date'][:10]} on {number:,} test digits; torch "
        f"{about['versions']['torch']}. Every attack maximizes the margin, which is positive "
        "exactly where a digit is misclassified.",
        "",
    ]
    for norm, rows in found.items():
        radii = EPSILONS[norm]
        lines += [
            markdown(
                ["classified correctly, %", *(f"{norm} {epsilon:g}" for epsilon in radii)],
                [[name, *(f"{100 * a:.1f}" for a in row)] for name, row in rows.items()],
            )
        ]
        shares = ", ".join(
            f"{n}: {100 * a:.1f}" for n, a in zip(RESTARTS, restarts[norm], strict=True)
        )
        lines += [
            "",
            f"PGD-20 from random points of {norm} balls of {radii[-3]:g}, by restarts: {shares}.",
            "",
        ]
    wrong = broken(found, restarts)
    held = (
        "All orderings hold: stronger attacks, larger balls and more restarts never help the net."
    )
    lines += (
        ["These orderings do not hold:", "", *(f"- {text}" for text in wrong)] if wrong else [held]
    )
    return "\n".join(lines) + "\n"


def draw(path: Path, found: dict[str, Accuracies]) -> None:
    """Accuracy over the radius, a line for each attack."""
    styles = [("0.6", ":"), ("#7aa6c2", "-"), ("#0b5fa5", "-"), ("#e07b00", "--"), ("#c0152f", "-")]
    figure = svg_figure(10, 3.6)
    for axes, (norm, rows) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        clean = rows["clean"][0]
        for (name, row), (color, line) in zip(rows.items(), styles, strict=True):
            values = [100 * a for a in (clean, *row)]
            axes.plot([0, *EPSILONS[norm]], values, line, color=color, label=name, marker=".")
        axes.set(title=f"{norm} balls in the box of images", xlabel="radius")
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 101)
    figure.axes[0].set_ylabel("test digits classified correctly, %")
    figure.axes[0].legend(loc="lower left")
    save_svg(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the orderings of attacks on a robust CNN.")
    parser.add_argument("--data", type=int, default=1000, help="test digits (default 1000)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of table and picture")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("training ...", flush=True)
    problem = robust_problem(args.data, epochs=args.epochs)
    found = {norm: over_radii(problem, norm) for norm in NORMS}
    restarts = {norm: over_restarts(problem, norm) for norm in NORMS}
    args.out.mkdir(parents=True, exist_ok=True)
    text = page(found, restarts, args.data)
    (args.out / "orderings.md").write_text(text)
    draw(args.out / "orderings.svg", found)
    print(text)
    if broken(found, restarts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
