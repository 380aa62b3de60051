"""Hyperplane, HalfSpace and Affine: exact after rounding, at any scale, and right derivatives."""

import math
from fractions import Fraction

import pytest
import torch
from optim.memory_layouts import LAYOUTS, equal_bits
from scipy.optimize import minimize

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.linear import Affine, HalfSpace, Hyperplane

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-20, 1e-5, 1.0, 1e5, 1e20]

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SETS = {
    "hyperplane": Hyperplane(normal(6), 0.7),
    "hyperplane_of_sum": Hyperplane(1.0, -2.0),
    "hyperplane_each": Hyperplane(normal(4, 6), normal(4, 1)),
    "hyperplane_one_entry": Hyperplane(torch.tensor([0.0, 3, 0, 0, 0, 0]), 1.0),
    "half_space": HalfSpace(normal(6), 0.7),
    "half_space_of_sum": HalfSpace(-1.0, -2.0),
    "half_space_each": HalfSpace(normal(4, 6), normal(4, 1)),
    "half_space_one_entry": HalfSpace(torch.tensor([0.0, 3, 0, 0, 0, 0]), 1.0),
    "affine": Affine(normal(3, 6), normal(3)),
    "affine_each": Affine(normal(3, 6), normal(4, 3)),
    "affine_full": Affine(normal(6, 6), 1.0),
    "affine_any_scales": Affine(normal(2, 6) * torch.tensor([[1e-30], [1e30]]), 0.0),
}
with_each_set = pytest.mark.parametrize("name", SETS)


def batch(dtype, scale, seed=1):
    x = normal(4, 6, seed=seed) * scale
    return x.clamp(-torch.finfo(dtype).max / 100, torch.finfo(dtype).max / 100).to(dtype)


def test_reference_values():
    halves = HalfSpace(torch.tensor([3.0, 4.0]), 5.0)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(halves.project(x), x.new_tensor([[7 / 25, 26 / 25]]))
    affine = Affine(torch.tensor([[1.0, 1, 1], [1, -1, 0]]), torch.tensor([1.0, 0.0]))
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(affine.project(x), x.new_tensor([[0.5, 0.5, 0.0]]))
    assert halves.violation(torch.tensor([[3.0, 4.0]])).item() == pytest.approx(4.0)  # distance
    off = Hyperplane(2.0, 0.0).violation(torch.tensor([[3.0], [-3.0]]))
    assert off.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)  # less its rounding


@pytest.mark.parametrize("scale", SCALES)
@in_each_dtype
@with_each_set
def test_feasible_idempotent_and_one_by_one(name, dtype, scale):
    constraint, x = SETS[name], batch(dtype, scale)
    y = constraint.project(x)
    assert (constraint.violation(y) == 0).all()
    assert equal_bits(constraint.project(y), y)
    for layout in LAYOUTS.values():
        assert_same(constraint.project_(layout(x)), y)
    for i in range(len(x)):
        alone = constraint._map(lambda _, s, i=i: s[i : i + 1] if s.ndim == 2 else s)
        assert_same(alone.project(x[i : i + 1]), y[i : i + 1])


def assert_same(found, y):
    """The same to within rounding: sums in another order are off by some units of float64."""
    unit = 2 * torch.finfo(y.dtype).eps if y.dtype != torch.float64 else 1e-14
    assert ((found - y).double().abs() <= unit * (1e-300 + y.double().abs().amax())).all()


def test_many_rows_as_one_by_one():
    constraint = Affine(normal(30, 500), normal(30))
    x = normal(400, 500, seed=2).float()
    y = constraint.project(x)
    for i in (0, 77, 399):
        assert_same(constraint.project(x[i : i + 1]), y[i : i + 1])


@pytest.mark.parametrize("scale", SCALES)
@in_each_dtype
def test_half_space_is_exact_after_rounding(dtype, scale):
    weights = normal(200, 6, seed=3)
    x = batch(dtype, scale).repeat(50, 1)
    for offset in (0.7, -1e-6, 0.0, -3e4):
        before = (weights * x.double()).sum(1)
        y = HalfSpace(weights, offset).project(x)
        for w, row, outside in zip(weights.tolist(), y.tolist(), before > offset, strict=True):
            total = sum(Fraction(a) * Fraction(b) for a, b in zip(w, row, strict=True))
            assert total <= Fraction(offset) or not outside


def test_inside_stays():
    boundary = HalfSpace(torch.tensor([3.0, 4.0]), 5.0)
    x = torch.tensor([[1.0, 0.5], [-0.0, 0.0], [-7.0, 0.1]])
    assert equal_bits(boundary.project(x), x)
    x = torch.tensor([[1 / 3, 2 / 3, -0.0]])
    assert equal_bits(Hyperplane(1.0, 1.0).project(x), x)
    assert equal_bits(Affine(torch.ones(1, 3), 1.0).project(x), x)


