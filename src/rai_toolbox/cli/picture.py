"""The pictures of the demo: bounded weights and accuracy under attack; fits in L1 balls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rai_toolbox.cli.sparse import Fit
from rai_toolbox.cli.training import Run
from rai_toolbox.extras import require
from rai_toolbox.perturbations import RobustnessReport
from rai_toolbox.perturbations.evaluation.plot import COLORS, draw_accuracy, tidy


def draw(
    path: Path,
    report: Mapping[str, Any],
    robustness: Mapping[str, RobustnessReport],
    runs: Mapping[str, Run],
) -> None:
    """Write to `path` the weights of the nets, and their accuracy under attack."""
    bound = report["bound"]
    figure = _page(
        f"A CNN that classifies MNIST digits, trained with every weight in "
        f"±{bound['clamp_max']:g} and without bounds",
        f"Largest violation of the bounds after any of {bound['steps_checked']} steps: "
        f"{bound['largest_violation']:g}.",
        report["nets"],
    )
    grid = figure.add_gridspec(1, 3, left=0.05, right=0.98, top=0.71, bottom=0.12, wspace=0.22)
    _weights(figure.add_subplot(grid[0]), bound, runs)
    for place, norm in zip((grid[1], grid[2]), ("Linf", "L2"), strict=True):
        _accuracy(figure.add_subplot(place), robustness, norm)
    figure.savefig(path)


def draw_sparse(path: Path, report: Mapping[str, Any], fits: Mapping[str, Fit]) -> None:
    """Write to `path` the KKT residuals of the fits over the steps, and maps of the weights."""
    runs, settings = report["runs"], report["settings"]
    violation = max(run["largest_violation"] for run in runs.values())
    losses = ", ".join(f"{name} {run['loss']:.3f}" for name, run in runs.items())
    figure = _page(
        "Softmax regression on MNIST digits, the weights of each class in an L1 ball of radius "
        f"{settings['radius']:g}",
        f"Largest violation in 2 × {settings['steps']} steps of {settings['optimizer']}: "
        f"{violation:g}.  Final loss: {losses}.",
        runs,
    )
    grid = figure.add_gridspec(
        1, 2, left=0.06, right=0.94, top=0.71, bottom=0.12, wspace=0.08, width_ratios=(1, 1.4)
    )
    _residuals(figure.add_subplot(grid[0]), runs, fits)
    _maps(figure, grid[1], report, fits["default"].weights())
    figure.savefig(path)


def _page(title: str, subtitle: str, runs: Mapping[str, Any]) -> Any:
    accuracies = ", ".join(f"{name} {run['test_accuracy']:.1%}" for name, run in runs.items())
    figure = require("matplotlib.figure", extra="demo").Figure(figsize=(13, 5.4), dpi=120)
    figure.text(0.05, 0.925, title, fontsize=16, weight="bold")
    subtitle = f"{subtitle}  Test accuracy: {accuracies}."
    figure.text(0.05, 0.87, subtitle, fontsize=12, color="0.25")
    return figure


def _weights(axes: Any, bound: Mapping[str, float], runs: Mapping[str, Run]) -> None:
    limit = 3 * bound["clamp_max"]
    edges = [limit * (i - 0.5) / 24 for i in range(-24, 26)]  # a bin is centered on each bound
    for (name, run), color, kind in zip(runs.items(), COLORS, ("stepfilled", "step"), strict=False):
        weights = run.weights().clamp(-limit, limit)
        shares = [100 / len(weights)] * len(weights)
        style = {"color": color, "histtype": kind, "linewidth": 2, "label": name}
        axes.hist(weights.numpy(), bins=edges, weights=shares, **style)
    for side in ("clamp_min", "clamp_max"):
        axes.axvline(bound[side], color="0.2", linestyle="--", linewidth=1)
    share = bound["share_of_weights_within_1_percent"]
    _title(axes, f"{share:.0%} of the bounded weights end\nwithin 1% of a bound (dashed)")
    axes.set(xlabel="weight (larger ones: in the outermost bins)", xlim=(edges[0], edges[-1]))
    axes.set(ylabel="share of the weights (%)")
    tidy(axes)


def _accuracy(axes: Any, robustness: Mapping[str, RobustnessReport], norm: str) -> None:
    draw_accuracy(axes, robustness, norm)
    rows = {name: found.rows_of(norm)[3] for name, found in robustness.items()}
    shares = ", ".join(f"{name} {row.robust_accuracy:.0%}" for name, row in rows.items())
    balls = f"{norm.replace('inf', '∞')} balls, at ε = {rows['bounded'].epsilon:g}"
    _title(axes, f"Accuracy in {balls}:\n{shares}")


def _residuals(axes: Any, runs: Mapping[str, Any], fits: Mapping[str, Fit]) -> None:
    labels = ("default: gradient mapping, step, project", "plain: step, project")
    for fit, color, line, label in zip(fits.values(), COLORS, ("-", "--"), labels, strict=False):
        axes.plot(fit.residuals, color=color, linestyle=line, linewidth=2, label=label)
    default, plain = (f"{run['kkt_residual']:.2g}" for run in runs.values())
    text = f"With the gradient mapping the KKT residual\nends at {default}, without it at {plain}"
    _title(axes, text)
    axes.set(xlabel="steps (each on all training digits)", xlim=(0, len(fit.residuals) - 1))
    axes.set(ylabel="KKT residual |W - P(W - ∇)| of the weights W", yscale="log")
    tidy(axes)


def _maps(figure: Any, place: Any, report: Mapping[str, Any], weights: Tensor) -> None:
    run, most = report["runs"]["default"], report["settings"]["small"]
    small, zero = (f"{run[f'share_of_weights_{which}']:.0%}" for which in ("small", "zero"))
    grid = place.subgridspec(2, 6, hspace=0.16, wspace=0.08, width_ratios=(1, 1, 1, 1, 1, 0.1))
    limit = weights.abs().max().item()
    for digit, weight in enumerate(weights.view(-1, 28, 28)):
        axes = figure.add_subplot(grid[divmod(digit, 5)], xticks=[], yticks=[], anchor="N")
        image = axes.imshow(weight.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.spines[:].set(color="0.8")
        axes.set_xlabel(str(digit), fontsize=12, weight="bold")
        if digit == 0:
            text = f"Weights of each class, default: {small} are at most {most:.0%} of the\n"
            _title(axes, f"{text}largest of their class, {zero} are exactly 0")
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[:, 5]))
    bar.outline.set_visible(False)
    bar.set_label("weight: for the class (red) or against it (blue)")


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, weight="bold", pad=12)
