"""Run the benchmarks: `python benchmarks/run.py [--quick]`.

Prints tables, and writes the figures of projections with machine and versions to
`out/bench/projections.json`, and those of steps to docs/speed/ (see speed.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import projections
import speed
import torch
from tables import measured_on
from timing import progress_bar

OUT = Path(__file__).resolve().parents[1] / "out" / "bench"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of the width they need; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


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
        metavar="projections|speed",
        help="by default both",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: a first look")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    args = parser.parse_args()
    what = args.what or ["projections", "speed"]
    torch.set_num_threads(args.threads)
    budget_s = 3.0 if args.quick else 20.0

    about = {**machine.describe(), "quick": args.quick}
    print(measured_on(about), end="\n\n")
    args.out.mkdir(parents=True, exist_ok=True)
    if "projections" in what:
        write(args.out / "projections.json", about | run_projections(budget_s))
    if "speed" in what:
        speed.measured([], quick=args.quick)


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
