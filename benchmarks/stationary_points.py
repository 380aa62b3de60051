"""Do constrained optimizers stop at stationary points? `python benchmarks/stationary_points.py`

Writes the tables and the plot of docs/stationarity.md to docs/stationarity/, in about 25 minutes on
one core. The figures of each set are kept in out/bench/stationary/, so that a run for some of the
sets renews their columns only.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import stationary_problems as problems
import stationary_runs as runs
import torch
from stationary_problems import SETS, Problem
from stationary_runs import RULES
from tables import markdown, save_svg, svg_figure
from timing import progress_bar

ROOT = Path(__file__).resolve().parents[1]
OUT, KEPT = ROOT / "docs" / "stationarity", ROOT / "out" / "bench" / "stationary"
KINDS: dict[str, Callable[[str], Problem]] = {
    "reference": problems.reference,
    "random": problems.random,
    "held out": partial(problems.random, seed=1),
}
TITLES = {
    "reference": "The reference quadratic, n = 3",
    "random": f"Random quadratics, n = 50, condition number {problems.CONDITION:g}, 4 a cell",
    "held out": "Four others, on which no learning rate was chosen",
}
# The default of these is plain projection: they have no second run.
PLAIN = ("SGD", "SGD momentum")
DIVERGED = 1e6

Report = dict[str, Any]


# The table


def measured(name: str, steps: int, kinds: Iterable[str] = KINDS) -> Report:
    """Of one set: how each inner optimizer ends, by default and with plain projection."""
    report: Report = {}
    with progress_bar(name) as progress:
        cells = [(kind, inner) for kind in kinds for inner in RULES]
        solved = {kind: KINDS[kind](name) for kind in kinds}
        for done, (kind, inner) in enumerate(cells):
            progress(done, len(cells))
            problem, rule = solved[kind], RULES[inner]
            default = runs.run(problem, rule, steps=steps)
            plain = default
            if inner not in PLAIN and kind != "held out":
                plain = runs.run(problem, rule, False, steps=steps, stall=1000)
            report.setdefault(kind, {})[inner] = {
                "default": default._replace(trace=[])._asdict(),
                "plain": plain._replace(trace=[])._asdict(),
            }
    return report


def number(x: float) -> str:
    """Two digits, short."""
    if not math.isfinite(x):
        return "diverges"
    return f"{x:.2g}" if 0.01 <= x < 100 else f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e")


def default_cell(run: Report) -> str:
    if run["steps_to_wanted"] is None:
        return f"**{number(run['residual'])}**"
    return f"{number(run['residual'])} ({run['steps_to_wanted']})"


def plain_cell(run: Report) -> str:
    if not run["residual"] < DIVERGED:
        return "diverges"
    if run["residual"] <= runs.WANTED:
        return number(run["residual"])
    return f"{number(run['residual'])} (+{100 * run['excess']:.2g} %)"


def by_sets(reports: dict[str, Report], cell: Callable[[Report, str], str], names: Any) -> str:
    return markdown(
        ["", *(f"`{s}`" for s in reports)],
        [[name, *(cell(report, name) for report in reports.values())] for name in names],
    )


def table(reports: dict[str, Report]) -> str:
    """The page's table, of the figures of all sets."""
    parts = [
        markdown(
            ["inner optimizer", "learning rate"],
            [[name, f"`{rule.text()}`"] for name, rule in RULES.items()],
        )
    ]
    for kind, title in TITLES.items():
        one = {name: report["table"][kind] for name, report in reports.items()}
        every = [cells["default"] for report in one.values() for cells in report.values()]
        missed = sum(run["steps_to_wanted"] is None for run in every)
        worst = max(run["excess"] for run in every)
        parts += [
            f"**{title}.** By default: the residual at the end, and in brackets the steps after "
            f"which it stayed at or below {runs.WANTED:g}.",
            by_sets(one, lambda report, name: default_cell(report[name]["default"]), RULES),
            f"{len(every) - missed} of {len(every)} cells end at or below {runs.WANTED:g}; the "
            f"objective is above that of an independent solver by at most {number(worst)} of it.",
        ]
        if kind == "held out":
            continue
        parts += [
            "Plain projection (`gradient_mapping=False`): the residual at the end, and by how much "
            "the objective is too large.",
            by_sets(
                one,
                lambda report, name: plain_cell(report[name]["plain"]),
                [name for name in RULES if name not in PLAIN],
            ),
        ]
    return "\n\n".join([*parts, stamp()])


