"""How many evaluations L-BFGS takes in a set, and what an iteration costs.

`python benchmarks/lbfgs.py` writes the tables and the plot of docs/lbfgs.md to docs/lbfgs/, in
about ten minutes on one core. `--only` renews some of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import lbfgs_problems as bounds
import machine
import memory
import stationary_problems as quadratics
import torch
from lbfgs_problems import Problem, Run
from tables import markdown, measured_on, save_svg, svg_figure
from torch import Tensor

from rai_toolbox.constraints import Box, Constraint, Hyperplane, Intersection, NonNegative
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedLBFGS, ProjectedOptimizer

OUT = Path(__file__).resolve().parents[1] / "docs" / "lbfgs"
ENOUGH = 1e-8  # the relative excess to get to


def count(evaluations: int | None) -> str:
    return "-" if evaluations is None else f"{evaluations}"


# Evaluations, in boxes


def least_squares(seeds: int = 6) -> str:
    """Non-negative least squares, where scipy gets there within some thousand evaluations."""
    rows = []
    for decades in (0.5, 1.0):
        for seed in range(seeds):
            problem, least = bounds.non_negative_least_squares(decades, seed)
            ours, theirs = bounds.by_ours(problem, 4000), bounds.by_scipy(problem, 4000)
            found = [run.evaluations_to(least * (1 + ENOUGH)) for run in (ours, theirs)]
            rows.append([f"{decades:g}", f"{seed}", *map(count, found)])
    return markdown(["c", "seed", "`ProjectedLBFGS`", "L-BFGS-B"], rows)


def badly_scaled(levels: tuple[float, ...] = (0.3, 0.1, 0.03), most: int = 4000) -> str:
    """Columns of scales over four orders of magnitude: evaluations to some excesses."""
    rows = []
    for seed in range(3):
        problem, least = bounds.non_negative_least_squares(2.0, seed)
        ours, theirs = bounds.by_ours(problem, most), bounds.by_scipy(problem, most)
        cells = [
            " / ".join(count(run.evaluations_to(least * (1 + level))) for run in (ours, theirs))
            for level in levels
        ]
        rows.append(["2", f"{seed}", *cells])
    return markdown(["c", "seed", *(f"excess {level:g}" for level in levels)], rows)


def literature(most: int = 3000) -> str:
    rows, ratios, solved = [], [], [0, 0]
    for name, make in bounds.BOUNDED.items():
        problem = make()
        runs = [bounds.by_ours(problem, most), bounds.by_scipy(problem, most)]
        others = [bounds.by_scipy(problem, most, "TNC")]
        least = min(min(run.losses) for run in runs + others)
        level = least + ENOUGH * max(1.0, abs(least))
        ours, theirs = (run.evaluations_to(level) for run in runs)
        solved = [solved[0] + (ours is not None), solved[1] + (theirs is not None)]
        if ours and theirs:
            ratios.append(ours / theirs)
        source = (make.__doc__ or "").partition(":")[0].rstrip(".")
        size = f"{len(problem.start)}"
        rows.append([name, size, f"{least:.8g}", count(ours), count(theirs), source])
    header = ["problem", "n", "least loss", "`ProjectedLBFGS`", "L-BFGS-B", "source"]
    return (
        f"{markdown(header, rows)}\n\nSolved: {solved[0]} and {solved[1]} of {len(rows)}; median "
        f"ratio of evaluations {statistics.median(ratios):.2f}."
    )


# Evaluations, in other sets

OTHERS = ("Simplex", "L1Ball", "L2Ball", "BoundedBall", "BoxSection", "SpectralBall", "Monotone")


def over_set(problem: quadratics.Problem, constraint: Constraint) -> Run:
    """A quadratic over a set, from the origin."""
    start = torch.zeros((1, *problem.shape), dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return problem.objective(x).sum()

    return bounds.in_set(loss, start, constraint, max_iter=400, max_eval=400)


def other_sets(seeds: int = 3) -> str:
    quadratics.CONDITION = 1e3
    rows = []
    for name in (*OTHERS, "Intersection"):
        cells, excess = [], 0.0
        for seed in range(seeds):
            of = "BoxSection" if name == "Intersection" else name
            problem = quadratics.random(of, rows=1, n=40, seed=seed)
            constraint: Any = problem.constraint
            if name == "Intersection":
                plane = Hyperplane(constraint.weight, constraint.total)
                constraint = Intersection(plane, Box(constraint.lower, constraint.upper))
            run, least = over_set(problem, constraint), float(problem.best)
            cells.append(count(run.evaluations_to(least * (1 + ENOUGH))))
            excess = max(excess, abs(run.losses[-1] / least - 1))
        rows.append([f"`{name}`", *cells, f"{excess:.0e}"])
    seeds_named = (f"seed {seed}" for seed in range(seeds))
    return markdown(["set", *seeds_named, "largest difference at the end"], rows)


# Cost

SIZE = 10**6


def large(dtype: torch.dtype, share: float) -> tuple[Callable[[Tensor], Tensor], float]:
    """A chain of springs, and an upper bound that holds about a share of its elements."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.logspace(0, 2, SIZE)[torch.randperm(SIZE, generator=generator)].to(dtype)
    center = torch.randn(SIZE, generator=generator).to(dtype)
    upper = float(center[:10_000].quantile(1 - share))

    def loss(x: Tensor) -> Tensor:
        return (weight * (x - center).square()).sum() / 2 + x.diff().square().sum()

    return loss, upper


