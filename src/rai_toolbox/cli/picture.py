"""The picture of the demo: accuracy against epsilon, weights, and perturbed digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rai_toolbox.extras import require
from rai_toolbox.perturbations.evaluation.rows import wilson_interval

__all__ = ["Example", "draw", "tidy", "write_title"]

# Colors that stay apart for color-blind readers and in grey.
COLOR = {"bounded": "#0b5fa5", "free": "#e07b00"}
MARKER = {"bounded": "o", "free": "s"}
WRONG = "#c0152f"
NORM = {"Linf": "L∞", "L2": "L2"}
UNIT = {
    "Linf": "ε: largest change of any pixel (pixels are in [0, 1])",
    "L2": "ε: Euclidean length of the change of the image",
}


class Example(NamedTuple):
    """Digits under a title, shape (N, 28, 28), what they are and how they are read, shape (N,)."""

    title: str
    images: Tensor
    labels: Tensor
    readings: Tensor


def draw(
    path: Path, report: dict[str, Any], weights: dict[str, Tensor], examples: list[Example]
) -> None:
    """Write the picture of `report` to `path`."""
    figure = require("matplotlib.figure", extra="demo").Figure(figsize=(13, 9.6), dpi=120)
    bound, nets = report["bound"], report["nets"]
    figure.text(
        0.05,
        0.965,
        f"A CNN that reads MNIST digits, trained with every weight held in ±{bound['clamp_max']:g}"
        " and trained free",
        fontsize=16,
        weight="bold",
    )
    figure.text(
        0.05,
        0.935,
        f"Largest violation of the bounds after any of {bound['steps_checked']} steps: "
        f"{bound['largest_violation']:g}.  Test accuracy: bounded "
        f"{nets['bounded']['test_accuracy']:.1%}, free {nets['free']['test_accuracy']:.1%}.",
        fontsize=12,
        color="0.25",
    )
    grid = figure.add_gridspec(
        2, 2, left=0.05, right=0.98, top=0.85, bottom=0.065, hspace=0.5, wspace=0.16
    )
    for column, norm in enumerate(NORM):
        rows = [row for row in report["perturbations"] if row["norm"] == norm]
        number = report["settings"]["digits_perturbed"]
        _accuracy(figure.add_subplot(grid[0, column]), rows, number)
    _weights(figure.add_subplot(grid[1, 0]), report, weights)
    _digits(figure, grid[1, 1], examples)
    figure.savefig(path)


def _accuracy(axes: Any, rows: list[dict[str, Any]], number: int) -> None:
    epsilons = [row["epsilon"] for row in rows]
    for name, color in COLOR.items():
        shares = [row["accuracy"][name] for row in rows]
        each = [wilson_interval(round(share * number), number) for share in shares]
        low, high = zip(*((100 * low, 100 * high) for low, high in each), strict=True)
        axes.fill_between(epsilons, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            epsilons,
            [100 * share for share in shares],
            color=color,
            marker=MARKER[name],
            markersize=7,
            linewidth=2,
            label=f"{name} net (band: 95% interval)",
            clip_on=False,
        )
    row = rows[3]
    norm, accuracy = row["norm"], row["accuracy"]
    write_title(
        axes,
        f"{NORM[norm]} balls, by {row['optimizer']}: at ε = {row['epsilon']:g} the bounded\n"
        f"net reads {accuracy['bounded']:.0%} of the digits right, the free net "
        f"{accuracy['free']:.0%}",
    )
    axes.set_xlabel(UNIT[norm])
    axes.set_ylabel(f"digits read right (% of {number:,})")
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.set_xlim(0, epsilons[-1])
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="upper right", fontsize=11)
    tidy(axes)


def _weights(axes: Any, report: dict[str, Any], weights: dict[str, Tensor]) -> None:
    bound = report["bound"]["clamp_max"]
    reach = 3 * bound
    for name, color in COLOR.items():
        width = bound / 8  # so that a bin is centered on each bound
        edges = [width * (i - 0.5) for i in range(-24, 26)]
        axes.hist(
            weights[name].clamp(-reach, reach).numpy(),
            bins=edges,
            weights=[100 / weights[name].numel()] * weights[name].numel(),
            color=color,
            histtype="stepfilled" if name == "bounded" else "step",
            alpha=0.75 if name == "bounded" else 1,
            linewidth=2,
            label=f"{name} net",
        )
    for side in (-bound, bound):
        axes.axvline(side, color="0.2", linestyle="--", linewidth=1)
    exactly = report["bound"]["share_of_weights_on_bound"]
    nearly = report["bound"]["share_of_weights_within_1_percent"]
    write_title(
        axes,
        f"{nearly:.0%} of the bounded net's weights end within 1% of a bound\n"
        f"(dashed), {exactly:.0%} exactly on it; the free net's reach "
        f"{report['nets']['free']['largest_weight']:.2f}",
    )
    axes.set_xlabel(f"weight (those beyond ±{reach:.2f} are counted in the outermost bins)")
    ticks = [i * bound for i in range(-3, 4)]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_ylabel("share of the net's weights (%)")
    axes.set_xlim(edges[0], edges[-1])
    axes.legend(frameon=False, loc="upper right", fontsize=11)
    tidy(axes)


def _digits(figure: Any, place: Any, examples: list[Example]) -> None:
    columns = len(examples[0].labels)
    grid = place.subgridspec(len(examples), columns, hspace=0.08, wspace=0.08)
    for i, example in enumerate(examples):
        for j in range(columns):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(example.images[j].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            wrong = bool(example.readings[j] != example.labels[j])
            for spine in axes.spines.values():
                spine.set_visible(wrong)
                spine.set(color=WRONG, linewidth=3)
            axes.text(
                0.06,
                0.93,
                str(int(example.readings[j])),
                transform=axes.transAxes,
                va="top",
                fontsize=11,
                weight="bold",
                color="white",
                bbox={"boxstyle": "round", "color": WRONG if wrong else "0.35"},
            )
            if j == 0:
                axes.set_ylabel(example.title.replace("Linf", NORM["Linf"]))
            if i == j == 0:
                write_title(
                    axes,
                    "What the bounded net is shown and, in the corner, what it\n"
                    "reads: it misreads the digits framed in red",
                )


def write_title(axes: Any, text: str) -> None:
    """Write what a panel shows above it."""
    axes.set_title(text, loc="left", fontsize=11.5, weight="bold", pad=12)


def tidy(axes: Any) -> None:
    """Take away what a panel does not need."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
