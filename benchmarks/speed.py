"""The cost of constraints: steps beside bare ones, and beside loops by hand.

`python benchmarks/speed.py` measures all rows of speed_rows.py in about 12 minutes, keeps the
figures in out/bench/speed.json, and writes the tables of docs/speed.md and of
docs/contributing/speed.md. `--rows` selects rows by words in their names, `--quick` takes few
rounds, `--tables` only writes the tables again,
`--device cuda` only prints. The machine should be idle otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import import_time
import machine
import speed_tables
import torch
from memory import peak_bytes
from speed_rows import BARE, Row, Step, Work, all_rows
from timing import Progress, compare, measure, progress_bar, silent

ROOT = Path(__file__).resolve().parents[1]
KEPT, DOCS = ROOT / "out" / "bench" / "speed.json", ROOT / "docs" / "speed"

BUDGET_S, QUICK_S = 6.0, 1.0


def run(row: Row, *, budget_s: float, device: str = "cpu", progress: Progress = silent) -> Any:
    """Times, ratios, and the memory of a step of ours beyond a bare one."""
    work = row.build(device)
    steps = {
        name: _finished(step) if device == "cuda" else step for name, step in work.steps.items()
    }
    samples = measure(steps, budget_s=budget_s, reset=work.reset, progress=progress)
    base = BARE if BARE in steps else row.base
    times, against_base = compare(samples, base), compare(samples, row.base)
    for name, figures in against_base.items():
        times[name]["against_base"] = figures["ratio_quartiles"]
    return {
        "times": times,
        "ratio": against_base[row.ours]["ratio"],
        "excess": _excess(row, work) if row.tensor_bytes and device == "cpu" else 0.0,
        "compile_s": work.compile_s,
    }


def _finished(step: Step) -> Step:
    """A step on a GPU, until the GPU has finished it."""

    def done() -> None:
        step()
        torch.cuda.synchronize()

    return done


def _excess(row: Row, work: Work) -> float:
    def peak(name: str) -> int:
        work.reset()
        return peak_bytes(work.steps[name])

    return (peak(row.ours) - peak(BARE)) / row.tensor_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[], help="words in the names of rows")
    parser.add_argument("--quick", action="store_true", help="few rounds: a first look")
    parser.add_argument("--tables", action="store_true", help="from the figures of the last run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: prints only"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tables:
        write(json.loads(KEPT.read_text()))
    else:
        measured(args.rows, quick=args.quick, device=args.device)


def measured(words: list[str], *, quick: bool = False, device: str = "cpu") -> None:
    """Measure rows, all or those with a word in their names; figures of others are kept."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"figures": {}}
    report = {**machine.describe(), "figures": kept["figures"]}
    budget_s = QUICK_S if quick else BUDGET_S
    for row in all_rows():
        if not words or any(word in row.name for word in words):
            with progress_bar(row.name) as progress:
                found = run(row, budget_s=budget_s, device=device, progress=progress)
            missed = "" if speed_tables.holds(row, found["ratio"]) else "  MISSED"
            limit = "" if row.limit is None else f" <= {row.limit}"
            print(f"{row.name} = {found['ratio']:.2f}{limit}{missed}", flush=True)
            report["figures"][row.name] = found
            if device == "cpu":  # now, so that an interrupted run is not lost
                write(report)
    if not words or "import" in words:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is cached, as for users
        report["figures"]["import"] = import_time.run(3 if quick else 9)
        write(report)


def write(report: dict[str, Any]) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(report, indent=1) + "\n")
    for name, table in (("costs", speed_tables.costs), ("targets", speed_tables.targets)):
        (DOCS / f"{name}.md").write_text(table(report["figures"], report))


if __name__ == "__main__":
    main()