def time_per_iteration(make: Callable[[Tensor], Any], loss: Any, dtype: torch.dtype) -> list[float]:
    """Milliseconds per iteration: in all, and without the closure."""
    x = torch.zeros(SIZE, dtype=dtype, requires_grad=True)
    optim = make(x)
    inside = 0.0

    def closure() -> Tensor:
        nonlocal inside
        start = perf_counter()
        optim.zero_grad()
        value = loss(x)
        value.backward()
        inside += perf_counter() - start
        return value

    start = perf_counter()
    optim.step(closure)
    total = perf_counter() - start
    iterations = optim.state[x]["n_iter"]
    return [1e3 * total / iterations, 1e3 * (total - inside) / iterations]


def overhead(rounds: int = 3) -> str:
    exact = {"tolerance_grad": 0, "tolerance_change": 0, "max_iter": 25, "max_eval": 10**6}
    rows = []
    for dtype in (torch.float32, torch.float64):
        for share in (0.1, 0.5):
            loss, upper = large(dtype, share)

            def torchs(x: Tensor) -> Any:
                search = "strong_wolfe"
                return torch.optim.LBFGS([x], history_size=10, line_search_fn=search, **exact)

            def ours(x: Tensor, upper: float = upper) -> Any:
                return ProjectedLBFGS([x], constraint=Box(-10.0, upper), **exact)

            times = [
                [time_per_iteration(make, loss, dtype) for make in (torchs, ours)]
                for _ in range(rounds)
            ]
            medians = [
                [statistics.median(one[which][part] for one in times) for which in (0, 1)]
                for part in (0, 1)
            ]
            cells = [f"{theirs:.0f} / {own:.0f} ms ({own / theirs:.1f})" for theirs, own in medians]
            rows.append([str(dtype).removeprefix("torch."), f"{share:.0%}", *cells])
    header = ["dtype", "held by bounds", "torch's LBFGS / ours (ratio)", "without the closure"]
    return f"{markdown(header, rows)}\n\n{vectors()}"


def vectors() -> str:
    """Peak memory beyond parameter and gradient, in vectors; the closure needs none."""
    target = torch.linspace(-1, 1, SIZE)
    x = torch.zeros(SIZE, requires_grad=True)
    x.grad = torch.zeros(SIZE)
    optim = ProjectedLBFGS(
        [x], constraint=Box(-0.5, 0.5), max_iter=15, tolerance_grad=0, tolerance_change=0
    )
    rate = torch.linspace(1, 2, SIZE)

    def closure() -> float:
        with torch.no_grad():
            torch.sub(x, target, out=x.grad).mul_(rate)
            return float(x.grad @ x.grad) / 2

    peak = memory.peak_bytes(lambda: optim.step(closure)) / (4 * SIZE)
    return (
        f"Peak memory of a step with `history_size=10` in float32, without parameters and their "
        f"gradients: {peak:.1f} vectors, 20 of which are the history."
    )


