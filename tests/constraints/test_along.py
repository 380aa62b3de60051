"""Sets of what lies along any dims: their methods do with it what those of rows do with rows."""

import math
import re

import pytest
import torch

from rai_toolbox.constraints import MaxNorm, MinMaxNorm, UnitNorm

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


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_methods_act_on_rows(p, dim):
    x, of, of_rows = randn(), MinMaxNorm(1.5, 2.0, p, dim), MinMaxNorm(1.5, 2.0, p)
    rows, kept = as_rows(x, dim)
    assert torch.equal(as_rows(of.project(x), dim)[0], of_rows.project(rows))
    assert torch.equal(as_rows(of.lmo(x), dim)[0], of_rows.lmo(rows))
    assert torch.equal(of.violation(x), of_rows.violation(rows).view(kept))
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
