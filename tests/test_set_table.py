"""The marks of the table of sets are correct, and each set has its section in the docs."""

import re
from pathlib import Path

import pytest
import torch

from rai_toolbox import constraints as sets

ROOT = Path(__file__).parents[1]
SETS = sorted(set(sets.__all__) - {"Constraint", "Projected"})
HEADER = ["set", "definition", "`project_`", "`lmo`", "`violation`", "`sample_`", "convex"]
METHODS = ("project_", "lmo", "violation", "sample_")
ALWAYS, SOMETIMES, NEVER = "✓", "(✓)", ""


def rows_of(text: str) -> list[list[str]]:
    """The cells below the header of the table."""
    lines = iter(text.splitlines())
    for line in lines:
        if cells_of(line) == HEADER:
            break
    next(lines)  # the rule below the header
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append(cells_of(line))
    return rows


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


ROWS = rows_of((ROOT / "docs/constraints.md").read_text(encoding="utf-8"))
TABLE = {
    name: dict(zip((*METHODS, "convex"), cells[2:], strict=True))
    for cells in ROWS
    for name in re.findall(r"`(\w+)`", cells[0])
}

# Each set with settings for which it supports the fewest methods, and the most.
FEWEST_AND_MOST = {
    "Affine": [sets.Affine(torch.eye(2, 6), 0.5)],
    "Birkhoff": [sets.Birkhoff()],
    "BoundedBall": [sets.BoundedBall(sets.L2Ball(1.0), 0.0, None)],
    "Box": [sets.Box(0.0, None), sets.Box(-1.0, 1.0)],
    "BoxSection": [sets.BoxSection(1.0, 1.0, 0.0, None), sets.BoxSection(1.0, 1.0, 0.0, 0.5)],
    "HalfSpace": [sets.HalfSpace(1.0, 0.5)],
    "Hyperplane": [sets.Hyperplane(1.0, 0.5)],
    "Intersection": [
        sets.Intersection(sets.NonNegative(), sets.Hyperplane(1.0, 1.0)),
        sets.Intersection(sets.NonNegative(), sets.L2Ball(1.0)),
    ],
    "L1Ball": [sets.L1Ball(torch.inf), sets.L1Ball(0.5)],
    "L2Ball": [sets.L2Ball(torch.inf), sets.L2Ball(0.5)],
    "LinfBall": [sets.LinfBall(torch.inf), sets.LinfBall(0.5)],
    "Masked": [
        sets.Masked(sets.TopK(1), torch.arange(6) < 3),
        sets.Masked(sets.Box(0.0, 1.0), torch.arange(6) < 3),
    ],
    "MaxNorm": [sets.MaxNorm(torch.inf), sets.MaxNorm(0.5)],
    "MinMaxNorm": [sets.MinMaxNorm(0.5, torch.inf), sets.MinMaxNorm(0.0, 0.5)],
    "Monotone": [sets.Monotone()],
    "NonNegative": [sets.NonNegative()],
    "NuclearBall": [sets.NuclearBall(0.5)],
    "PSD": [sets.PSD()],
    "Rank": [sets.Rank(1)],
    "Simplex": [sets.Simplex()],
    "SparseSimplex": [sets.SparseSimplex(2)],
    "SpectralBall": [sets.SpectralBall(0.5)],
    "Stiefel": [sets.Stiefel()],
    "TopK": [sets.TopK(2)],
    "Transport": [sets.Transport(torch.full((3,), 0.4), torch.full((2,), 0.6))],
    "UnitNorm": [sets.UnitNorm()],
}


def batch_for(constraint):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    if isinstance(constraint, (sets.PSD, sets.Birkhoff)):
        return x[:, :4].reshape(4, 2, 2)
    matrices = sets.SpectralBall, sets.NuclearBall, sets.Stiefel, sets.Rank, sets.Transport
    return x.view(4, 3, 2) if isinstance(constraint, matrices) else x


def has_method(constraint, method):
    """Whether the set supports the method; if not, the method has to raise a ValueError."""
    x = batch_for(constraint)
    given = x.clone()
    try:
        found = getattr(constraint, method)(given)
    except ValueError as error:
        assert f"`{method}`" in str(error)
        assert torch.equal(given, x), "a method that is not supported wrote to its argument"
        return False
    if method == "violation":
        assert found.shape == (4,)
        assert (found >= 0).all()
    else:
        assert found.shape == x.shape
        assert (found is given) == method.endswith("_")
        assert (constraint.violation(found) == 0).all()
    return True


def test_each_set_has_a_row_an_example_and_a_section():
    sections = re.findall(
        r"^### (\w+)$", (ROOT / "docs/constraints.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    names = [name for cells in ROWS for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(names) == SETS  # once each
    assert sorted(FEWEST_AND_MOST) == SETS
    assert sorted(set(sections) & set(sets.__all__)) == SETS
    assert all(type(s).__name__ == name for name, made in FEWEST_AND_MOST.items() for s in made)


@pytest.mark.parametrize("column", [*METHODS, "convex"])
@pytest.mark.parametrize("name", SETS)
def test_cell(name, column):
    found = [
        constraint.convex if column == "convex" else has_method(constraint, column)
        for constraint in FEWEST_AND_MOST[name]
    ]
    mark = {(True,): ALWAYS, (False,): NEVER}.get(tuple(sorted(set(found))), SOMETIMES)
    assert TABLE[name][column] == mark


@pytest.mark.parametrize("name", SETS)
def test_lmo_and_samples_are_for_bounded_sets(name):
    for constraint in FEWEST_AND_MOST[name]:
        assert has_method(constraint, "sample_") == constraint.bounded
        assert constraint.bounded or not has_method(constraint, "lmo")


@pytest.mark.parametrize("page", ["README.md", "docs/migration.md"])
def test_the_number_of_sets_is_as_told(page):
    assert f"{len(SETS)} sets" in (ROOT / page).read_text(encoding="utf-8")
