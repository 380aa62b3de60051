"""The cost of constraints: limits, measured ratios, and growth with size.

`python benchmarks/speed.py` measures everything and writes docs/speed.md and its plot, in about
fifteen minutes, half of them for compiling; `--budget` is the time of each case in seconds.
`--rows` selects cases by words in their names; `--page` rewrites page and plot from the figures of
the last run. The machine should be idle otherwise. If there is a GPU, the cases are also timed on
it, and docs/speed/cuda.md is written; `--device cuda` does only that.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import import_time
import machine
import torch
from memory import peak_bytes
from projections import textbook_l1
from tables import markdown, measured_on, save_svg, svg_figure
from timing import Progress, compare, measure, progress_bar, silent
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer

from rai_toolbox.constraints import Box, Constraint, L1Ball, L2Ball, UnitNorm
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedOptimizer, compiled

ROOT = Path(__file__).resolve().parents[1]
KEPT, DOCS = ROOT / "out" / "bench" / "speed.json", ROOT / "docs"

BARE, AGAIN, OURS, COMPILED = "bare", "bare, again", "ours", "ours, compiled"
FUSED, LOOP, SORTED = "fused, unconstrained", "loop", "loop by sorting"
AROUND_FUSED = "ours, around the fused one"
BARE_TOGETHER, TOGETHER = "bare, foreach=True", "ours, foreach=True"
PARAMETRIZED = "parametrization"
NOISE = 0.05  # if two bare optimizers differ by more, the machine was busy

Step = Callable[[], object]
Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer on `count` tensors of a shape, and the limits (ours, to what) -> ratio."""

    name: str
    inner: partial[Any]
    count: int
    shape: tuple[int, ...]
    ours: Callable[..., Optimizer]
    limits: dict[tuple[str, str], float]
    loop: Callable[[Tensor], object] | None = None
    lr: float = 1e-4  # small: the work must not change while it is timed

    @property
    def work(self) -> str:
        size = ", ".join(f"{n:,}" for n in self.shape)
        size = size if len(self.shape) == 1 else f"({size})"
        return f"{self.name}, {self.inner.func.__name__}, {self.count:,} x {size}"


clamp = partial(ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0)


def kept_in(constraint: Constraint, **options: Any) -> Callable[..., Optimizer]:
    return partial(ProjectedOptimizer, constraint=constraint, **options)


def l2_rows_(x: Tensor) -> None:
    x.mul_(torch.clamp(20.0 / torch.linalg.vector_norm(x, dim=1, keepdim=True), max=1.0))


def unit_rows_(x: Tensor) -> None:
    x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


SMALL, LARGE, ROWS = (2_000, (1_000,)), (1, (16_000_000,)), (160, (400, 400))
FEW = (20, (400, 400))  # what takes seconds to compile for each tensor
CASES = [
    Case("clamp", partial(SGD), *SMALL, clamp, {(OURS, BARE): 1.10}, lambda x: x.clamp_(-1, 1)),
    Case("clamp", partial(AdamW), *SMALL, clamp, {(OURS, BARE): 1.03}, lambda x: x.clamp_(-1, 1)),
    Case("clamp", partial(SGD), *LARGE, clamp, {(COMPILED, BARE): 1.10}, lambda x: x.clamp_(-1, 1)),
    Case(
        "clamp",
        partial(AdamW),
        *LARGE,
        clamp,
        {(COMPILED, BARE): 0.35, (COMPILED, FUSED): 1.10},
        lambda x: x.clamp_(-1, 1),
    ),
    # Rows have a norm of 20 on average.
    Case(
        "L2 ball of each row, all inside",
        partial(SGD, momentum=0.9),
        *ROWS,
        kept_in(L2Ball(30.0)),
        {(OURS, BARE): 1.4},
        l2_rows_,
    ),
    Case(
        "L2 ball of each row, half outside",
        partial(SGD, momentum=0.9),
        *ROWS,
        kept_in(L2Ball(20.0)),
        {(OURS, BARE): 1.4},
        l2_rows_,
    ),
    Case(
        "L1 ball of each row, all outside",
        partial(SGD),
        *ROWS,
        kept_in(L1Ball(10.0)),
        {(COMPILED, BARE): 8.0, (OURS, SORTED): 0.1},
        lr=1e-1,
    ),
    Case(
        "unit norm of each row",
        partial(AdamW),
        *FEW,
        kept_in(UnitNorm()),
        {(COMPILED, BARE): 1.0},
        unit_rows_,
        lr=1e-2,
    ),
    Case(
        "unit norm of each row, without the gradient mapping",
        partial(AdamW),
        *ROWS,
        kept_in(UnitNorm(), gradient_mapping=False),
        {(COMPILED, BARE): 1.0},
        unit_rows_,
        lr=1e-2,
    ),
]