def stamp() -> str:
    about = machine.describe()
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return f"Made by `benchmarks/stationary_points.py` on {about['date'][:10]}: {versions}.\n"


# With noise

SLOW = ("BoxSection", "Monotone")  # half the steps
NOISY = ("SGD momentum", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam")


def measured_with_noise(name: str, seeds: int, steps: int) -> Report:
    problem = problems.random(name)
    steps = steps // 2 if name in SLOW else steps
    report: Report = {}
    with progress_bar(f"{name} with noise") as progress:
        for done, inner in enumerate(NOISY):
            progress(done, len(NOISY))
            mapping = True if inner in PLAIN else None
            (report[inner],) = runs.compared(problem, RULES[inner], mapping, seeds, steps)
            report[inner] = report[inner]._asdict()
    return report


def noise_table(reports: dict[str, Report]) -> str:
    known = {name: report["noise"] for name, report in reports.items() if "noise" in report}
    defaults = [name for name in NOISY if name not in PLAIN]
    worst = max(max(r[name]["objective"]) for r in known.values() for name in defaults)

    def cells(what: str) -> Callable[[Report, str], str]:
        return lambda report, name: " / ".join(number(ratio) for ratio in report[name][what])

    def objectives(report: Report, name: str) -> str:
        return " / ".join(f"{ratio:.3f}" for ratio in report[name]["objective"])

    sigmas = " / ".join(f"{sigma:g}" for sigma in runs.SIGMAS)
    rows = [name if name not in PLAIN else f"({name})" for name in NOISY]
    renamed = {
        name: {row: report[old] for row, old in zip(rows, NOISY, strict=True)}
        for name, report in known.items()
    }
    return "\n\n".join(
        [
            f"Objective by default over that of plain projection, for noise of {sigmas} times the "
            "rms of the gradient at the solution. Below 1 the default is better.",
            by_sets(renamed, objectives, rows),
            f"The largest ratio is {worst:.3f}.",
            "The same of the suboptimality, objective minus least objective:\n",
            by_sets(renamed, cells("suboptimality"), rows),
            f"{runs.NOISE_STEPS} steps; half of them for {' and '.join(SLOW)}. In brackets: the "
            "mapping, which is not the default there.",
            stamp(),
        ]
    )


# The step of the mapping

CANDIDATE_STEPS = 4000
CANDIDATE_SETS = ("L2Ball", "L1Ball")


def measured_steps(names: Iterable[str], inner: str, steps: int) -> Report:
    """Each candidate for e: residuals without noise, f above its least value with noise."""
    report: Report = {}
    for name in names:
        problem, row = problems.random(name), report.setdefault(f"{inner}, `{name}`", {})
        with progress_bar(f"{name}: candidates") as progress:
            for done, (label, e) in enumerate(runs.STEP_RULES.items()):
                progress(done, len(runs.STEP_RULES))
                row[label] = runs.candidate(problem, RULES[inner], e, steps)
    return report


def step_table(report: Report) -> str:
    labels = list(next(iter(report.values())))
    return "\n\n".join(
        [
            f"First the residual after {CANDIDATE_STEPS} steps without noise. Then by how much the "
            "objective ends above its least value with noise of "
            + ", ".join(f"{sigma:g}" for sigma in runs.SIGMAS)
            + f" times the rms of the gradient at the solution, after {runs.NOISE_STEPS} steps.",
            markdown(
                ["e", *report],
                [
                    [label, *(candidate_cell(row[label]) for row in report.values())]
                    for label in labels
                ],
            ),
            stamp(),
        ]
    )


def candidate_cell(found: list[float]) -> str:
    residual, *excess = found
    return f"{number(residual)}; " + ", ".join(f"{100 * x:.2g} %" for x in excess)


# The average of gradients

AVERAGINGS = (0.0, 0.5, 0.8, 0.9, 0.95)
AVERAGED = (("L1Ball", "Adam"), ("Monotone", "Adam"), ("Monotone", "Adagrad"))


def measured_averages(steps: int, noise_steps: int) -> Report:
    """Steps to the wanted residual without noise; objectives over those of plain projection."""
    each = [{"averaging": share} for share in AVERAGINGS]
    report: Report = {}
    with progress_bar("averages") as progress:
        for done, (name, inner) in enumerate(AVERAGED):
            progress(done, len(AVERAGED))
            problem, rule = problems.random(name), RULES[inner]
            some = noise_steps // 2 if name in SLOW else noise_steps
            exact = [runs.run(problem, rule, steps=steps, **one).steps_to_wanted for one in each]
            noisy = runs.compared(problem, rule, None, 2, some, each)
            report[f"{inner}, `{name}`"] = [
                f"{'never' if exactly is None else exactly}; "
                + " / ".join(f"{ratio:.3f}" for ratio in found.objective)
                for exactly, found in zip(exact, noisy, strict=True)
            ]
    return report


def average_table(report: Report) -> str:
    rows = zip(AVERAGINGS, *report.values(), strict=True)
    return "\n\n".join(
        [
            f"First the steps after which the residual stays at or below {runs.WANTED:g} without "
            "noise. Then the objective over that of plain projection, for noise of "
            + " / ".join(f"{sigma:g}" for sigma in runs.SIGMAS)
            + " times the rms of the gradient at the solution.",
            markdown(["averaging", *report], [[f"{share:g}", *cells] for share, *cells in rows]),
            stamp(),
        ]
    )


# The plot

PLOTTED = ("L2Ball", "Simplex", "SpectralBall")


def draw(path: Path, steps: int = 700) -> None:
    """Residuals of Adam over steps, plain and by default."""
    figure = svg_figure(10, 3.4)
    for axes, name in zip(figure.subplots(1, len(PLOTTED), sharey=True), PLOTTED, strict=True):
        problem = problems.random(name)
        for mapping, label, color in ((False, "plain", "#e07b00"), (None, "default", "#0b5fa5")):
            trace = runs.run(problem, RULES["Adam"], mapping, steps=steps).trace
            axes.semilogy(*zip(*trace, strict=True), label=label, color=color)
        axes.set(title=f"Adam, {name}", xlabel="steps")
        axes.grid(alpha=0.3)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("residual |x - P(x - g)|")
    figure.axes[0].legend()
    save_svg(figure, path)


# The command


def updated(name: str, part: str, found: Report) -> None:
    path = KEPT / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, part: found}, indent=1) + "\n")


