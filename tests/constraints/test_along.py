"""Sets of what lies along any dims: their methods do with it what those of rows do with rows."""

import math
import re
from functools import partial

import pytest
import torch

from rai_toolbox.constraints import (
    Affine,
    Box,
    BoxSection,
    HalfSpace,
    Hyperplane,
    Intersection,
    L1Ball,
    L2Ball,
    Masked,
    MaxNorm,
    MinMaxNorm,
    Monotone,
    Simplex,
    SparseSimplex,
    TopK,
    UnitNorm,
)
from rai_toolbox.constraints.base import Constraint

SHAPE = (4, 5, 3)
DIMS = [0, 1, -1, (0, 1), (0, 2), (2, 0), (0, 1, 2)]


def randn():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def as_rows(x, dims):
    """What lies along the dims as the rows of a copy, and the shape of all other dims."""
    dims = dims if isinstance(dims, tuple) else (dims,)
    end = x.movedim(dims, tuple(range(-len(dims), 0)))
    kept = end.shape[: x.ndim - len(dims)]
    return end.reshape(math.prod(kept), -1), kept


SETS = {
    "L1Ball": partial(L1Ball, 1.5),
    "L2Ball": partial(L2Ball, 1.5),
    "L2Ball with a center": partial(L2Ball, 1.5, center=0.5),
    "Simplex": partial(Simplex, 2.0),
    "SparseSimplex": partial(SparseSimplex, 2),
    "TopK": partial(TopK, 2),
    "Monotone": Monotone,
    "BoxSection": partial(BoxSection, 1.0, 0.5, -1.0, 1.0),
    "Hyperplane": partial(Hyperplane, 1.0, 1.0),
    "HalfSpace": partial(HalfSpace, 1.0, -1.0),
    **{f"p={p}": partial(MinMaxNorm, 1.5, 2.0, p=p) for p in (1, 2, math.inf)},
}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", SETS)
def test_methods_act_on_rows(name, dim):
    x, of, of_rows = randn(), SETS[name](dim=dim), SETS[name]()
    rows, kept = as_rows(x, dim)
    assert torch.equal(as_rows(of.project(x), dim)[0], of_rows.project(rows))
    assert torch.equal(of.violation(x), of_rows.violation(rows).view(kept))
    assert Constraint.from_plain(of.to_plain()) == of != of_rows
    each = [x.clone(), x.clone()]
    of.project_each_(each)
    assert torch.equal(each[1], of.project(x))
    if not of.bounded:
        return
    assert torch.equal(as_rows(of.lmo(x), dim)[0], of_rows.lmo(rows))
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    drawn = of.sample_(x, one)
    assert drawn is x
    assert torch.equal(as_rows(x, dim)[0], of_rows.sample_(rows, other))


@pytest.mark.parametrize("dim", [0, 1, (0, 2)])
def test_a_bound_for_each(dim):
    dims = dim if isinstance(dim, tuple) else (dim,)
    shape = [1 if d in dims else size for d, size in enumerate(SHAPE)]
    most = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    x, of = randn(), MaxNorm(most, dim=dim)
    of_rows = MaxNorm(as_rows(most, dim)[0])
    assert torch.equal(as_rows(of.project(x), dim)[0], of_rows.project(as_rows(x, dim)[0]))
    assert torch.equal(as_rows(of.lmo(x), dim)[0], of_rows.lmo(as_rows(x, dim)[0]))
    assert (of.violation(of.project(x)) == 0).all()


SHAPES_OF_ELEMENTS = [(4, 5, 3), (4, 1, 1), (5, 1), (1, 5, 3), ()]


@pytest.mark.parametrize("shape", SHAPES_OF_ELEMENTS, ids=str)
@pytest.mark.parametrize("dim", [0, 1, (0, 2)])
def test_settings_of_elements(dim, shape):
    """They broadcast against the batch, along `dim` and along all others."""
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1
    each = as_rows(weight.expand(SHAPE), dim)[0]
    x = randn()
    rows = as_rows(x, dim)[0]
    for make in (
        lambda w, **kwargs: L2Ball(0.5, center=w, **kwargs),
        lambda w, **kwargs: L1Ball(0.5, center=w, **kwargs),
        lambda w, **kwargs: Hyperplane(w, 1.0, **kwargs),
        lambda w, **kwargs: BoxSection(w, 0.01, -w, w, **kwargs),
    ):
        found = as_rows(make(weight, dim=dim).project(x), dim)[0]
        torch.testing.assert_close(found, make(each).project(rows))


