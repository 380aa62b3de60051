"""The picture of the demo: accuracy against epsilon, weights, and perturbed digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rai_toolbox.cli.extras import require

__all__ = ["Example", "draw"]

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
    """Digits under a title, shape (N, 28, 28), and whether each is read right, shape (N,)."""

    title: str
    images: Tensor
    right: Tensor


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
        2, 2, left=0.065, right=0.98, top=0.86, bottom=0.07, hspace=0.42, wspace=0.16
    )
    for column, norm in enumerate(NORM):
        rows = [row for row in report["perturbations"] if row["norm"] == norm]
        _accuracy(figure.add_subplot(grid[0, column]), rows)
    _weights(figure.add_subplot(grid[1, 0]), report, weights)
    _digits(figure, grid[1, 1], examples)
    figure.savefig(path)


def _accuracy(axes: Any, rows: list[dict[str, Any]]) -> None:
    epsilons = [row["epsilon"] for row in rows]
    for name, color in COLOR.items():
        axes.plot(
            epsilons,
            [100 * row["accuracy"][name] for row in rows],
            color=color,
            marker=MARKER[name],
            markersize=7,
            linewidth=2,
            label=f"{name} net",
            clip_on=False,
        )
    row = rows[3]
    norm, accuracy = row["norm"], row["accuracy"]
    _title(
        axes,
        f"{NORM[norm]} perturbations by {row['optimizer']}: at ε = {row['epsilon']:g} the\n"
        f"bounded net still reads {accuracy['bounded']:.0%} of the digits, the free net "
        f"{accuracy['free']:.0%}",
    )
    axes.set_xlabel(UNIT[norm])
    axes.set_ylabel("digits read right (%)")
    axes.set_xticks(epsilons)
    axes.set_xlim(0, epsilons[-1])
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="upper right", fontsize=11)
    _plain(axes)


def _weights(axes: Any, report: dict[str, Any], weights: dict[str, Tensor]) -> None:
    bound = report["bound"]["clamp_max"]
    reach = 3 * bound
    for name, color in COLOR.items():
        # 17 bins of the bounds' width fit between them: those at the ends are centered on a bound
        width = bound / 8
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
    share = report["bound"]["share_of_weights_on_bound"]
    _title(
        axes,
        f"Weights: {share:.0%} of the bounded net's lie exactly on a bound (dashed);\n"
        f"the free net's reach {report['nets']['free']['largest_weight']:.2f}",
    )
    axes.set_xlabel(f"weight (those beyond ±{reach:.2g} are counted in the last bin)")
    axes.set_ylabel("share of the net's weights (%)")
    axes.set_xlim(edges[0], edges[-1])
    axes.legend(frameon=False, loc="upper right", fontsize=11)
    _plain(axes)


def _digits(figure: Any, place: Any, examples: list[Example]) -> None:
    columns = len(examples[0].right)
    grid = place.subgridspec(len(examples), columns, hspace=0.12, wspace=0.12)
    for i, example in enumerate(examples):
        for j in range(columns):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(example.images[j].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(not example.right[j])
                spine.set(color=WRONG, linewidth=3)
            if j == 0:
                axes.set_ylabel(example.title)
            if i == j == 0:
                _title(axes, "What the bounded net is shown; it misreads the framed digits")


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, weight="bold", pad=12)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