def kept() -> dict[str, Report]:
    paths = {name: KEPT / f"{name}.json" for name in SETS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure where constrained optimizers stop.")
    parser.add_argument("--quick", action="store_true", help="few steps: a first look")
    parser.add_argument(
        "--only", default=",".join(SETS), metavar="SET,...", help="some of the sets"
    )
    parser.add_argument("--noise", action="store_true", help="the study with noisy gradients")
    parser.add_argument("--candidates", action="store_true", help="the study of the step e")
    parser.add_argument("--averages", action="store_true", help="the study of averaging")
    parser.add_argument("--plot", action="store_true", help="the plot alone")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of tables and plot")
    args = parser.parse_args()
    names = args.only.split(",")
    if set(names) - set(SETS):
        parser.error(f"--only must name some of {','.join(SETS)}, got {args.only}")
    torch.set_num_threads(1)
    steps = 300 if args.quick else runs.STEPS
    KEPT.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    if args.plot:
        draw(args.out / "adam.svg")
    elif args.candidates:
        found = measured_steps(
            names if args.only != ",".join(SETS) else CANDIDATE_SETS,
            "Adam",
            min(steps, CANDIDATE_STEPS),
        )
        (args.out / "steps.md").write_text(step_table(found))
    elif args.averages:
        found = measured_averages(steps, 100 if args.quick else runs.NOISE_STEPS)
        (args.out / "averages.md").write_text(average_table(found))
    elif args.noise:
        for name in names:
            noise_steps = 100 if args.quick else runs.NOISE_STEPS
            updated(name, "noise", measured_with_noise(name, 2, noise_steps))
            (args.out / "noise.md").write_text(noise_table(kept()))
    else:
        for name in names:
            updated(name, "table", measured(name, steps))
        (args.out / "table.md").write_text(table(kept()))
        draw(args.out / "adam.svg")


if __name__ == "__main__":
    main()