def by_scipy(row, matrix, offset, kind):
    found = minimize(
        lambda z: (0.5 * ((z - row) ** 2).sum(), z - row),
        row,
        jac=True,
        constraints=[
            {"type": kind, "fun": lambda z: offset - matrix @ z, "jac": lambda z: -matrix}
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(found.x)


@pytest.mark.parametrize("name", [name for name in SETS if name != "affine_any_scales"])
def test_another_solver(name):
    constraint, x = SETS[name], batch(torch.float64, 1.0)
    if isinstance(constraint, Affine):
        matrices = constraint.matrix.expand(4, -1, -1)
    else:
        matrices = torch.as_tensor(constraint.normal, dtype=torch.float64).expand(4, 6)[:, None]
    offsets = torch.as_tensor(constraint.offset).expand(4, matrices.shape[1])
    kind = "ineq" if isinstance(constraint, HalfSpace) else "eq"
    for row, matrix, offset, y in zip(x, matrices, offsets, constraint.project(x), strict=True):
        expected = by_scipy(row.numpy(), matrix.numpy(), offset.numpy(), kind)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@with_each_set
def test_float32_as_float64(name, scale):
    x = batch(torch.float32, scale)
    exact = SETS[name].project(x.double())
    error = (SETS[name].project(x).double() - exact).abs().amax(1)
    assert (error <= 1e-6 * torch.maximum(x.double().abs(), exact.abs()).amax(1)).all()


@with_each_set
def test_derivative(name):
    x = (batch(torch.float64, 3.0) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(SETS[name].project, x)


def test_derivative_of_offset():
    x, c = normal(3, 4), torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: Hyperplane(2.0, c).project(x), c)
    b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: Affine(normal(2, 4), b).project(x), b)


@with_each_set
def test_what_is_not_finite_makes_its_row_nan(name):
    x = batch(torch.float32, 1.0)
    y = SETS[name].project(x)
    x[1, 2], x[2, 0] = math.nan, math.inf
    z = SETS[name].project(x)
    assert z[1:3].isnan().all()
    assert equal_bits(z[[0, 3]], y[[0, 3]])
    violation = SETS[name].violation(x)
    assert violation[1].isnan()
    assert violation[2] == math.inf


def test_weights_of_zero_in_one_row():
    """The whole space where 0 solves it; what has no solution is not hidden."""
    normals = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    offsets, x = torch.tensor([[0.0], [-1.0], [1.0]]), torch.ones(3, 2)
    for kind in (Hyperplane, HalfSpace):
        y = kind(normals, offsets).project(x)
        assert equal_bits(y[0], x[0])
        assert y[1].isnan().all()
        assert y[2].isfinite().all()
        assert kind(normals, offsets).violation(x).tolist()[:2] == [0.0, math.inf]


@with_each_set
def test_plain_data_and_conversion(name):
    constraint, x = SETS[name], batch(torch.float32, 1.0)
    again = Constraint.from_plain(constraint.to_plain())
    assert again == constraint
    assert equal_bits(again.project(x), constraint.project(x))
    assert (constraint.to(torch.float64).violation(constraint.project(x)) == 0).all()


@with_each_set
def test_unbounded(name):
    x = batch(torch.float32, 1.0)
    assert not SETS[name].bounded
    with pytest.raises(ValueError, match="`lmo` needs a bounded set"):
        SETS[name].lmo(x)
    with pytest.raises(ValueError, match="`sample_` needs a bounded set"):
        SETS[name].sample_(x)


@pytest.mark.parametrize("shape", [(0, 6), (0, 2, 3), (4, 0)], ids=str)
def test_empty(shape):
    x = torch.ones(shape)
    assert Hyperplane(1.0, 1.0).project(x).shape == shape
    assert HalfSpace(1.0, 1.0).violation(x).shape == shape[:1]
    if len(shape) == 3 or shape[1]:
        assert SETS["affine"].project(x).shape == shape


def test_any_dims_and_single_entries():
    x = normal(2, 3, 2)
    flat = SETS["affine"].project(x.view(2, 6)).view(2, 3, 2)
    assert equal_bits(SETS["affine"].project(x), flat)
    assert Hyperplane(3.0, 6.0).project(torch.full((2, 1), 1e20)).tolist() == [[2.0], [2.0]]
    assert (HalfSpace(torch.tensor([-1e-20]), -1.0).project(torch.zeros(1, 1)) >= 1e20).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hyperplane(0.0, 1.0), "`normal` must not be 0, got 0.0"),
        (lambda: HalfSpace(torch.zeros(2, 3), 1.0), "`normal` must not be 0 everywhere"),
        (lambda: HalfSpace(math.nan, 1.0), "`normal` must not be NaN"),
        (lambda: HalfSpace(1.0, math.inf), "`offset` must be finite, got inf"),
        (lambda: Hyperplane(1.0, torch.tensor([math.nan])), "`offset` must not be NaN"),
        (lambda: Affine(torch.ones(3), 1.0), r"`matrix` must have the shape \(m, n\)"),
        (lambda: Affine(torch.ones(3, 2), 1.0), r"1 <= m <= n, got \(3, 2\)"),
        (lambda: Affine(torch.ones(2, 3), 1.0), "numerical rank 1 with m=2"),
        (lambda: Affine(torch.zeros(1, 3), 1.0), "numerical rank 0 with m=1"),
        (lambda: Affine(torch.tensor([[0.1, 0.2], [0.3, 0.6]]), 1.0), "numerical rank 1"),
        (lambda: Affine(torch.eye(3), torch.ones(2)), r"`offset` must have the shape \(3,\)"),
        (lambda: Affine(torch.eye(3), math.nan), "`offset` must not be NaN"),
        (lambda: Affine(torch.eye(3) * math.inf, 1.0), "`matrix` must not be NaN"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_of_settings():
    with pytest.raises(TypeError, match="`matrix` must be a tensor, got 1.0"):
        Affine(1.0, 1.0)
    with pytest.raises(TypeError, match="`normal` must be a number"):
        HalfSpace(None, 1.0)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (SETS["affine"], "one column per element of a sub-tensor, 5 for the batch"),
        (Affine(torch.ones(1, 5), torch.ones(2, 1)), "`offset` must have a row per sub-tensor"),
        (SETS["half_space"], "`normal` must broadcast against the batch"),
        (HalfSpace(1.0, torch.ones(5)), "`offset` must have one value per sub-tensor"),
    ],
    ids=str,
)
def test_wrong_batch(constraint, message):
    x = torch.ones(3, 5)
    with pytest.raises(ValueError, match=message):
        constraint.project_(x)
    assert (x == 1).all()
