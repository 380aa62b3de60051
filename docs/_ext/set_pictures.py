"""Draw each set of rai_toolbox.constraints, and where its projection moves points.

The build of the documentation runs this, for the pages of the sets.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import tensor

from rai_toolbox import constraints as sets

SET, OUTSIDE, LINES = "#3b75af", "#d1495b", "#bbbbbb"

ball, weights = sets.L2Ball(1.0), tensor([1.0, 2.0])
plate = sets.HalfSpace(weights, 0.5)
first, equal = tensor([True, False]), tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]])
rows, columns = tensor([0.5, 0.3, 0.2]), torch.full((4,), 0.25)
# A constraint of each class, the caption of its picture, and how it is drawn.
EXAMPLES = [
    (sets.Affine(equal, tensor([1.0, 0.0])), "x + y + z = 1 and x = y", "space"),
    (sets.Birkhoff(), "A matrix, its projection, and their sums", "matrix"),
    (sets.BoundedBall(ball, -0.4, 0.8), "L2Ball(1) within [-0.4, 0.8]", "plane"),
    (sets.Box(-0.5, tensor([1.0, 0.7])), "Box(-0.5, (1, 0.7))", "plane"),
    (sets.BoxSection(weights, 1.0, -0.5, 0.8), "x + 2y = 1 within [-0.5, 0.8]", "plane"),
    (plate, "x + 2y <= 0.5", "plane"),
    (sets.Hyperplane(weights, 0.5), "x + 2y = 0.5", "plane"),
    (sets.Intersection(ball, plate), "L2Ball(1) and x + 2y <= 0.5", "plane"),
    (sets.L1Ball(1.0), "L1Ball(1)", "plane"),
    (ball, "L2Ball(1)", "plane"),
    (sets.LinfBall(1.0), "LinfBall(1)", "plane"),
    (sets.Masked(sets.Box(-0.5, 0.8), first), "x in [-0.5, 0.8], y unconstrained", "plane"),
    (sets.MaxNorm(1.0, p=1), "MaxNorm(1, p=1)", "plane"),
    (sets.MinMaxNorm(0.6, 1.2), "MinMaxNorm(0.6, 1.2)", "plane"),
    (sets.Monotone(), "x <= y", "plane"),
    (sets.NonNegative(), "x >= 0 and y >= 0", "plane"),
    (sets.NuclearBall(1.0), "Diagonal matrices: |x| + |y| <= 1", "diagonal"),
    (sets.PSD(), "Matrices ((x, y), (y, x)): x >= |y|", "symmetric"),
    (sets.Rank(2), "Singular values, before and after the projection onto Rank(2)", "spectrum"),
    (sets.Simplex(), "x + y + z = 1, no entry negative", "space"),
    (sets.SparseSimplex(2), "The simplex, with at most 2 entries that are not 0", "space"),
    (sets.SpectralBall(1.0), "Diagonal matrices: |x| <= 1 and |y| <= 1", "diagonal"),
    (sets.Stiefel(), "Matrices ((x, -y), (y, x)): the rotations", "rotation"),
    (sets.TopK(1), "TopK(1): the axes", "plane"),
    (sets.Transport(rows, columns), "A matrix, its projection, and their sums", "matrix"),
    (sets.UnitNorm(), "UnitNorm()", "plane"),
]
PICTURES = {type(example[0]).__name__: example for example in EXAMPLES}
# Planes of matrices that projections do not leave: from points to matrices, by a basis.
BASES = {
    "plane": tensor([[1.0, 0.0], [0.0, 1.0]]),
    "space": torch.eye(3),
    "diagonal": tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]),
    "symmetric": tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]),
    "rotation": tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]]),
}


def draw(name, folder):
    """Write the picture of a set to ``folder/name.png``."""
    constraint, _, kind = PICTURES[name]
    size = (5.2, 2.6) if kind == "matrix" else (3.6, 3.4)
    figure = Figure(figsize=size, layout="constrained")
    {"space": space, "spectrum": spectrum, "matrix": matrix}.get(kind, plane)(
        figure, constraint, BASES.get(kind)
    )
    figure.savefig(Path(folder) / f"{name}.png", dpi=130)


def projected(constraint, points, basis):
    """The projection of points with these coordinates, by its coordinates."""
    found = constraint.project(torch.tensordot(points, basis, 1))
    return found.flatten(1) @ torch.linalg.pinv(basis.flatten(1))


def plane(figure, constraint, basis):
    axes, reach, line = figure.subplots(), 1.9, torch.linspace(-1.9, 1.9, 241)
    grid = torch.cartesian_prod(line, line)
    inside = constraint.violation(torch.tensordot(grid, basis, 1)) == 0
    axes.axhline(0, color=LINES, lw=0.8)
    axes.axvline(0, color=LINES, lw=0.8)
    filled = inside.view(241, 241).T.float()
    axes.contourf(line, line, filled, [0.5, 1.5], colors=[SET], alpha=0.25)
    axes.plot(*projected(constraint, grid[~inside], basis).T, ".", ms=2, color=SET)
    angles = torch.arange(12) * torch.pi / 6 + 0.2
    start = 1.65 * torch.stack([angles.cos(), angles.sin()], 1)
    moves = projected(constraint, start, basis) - start
    units = {"angles": "xy", "scale_units": "xy", "scale": 1}
    axes.quiver(*start.T, *moves.T, **units, color=OUTSIDE, width=0.007, zorder=3)
    axes.plot(*start.T, "o", ms=3.5, color=OUTSIDE)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="x", ylabel="y")


def space(figure, constraint, basis):
    axes, limits = figure.add_subplot(projection="3d"), (-0.5, 1.5)
    random = torch.Generator().manual_seed(0)
    found = projected(constraint, 1.2 * torch.randn(4000, 3, generator=random), basis)
    shown = found[((found > -0.5) & (found < 1.5)).all(1)]
    axes.scatter(*shown.T, s=2, color=SET, alpha=0.4)
    start = 1.7 * torch.rand(9, 3, generator=random) - 0.4
    moves = projected(constraint, start, basis) - start
    axes.quiver(*start.T, *moves.T, color=OUTSIDE, arrow_length_ratio=0.15, lw=1.2)
    axes.scatter(*start.T, s=10, color=OUTSIDE)
    axes.set(xlabel="x", ylabel="y", zlabel="z", xlim=limits, ylim=limits, zlim=limits)
    axes.set(xticks=(0, 1), yticks=(0, 1), zticks=(0, 1))
    axes.view_init(25, 30)


def spectrum(figure, constraint, _):
    axes, x = figure.subplots(), torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0))
    for values, at, color in [(x, -0.2, OUTSIDE), (constraint.project(x), 0.2, SET)]:
        sizes = torch.linalg.svdvals(values)[0]
        axes.bar([i + at for i in range(1, 6)], sizes.tolist(), 0.4, color=color)
    axes.legend(["before", "after"])
    axes.set(xlabel="index", ylabel="singular value")


def matrix(figure, constraint, _):
    x = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.2
    x = x[:, :, :3] if isinstance(constraint, sets.Birkhoff) else x
    for axes, values in zip(figure.subplots(1, 2), (x[0], constraint.project(x)[0]), strict=True):
        axes.imshow(values.numpy(), vmin=-1, vmax=1, cmap="RdBu")
        for i, j in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8)
        for dim, ticks in ((1, axes.set_yticks), (0, axes.set_xticks)):
            sums = values.sum(dim).tolist()
            ticks(range(len(sums)), [f"{total:.2f}" for total in sums])
