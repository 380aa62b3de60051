"""Norms against exact arithmetic, in every dtype, over all of its range."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS

from rai_toolbox.constraints.kernels.blocks import Workspace
from rai_toolbox.constraints.kernels.norms import norm, scale_dtype, wide_norms
from rai_toolbox.constraints.kernels.rounding import noise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = Fraction(2) ** -52  # of float64, in which norms are accumulated and returned
LEAST = Fraction(2) ** -1074  # its spacing of subnormal numbers
ORDERS = [1, 2, math.inf]

close = partial(torch.testing.assert_close, rtol=noise(160_000), atol=0)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_each_order = pytest.mark.parametrize("p", ORDERS)


def is_right(length, entries, p):
    """Whether `length` is the p-norm of the entries up to roundings, in exact arithmetic."""
    length, entries = Fraction(length), [abs(Fraction(entry)) for entry in entries]
    if p == math.inf:
        return length == max(entries, default=0)
    power = sum(entry**p for entry in entries)
    to_subnormal = (length + LEAST) ** p - length**p
    return abs(length**p - power) <= (len(entries) + 4) * EPS * power + to_subnormal


@of_each_order
@in_each_dtype
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-20, 20),
    data=st.data(),
)
def test_exact_up_to_rounding(dtype, p, shape, seed, scale, data):
    ndim = data.draw(st.integers(1, len(shape)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**scale
    x = x.to(dtype).nan_to_num()  # float16 has no numbers of all these scales
    split = len(shape) - ndim
    if p == math.inf and math.prod(shape[split:]) == 0:
        return  # a maximum of nothing
    length = norm(x, p, ndim)
    assert length.dtype == torch.float64
    assert length.shape == (*shape[:split], *[1] * ndim)
    rows = x.reshape(math.prod(shape[:split]), math.prod(shape[split:]))
    for row, its in zip(rows.tolist(), length.flatten().tolist(), strict=True):
        assert is_right(its, row, p)


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [
        ([1e20] * 3, torch.float32),
        ([1e-25] * 3, torch.float32),
        ([1e20, 1e-25], torch.float32),
        ([3e38] * 4, torch.float32),  # the norm is beyond float32
        ([1e-45] * 3, torch.float32),
        ([3e38] * 4, torch.bfloat16),
        ([1e-40] * 3, torch.bfloat16),
        ([65504.0] * 3, torch.float16),
        ([6e-8] * 3, torch.float16),
        ([1e-5, 65504.0], torch.float16),
        ([0.0, -0.0], torch.float16),
        ([1e150, 1e-150], torch.float64),
        ([1e200] * 3, torch.float64),
        ([1e-200] * 3, torch.float64),
        ([3e-308] * 3, torch.float64),
        ([5e-324] * 3, torch.float64),  # the norm is a subnormal number of few bits
    ],
)
@of_each_order
def test_neither_overflows_nor_underflows(p, entries, dtype):
    x = torch.tensor(entries, dtype=dtype)
    assert is_right(norm(x, p, 1).item(), x.tolist(), p)


@of_each_order
@in_each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_non_finite_is_hidden(value, dtype, p):
    x = torch.tensor([[1.0, value], [3.0, 4.0]], dtype=dtype)
    bad, good = norm(x, p, 1).flatten().tolist()
    assert math.isnan(bad) if math.isnan(value) else bad == math.inf
    assert good == {1: 7, 2: 5, math.inf: 4}[p]


@pytest.mark.parametrize(
    "shape", [(3, 99_000), (99_000, 3), (1, 270_000), (3, 300, 300), (270_000,)], ids=str
)
@of_each_order
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_tensors_of_several_blocks(dtype, p, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for ndim in range(1, len(shape) + 1):
        length = norm(x, p, ndim)
        assert length.shape == (*shape[: len(shape) - ndim], *[1] * ndim)
        rows = x.double().abs().reshape(-1, math.prod(shape[len(shape) - ndim :]))
        for row, its in zip((rows[0], rows[-1]), length.flatten()[[0, -1]].tolist(), strict=True):
            exact = row.max() if p == math.inf else math.fsum(row.pow(p).tolist()) ** (1 / p)
            assert its == pytest.approx(float(exact), rel=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7, 11), (2, 270, 270)], ids=str)
@of_each_order
@in_each_dtype
def test_any_layout_alike(dtype, p, shape, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    for ndim in range(1, len(shape) + 1):
        close(norm(LAYOUTS[layout](x), p, ndim), norm(x, p, ndim))


@of_each_order
@in_each_dtype
def test_batched_as_row_by_row(dtype, p):
    for shape in [(9, 5), (3, 2, 17), (4, 40_000), (2, 400, 400)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        alone = torch.stack([norm(row, p, x.ndim - 1) for row in x])
        close(norm(x, p, x.ndim - 1), alone)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@of_each_order
def test_complex(dtype, p):
    x = torch.tensor([[3 + 4j, 0], [1e20j, 1e20], [1e-25 + 0j, 1e-25j]], dtype=dtype)
    sizes = [[5, 0], [1e20, 1e20], [1e-25, 1e-25]]
    for length, row in zip(norm(x, p, 1).flatten().tolist(), sizes, strict=True):
        assert length == pytest.approx(sum(size**p for size in row) ** (1 / p) if p < 3 else row[0])


def test_the_tensor_itself_is_left_alone():
    x = torch.tensor([[3.0, -4.0]])
    norm(x, 2, 1)
    assert x.tolist() == [[3, -4]]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_dtype_of_factors(dtype, expected):
    assert scale_dtype(torch.empty(1, dtype=dtype)) == expected


@in_each_dtype
def test_norms_of_large_batches_together(dtype):
    """By pieces that share memory: of any number of rows, in any layout, with few long rows."""
    shapes = [(401, 400), (400, 400), (3, 70_000), (1, 90_000), (5, 7), (250, 3, 20, 20)]
    batches = [torch.randn(shape).to(dtype) for shape in shapes]
    batches[-1] = batches[-1].contiguous(memory_format=torch.channels_last)
    batches[0][[0, 200, 400], 7] = torch.tensor([0.0, torch.nan, torch.inf]).to(dtype)
    expected = torch.cat([x.double().flatten(1).norm(dim=1) for x in batches])
    close(wide_norms(batches, Workspace()), expected, equal_nan=True)
