"""The laws of the L2 ball: in exact arithmetic where a law says so, over all dtypes and scales."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS, equal_bits
from scipy.optimize import minimize

from rai_toolbox.constraints.balls import project_l2_ball_
from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.constraints.kernels.rounding import noise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# |x| / epsilon: far outside, near the boundary, inside. On the boundary itself only rounding to a
# dtype coarser than that of the norms, float64, tells on which side a row is.
RATIOS = [1e20, 1e3, 3.0, 1 + 1e-3, 1 + 1e-7, 1 + 1e-10, 1 - 1e-10, 1 - 1e-7, 0.5, 1e-20]
SCALES = [1e-20, 1e-6, 1e-3, 1.0, 1e3, 1e20]
SIZES = [1, 2, 3, 17, 150]

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
at_each_scale = pytest.mark.parametrize("epsilon", [0.3 * scale for scale in SCALES], ids=str)


def rows_around(epsilon, dtype, size, seed=0, count=4):
    """Rows whose norms are the above multiples of epsilon; in float16 some are 0 or inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * len(RATIOS), size, generator=generator, dtype=torch.float64)
    x *= epsilon / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    x *= torch.tensor(RATIOS * count, dtype=torch.float64)[:, None]
    rows = x.to(dtype)
    return rows[rows.isfinite().all(dim=1)]


def squared(row):
    return sum(Fraction(entry) ** 2 for entry in row)


def projected(x, epsilon, ndim=1):
    return project_l2_ball_(x.clone(), epsilon, ndim)


def slack(epsilon, dtype, size):
    """How far from the exact projection rounding may lead.

    Half a unit for the products and half a one for the margin against it; as much and a half for
    the factor, which has float32 at least; the sum of squares in float64; subnormal numbers.
    """
    info = torch.finfo(dtype)
    relative = info.eps + 2 * min(info.eps, 2**-23) + size * 2**-52
    return relative * epsilon + 2 * info.smallest_normal * info.eps * math.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
@at_each_scale
@in_each_dtype
def test_feasible_identity_inside_idempotent(dtype, epsilon, size):
    x = rows_around(epsilon, dtype, size)
    y = projected(x, epsilon)
    assert y.dtype == dtype
    for before, after in zip(x.tolist(), y.tolist(), strict=True):
        assert squared(after) <= Fraction(epsilon) ** 2
        if squared(before) <= Fraction(epsilon) ** 2:
            assert after == before
        else:  # on the sphere, as far as the dtype can tell
            assert math.hypot(*after) >= epsilon - slack(epsilon, dtype, size)
    inside = torch.linalg.vector_norm(x.double(), dim=1) < epsilon * (1 - 1e-12)
    assert equal_bits(y[inside], x[inside])  # its zeros keep their signs, too
    assert equal_bits(projected(y, epsilon), y)


@in_each_dtype
def test_feasible_after_rounding_for_every_row(dtype):
    """x / |x| ends outside for half of the rows when it is rounded to nearest."""
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = projected((10 * x).to(dtype), 1.0)
    assert max(map(squared, y.tolist())) <= 1
    assert torch.linalg.vector_norm(y.double(), dim=1).min() > 1 - slack(1.0, dtype, 5)


def test_rows_on_the_sphere():
    """Those whose norm float64 computes as epsilon are in: unit vectors stay as they are."""
    x = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        assert equal_bits(projected(x[:2].to(dtype), 1.0), x[:2].to(dtype))
        whole = (5 * x).to(dtype)
        assert equal_bits(projected(whole, 5.0), whole)
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    y = projected(x, 1.0)
    assert max(map(squared, y.tolist())) <= 1 + Fraction(7, 2**52)
    assert (y - x).abs().max() <= slack(1.0, torch.float64, 7)
    assert equal_bits(projected(y, 1.0), y)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.7])
@pytest.mark.parametrize("size", [10_000, 300_000])
@in_each_dtype
def test_feasible_and_idempotent_for_long_rows(dtype, size, value):
    """The rounding errors of a sum of equal numbers all go the same way."""
    y = projected(torch.full((1, size), value).to(dtype), 1.0)
    assert (y == y[0, 0]).all()
    assert size * Fraction(y[0, 0].item()) ** 2 <= 1
    assert equal_bits(projected(y, 1.0), y)


