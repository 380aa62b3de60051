"""The tables of the documentation, from the figures of speed.py."""

from __future__ import annotations

import math
from typing import Any

import speed_rows
from speed_rows import BARE, LOOP, NAMED, OURS, SORTED, Row
from tables import markdown, measured_on

Found = dict[str, Any]
"""Of a row: `times` of its steps, `excess` memory in largest parameters, and `compile_s`."""

TOLERANCE = 1.05  # for noise, of ratios to the loop


def costs(figures: dict[str, Found], about: dict[str, Any]) -> str:
    """For users: steps with a constraint beside bare ones, and beside loops."""
    rows = [row for row in speed_rows.all_rows() if row.name in figures]
    sizes = list(dict.fromkeys(_size(row) for row in rows if row.part == NAMED))
    by_name: dict[str, list[str]] = {}
    for row in rows:
        if row.part == NAMED:
            by_name.setdefault(_name(row), []).append(_cost(figures[row.name]))
    others = [
        [
            row.work,
            f"{_times(figures[row.name])[BARE]['median_ms']:.2f}",
            _cost(figures[row.name], row.ours),
            f"{figures[row.name]['compile_s']:.0f} s" if row.part == speed_rows.FEW else "",
        ]
        for row in rows
        if row.part != NAMED and BARE in _times(figures[row.name])
    ]
    return "\n\n".join(
        [
            measured_on(about),
            markdown(["optimizer", *sizes], [[name, *cells] for name, cells in by_name.items()]),
            markdown(["constraint", "bare, ms", "times that", "compiling"], others) + "\n",
        ]
    )


def targets(figures: dict[str, Found], about: dict[str, Any]) -> str:
    """For contributors: what was to be reached, and whether it was."""
    rows = [row for row in speed_rows.all_rows() if row.name in figures]
    lines = []
    for row in rows:
        found = figures[row.name]
        ratio = found["ratio"]
        verdict = "" if row.limit is None else "holds" if holds(row, ratio) else "**missed**"
        limit = "" if row.limit is None else f"{row.limit:.2f}"
        quartiles = "{:.2f} .. {:.2f}".format(*_times(found)[row.ours]["against_base"])
        lines.append([row.work, f"{row.ours} / {row.base}", limit, f"{ratio:.2f}", quartiles])
        lines[-1].append(verdict)
    named = [figures[row.name]["ratio"] for row in rows if row.part == NAMED]
    if named:
        mean = math.exp(sum(map(math.log, named)) / len(named))
        verdict = "holds" if mean <= 0.8 else "**missed**"
        title = "geometric mean of the named optimizers"
        lines.append([title, f"{OURS} / {LOOP}", "0.80", f"{mean:.2f}", "", verdict])
    if "import" in figures:
        extra = figures["import"]["extra_ms"]
        verdict = "holds" if extra <= 30 else "**missed**"
        lines.append(["import `rai_toolbox.optim`", "ms", "30", f"{extra:.1f}", "", verdict])
    memory = [
        [
            row.work,
            f"{row.tensors_allowed:.0f}",
            f"{figures[row.name]['excess']:.2f}",
            "holds" if figures[row.name]["excess"] <= row.tensors_allowed + 0.01 else "**missed**",
        ]
        for row in rows
        if row.tensor_bytes
    ]
    return "\n\n".join(
        [
            measured_on(about),
            markdown(["work", "ratio", "limit", "measured", "quartiles", ""], lines),
            "The memory that a step takes at its peak, beyond that of the bare step, in tensors of "
            "the size of\nthe largest parameter:",
            markdown(["work", "limit", "measured", ""], memory) + "\n",
        ]
    )


def holds(row: Row, ratio: float) -> bool:
    if row.limit is None:
        return True
    return ratio <= row.limit * (TOLERANCE if row.part == NAMED else 1.0)


def _times(found: Found) -> Any:
    return found["times"]


def _cost(found: Found, ours: str = OURS) -> str:
    """A step of ours in units of the bare one; in brackets, that by hand."""
    times = _times(found)
    loop = next(name for name in (LOOP, SORTED) if name in times)
    return f"{times[ours]['ratio']:.2f} ({times[loop]['ratio']:.2f})"


def _name(row: Row) -> str:
    return f"`{row.work.partition(',')[0]}`"


def _size(row: Row) -> str:
    return row.work.split(", ", 2)[2]
