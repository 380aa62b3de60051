"""Masked: what is selected is projected, and all else keeps its bits."""

import math

import pytest
import torch
from optim.memory_layouts import LAYOUTS, equal_bits

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box, NonNegative
from rai_toolbox.constraints.linear import Affine, HalfSpace, Hyperplane
from rai_toolbox.constraints.masked import Masked

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHARED = torch.tensor([[True, False, True], [False, True, False]])
EACH = torch.tensor(
    [[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 1]], [[1, 1, 1], [0, 0, 0]]]
).bool()
MASKS = {"shared": SHARED, "one": SHARED[None], "each": EACH}
SETS = {
    "box": Box(-0.2, 0.3),
    "box_of_tensors": Box(torch.tensor([-0.2, -1.0, 0.0]), torch.tensor([[0.3], [0.1]])),
    "sum": Hyperplane(1.0, 1.0),
    "sum_each": Hyperplane(1.0, torch.arange(4.0).view(4, 1)),
    "half_space": HalfSpace(torch.tensor([1.0, 2.0, 3.0]), -1.0),
    "affine": Affine(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), torch.ones(2)),
}


def batch(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator) * scale
    most = torch.finfo(dtype).max / 100  # room for a projection, which may be larger
    return x.clamp(-most, most).to(dtype)


def selected(constraint, mask, x):
    """Row by row, the slow and obvious way."""
    y = x.clone()
    masks = mask.expand(x.shape)
    if constraint.elementwise:
        y[masks] = constraint.project(x)[masks]
    else:
        rows = torch.stack([row[at] for row, at in zip(x, masks, strict=True)])
        for row, at, new in zip(y, masks, constraint.project(rows), strict=True):
            row[at] = new
    return y


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SETS)
def test_as_row_by_row(name, mask, dtype, scale):
    x = batch(dtype, scale)
    constraint = Masked(SETS[name], MASKS[mask])
    y = constraint.project(x)
    assert equal_bits(y, selected(SETS[name], MASKS[mask], x))
    assert (constraint.violation(y) == 0).all()
    assert equal_bits(constraint.project(y), y)
    for layout in LAYOUTS.values():
        assert equal_bits(constraint.project_(layout(x)), y)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SETS)
def test_what_is_not_selected_keeps_its_bits(name, mask):
    x = batch(torch.float32)
    free = ~MASKS[mask].expand(x.shape)
    clean = Masked(SETS[name], MASKS[mask]).violation(x)
    x[free] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e30, 7.0]).repeat(2)
    y = Masked(SETS[name], MASKS[mask]).project(x)
    assert equal_bits(y[free], x[free])
    assert y[~free].isfinite().all()
    assert torch.equal(Masked(SETS[name], MASKS[mask]).violation(x), clean)


def test_what_is_selected_is_not_hidden():
    x = batch(torch.float32)
    x[1, 0, 0] = math.nan
    assert Masked(NonNegative(), SHARED).project(x)[1, 0, 0].isnan()
    y = Masked(Hyperplane(1.0, 1.0), SHARED).project(x)
    assert y[1][SHARED].isnan().all()
    assert equal_bits(y[:, ~SHARED], x[:, ~SHARED])
    assert Masked(Hyperplane(1.0, 1.0), SHARED).violation(x)[1].isnan()


def test_nothing_selected():
    x = batch(torch.float32)
    affine = Affine(torch.ones(1, 6), 1.0)  # which takes no batch without elements
    for member in (Box(5.0, 6.0), Hyperplane(1.0, 1.0), Hyperplane(torch.ones(6), 1.0), affine):
        nothing = Masked(member, torch.zeros(2, 3, dtype=torch.bool))
        assert equal_bits(nothing.project(x), x)
        assert nothing.violation(x).tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["box", "sum", "half_space", "affine"])
def test_derivative(name):
    x = batch(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Masked(SETS[name], EACH).project, x)


def test_empty_batch():
    for member in (Box(0.0, 1.0), Hyperplane(1.0, 1.0)):
        assert Masked(member, SHARED).project(torch.ones(0, 2, 3)).shape == (0, 2, 3)
        assert Masked(member, SHARED).violation(torch.ones(0, 2, 3)).shape == (0,)


@pytest.mark.parametrize("name", SETS)
def test_plain_data_and_conversion(name):
    constraint = Masked(SETS[name], EACH)
    again = Constraint.from_plain(constraint.to_plain())
    assert again == constraint
    assert again != Masked(SETS[name], ~EACH)
    converted = constraint.to(torch.float64)
    assert converted.mask.dtype == torch.bool
    x = batch(torch.float32)
    assert equal_bits(again.project(x), constraint.project(x))


def test_nested():
    x = batch(torch.float32)
    twice = Masked(Masked(Hyperplane(1.0, 1.0), torch.tensor([True, False, True])), SHARED)
    both = torch.tensor([[True, False, False], [False, True, False]])  # of three, first and last
    assert equal_bits(twice.project(x), Masked(Hyperplane(1.0, 1.0), both).project(x))


def test_unbounded():
    constraint = Masked(Box(0.0, 1.0), SHARED)
    assert not constraint.bounded
    assert constraint.elementwise and constraint.convex
    with pytest.raises(ValueError, match="`lmo` needs a bounded set"):
        constraint.lmo(batch(torch.float32))
    with pytest.raises(ValueError, match="`sample_` needs a bounded set"):
        constraint.sample_(batch(torch.float32))


class OfMatrices(Box):
    _of_matrices = True


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Masked(1.0, SHARED), TypeError, "`constraint` must be a constraint, got 1.0"),
        (lambda: Masked(NonNegative(), SHARED.float()), TypeError, "bools, got torch.float32"),
        (lambda: Masked(NonNegative(), [True]), TypeError, r"bools, got \[True\]"),
        (lambda: Masked(OfMatrices(0, 1), SHARED), ValueError, "must not be a set of matrices"),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Masked(NonNegative(), torch.ones(2, dtype=torch.bool)), "`mask` must broadcast"),
        (Masked(SETS["sum"], SHARED[:1]), r"shape of the sub-tensor .* \(2, 3\) for the batch"),
        (Masked(SETS["sum"], EACH[:3]), "`mask` must broadcast against the batch"),
        (
            Masked(SETS["sum"], torch.cat([EACH[:3], ~EACH[:1].logical_and(EACH[1:2])])),
            "as many entries of one sub-tensor as of another, got from 3 to",
        ),
        (Masked(HalfSpace(torch.ones(2), 1.0), SHARED), r"the batch of shape \(4, 3\)"),
    ],
)
def test_wrong_batch(constraint, message):
    x = torch.ones(4, 2, 3)
    with pytest.raises(ValueError, match=message):
        constraint.project_(x)
    assert (x == 1).all()