@pytest.mark.parametrize("size", SIZES)
@at_each_scale
@in_each_dtype
def test_optimal(dtype, epsilon, size):
    """<x - Px, z - Px> <= 0 for the z of the ball that is farthest along x - Px."""
    x = rows_around(epsilon, dtype, size)
    normal = x.double() - projected(x, epsilon).double()
    length = torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    farthest = epsilon * normal / length.where(length > 0, 1.0)
    product = (normal * (farthest - projected(x, epsilon))).sum(dim=1)
    assert (product <= 2 * slack(epsilon, dtype, size) * (length[:, 0] + 2 * epsilon)).all()


@at_each_scale
@in_each_dtype
def test_never_expands(dtype, epsilon):
    x, y = (rows_around(epsilon, dtype, 6, seed) for seed in (1, 2))
    x, y = x[:, None].expand(-1, len(y), 6), y[None].expand(len(x), -1, 6)
    px, py = (projected(t.contiguous(), epsilon).double() for t in (x, y))
    before = torch.linalg.vector_norm(x.double() - y.double(), dim=-1)
    after = torch.linalg.vector_norm(px - py, dim=-1)
    assert (after <= before * (1 + 1e-12) + 2 * slack(epsilon, dtype, 6)).all()


@at_each_scale
@in_each_dtype
def test_equivariant_under_sign_permutation_and_scale(dtype, epsilon):
    x = rows_around(epsilon, dtype, 6)
    y = projected(x, epsilon)
    signs = torch.tensor([1, -1, -1, 1, 1, -1], dtype=dtype)
    assert equal_bits(projected(x * signs, epsilon), y * signs)
    tolerance = 2 * slack(epsilon, dtype, 6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert (
        projected(x[:, order], epsilon).double() - y[:, order].double()
    ).abs().max() <= tolerance
    half = projected(x / 2, epsilon / 2).double()
    representable = ((x / 2) * 2 == x).all(dim=1)  # subnormal numbers lose a bit
    assert (2 * half - y.double())[representable].abs().max() <= 2 * tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@in_each_dtype
def test_any_layout_alike_and_batched_as_row_by_row(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    for shape in [(4, 3, 5, 6), (7, 11), (9,), (2, 270, 270)]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for ndim in range(len(shape) + 1) if x.numel() < 1000 else (2, 3):
            y = projected(x, 0.9, ndim)
            other = LAYOUTS[layout](x)
            assert project_l2_ball_(other, 0.9, ndim) is other
            rounding = 2 * torch.finfo(dtype).eps + noise(x.numel())
            if x.numel() > BLOCK and dtype == torch.float32:
                rounding += 3e-6  # norms in float32, and radii that allow for these
            close = partial(torch.testing.assert_close, rtol=rounding, atol=0)
            close(other, y)
            if 0 < ndim < len(shape):
                close(torch.stack([projected(row, 0.9, ndim) for row in x]), y)


@in_each_dtype
def test_no_dims_are_elements(dtype):
    """With 0 dims each element is a sub-tensor; a 0-d tensor is one, too."""
    y = projected(torch.tensor([[-3.0, 0.25], [0.0, 7.0]], dtype=dtype), 0.5, ndim=0)
    assert y.double().numpy() == pytest.approx(
        np.array([[-0.5, 0.25], [0, 0.5]]), abs=slack(0.5, dtype, 1)
    )
    y = projected(torch.tensor(-3.0, dtype=dtype), 0.5, ndim=0)
    assert y.shape == ()
    assert -0.5 <= y.item() <= -0.5 + slack(0.5, dtype, 1)


@in_each_dtype
def test_zero_rows_and_radius_zero(dtype):
    x = torch.tensor([[0.0, -0.0], [3.0, -4.0]], dtype=dtype)
    assert equal_bits(projected(x, 1.0)[0], x[0])
    y = projected(x, 0.0)
    assert (y == 0).all()
    assert equal_bits(projected(y, 0.0), y)


@in_each_dtype
def test_infinite_radius_is_the_identity(dtype):
    x = torch.tensor([[0.0, -0.0], [3.0, -4.0], [1.0, math.inf]], dtype=dtype)
    assert equal_bits(projected(x, math.inf), x)


@in_each_dtype
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 1e5])
def test_nothing_non_finite_is_hidden(dtype, epsilon):
    """A NaN makes its own row NaN; an infinity, which no scaling brings back, is NaN afterwards."""
    x = torch.tensor([[1.0, math.nan], [1.0, math.inf], [-math.inf, 0.0], [3.0, 4.0]], dtype=dtype)
    y = projected(x, epsilon)
    assert y[0].isnan().all()
    assert y[1, 1].isnan() and y[2, 0].isnan()
    assert equal_bits(y[3:], projected(x[3:], epsilon))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
