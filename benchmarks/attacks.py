"""Attacks compared with those of other libraries: `make bench-attacks`.

Every solver gets the same model object, data, ball, step length and number of steps. Whether a
result fools the model and is inside ball and box is computed here in float64, from the returned
points; a hook counts model calls. Times are of interleaved rounds (timing.py). Writes the
figures to `out/bench/attacks.json` and the tables to `docs/attacks/table.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import adversarial_training
import attacks_ours as ours
import attacks_peers as peers
import attacks_problems as problems
import machine
import torch
from attacks_peers import PEERS, Solver
from attacks_problems import Problem
from attacks_tables import (
    FLOOR,
    FLOOR_AGAIN,
    FLOOR_FOUND,
    OURS,
    PYAUTOATTACK,
    RANDOM_START,
    SPELLED,
    STOPPING,
    Report,
    memory_table,
    page,
    success_table,
    time_table,
    verdict_table,
)
from memory import peak_bytes
from timing import compare, measure, progress_bar
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
OUT, DOCS = ROOT / "out" / "bench", ROOT / "docs" / "attacks"

NORMS = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}


@dataclass(frozen=True)
class Size:
    """How much is run."""

    data: int = 256
    steps: int = 40
    budget_s: float = 300.0
    seeds: int = 5


QUICK = Size(data=32, steps=5, budget_s=2.0, seeds=1)


# What is recomputed outside of the solvers


@dataclass
class Calls:
    """Calls of a model and the number of rows; ART calls the parts of a model one by one."""

    calls: int = 0
    rows: int = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls += 1
        self.rows += len(args[0])


@contextmanager
def counted(net: nn.Sequential) -> Iterator[Calls]:
    calls = Calls()
    handle = net[0].register_forward_hook(calls)
    try:
        yield calls
    finally:
        handle.remove()


def judged(problem: Problem, solver: Solver, p: float, epsilon: float) -> Report:
    """The share fooled, and the largest distance outside ball and box, in float64."""
    net, data, target = problem
    with counted(net) as calls:
        points = solver().detach()
    wide = copy.deepcopy(net).double()
    with torch.no_grad():
        fooled = wide(points.double()).argmax(1) != target
    norms = torch.linalg.vector_norm((points.double() - data.double()).flatten(1), p, dim=1)
    outside = torch.maximum(-points.double(), points.double() - 1).max()
    return {
        "fooled": fooled.double().mean().item(),
        "outside_ball": max(0.0, norms.max().item() - epsilon),
        "outside_box": max(0.0, outside.item()),
        "calls": calls.calls,
        "calls_per_example": calls.rows / len(data),
    }


def timed(
    kind: str,
    title: str,
    problem: Problem,
    solvers: Mapping[str, Solver],
    p: float,
    epsilon: float,
    size: Size,
) -> Report:
    """Of each solver: time, its ratios to the floor and to the fastest peer, and `judged`."""
    with progress_bar(title) as progress:
        samples = measure(solvers, budget_s=size.budget_s, progress=progress)
    rows = compare(samples, FLOOR)
    fastest = min((name for name in rows if name in PEERS), key=lambda n: rows[n]["median_ms"])
    to_peer = compare(samples, fastest)
    for name, solver in solvers.items():
        rows[name]["to_fastest_peer"] = to_peer[name]["ratio"]
        if name not in (FLOOR, FLOOR_AGAIN, FLOOR_FOUND):
            rows[name] |= judged(problem, solver, p, epsilon)
    return {
        "kind": kind,
        "title": title,
        "norm": NORMS[p],
        "epsilon": epsilon,
        "steps": size.steps,
        "data": len(problem.data),
        "fastest_peer": fastest,
        "rounds": rows[FLOOR]["rounds"],
        "rows": rows,
    }


# The parts


def side_by_side(
    kind: str, title: str, problem: Problem, p: float, epsilon: float, size: Size, **more: Solver
) -> Report:
    settings = (problem, p, epsilon, size.steps, 2.5 * epsilon / size.steps)
    found = ours.pgd(*settings)()
    solvers = {
        FLOOR: peers.floor(problem, size.steps),
        FLOOR_AGAIN: peers.floor(problem, size.steps),
        FLOOR_FOUND: peers.floor(problem._replace(data=found), size.steps),
        "a loop by hand": peers.by_hand(*settings),
        **{name: peer(*settings) for name, peer in PEERS.items()},
        OURS: ours.pgd(*settings),
        SPELLED: ours.spelled_out(*settings),
        **more,
    }
    return timed(kind, title, problem, solvers, p, epsilon, size)


def wide_cnn(p: float, epsilon: float, size: Size) -> Report:
    problem = problems.problem(problems.wide_net, size.data)
    title = f"PGD-{size.steps}, {NORMS[p]}, CNN of 169,026 parameters, N={size.data}"
    return side_by_side("wide", title, problem, p, epsilon, size)


def weak_cnn(size: Size) -> Report:
    """Most examples are fooled after a few steps."""
    problem = problems.problem(problems.wide_net, size.data)
    p, epsilon = math.inf, 0.25
    settings = (problem, p, epsilon, size.steps, 2.5 * epsilon / size.steps)
    stopping = {STOPPING: ours.pgd(*settings, stop_once_fooled=True)}
    title = f"PGD-{size.steps}, Linf, a ball too large for the same CNN, N={size.data}"
    return side_by_side("weak", title, problem, p, epsilon, size, **stopping)


def linear(p: float, epsilon: float, size: Size) -> Report:
    problem = problems.problem(problems.linear_net, 1)
    title = f"PGD-{size.steps}, {NORMS[p]}, linear model, N=1"
    return side_by_side("linear", title, problem, p, epsilon, size)


def auto_pgd(net: str, problem: Problem, p: float, epsilon: float, size: Size) -> Report:
    """The share fooled by Auto-PGD, ours and pyautoattack's, with equal numbers of model calls.

    Pyautoattack starts at random points; ours at the data, unless it is told to do the same.
    """
    steps = 100 if size.steps >= 40 else size.steps

    def by_ours(seed: int, steps: int, random_start: bool) -> Solver:
        generator = torch.Generator().manual_seed(seed)
        options = {"random_start": random_start, "generator": generator}
        return ours.apgd(problem, p, epsilon, steps, **options)

    def by_theirs(seed: int, larger_first: bool) -> Solver:
        return peers.pyautoattack(problem, p, epsilon, steps, seed=seed, larger_first=larger_first)

    # as many steps as make no more calls than theirs
    calls = judged(problem, by_theirs(0, False), p, epsilon)["calls"]
    extra = judged(problem, by_ours(0, steps, False), p, epsilon)["calls"] - steps
    kinds: dict[str, Callable[[int], Solver]] = {
        OURS: lambda seed: by_ours(seed, calls - extra, False),
        RANDOM_START: lambda seed: by_ours(seed, calls - extra, True),
        PYAUTOATTACK: lambda seed: by_theirs(seed, False),
    }
    if p == 1.0:  # as its authors recommend for L1
        kinds[f"{PYAUTOATTACK}, larger balls first"] = lambda seed: by_theirs(seed, True)
    rows: dict[str, Report] = {}
    with progress_bar(f"APGD, {NORMS[p]}, {net}") as progress:
        for done, (name, kind) in enumerate(kinds.items()):
            progress(done, len(kinds))
            runs = [judged(problem, kind(seed), p, epsilon) for seed in range(size.seeds)]
            rows[name] = runs[0] | {
                key: max(run[key] for run in runs) for key in ("outside_ball", "outside_box")
            }
            rows[name]["fooled"] = statistics.mean(run["fooled"] for run in runs)
            rows[name]["fooled_runs"] = [run["fooled"] for run in runs]
    return {
        "title": f"APGD, {NORMS[p]} balls of {epsilon:g}, {net}, N={len(problem.data)}",
        "rows": rows,
    }


def memory(size: Size) -> Report:
    """Peak bytes of a solve that keeps the best, over numbers of steps."""
    problem = problems.problem(problems.small_net, 64, epochs=1)

    def peak(steps: int, use_best: bool) -> int:
        options = {"use_best": True} if use_best else {}
        return peak_bytes(ours.spelled_out(problem, math.inf, 0.1, steps, 0.01, **options))

    peak(2, True)  # what is allocated once
    return {
        "use_best": {steps: peak(steps, True) for steps in (5, 20, 80)},
        "without": {steps: peak(steps, False) for steps in (5, 20, 80)},
        "data_bytes": problem.data.nbytes,
    }


# The command


def run(size: Size) -> Report:
    report: Report = {"size": asdict(size), "time": [], "success": []}
    for part in (
        partial(wide_cnn, math.inf, 0.125),
        partial(wide_cnn, 2.0, 1.5),
        weak_cnn,
        partial(linear, math.inf, 0.0625),
        partial(linear, 2.0, 0.75),
    ):
        found = part(size)
        report["time"].append(found)
        print(time_table(found), end="\n\n", flush=True)

    plain = problems.problem(problems.wide_net, size.data)
    epochs = adversarial_training.EPOCHS if size.steps >= 40 else 1
    robust = adversarial_training.robust_problem(size.data, epochs=epochs)
    for name, problem, p, epsilon in (
        ("CNN", plain, 1.0, 6.0),
        ("CNN trained adversarially", robust, 1.0, 8.0),
        ("CNN trained adversarially", robust, 2.0, 2.0),
        ("CNN trained adversarially", robust, math.inf, 0.1875),
    ):
        found = auto_pgd(name, problem, p, epsilon, size)
        report["success"].append(found)
        print(success_table(found), end="\n\n", flush=True)

    report["memory"] = memory(size)
    print(memory_table(report["memory"]), end="\n\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Attacks side by side with other libraries.")
    parser.add_argument("--quick", action="store_true", help="small and few: a first look")
    parser.add_argument(
        "--budget", type=float, default=Size.budget_s, help="seconds for each of the timed parts"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size(budget_s=args.budget)
    report = {**machine.describe(), "quick": args.quick, **run(size)}
    print(verdict_table(report))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "attacks.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    if not args.quick:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "table.md").write_text(page(report))
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