# The plot


def excesses(losses: list[float], least: float) -> list[float]:
    """The lowest excess so far, after each evaluation."""
    found, lowest = [], float("inf")
    for loss in losses:
        lowest = min(lowest, loss)
        found.append(max(lowest / least - 1, 1e-12))
    return found


def by_wrapper(
    problem: Problem, constraint: Constraint, make: Callable[[list[Tensor]], Any], most: int
) -> list[float]:
    """Losses of a wrapper, in the points of the set next to those that it evaluates."""
    x = problem.start.clone().requires_grad_()
    optim, losses = make([x]), []

    def closure() -> Tensor:
        optim.zero_grad()
        loss = problem.loss(x)
        loss.backward()
        losses.append(problem.loss(constraint.project(x.detach().view(1, -1))[0]).item())
        return loss

    while len(losses) < most:
        optim.step(closure)
    return losses[:most]


def draw(path: Path, most: int = 700) -> None:
    figure = svg_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    blue, orange, gray, green = "#0b5fa5", "#e07b00", "#888888", "#2a8c4a"

    problem, least = bounds.non_negative_least_squares(1.0, 0)
    inner = partial(torch.optim.LBFGS, history_size=10)

    def clamped(params: list[Tensor]) -> Any:
        return ClampedParameterOptimizer(params, inner, clamp_min=0.0)

    found = {
        "ProjectedLBFGS": (bounds.by_ours(problem, most).losses, blue),
        "scipy's L-BFGS-B": (bounds.by_scipy(problem, most).losses, gray),
        "ClampedParameterOptimizer(LBFGS)": (
            by_wrapper(problem, NonNegative(), clamped, most),
            orange,
        ),
    }
    plot(left, found, least, "Non-negative least squares, n = 200")

    quadratics.CONDITION = 1e3
    section = quadratics.random("BoxSection", rows=1, n=40)
    constraint = section.constraint
    start = constraint.project(torch.zeros(1, 40, dtype=torch.float64))[0]
    as_problem = bounds.bounded(lambda x: section.objective(x).sum(), start, 0.0, 1.0)

    def projected(inner: Any, **settings: Any) -> list[float]:
        options = {"constraint": constraint, "param_ndim": None, **settings}
        return by_wrapper(
            as_problem, constraint, lambda params: ProjectedOptimizer(params, inner, **options), 120
        )

    rate = 1 / section.largest_eigenvalue
    found = {
        "ProjectedLBFGS": (over_set(section, constraint).losses, blue),
        "ProjectedOptimizer(LBFGS)": (projected(inner), orange),
        "ProjectedOptimizer(SGD)": (projected(torch.optim.SGD, lr=rate), green),
    }
    plot(right, found, float(section.best), "Quadratic in a box with a fixed sum, n = 40")
    left.set_ylabel("relative excess of the loss")
    save_svg(figure, path)


def plot(axes: Any, found: dict[str, tuple[list[float], str]], least: float, title: str) -> None:
    for label, (losses, color) in found.items():
        excess = excesses(losses, least)
        axes.semilogy(range(1, len(excess) + 1), excess, label=label, color=color)
    axes.set(title=title, xlabel="evaluations")
    axes.grid(alpha=0.3)
    axes.minorticks_off()
    axes.legend()


PARTS: dict[str, Callable[[], str]] = {
    "least_squares": least_squares,
    "badly_scaled": badly_scaled,
    "literature": literature,
    "other_sets": other_sets,
    "overhead": overhead,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure L-BFGS inside sets.")
    every = ",".join([*PARTS, "plot"])
    parser.add_argument("--only", default=every, metavar="PART,...", help=f"some of {every}")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of tables and plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        if name == "plot":
            draw(args.out / "excess.svg")
            continue
        text = f"{PARTS[name]()}\n\n{measured_on(machine.describe())}\n"
        (args.out / f"{name}.md").write_text(text)
        print(f"{name}\n\n{text}", flush=True)


if __name__ == "__main__":
    main()
