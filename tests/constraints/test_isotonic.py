"""The laws of monotone sequences, beside pool-adjacent-violators in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS, equal_bits
from scipy.optimize import isotonic_regression
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.isotonic import Monotone

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-20, 1e-3, 1.0, 1e3, 1e20]
SIZES = [1, 2, 3, 5, 8, 33, 200]
KINDS = {
    "noise": lambda x: x,
    "ties": lambda x: x.mul(2).round(),
    "trend": lambda x: x + torch.linspace(-8, 8, x.shape[1]).double(),
    "falling": lambda x: x.sort(dim=1, descending=True).values,
    "all scales": lambda x: x * 10.0 ** (8 * x.roll(1, 0)),
    "far from zero": lambda x: x + 1e6,
}

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
at_each_scale = pytest.mark.parametrize("scale", SCALES)
of_each_kind = pytest.mark.parametrize("kind", KINDS)
# torch 2.13 says it of its own decompositions, the first time that a forward derivative needs one
in_forward_mode = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)
either_way = pytest.mark.parametrize("increasing", [True, False])


def random(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(kind, size, scale=1.0, dtype=torch.float64, count=10):
    x = (KINDS[kind](random((count, size))) * scale).to(dtype)
    return x[x.isfinite().all(dim=1)]


def pools(row, ties=False):
    """Pool adjacent violators in integers: the (first, sum, size) of blocks, ordered by mean.

    And pool those of equal means too, if so asked.
    """
    found = []
    for i, value in enumerate(row):
        first, total, size = i, int(Fraction(value) * 2**1074), 1
        while found and found[-1][1] * size > total * found[-1][2] - ties:
            before = found.pop()
            first, total, size = before[0], before[1] + total, before[2] + size
        found.append((first, total, size))
    return found


def exact(row):
    """The solution, and the largest magnitude among what each of its entries is the mean of.

    Pools whose means tie count as one: rounding of the one may move the other.
    """
    solution, largest = [], []
    for first, total, size in pools(row, ties=True):
        solution += [float(Fraction(total, size * 2**1074))] * size
        largest += [max(map(abs, row[first : first + size]))] * size
    return torch.tensor([solution, largest], dtype=torch.float64)


def steps(y, increasing=True):
    return (y.double().diff(dim=1)) * (1 if increasing else -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reference_values(dtype):
    for given_, expected in [
        ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 5, 4, 3, 6, 2], [1, 4, 4, 4, 4, 4]),
        ([7], [7]),
    ]:
        x = torch.tensor([given_], dtype=dtype)
        assert Monotone().project(x).tolist() == [expected]
        assert Monotone(increasing=False).project(-x).neg().tolist() == [expected]
        assert Monotone(increasing=False).project(x.flip(1)).flip(1).tolist() == [expected]
    assert Monotone().violation(torch.tensor([[1.0, 5, 4, 1, 6], [1, 1, 2, 3, 4]])).tolist() == [
        3,
        0,
    ]
    assert Monotone(False).violation(torch.tensor([[1.0, 5, 4, 1, 6]])).tolist() == [5]


@of_each_kind
@at_each_scale
@in_each_dtype
def test_feasible_idempotent_and_as_exact(dtype, scale, kind):
    """Also what is pooled is one number, and what is not pooled keeps its bits."""
    info = torch.finfo(dtype)
    for size in SIZES:
        x = rows(kind, size, scale, dtype)
        y = Monotone().project(x)
        assert (steps(y) >= 0).all()
        assert (Monotone().violation(y) == 0).all()
        assert equal_bits(Monotone().project(y), y)
        outside = steps(x).amin(1) < 0 if size > 1 else torch.zeros(len(x), dtype=torch.bool)
        assert torch.equal(Monotone().violation(x) > 0, outside)
        assert equal_bits(y[~outside], x[~outside])
        for before, after in zip(x, y, strict=True):
            solution, largest = exact(before.tolist())
            off = (after.double() - solution).abs()
            room = 0.51 * info.eps * solution.abs() + 1e-13 * largest
            assert (off <= room + info.smallest_normal * info.eps).all()
            if kind != "ties":  # which rounding breaks: to pool them or not is the same within it
                for first, _, count in pools(before.tolist()):
                    assert (after[first : first + count] == after[first]).all()
            alone = [first for first, _, count in pools(before.tolist(), ties=True) if count == 1]
            assert equal_bits(after[alone], before[alone])


@pytest.mark.parametrize(
    ("kind", "size"), [("noise", 100_000), ("falling", 2**15), ("far from zero", 30_000)]
)
def test_long_rows(kind, size):
    x = rows(kind, size, dtype=torch.float32, count=1)
    solution, largest = exact(x[0].tolist())
    y = Monotone().project(x)[0]
    assert (steps(y[None]) >= 0).all()
    assert ((y - solution).abs() <= 1e-7 * solution.abs() + 1e-13 * largest).all()


@pytest.mark.parametrize("size", [4096, 100_000])
def test_long_rows_of_one_descent(size):
    """Sums of equal terms, whose rounding errors all go the same way."""
    x = torch.full((1, size), 0.1)
    x[0, -1] = 0.0
    assert (Monotone().project(x) == 0.1 * (size - 1) / size).all()
    assert equal_bits(Monotone().project(x[:, :-1]), x[:, :-1])


def test_large_entries_cost_their_neighbors_no_precision():
    x = torch.tensor([[-1e20, 2.0, 1.0, 1e20, 4e-20, 2e-20, 3e20, 3e20]], dtype=torch.float64)
    y = Monotone().project(x)
    assert y[0, :3].tolist() == [-1e20, 1.5, 1.5]
    x = torch.tensor([[-1e20, -1e20, 3e-20, 1e-20, 2.0, 1.0, 1e20, 1e20]], dtype=torch.float64)
    expected = [-1e20, -1e20, 2e-20, 2e-20, 1.5, 1.5, 1e20, 1e20]
    assert Monotone().project(x)[0].tolist() == pytest.approx(expected, rel=1e-15)


def test_ends_of_the_range():
    most = torch.finfo(torch.float64).max
    for row, expected in [
        ([most, -most], [0, 0]),
        ([most] * 7 + [-most], [0.75 * most] * 8),
        ([-most, most, most], [-most, most, most]),
        ([5e-324, -5e-324, 0.0], [0, 0, 0]),
    ]:
        x = torch.tensor([row], dtype=torch.float64)
        y = Monotone().project(x)
        assert (steps(y / 4) >= 0).all()
        assert y[0].tolist() == pytest.approx(expected, rel=1e-12)
    for dtype in DTYPES:
        big = torch.finfo(dtype).max
        y = Monotone().project(torch.tensor([[big, -big, big]], dtype=dtype))
        assert y.tolist() == [[0, 0, big]]


@of_each_kind
@either_way
def test_optimal(increasing, kind):
    """x - Px is orthogonal to Px, and at an obtuse angle to each step that the cone is made of."""
    for size in SIZES:
        x = rows(kind, size)
        if not increasing:
            x = -x
        y = Monotone(increasing).project(x)
        assert (steps(y, increasing) >= 0).all()
        normal = (x - y) * (1 if increasing else -1)
        scale = x.abs().amax(1) * size
        assert (normal.sum(1).abs() <= 1e-14 * scale).all()
        assert (normal.cumsum(1) >= -1e-14 * scale[:, None]).all()
        assert ((normal * y).sum(1).abs() <= 1e-14 * scale * x.abs().amax(1)).all()


@of_each_kind
def test_never_expands(kind):
    for size in SIZES:
        x, z = rows(kind, size), rows(kind, size) + random((10, size), seed=1)
        before = torch.linalg.vector_norm(x - z, dim=1)
        after = torch.linalg.vector_norm(Monotone().project(x) - Monotone().project(z), dim=1)
        assert (after <= before * (1 + 1e-12) + 1e-14 * size * x.abs().amax(1)).all()


@of_each_kind
def test_equivariant(kind):
    """Under scale, shifts, and both ways to turn around."""
    for size in SIZES:
        x = rows(kind, size)
        y = Monotone().project(x)
        assert torch.equal(Monotone().project(4 * x), 4 * y)
        assert torch.equal(Monotone(False).project(-x), -y)
        turned = Monotone(False).project(x.flip(1)).flip(1)
        room = 1e-13 * (1 + x.abs().amax(1, keepdim=True))
        assert ((turned - y).abs() <= room).all()
        assert ((Monotone().project(x + 3) - 3 - y).abs() <= room).all()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    row=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32)),
        min_size=1,
        max_size=40,
    ),
    increasing=st.booleans(),
)
def test_as_an_independent_solver(row, increasing):
    solved = isotonic_regression(np.array(row), increasing=increasing).x
    x = torch.tensor([row], dtype=torch.float64)
    y = Monotone(increasing).project(x)
    assert (steps(y, increasing) >= 0).all()
    largest = max(map(abs, row))
    assert y[0].numpy() == pytest.approx(solved, rel=1e-12, abs=1e-13 * largest)
    solution = exact(row if increasing else row[::-1])[0]
    assert y[0].numpy() == pytest.approx(
        (solution if increasing else solution.flip(0)).numpy(), rel=1e-13, abs=1e-14 * largest
    )


@in_each_dtype
def test_zeros_keep_their_signs(dtype):
    x = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 1.0], [-0.0, 0.0, -0.0, 2.0, 1.0]], dtype=dtype)
    y = Monotone().project(x)
    assert equal_bits(y[0], x[0])
    assert equal_bits(y[1, :3], x[1, :3])


@in_each_dtype
def test_not_finite(dtype):
    x = torch.tensor([[3.0, 1.0], [math.nan, 1.0], [1.0, math.inf], [-math.inf, 1.0]], dtype=dtype)
    y = Monotone().project(x)
    assert y[0].tolist() == [2, 2]
    assert y[1:].isnan().all()
    violation = Monotone().violation(x)
    assert violation[0] == 2 and violation[1].isnan() and (violation[2:] == math.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (7, 9), (3, 30_000), (0, 3), (3, 0), (2, 1)])
@either_way
def test_one_by_one_and_in_any_layout_alike(increasing, shape, layout):
    x = random(shape).float()
    expected = [Monotone(increasing).project(row[None]) for row in x]
    y = LAYOUTS[layout](x)
    assert Monotone(increasing).project_(y) is y
    assert equal_bits(y, torch.cat(expected) if expected else x)
    assert Monotone(increasing).violation(y).tolist() == [0] * shape[0]


@in_forward_mode
@either_way
@pytest.mark.parametrize(
    "size", [1, 2, 3, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 13))]
)
def test_derivatives(size, increasing):
    x = random((4, size)).requires_grad_()
    project = Monotone(increasing).project
    assert torch.autograd.gradcheck(project, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(project, x)
    with torch.no_grad():
        value = project(x)
    assert equal_bits(project(x), value)


@in_forward_mode
@pytest.mark.parametrize("size", [100, 1000])
def test_gradient_is_averaged_over_each_pool(size):
    x = (random((5, size)) + torch.linspace(0, 9, size)).requires_grad_()
    gradient = random((5, size), seed=1)
    (found,) = torch.autograd.grad(Monotone().project(x), x, gradient)
    expected = gradient.clone()
    for row, of_x in zip(expected, x.tolist(), strict=True):
        for first, _, count in pools(of_x):
            row[first : first + count] = row[first : first + count].mean()
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    with forward_ad.dual_level():  # the derivative is symmetric
        dual = forward_ad.make_dual(x.detach(), gradient)
        tangent = forward_ad.unpack_dual(Monotone().project(dual)).tangent
    assert torch.allclose(tangent, expected, rtol=0, atol=1e-13)


def test_reads_no_value_on_the_host():
    with FakeTensorMode():  # whose tensors have none
        x = torch.empty(3, 9)
        Monotone().project_(x)
        Monotone().violation(x)


@pytest.mark.parametrize("wrong", [1, None, "up", math.nan])
def test_wrong_settings(wrong):
    with pytest.raises(TypeError, match=rf"`increasing` must be a bool, got {wrong!r}"):
        Monotone(wrong)


def test_plain_data_and_words_it_has_not():
    for constraint in (Monotone(), Monotone(False)):
        assert Constraint.from_plain(constraint.to_plain()) == constraint
        assert not constraint.bounded
        with pytest.raises(ValueError, match="`lmo` needs a bounded set"):
            constraint.lmo(torch.ones(1, 2))
        with pytest.raises(ValueError, match="`sample_` needs a bounded set"):
            constraint.sample_(torch.ones(1, 2))
    assert Monotone() != Monotone(False)
