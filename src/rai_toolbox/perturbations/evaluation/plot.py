"""Figures of robustness: accuracy against epsilon, and examples with their perturbations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rai_toolbox.extras import require

# Colors that remain distinct for color-blind readers and in grey.
COLORS = ("#0b5fa5", "#e07b00", "#4c9f70", "#8c6bb1")
MARKERS = "os^D"
WRONG = "#c0152f"
SYMBOLS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
MOST_BARS = 100
PANEL, CELL = 4.2, 1.0  # inches

# `Any` stands for the classes of matplotlib, and of the report, whose file imports this one.


def draw_report(report: Any, title: str = "") -> Any:
    """A panel of accuracy per norm, and the examples below; what was attacked, and by what."""
    figures = require("matplotlib.figure", extra="plots")
    norms, examples = list(report.epsilons), report.examples
    columns = max((len(shown.data) for shown in examples), default=0)
    width = max(PANEL, CELL * columns + 0.6)
    heights = [PANEL, 3 * CELL + 0.6] if examples else [PANEL]
    size = width * len(norms), sum(heights)
    figure = figures.Figure(figsize=size, dpi=120, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    lines = [title] if title else []
    if "solver" in report.settings:
        lines.append(f"attacked by {_attacks_of(report.settings['solver'])}")
    if lines:
        parts[0].suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    for axes, norm in zip(parts[0].subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        draw_accuracy(axes, {"robust accuracy": report}, norm)
    if examples:
        below = parts[1].subfigures(1, len(examples), squeeze=False)[0]
        for part, shown in zip(below, examples, strict=True):
            _draw_examples(part, shown)
    return figure


def draw_accuracy(axes: Any, reports: Mapping[str, Any], norm: str) -> None:
    """Accuracy against epsilon in balls of one norm, with a 95 % interval, one curve per report."""
    for (name, report), color, marker in zip(reports.items(), COLORS, MARKERS, strict=False):
        rows = report.rows_of(norm)
        epsilons = [row.epsilon for row in rows]
        low, high = [100 * row.low for row in rows], [100 * row.high for row in rows]
        axes.fill_between(epsilons, low, high, color=color, alpha=0.15, linewidth=0)
        accuracies = [100 * row.robust_accuracy for row in rows]
        label = f"{name} (band: 95% interval)"
        axes.plot(epsilons, accuracies, color=color, marker=marker, linewidth=2, label=label)
        doubtful = [row for row in rows if row.unreliable]
        points = [row.epsilon for row in doubtful], [100 * row.robust_accuracy for row in doubtful]
        if doubtful:
            axes.plot(*points, "x", color=WRONG, markersize=12, label=f"{name}: unreliable")
    axes.set_title(f"{SYMBOLS[norm]} balls, {len(report):,} examples", loc="left", weight="bold")
    axes.set(xlabel="ε (at 0: the original data)", xlim=(0, None))
    axes.set(ylabel="correct (%)", ylim=(0, 100))
    tidy(axes)


def _attacks_of(solver: Any) -> str:
    """The names of the attacks, from a solver as it is described in the settings."""
    if isinstance(solver, Mapping):
        return ", ".join(solver.get("attacks", [])) or _attacks_of(solver.get("call"))
    return str(solver).rpartition(".")[2]


def tidy(axes: Any) -> None:
    """A legend without a frame, no lines at the top and the right, and a grid behind the data."""
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def _draw_examples(figure: Any, shown: Any) -> None:
    """Rows of originals, changes and results, with the classes above and below."""
    title = f"{SYMBOLS[shown.norm]}, ε = {shown.epsilon:g}; below: prediction"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    grid = figure.subplots(3, len(shown.data), squeeze=False)
    change = shown.perturbed - shown.data
    largest = max(float(change.abs().max()), 1e-30)
    both = shown.data.minimum(shown.perturbed).min(), shown.data.maximum(shown.perturbed).max()
    limits = float(both[0]), float(both[1])  # the same for originals and results
    rows = [
        ("original", shown.data, limits, "gray"),
        ("change", change, (-largest, largest), "RdBu_r"),
        ("result", shown.perturbed, limits, "gray"),
    ]
    for line, (name, data, limits, colors) in zip(grid, rows, strict=True):
        for axes, example in zip(line, data, strict=True):
            image = _show(axes, example.detach().float().cpu(), limits, colors)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
        if name == "change" and image is not None:
            figure.colorbar(image, ax=list(line), ticks=[-largest, 0, largest], format="%.2g")
        elif name == "change":  # curves, bars, or colors, in which no change is grey
            line[0].set_ylabel(f"change, ±{largest:.2g}")
    misread = shown.reading != shown.target if shown.misread is None else shown.misread
    texts = map(_texts, (shown.target, shown.reading))
    examples = zip(grid[0], grid[2], *texts, misread.tolist(), strict=True)
    for top, bottom, target, predicted, wrong in examples:
        top.set_title(target, fontsize=10)
        bottom.set_xlabel(predicted, color=WRONG if wrong else "0.2", fontsize=10)
        bottom.spines[:].set(color=WRONG if wrong else "0.7", linewidth=2)


def _texts(values: Tensor) -> list[str]:
    """One text for each example; none for those of many numbers."""
    rows = values.reshape(len(values), -1)
    if rows.shape[1] > 5:
        return [""] * len(rows)
    texts = "{:.3g}" if values.is_floating_point() else "{}"
    return [" ".join(map(texts.format, row)) for row in rows.tolist()]


def _show(axes: Any, example: Tensor, limits: tuple[float, float], colors: str) -> Any:
    """One example: as an image if it has the shape of one, few features as bars, else a curve.

    Gives an image whose colors stand for numbers.
    """
    low, high = limits
    if example.ndim == 3 and example.shape[0] == 1:
        example = example[0]
    if example.ndim == 2:
        return axes.imshow(example.tolist(), cmap=colors, vmin=low, vmax=high)
    if example.ndim == 3 and example.shape[0] == 3:
        scaled = (example - low) / max(high - low, 1e-30)  # no change is mid-grey
        axes.imshow(scaled.clamp(0, 1).permute(1, 2, 0).tolist())
    else:
        values = example.flatten().tolist()
        if example.ndim == 1 and len(values) <= MOST_BARS:
            axes.bar(range(len(values)), values, color=COLORS[0])
        else:
            axes.plot(values, color=COLORS[0], linewidth=0.8)
        axes.set_ylim(low, high if high > low else low + 1)
    return None