@in_each_dtype
def test_empty(dtype, shape):
    for ndim in range(len(shape) + 1):
        assert projected(torch.empty(shape, dtype=dtype), 1.0, ndim).shape == shape


@pytest.mark.parametrize(
    ("x", "epsilon", "dtype"),
    [
        ([1e-45, 3e-45, 0.0], 2e-45, torch.float32),
        ([1e-40, -1e-40], 1e-41, torch.float32),
        ([1e-40, 1e-39], 1e-40, torch.bfloat16),
        ([6e-8, 6e-8], 7e-8, torch.float16),
        ([6e-8, 1e-5], 1e-6, torch.float16),
        ([3e-308, 3e-308], 3e-308, torch.float64),
        ([1e20, 3e20], 1e-20, torch.float32),  # the factor is a subnormal number of float32
        ([1e20, 3e20], 1e-25, torch.float32),  # and here it is not even that
        ([3e38, 3e38, 3e38], 1.0, torch.float32),  # the norm is beyond float32
        ([65504.0, 65504.0], 1.0, torch.float16),
        ([1.0, 1.0], 1e30, torch.float16),
        ([1e200, 1e200], 1.0, torch.float64),
    ],
)
def test_at_the_ends_of_the_range(x, epsilon, dtype):
    x = torch.tensor([x], dtype=dtype)
    y = projected(x, epsilon)
    assert squared(y[0].tolist()) <= Fraction(epsilon) ** 2
    assert equal_bits(projected(y, epsilon), y)
    exact = [float(Fraction(v) * _factor(x[0].tolist(), epsilon)) for v in x[0].tolist()]
    # The factor is a number of float32 at least, so that one near 0 has an absolute error.
    of_factor = max(map(abs, x[0].tolist())) * (2**-149 if dtype != torch.float64 else 0)
    error = slack(epsilon, dtype, 3) + of_factor
    assert y[0].tolist() == pytest.approx(exact, rel=1e-12, abs=error)


def _factor(row, epsilon):
    """min(1, epsilon / |row|), to 60 digits."""
    ratio = Fraction(epsilon) ** 2 / squared(row)
    return min(
        Fraction(1), Fraction(math.isqrt(ratio.numerator * 10**800 // ratio.denominator), 10**400)
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(dtype):
    x = torch.tensor([[3 + 4j, 0], [0.1j, 0.2]], dtype=dtype)
    y = projected(x, 1.0)
    assert torch.allclose(y[0], torch.tensor([0.6 + 0.8j, 0], dtype=dtype))
    assert squared(torch.view_as_real(y[0]).flatten().tolist()) <= 1
    assert torch.equal(y[1], x[1])


def test_only_what_is_outside_is_pulled_in_when_differentiable():
    x = torch.tensor([[3.0, 4.0], [0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: project_l2_ball_(x.clone(), 1.0, 1), x)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    n=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    epsilon=st.floats(0.1, 3),
    unit=st.floats(-20, 20),
)
def test_as_an_independent_solver(n, seed, epsilon, unit):
    """min |y - x|^2 over the ball, by scipy (in units of 10^unit)."""
    x = np.random.default_rng(seed).normal(size=n) * 2
    ball = {"type": "ineq", "fun": lambda y: epsilon**2 - y @ y, "jac": lambda y: -2 * y}
    solved = minimize(
        lambda y: (y - x) @ (y - x),
        np.zeros(n),
        jac=lambda y: 2 * (y - x),
        constraints=[ball],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    mine = projected(torch.tensor(x * 10**unit)[None], epsilon * 10**unit)[0].numpy()
    assert mine == pytest.approx(solved * 10**unit, rel=1e-5, abs=1e-5 * 10**unit)


@pytest.mark.parametrize("height", [1, 2, 400])
def test_a_radius_of_few_digits_is_as_exact(height):
    radius = np.float32(0.7)
    x = torch.randn(height, 101, generator=torch.Generator().manual_seed(0)).double()
    project_l2_ball_(x, radius, 1)
    assert x.norm(dim=1).amax() <= float(radius)
    assert torch.equal(project_l2_ball_(x.clone(), float(radius), 1), x)
