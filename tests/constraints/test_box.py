"""The laws of the box: `clamp_` over dtypes, scales, bounds, layouts and both of its kernels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS, equal_bits
from scipy.optimize import lsq_linear

from rai_toolbox.foreach import _SMALL, clamp_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUNDS = [
    (-1.0, 1.0),
    (0.1, 0.7),  # neither is a number of any of the dtypes
    (None, 0.3),
    (-0.2, None),
    (0.0, 0.0),
    (-0.0, 1.0),
    (0.0, None),
    (-1e-20, 1e-20),
    (-1e20, 1e20),
    (1e-300, 1e300),  # 0 and inf in most dtypes
    (-70000.0, 70000.0),  # beyond float16
    (-1.0, 1e6),
    (70000.0, None),
    (None, -65530.0),  # -inf in float16
    (-65519.0, 65519.0),  # rounds to the largest number of float16
    (-math.inf, math.inf),
    (math.inf, math.inf),
    (5e-8, 3e-4),  # subnormal in float16
    (-1e-42, 2e-45),  # subnormal in float32 and bfloat16
]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 0.7, math.inf, -math.inf, 1e-45, -1e-42, 6e-8, 65504.0, 1e30]

on_both_kernels = pytest.mark.parametrize("size", [40, _SMALL + 40], ids=["small", "large"])
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_each_bound = pytest.mark.parametrize("bounds", BOUNDS, ids=str)


def rounded(bounds, dtype):
    """The bounds as numbers of the dtype; an open side is at infinity."""
    lower, upper = bounds
    lower, upper = (-math.inf if lower is None else lower), (math.inf if upper is None else upper)
    return torch.tensor(lower, dtype=dtype), torch.tensor(upper, dtype=dtype)


def values(size, dtype, seed=0):
    """All scales, signs, and special values, in random order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x *= 10.0 ** (40 * torch.rand(size, generator=generator, dtype=torch.float64) - 20)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)
    return x[torch.randperm(size, generator=generator)].to(dtype)


def clamped(x, bounds):
    result = x.clone()
    clamp_([result], *bounds)
    return result


@on_both_kernels
@in_each_dtype
@with_each_bound
def test_projection(bounds, dtype, size):
    """In the box as rounded; identity inside and idempotent, bitwise; else at the nearer bound."""
    x = values(size, dtype)
    lower, upper = rounded(bounds, dtype)
    y = clamped(x, bounds)
    assert ((lower <= y) & (y <= upper)).all()
    inside = (lower <= x) & (x <= upper)
    assert equal_bits(y[inside], x[inside])
    assert equal_bits(clamped(y, bounds), y)
    assert (y[x < lower] == lower).all()
    assert (y[x > upper] == upper).all()


@on_both_kernels
@in_each_dtype
@with_each_bound
def test_nan_stays_and_infinity_is_clamped(bounds, dtype, size):
    x = values(size, dtype)
    x[::3], x[1::3], x[2::3] = math.nan, math.inf, -math.inf
    lower, upper = rounded(bounds, dtype)
    y = clamped(x, bounds)
    assert y[::3].isnan().all()
    assert (y[1::3] == upper).all()
    assert (y[2::3] == lower).all()


@on_both_kernels
@in_each_dtype
@with_each_bound
def test_never_expands(bounds, dtype, size):
    # Monotone rounding: differences in float64 keep the order that they have on paper.
    x, y = values(size, dtype, 1).double(), values(size, dtype, 2).double()
    x[x.isinf()], y[y.isinf()] = 1.0, -1.0
    after = (clamped(x.to(dtype), bounds).double() - clamped(y.to(dtype), bounds).double()).abs()
    assert (after[after.isfinite()] <= (x - y).abs()[after.isfinite()]).all()


@on_both_kernels
@in_each_dtype
@with_each_bound
def test_equivariant_under_sign_permutation_and_scale(bounds, dtype, size):
    x = values(size, dtype)
    y = clamped(x, bounds)
    lower, upper = bounds
    mirrored = (None if upper is None else -upper, None if lower is None else -lower)
    assert torch.equal(clamped(-x, mirrored), -y)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clamped(x[order], bounds), y[order])
    # Powers of two are exact where nothing overflows or becomes subnormal.
    scaled = [b and 4 * b for b in bounds]
    exact = (
        (4 * x).isfinite() & (x.abs() > 1e-4) & all(not b or 1e-4 < abs(b) < 1e4 for b in scaled)
    )
    assert torch.equal(clamped(4 * x, scaled)[exact], 4 * y[exact])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 40, 5, 20), (7,), (), (0, 3)], ids=str)
@in_each_dtype
def test_any_layout_alike(dtype, shape, layout):
    x = values(max(math.prod(shape), 40), dtype)[: math.prod(shape)].view(shape)
    for bounds in BOUNDS:
        y = LAYOUTS[layout](x)
        clamp_([y], *bounds)
        assert equal_bits(y, clamped(x, bounds))


@pytest.mark.parametrize("shapes", [[(3,), (), (0, 3), (2, 5), (4, 1, 2)], [(2,)] * 150])
@with_each_bound
def test_together_as_one_by_one(bounds, shapes):
    """Also for a list of several dtypes, of more tensors than one chunk, and of any shapes."""
    tensors = [
        values(40, DTYPES[i % 4], seed=i)[: math.prod(shape)].view(shape)
        for i, shape in enumerate(shapes)
    ]
    alone = [clamped(x, bounds) for x in tensors]
    large = values(_SMALL + 40, torch.float32)
    beside_a_large_one = [x.clone() for x in tensors]
    clamp_([*beside_a_large_one, large], *bounds)
    clamp_(tensors, *bounds)
    assert all(map(equal_bits, tensors, alone))
    assert all(map(equal_bits, beside_a_large_one, alone))


def test_nothing_to_clamp():
    clamp_([], -1.0, 1.0)
    clamp_([], -1e9, 1.0)


@on_both_kernels
def test_in_place(size):
    x = values(size, torch.float32)
    where = x.data_ptr()
    clamp_([x], -1.0, 1.0)
    assert x.data_ptr() == where
    assert x.abs().max() == 1


@settings(deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    ends=st.lists(st.floats(-2, 2), min_size=2, max_size=2, unique=True),
)
def test_as_an_independent_solver(n, seed, scale, ends):
    """min |y - x| over the box, by scipy's bounded least squares (in units of `scale`)."""
    lower, upper = sorted(ends)
    x = np.random.default_rng(seed).normal(size=n) * 2
    solved = lsq_linear(np.eye(n), x, (lower, max(upper, lower + 1e-9)), tol=1e-15).x
    mine = clamped(torch.tensor(x * scale), (lower * scale, max(upper, lower + 1e-9) * scale))
    assert mine.numpy() == pytest.approx(solved * scale, rel=1e-6, abs=1e-6 * scale)
