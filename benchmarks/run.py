"""Run the benchmarks: `python benchmarks/run.py [--quick]`.

Prints tables, and writes the figures with the machine and versions they belong to to
`out/bench/step_cost.json` and `out/bench/projections.json`. With the word `attacks` it measures
attacks beside other libraries', which `make bench-attacks` installs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import import_time
import machine
import projections
import step_cost
import torch
from timing import Progress, silent

try:
    from tqdm import tqdm
except ImportError:  # an extra: rai-toolbox[progress]
    tqdm = None

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"


@contextmanager
def progress_bar(text: str) -> Iterator[Progress]:
    """A bar that is told what is done and what there is in all."""
    if tqdm is None:
        print(f"{text} ...", flush=True)
        yield silent
        return
    with tqdm(desc=text, unit="round", leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of the width they need; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def step_table(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        low, high = row["ratio_quartiles"]
        target = row["target"]
        verdict = "ok" if target is None or row["ratio"] <= target else "MISSED"
        if result["noisy"]:
            verdict = "unclear"
        rows.append(
            [
                name,
                f"{row['median_ms']:.3f}",
                f"{row['ratio']:.3f}",
                f"{low:.3f} .. {high:.3f}",
                f"<= {target:.2f} {verdict}" if target is not None else "",
                f"{row['peak_bytes']:,}",
            ]
        )
    header = ["step", "ms", "ratio to bare", "its quartiles", "target", "peak bytes"]
    rounds = result["rows"][step_cost.BARE]["rounds"]
    title = (
        f"{result['case']} floats: {rounds} rounds, "
        f"largest parameter {result['largest_parameter_bytes']:,} bytes"
    )
    note = "\nThe machine was busy: a bare optimizer is that far from another. Measure again."
    return f"{title}\n{table(header, rows)}{note if result['noisy'] else ''}"


def projection_table(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        faster = result["faster"]
        ratio = 1 / row["ratio"] if faster else row["ratio"]
        target = row["target"]
        verdict = ""
        if target is not None:
            met = ratio >= target if faster else ratio <= target
            verdict = f"{'>=' if faster else '<='} {target:.1f} {'ok' if met else 'MISSED'}"
        error = row.get("error")
        cells = [name, f"{row['median_ms']:.3f}", f"{ratio:.2f}", verdict]
        rows.append([*cells, "" if error is None else f"{error:.1e}"])
    ratio = "times faster" if result["faster"] else "ratio"
    title = f"{result['case']} floats: {result['rounds']} rounds"
    return f"{title}\n{table(['projection', 'ms', ratio, 'target', 'largest error'], rows)}"


def run_steps(budget_s: float, import_rounds: int) -> dict[str, Any]:
    report: dict[str, Any] = {"step": []}
    for case in step_cost.CASES:
        with progress_bar(case.name) as progress:
            result = step_cost.run(case, budget_s=budget_s, progress=progress)
        report["step"].append(result)
        print(step_table(result), end="\n\n", flush=True)

    with progress_bar("import") as progress:
        report["import"] = import_time.run(import_rounds, progress=progress)
    print(
        "import rai_toolbox.optim: {extra_ms:.1f} ms after torch "
        "(torch alone {torch_ms:.0f} ms, both {both_ms:.0f} ms; "
        "medians of {rounds} fresh interpreters each)".format(**report["import"]),
        end="\n\n",
    )
    return report


def run_projections(budget_s: float) -> dict[str, Any]:
    report: dict[str, Any] = {"projections": []}
    cases = [(case, projections.run_sorted) for case in projections.SORTED]
    cases += [(case, projections.run_streamed) for case in projections.STREAMED]
    for case, run in cases:
        with progress_bar(case.name) as progress:
            result = run(case, budget_s=budget_s, progress=progress)
        report["projections"].append(result)
        print(projection_table(result), end="\n\n", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what constraints cost.")
    parser.add_argument(
        "what",
        nargs="*",
        metavar="steps|projections|speed|attacks",
        help="by default all but attacks",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: a first look")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    args = parser.parse_args()
    what = args.what or ["steps", "projections", "speed"]
    torch.set_num_threads(args.threads)
    budget_s, import_rounds = (3.0, 3) if args.quick else (20.0, 5)

    about = {**machine.describe(), "quick": args.quick}
    print(
        "{model}, {cpus} CPUs, {threads} threads, {vectors}, {system}".format(**about["machine"]),
        "Python {python}, torch {torch}, rai_toolbox {rai_toolbox}".format(**about["versions"]),
        about["date"],
        sep="\n",
        end="\n\n",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if "steps" in what:
        write(args.out / "step_cost.json", about | run_steps(budget_s, import_rounds))
    if "projections" in what:
        write(args.out / "projections.json", about | run_projections(budget_s))
    if "speed" in what:
        import free  # only here: it imports this script, too

        parts = free.measured(
            words=[], budget_s=budget_s, progress=progress_bar, import_rounds=import_rounds
        )
        free.renew(about, parts)
    if "attacks" in what:
        import attacks  # only here: it needs what it compares with

        report = about | attacks.run(attacks.QUICK if args.quick else attacks.Size())
        write(args.out / "attacks.json", report)


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
