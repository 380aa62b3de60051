"""The picture of the fits in L1 balls: KKT residuals over the steps, and maps of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rai_toolbox.cli.picture import COLOR, WRONG, tidy, write_title
from rai_toolbox.cli.sparse import Fit
from rai_toolbox.extras import require

__all__ = ["draw_sparse"]

STYLE = {
    "default": (COLOR["bounded"], "-", "default: gradient mapping, step, project"),
    "plain": (COLOR["free"], "--", "plain: step, project"),
}


def draw_sparse(path: Path, report: dict[str, Any], fits: dict[str, Fit]) -> None:
    """Write the picture of `fits` to `path`."""
    figure = require("matplotlib.figure", extra="demo").Figure(figsize=(13, 5.4), dpi=120)
    runs, settings = report["runs"], report["settings"]
    default, plain = runs["default"], runs["plain"]
    figure.text(
        0.06,
        0.925,
        "Softmax regression on MNIST digits, the weights of each class held in an L1 ball of "
        f"radius {settings['radius']:g}",
        fontsize=16,
        weight="bold",
    )
    violation = max(run["largest_violation"] for run in runs.values())
    figure.text(
        0.06,
        0.87,
        f"Largest violation in 2 × {settings['steps']} steps of {settings['optimizer']}: "
        f"{violation:g}.  Loss at the end: default {default['loss']:.3f}, plain "
        f"{plain['loss']:.3f}.  Test accuracy: default {default['test_accuracy']:.1%}, plain "
        f"{plain['test_accuracy']:.1%}.",
        fontsize=12,
        color="0.25",
    )
    grid = figure.add_gridspec(
        1, 2, left=0.06, right=0.94, top=0.71, bottom=0.12, wspace=0.08, width_ratios=(1, 1.4)
    )
    _residuals(figure.add_subplot(grid[0]), runs, fits)
    _maps(figure, grid[1], report, fits["default"].weights())
    figure.savefig(path)


def _residuals(axes: Any, runs: dict[str, Any], fits: dict[str, Fit]) -> None:
    for name, (color, line, label) in STYLE.items():
        axes.plot(fits[name].residuals, color=color, linestyle=line, linewidth=2, label=label)
    default, plain = runs["default"], runs["plain"]
    write_title(
        axes,
        f"With the gradient mapping the KKT residual\n"
        f"ends at {default['kkt_residual']:.2g}, without it at {plain['kkt_residual']:.2g}",
    )
    axes.set_yscale("log")
    axes.set_xlim(0, len(fits["default"].residuals) - 1)
    axes.set_xlabel("steps (each on all training digits)")
    axes.set_ylabel("KKT residual |W - P(W - ∇)| of the weights W")
    axes.legend(frameon=False, fontsize=11)
    tidy(axes)


def _maps(figure: Any, place: Any, report: dict[str, Any], weights: Tensor) -> None:
    run, small = report["runs"]["default"], report["settings"]["small"]
    grid = place.subgridspec(2, 6, hspace=0.16, wspace=0.08, width_ratios=(1, 1, 1, 1, 1, 0.1))
    against, zero, for_ = COLOR["bounded"], "white", WRONG
    colors = require("matplotlib.colors", extra="demo").LinearSegmentedColormap.from_list(
        "against and for", [against, zero, for_], N=257
    )
    reach = weights.abs().max().item()
    for digit, map_ in enumerate(weights.view(-1, 28, 28)):
        axes = figure.add_subplot(grid[divmod(digit, 5)])
        image = axes.imshow(map_.numpy(), cmap=colors, vmin=-reach, vmax=reach)
        axes.set_anchor("N")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(color="0.8")
        axes.set_xlabel(str(digit), fontsize=12, weight="bold")
        if digit == 0:
            write_title(
                axes,
                f"Weights of each class, default: {run['share_of_weights_small']:.0%} are at most "
                f"{small:.0%} of the\nlargest of their class, "
                f"{run['share_of_weights_zero']:.0%} are exactly 0",
            )
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[:, 5]))
    bar.outline.set_visible(False)
    bar.set_label("weight: for the class (red) or against it (blue)")