def parameters(count: int, shape: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    """Standard normal numbers, and gradients that point outward."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(count):
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
        param.grad = torch.randn(shape, generator=generator).to(device) - param.detach()
        params.append(param)
    return params


def then(step: Step, change_: Callable[[Tensor], object], params: list[Tensor]) -> Step:
    """The loop that one writes by hand."""

    def both() -> None:
        step()
        with torch.no_grad():
            for param in params:
                change_(param)

    return both


def sorted_l1_(x: Tensor) -> None:
    x.copy_(textbook_l1(x / 10.0) * 10.0)


def parametrized(case: Case, device: str) -> Step:
    """A step of torch's `weight_norm`, with what its parametrization adds to forward and backward.

    The norms are fixed; each forward pass computes all weights again, and the backward pass
    differentiates through them.
    """
    count, shape = case.count, case.shape
    layers = [torch.nn.Linear(shape[1], shape[0], False, device) for _ in range(count)]
    for layer in layers:
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.requires_grad_(False)
    directions = [layer.parametrizations.weight.original1 for layer in layers]
    optimizer = case.inner(directions, lr=case.lr)
    grads = [torch.randn(shape, device=device) for _ in layers]

    def step() -> None:
        optimizer.zero_grad()
        for layer, grad in zip(layers, grads, strict=True):
            layer.weight.backward(grad)
        optimizer.step()

    return step


def synchronized(step: Step) -> Step:
    """A step on a GPU, until the GPU has finished it."""

    def done() -> None:
        step()
        torch.cuda.synchronize()

    return done


def alternatives(case: Case, device: str) -> tuple[dict[str, Step], dict[str, float]]:
    """The steps to compare, on the same parameters, and the seconds of compilation."""
    params = parameters(case.count, case.shape, device)

    def bare(**options: Any) -> Step:
        return case.inner(params, lr=case.lr, **options).step  # type: ignore[no-any-return]

    def ours(**options: Any) -> Optimizer:
        return case.ours(params, case.inner, lr=case.lr, **options)

    steps: dict[str, Step] = {BARE: bare(), AGAIN: bare(), OURS: ours().step}
    compared = {name for pair in case.limits for name in pair}
    seconds = {}
    if COMPILED in compared:
        torch.compiler.reset()
        steps[COMPILED] = compiled(ours())
        steps[COMPILED]()
        start = perf_counter()
        steps[COMPILED]()
        seconds[COMPILED] = perf_counter() - start
    if FUSED in compared:
        steps[FUSED] = bare(fused=True)
        steps[AROUND_FUSED] = ours(fused=True).step
    if case.count == SMALL[0]:  # torch does not use it on CPU by default
        steps[BARE_TOGETHER] = bare(foreach=True)
        steps[TOGETHER] = ours(foreach=True).step
    if case.loop is not None:
        steps[LOOP] = then(bare(), case.loop, params)
    if SORTED in compared:
        steps[SORTED] = then(bare(), sorted_l1_, params)
    if isinstance(getattr(case.ours, "keywords", {}).get("constraint"), UnitNorm):
        steps[PARAMETRIZED] = parametrized(case, device)
    if device == "cuda":
        steps = {name: synchronized(step) for name, step in steps.items()}
    return steps, seconds


def run(case: Case, *, budget_s: float, device: str = "cpu", progress: Progress = silent) -> Report:
    """Times, ratios and peak memory of all alternatives of a case, as plain data."""
    steps, seconds = alternatives(case, device)
    samples = measure(steps, budget_s=budget_s, progress=progress)
    rows = compare(samples, BARE)
    peaks = {name: peak_bytes(step) for name, step in steps.items() if name != AGAIN}
    limits = []
    for (ours, base), limit in case.limits.items():
        ratio = compare(samples, base)[ours]["ratio"]
        limits.append({"ours": ours, "to": base, "limit": limit, "ratio": ratio})
    return {
        "work": case.work,
        "rounds": rows[BARE]["rounds"],
        "rows": rows,
        "limits": limits,
        "noise": rows[AGAIN]["ratio"],
        "compile_s": seconds,
        "largest_parameter_bytes": 4 * torch.Size(case.shape).numel(),
        "peak_bytes": peaks,
    }


# Growth

TOTAL = 10_000_000
SIZES = [10**k for k in range(3, 8)]
COUNTS = [1, 10, 100, 1_000, 5_000]
GROWING = {
    "Box": Box(-1.0, 1.0),
    "L2Ball": L2Ball(10.0),
    "L1Ball": L1Ball(10.0),
    "UnitNorm": UnitNorm(),
}


def growth(*, budget_s: float, progress: Progress = silent) -> Report:
    """Nanoseconds per element of a projection: one tensor of more elements, and more tensors."""

    def ns(constraint: Constraint, count: int, shape: tuple[int, int]) -> float:
        tensors = [t.detach() for t in parameters(count, shape)]
        starts = [t.clone() for t in tensors]

        def again() -> None:
            torch._foreach_copy_(tensors, starts)

        def project() -> None:
            again()
            constraint.project_each_(tensors)

        with torch.no_grad():
            rows = compare(measure({"copy": again, "both": project}, budget_s=budget_s), "copy")
        spent = rows["both"]["median_ms"] - rows["copy"]["median_ms"]
        return 1e6 * spent / (count * shape[0] * shape[1])

    report: Report = {"elements": SIZES, "tensors": COUNTS, "by_elements": {}, "by_tensors": {}}
    done, total = 0, len(GROWING) * (len(SIZES) + len(COUNTS))
    for name, constraint in GROWING.items():
        for what, cases in (
            ("by_elements", [(1, (n // 100, 100)) for n in SIZES]),
            ("by_tensors", [(n, (20, 100)) for n in COUNTS]),
        ):
            report[what][name] = []
            for count, shape in cases:
                report[what][name].append(ns(constraint, count, shape))
                done += 1
                progress(done, total)
    return report


# The page


def verdict(limit: Report) -> str:
    return "holds" if limit["ratio"] <= limit["limit"] else "**missed**"


def limit_rows(report: Report) -> list[list[str]]:
    rows = []
    for case in report["cases"]:
        for limit in case["limits"]:
            rows.append(
                [
                    case["work"],
                    f"{limit['ours']} / {limit['to']}",
                    f"<= {limit['limit']:.2f}",
                    f"{limit['ratio']:.3f}",
                    verdict(limit) + (" (busy)" if abs(case["noise"] - 1) > NOISE else ""),
                ]
            )
    if "import" in report:
        extra = report["import"]["extra_ms"]
        held = "holds" if extra <= 30 else "**missed**"
        rows.append(["import `rai_toolbox.optim`", "ms over torch", "<= 30", f"{extra:.1f}", held])
    return rows


def memory_rows(report: Report) -> list[list[str]]:
    rows = []
    for case in report["cases"]:
        peaks = case["peak_bytes"]
        for name in (OURS, COMPILED):
            if name in peaks:
                over = (peaks[name] - peaks[BARE]) / case["largest_parameter_bytes"]
                rows.append([case["work"], name, f"{peaks[name]:,}", f"{over:.2f}"])
    return rows


def time_rows(report: Report) -> list[list[str]]:
    return [
        [
            case["work"],
            name,
            f"{row['median_ms']:.2f}",
            f"{row['ratio']:.3f}",
            "{:.3f} .. {:.3f}".format(*row["ratio_quartiles"]),
            f"{case['compile_s'][name]:.0f} s" if name in case["compile_s"] else "",
        ]
        for case in report["cases"]
        for name, row in case["rows"].items()
    ]


def page(report: Report) -> str:
    parts = [
        (DOCS / "speed" / "about.md").read_text().rstrip(),
        f"{measured_on(report)}{' A quick run.' if report['quick'] else ''}",
        "## Limits",
        "Each figure is a ratio within one run: the median over rounds, in each of which all\n"
        "alternatives are timed in shuffled order.",
        markdown(["work", "ratio", "limit", "measured", ""], limit_rows(report)),
        '"Busy": a second bare optimizer took over 5 % more or less time than the first.',
        "## All alternatives",
        markdown(
            ["work", "step", "ms", "to bare", "quartiles", "compiling"],
            time_rows(report),
        ),
        "## Memory",
        "The peak number of bytes that a step allocates besides parameters, gradients and state;\n"
        "and its excess over the bare step, in units of the largest parameter.",
        markdown(["work", "step", "peak bytes", "excess"], memory_rows(report)),
    ]
    if "growth" in report:
        parts += ["## Growth", "![Nanoseconds per element](speed/growth.svg)"]
    parts.append((DOCS / "speed" / "tried.md").read_text().rstrip())
    return "\n\n".join(parts) + "\n"


def draw(report: Report, path: Path) -> None:
    figure = svg_figure(9, 3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what, xs, label in (
        (left, "by_elements", report["elements"], "elements of one tensor, in rows of 100"),
        (right, "by_tensors", report["tensors"], "tensors of (20, 100)"),
    ):
        for name, ns in report[what].items():
            axes.loglog(xs, ns, marker="o", markersize=3, label=name)
        axes.set_xlabel(label)
    left.set_ylabel("ns per element, projection")
    right.legend(frameon=False)
    save_svg(figure, path)


def cuda_page(*, words: list[str], budget_s: float) -> str:
    """The table of all alternatives on a GPU; limits are for the CPU only."""
    cases = []
    for case in CASES:
        if not words or any(word in case.work for word in words):
            with progress_bar(f"{case.work}, GPU") as update:
                cases.append(run(case, budget_s=budget_s, device="cuda", progress=update))
    header = ["work", "step", "ms", "to bare", "quartiles", "compiling"]
    return "\n\n".join(
        [
            "# What a constraint costs on a GPU",
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {date.today()}. A step is "
            "timed until the GPU has finished it.",
            markdown(header, time_rows({"cases": cases})) + "\n",
        ]
    )


def measured(*, words: list[str], budget_s: float, import_rounds: int) -> Iterator[Report]:
    """Everything, or the cases and parts that contain one of `words`, one after the other."""

    def wanted(name: str) -> bool:
        return not words or any(word in name for word in words)

    for case in CASES:
        if wanted(case.work):
            with progress_bar(case.work) as update:
                found = run(case, budget_s=budget_s, progress=update)
            print(*time_lines(found), sep="\n", end="\n\n", flush=True)
            yield {"cases": [found]}
    if wanted("import"):
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is cached, as for users
        with progress_bar("import") as update:
            yield {"import": import_time.run(import_rounds, progress=update)}
    if wanted("growth"):
        with progress_bar("growth") as update:
            yield {"growth": growth(budget_s=budget_s / 20, progress=update)}


def renew(about: Report, parts: Iterable[Report]) -> None:
    """Rewrite the page after each part, so that an interrupted run is not lost."""
    for part in parts:
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        write(merged(kept, about | part))
    print(f"page: {DOCS / 'speed.md'}")


def time_lines(case: Report) -> list[str]:
    lines = [f"{case['work']}: {case['rounds']} rounds"]
    for name, row in case["rows"].items():
        lines.append(f"  {name:28} {row['median_ms']:10.3f} ms {row['ratio']:8.3f}")
    for limit in case["limits"]:
        text = (
            f"  {limit['ours']} / {limit['to']} = {limit['ratio']:.3f}, <= {limit['limit']:.2f}: "
        )
        lines.append(text + verdict(limit).strip("*"))
    return lines


def merged(old: Report, new: Report) -> Report:
    """The figures of `old`, with those of `new` in place of the same work."""
    cases = {case["work"]: case for case in [*old.get("cases", []), *new.get("cases", [])]}
    order = {case.work: i for i, case in enumerate(CASES)}
    known = sorted(
        (c for c in cases.values() if c["work"] in order), key=lambda c: order[c["work"]]
    )
    return {**old, **new, "cases": known}


def write(report: Report) -> None:
    """The page, and its plot."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(report, indent=1) + "\n")
    (DOCS / "speed.md").write_text(page(report))
    if "growth" in report:
        draw(report["growth"], DOCS / "speed" / "growth.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[], help="words in the names of cases")
    parser.add_argument("--page", action="store_true", help="from the figures of the last run")
    parser.add_argument("--quick", action="store_true", help="few rounds: a first look")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default both, if there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.page:
        write(json.loads(KEPT.read_text()))
        return
    budget_s = min(3.0, args.budget) if args.quick else args.budget
    if args.device != "cuda":
        rounds = 3 if args.quick else 9
        parts = measured(words=args.rows, budget_s=budget_s, import_rounds=rounds)
        renew({**machine.describe(), "quick": args.quick}, parts)
    if args.device == "cuda" or (args.device is None and torch.cuda.is_available()):
        text = cuda_page(words=args.rows, budget_s=budget_s)
        (DOCS / "speed" / "cuda.md").write_text(text)


if __name__ == "__main__":
    main()
