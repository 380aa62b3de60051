"""Figures of robustness: accuracy against epsilon, and examples with their perturbations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rai_toolbox.extras import require
from rai_toolbox.perturbations.evaluation.interval import fraction, wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOR", "SYMBOLS", "WRONG", "Curve", "Examples", "draw", "plot_accuracy", "tidy"]

COLOR, WRONG = "#0b5fa5", "#c0152f"
SYMBOLS = {"Linf": "L∞", "L2": "L2", "L1": "L1"}
PANEL, CELL = 4.2, 1.0  # inches


class Examples(NamedTuple):
    """Some data, their perturbations in one ball, and the predictions of the model."""

    norm: str
    epsilon: float
    data: Tensor
    perturbed: Tensor
    target: Tensor
    reading: Tensor


class Curve(NamedTuple):
    """One line of an accuracy plot: at each epsilon, how many of `total` examples are right."""

    epsilons: Sequence[float]
    counts: Sequence[int]
    total: int
    label: str = "accuracy (band: 95% interval)"
    color: str = COLOR
    marker: str = "o"


def plot_accuracy(axes: Any, curves: Sequence[Curve]) -> None:
    """Plot accuracy in percent against epsilon, with bands of 95 % intervals."""
    for curve in curves:
        intervals = [wilson_interval(count, curve.total) for count in curve.counts]
        lows, highs = ([100 * end for end in ends] for ends in zip(*intervals, strict=True))
        axes.fill_between(curve.epsilons, lows, highs, color=curve.color, alpha=0.15, linewidth=0)
        percents = [100 * fraction(count, curve.total) for count in curve.counts]
        style = {"color": curve.color, "marker": curve.marker, "linewidth": 2, "clip_on": False}
        axes.plot(curve.epsilons, percents, label=curve.label, **style)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    tidy(axes)


def tidy(axes: Any) -> None:
    """No frame at the top and the right, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def draw(curves: Mapping[str, Curve], examples: Sequence[Examples]) -> Figure:
    """A panel of accuracy per norm, and the examples of each norm below."""
    figures = require("matplotlib.figure", extra="plots")
    columns = max((len(shown.data) for shown in examples), default=0)
    width = max(PANEL, CELL * columns + 0.6)
    heights = [PANEL, 3 * CELL + 0.6] if examples else [PANEL]
    figure: Figure = figures.Figure(
        figsize=(width * len(curves), sum(heights)), dpi=120, layout="constrained"
    )
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = parts[0].subplots(1, len(curves), squeeze=False)[0]
    for axes, (norm, curve) in zip(panels, curves.items(), strict=True):
        plot_accuracy(axes, [curve])
        title = f"{SYMBOLS[norm]} balls around {curve.total:,} examples"
        axes.set_title(title, loc="left", weight="bold")
        axes.set_xlabel("ε (0: original data)")
        axes.set_ylabel("predicted right (%)")
    if examples:
        below = parts[1].subfigures(1, len(examples), squeeze=False)[0]
        for part, shown in zip(below, examples, strict=True):
            _plot_examples(part, shown)
    return figure


def _plot_examples(figure: Any, shown: Examples) -> None:
    """Rows of originals, changes and results, with the classes above and below."""
    title = f"{SYMBOLS[shown.norm]}, ε = {shown.epsilon:g}; below: prediction"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    grid = figure.subplots(3, len(shown.data), squeeze=False)
    change = shown.perturbed - shown.data
    largest = max(float(change.abs().max()), 1e-30)
    both = shown.data.minimum(shown.perturbed).min(), shown.data.maximum(shown.perturbed).max()
    limits = float(both[0]), float(both[1])  # the same for originals and results
    rows = [
        ("original", shown.data, limits),
        ("change", change, (-largest, largest)),
        ("result", shown.perturbed, limits),
    ]
    for line, (name, data, limits) in zip(grid, rows, strict=True):
        for axes, example in zip(line, data, strict=True):
            _show(axes, example.detach().float().cpu(), limits, signed=name == "change")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    pairs = zip(shown.target.tolist(), shown.reading.tolist(), strict=True)
    for top, bottom, (target, predicted) in zip(grid[0], grid[2], pairs, strict=True):
        wrong = predicted != target
        top.set_title(str(target), fontsize=10)
        bottom.set_xlabel(str(predicted), color=WRONG if wrong else "0.2", fontsize=10)
        for spine in bottom.spines.values():
            spine.set(color=WRONG if wrong else "0.7", linewidth=2)


def _show(axes: Any, example: Tensor, limits: tuple[float, float], signed: bool) -> None:
    """One example: as an image if it has the shape of one, else as a curve."""
    low, high = limits
    if example.ndim == 3 and example.shape[0] == 1:
        example = example[0]
    if example.ndim == 2:
        colors = "RdBu_r" if signed else "gray"
        axes.imshow(example.tolist(), cmap=colors, vmin=low, vmax=high)
    elif example.ndim == 3 and example.shape[0] == 3:
        scaled = (example - low) / max(high - low, 1e-30)  # no change is mid-grey
        axes.imshow(scaled.clamp(0, 1).permute(1, 2, 0).tolist())
    else:
        axes.plot(example.flatten().tolist(), color=COLOR, linewidth=0.8)
        axes.set_ylim(low, high if high > low else low + 1)
