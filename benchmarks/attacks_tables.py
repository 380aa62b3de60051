"""The tables of attacks.py, and the limits that its figures must keep."""

from __future__ import annotations

from typing import Any

from attacks_peers import PEERS
from tables import markdown, measured_on

FLOOR, FLOOR_AGAIN = "floor: forward and backward", "floor, again"
FLOOR_FOUND = "floor, at the perturbed data"
OURS, SPELLED, STOPPING = "ours", "ours, gradient_ascent", "ours, stop_once_fooled"
RANDOM_START, PYAUTOATTACK = "ours, random start", "pyautoattack 0.2.0"

Report = dict[str, Any]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def excess(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}".replace("e-0", "e-")


def time_table(report: Report) -> str:
    per_step = report["kind"] == "linear"
    lines = [
        f"### {report['title']}",
        "",
        f"Balls of {report['epsilon']:g}; {report['rounds']} rounds. The fastest peer is "
        f"{report['fastest_peer']}.",
        "",
    ]
    header = ["solver", "us per step" if per_step else "ms", "to the floor", "quartiles"]
    header += ["to the fastest peer", "fooled, %", "outside the ball", "outside the box", "calls"]
    table = []
    for name, row in report["rows"].items():
        low, high = row["ratio_quartiles"]
        time = row["median_ms"] * (1e3 / report["steps"] if per_step else 1)
        cells = [name, f"{time:.0f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"]
        if "fooled" in row:
            cells += [
                f"{row['to_fastest_peer']:.2f}",
                percent(row["fooled"]),
                excess(row["outside_ball"]),
                excess(row["outside_box"]),
                f"{row['calls_per_example']:.1f}",
            ]
        else:
            cells += ["", "", "", "", str(report["steps"])]
        table.append(cells)
    return "\n".join([*lines, markdown(header, table)])


def success_table(report: Report) -> str:
    header = [
        "solver",
        "fooled, %: mean",
        "per seed",
        "outside the ball",
        "outside the box",
        "calls",
    ]
    table = []
    for name, row in report["rows"].items():
        runs = ", ".join(percent(share) for share in row["fooled_runs"])
        cells = [name, percent(row["fooled"]), runs]
        cells += [excess(row["outside_ball"]), excess(row["outside_box"]), str(row["calls"])]
        table.append(cells)
    return f"### {report['title']}\n\n{markdown(header, table)}"


def memory_table(report: Report) -> str:
    steps = list(report["use_best"])
    rows = [
        [title, *(f"{report[name][n]:,}" for n in steps)]
        for title, name in (("without", "without"), ("`use_best`", "use_best"))
    ]
    return (
        "### Peak memory over steps\n\n"
        f"Peak bytes of a solve of 64 images ({report['data_bytes']:,} bytes).\n\n"
        + markdown(["", *(f"{n} steps" for n in steps)], rows)
    )


def verdicts(report: Report) -> list[tuple[str, str, bool]]:
    """Each limit, the measured value, and whether the limit holds."""
    found = []
    for part in report["time"]:
        rows, title = part["rows"], part["title"]
        peer = rows[part["fastest_peer"]]
        mine = rows[OURS]
        if part["kind"] == "weak":
            least = max(row["fooled"] for name, row in rows.items() if name in PEERS)
            ratio = 1 / rows[STOPPING]["to_fastest_peer"]
            found += [
                (f"{title}: times faster, stopping", f">= 2: {ratio:.2f}", ratio >= 2),
                (
                    f"{title}: as successful",
                    f"{percent(rows[STOPPING]['fooled'])} vs. {percent(least)}",
                    rows[STOPPING]["fooled"] >= least - 0.005,
                ),
            ]
            continue
        most = 1.6 if part["kind"] == "linear" else 1.1
        found.append(
            (f"{title}: to the floor", f"<= {most}: {mine['ratio']:.2f}", mine["ratio"] <= most)
        )
        if part["kind"] == "wide":
            ratio, gap = mine["to_fastest_peer"], abs(mine["fooled"] - peer["fooled"])
            found += [
                (f"{title}: to the fastest peer", f"<= 1: {ratio:.3f}", ratio <= 1),
                (f"{title}: success", f"within .5 points: {100 * gap:.2f}", gap <= 0.005),
            ]
    for part in report["success"]:
        theirs = part["rows"][PYAUTOATTACK]["fooled"]
        mine = part["rows"][OURS]["fooled"]
        text = f"{percent(mine)} vs. {percent(theirs)}"
        found.append((f"{part['title']}: success", text, mine >= theirs))
    peaks = report["memory"]["use_best"].values()
    same = max(peaks) <= 1.01 * min(peaks)
    found.append(("peak of `use_best` over steps", f"{max(peaks) / min(peaks):.3f} x", same))
    parts = report["time"] + report["success"]
    worst = max(
        max(row["outside_ball"], row["outside_box"])
        for part in parts
        for name, row in part["rows"].items()
        if name in (OURS, RANDOM_START, STOPPING)
    )
    found.append(("`attack` outside ball or box", excess(worst), worst == 0))
    return found


def verdict_table(report: Report) -> str:
    rows = [[what, text, "yes" if holds else "**no**"] for what, text, holds in verdicts(report)]
    return "### Limits\n\n" + markdown(["limit", "measured", "holds"], rows)


def page(report: Report) -> str:
    parts = [measured_on(report), verdict_table(report), *map(time_table, report["time"])]
    parts += [*map(success_table, report["success"]), memory_table(report["memory"])]
    return "\n\n".join(parts) + "\n"