def test_equations_of_columns():
    matrix, x = torch.rand(2, 5), torch.randn(5, 3)
    for offset in (1.0, torch.rand(2), torch.rand(3, 2)):
        y = Affine(matrix, offset, dim=0).project(x)
        torch.testing.assert_close(y.T, Affine(matrix, offset).project(x.T))
    for wrong in (Affine(matrix, torch.rand(5, 2), dim=0), Affine(torch.rand(2, 3), 1.0, dim=0)):
        with pytest.raises(ValueError, match="of the batch|for the batch"):
            wrong.project_(x)


def test_a_column_stochastic_matrix():
    x = torch.rand(5, 3, requires_grad=True)
    y = Simplex(dim=0).project(x)
    torch.testing.assert_close(y.sum(0), torch.ones(3))
    assert (y >= 0).all()
    y.square().sum().backward()
    expected = x.detach().T.clone().requires_grad_()
    Simplex().project(expected).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad.T)


@pytest.mark.parametrize("dims", [(1, 2), (0, 1), (0, None)])
def test_intersections_of_sets_along_several_dims(dims):
    x = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = Intersection(*(Simplex(dim=dim) if dim is not None else Box(0.0, 0.6) for dim in dims))
    y = both.project(x)
    for dim in dims:
        if dim is not None:
            torch.testing.assert_close(y.sum(dim), torch.ones(3, 3).double())
    assert (both.violation(y) == 0).all()
    assert (both.violation(x + 1) > 0).all()
    assert len(both.violation(x)) == (1 if 0 in dims else 3)


@pytest.mark.parametrize("make", [lambda s: s, Intersection, lambda s: Intersection(Box(0, 1), s)])
def test_a_mask_takes_no_set_along_other_dims(make):
    with pytest.raises(ValueError, match="`constraint` must not be .* of other dims"):
        Masked(make(Simplex(dim=0)), torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MaxNorm(1.0, 1),
        lambda: UnitNorm(1),
        lambda: MinMaxNorm(0.5, 1.0, 1),
        lambda: L2Ball(1.0, 1),
        lambda: L1Ball(1.0, 0),
        lambda: Simplex(1.0, 0),
        lambda: TopK(2, 0),
    ],
)
def test_p_center_and_dim_are_given_by_name(make):
    with pytest.raises(TypeError, match="positional argument"):
        make()


def test_a_bound_for_each_has_size_1_along_dim():
    message = "`max_norm` must have one value per sub-tensor, shape (1, 5, 3) for the batch"
    with pytest.raises(ValueError, match=re.escape(message)):
        MaxNorm(torch.ones(4, 1, 1), dim=0).project_(randn())


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        (3, "`dim` must be in [-3, 2]"),
        ((), "`dim` must name one dim or more, each once"),
        ((0, -3), "`dim` must name one dim or more, each once"),
    ],
)
def test_dims_that_a_batch_does_not_have_are_refused(dim, message):
    x = randn()
    of = UnitNorm(dim=dim)
    for method in (of.project_, of.lmo, of.violation, of.sample_):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(x)
    assert torch.equal(x, randn())


@pytest.mark.parametrize("dim", [1.0, True, [0], (0, None)])
def test_dims_are_ints(dim):
    with pytest.raises(TypeError, match="`dim` must be an int, a tuple of them or None"):
        UnitNorm(dim=dim)


@pytest.mark.parametrize("dim", [0, (0, 2), (1, 3), 3])
@torch.no_grad()
def test_dims_of_size_1_beside_those_of_a_set(dim):
    x = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    of = UnitNorm(dim=dim)
    y = of.project_(x.clone())
    with torch.enable_grad():
        assert torch.equal(of.project(x), y)
    assert (of.violation(y) == 0).all()
    assert (of.violation(of.sample_(x)) == 0).all()
    assert (of.violation(of.lmo(x)) == 0).all()
