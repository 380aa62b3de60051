"""Pictures of robustness: accuracy against epsilon, and what was done to some of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from rai_toolbox.extras import require
from rai_toolbox.perturbations.report import Examples, RobustnessReport, wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_report"]

COLOR = "#0b5fa5"
WRONG = "#c0152f"
SIGN = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
PANEL, CELL = 4.2, 1.0  # inches


def draw_report(report: RobustnessReport) -> Figure:
    """Accuracy against epsilon, a panel per norm, and the examples below."""
    figures = require("matplotlib.figure", extra="plots")
    norms, examples = list(report.epsilons), report.examples
    columns = max((len(shown.data) for shown in examples), default=0)
    width = max(PANEL, CELL * columns + 0.6)
    heights = [PANEL, 3 * CELL + 0.6] if examples else [PANEL]
    figure: Figure = figures.Figure(
        figsize=(width * len(norms), sum(heights)), dpi=120, layout="constrained"
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, name in zip(parts[0].subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        _accuracy(axes, report, name)
    if examples:  # one for each norm, below its panel
        below = parts[1].subfigures(1, len(examples), squeeze=False)[0]
        for part, shown in zip(below, examples, strict=True):
            _examples(part, shown)
    return figure


def _accuracy(axes: Any, report: RobustnessReport, name: str) -> None:
    rows = [row for row in report.rows() if row.norm == name]
    low, high = wilson_interval(round(report.clean_accuracy * len(report)), len(report))
    points = [(0.0, report.clean_accuracy, low, high)]
    points += [(row.epsilon, row.robust_accuracy, row.low, row.high) for row in rows]
    epsilons, shares, lows, highs = zip(*points, strict=True)
    axes.fill_between(
        epsilons,
        [100 * share for share in lows],
        [100 * share for share in highs],
        color=COLOR,
        alpha=0.15,
        linewidth=0,
        label="95% interval",
    )
    axes.plot(epsilons, [100 * share for share in shares], color=COLOR, marker="o", linewidth=2)
    axes.set_title(f"{SIGN[name]} balls around {len(report):,} data", loc="left", weight="bold")
    axes.set_xlabel("ε (at 0: the data as they are)")
    axes.set_ylabel("read right (%)")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _examples(figure: Any, shown: Examples) -> None:
    figure.suptitle(
        f"{SIGN[shown.norm]}, ε = {shown.epsilon:g}; below: read as",
        x=0.01,
        ha="left",
        weight="bold",
    )
    grid = figure.subplots(3, len(shown.data), squeeze=False)
    change = shown.perturbed - shown.data
    reach = max(float(change.abs().max()), 1e-30)
    # one scale for originals and results, so that they can be compared by eye
    low, high = float(shown.data.min()), float(shown.data.max())
    low, high = min(low, float(shown.perturbed.min())), max(high, float(shown.perturbed.max()))
    rows = [
        ("original", shown.data, (low, high)),
        ("change", change, (-reach, reach)),
        ("result", shown.perturbed, (low, high)),
    ]
    for line, (title, data, limits) in zip(grid, rows, strict=True):
        for j, axes in enumerate(line):
            _show(axes, data[j].detach().float().cpu(), limits, title == "change")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(title)
    for j, (top, bottom) in enumerate(zip(grid[0], grid[2], strict=True)):
        target, reading = int(shown.target[j]), int(shown.reading[j])
        top.set_title(str(target), fontsize=10)
        wrong = reading != target
        bottom.set_xlabel(str(reading), color=WRONG if wrong else "0.2", fontsize=10)
        for spine in bottom.spines.values():
            spine.set(color=WRONG if wrong else "0.7", linewidth=2)


def _show(axes: Any, datum: Tensor, limits: tuple[float, float], signed: bool) -> None:
    """One datum: as an image if its shape is that of one, else as a curve."""
    low, high = limits
    if datum.ndim == 3 and datum.shape[0] == 1:
        datum = datum[0]
    if datum.ndim == 2:
        colors = "RdBu_r" if signed else "gray"
        axes.imshow(datum.tolist(), cmap=colors, vmin=low, vmax=high)
    elif datum.ndim == 3 and datum.shape[0] == 3:
        scaled = (datum - low) / max(high - low, 1e-30)  # a change of 0 is mid-grey
        axes.imshow(scaled.clamp(0, 1).permute(1, 2, 0).tolist())
    else:
        axes.plot(datum.flatten().tolist(), color=COLOR, linewidth=0.8)
        axes.set_ylim(low, high if high > low else low + 1)
