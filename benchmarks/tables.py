"""What the pages of all benchmarks share: Markdown tables, the line on the machine, SVG plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measured_on(about: dict[str, Any]) -> str:
    """One sentence on the date, the machine and the versions of `machine.describe`."""
    machine = "{model}, {cpus} CPUs, {threads} threads, {vectors}, {system}".format(
        **about["machine"]
    )
    versions = "Python {python}, torch {torch}".format(**about["versions"])
    return f"Measured on {about['date'][:10]}: {machine}; {versions}."


def svg_figure(width: float, height: float) -> Any:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "rai_toolbox"  # the same file in every run
    rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def save_svg(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
