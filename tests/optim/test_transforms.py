"""The gradient transforms, in every dtype: ties, zeros, ends of the range, non-finite values."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS, equal_bits

from rai_toolbox import to_batch
from rai_toolbox.constraints.kernels.directions import sign_
from rai_toolbox.optim.transforms import LargestSign, normalize_, top_q_each_

TINY = torch.finfo(torch.float32).tiny
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {
    "sign": lambda grads, k: sign_(grads),
    "l1": lambda grads, k: normalize_(grads, 1, k, TINY),
    "l2": lambda grads, k: normalize_(grads, 2, k, TINY),
    "top_q": lambda grads, k: top_q_each_(grads, 0.6, k),
    "largest_sign": lambda grads, k: LargestSign().change_(grads, {"param_ndim": k}),
}

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
for_each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def transformed(name, grad, param_ndim=-1):
    result = grad.clone()
    TRANSFORMS[name]([result], param_ndim)
    return result


def normalized(grad, p, eps=TINY):
    result = grad.clone()
    normalize_([result], p, -1, eps)
    return result


def random(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --------------------------------------------------------------- all of them


@pytest.mark.parametrize("layout", LAYOUTS)
@in_each_dtype
@for_each_transform
def test_any_layout_alike(name, dtype, layout):
    for shape in [(4, 3, 5, 6), (7, 11), (9,), (2, 3, 5), ()]:
        grad = random(shape, dtype)
        for param_ndim in [None, *range(-len(shape), len(shape) + 1)]:
            other = LAYOUTS[layout](grad)
            TRANSFORMS[name]([other], param_ndim)
            rounding = 4 * torch.finfo(dtype).eps
            expected = transformed(name, grad, param_ndim)
            torch.testing.assert_close(other, expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@for_each_transform
@torch.no_grad()
def test_several_of_one_shape_in_any_layout(name, layout):
    for shape in [(4, 3, 5, 6), (7, 11), (2, 3, 5)]:
        grads = [random(shape, torch.float32, seed) for seed in range(3)]
        for param_ndim in [None, *range(-len(shape), len(shape) + 1)]:
            others = list(map(LAYOUTS[layout], grads))
            TRANSFORMS[name](others, param_ndim)
            for grad, other in zip(grads, others, strict=True):
                expected = transformed(name, grad, param_ndim)
                torch.testing.assert_close(other, expected, rtol=1e-6, atol=0)


@in_each_dtype
@for_each_transform
def test_sub_tensors_one_by_one(name, dtype):
    grad = random((4, 3, 5, 6), dtype)
    for param_ndim in [None, *range(-4, 5)]:
        together = to_batch(transformed(name, grad, param_ndim), param_ndim)
        alone = [transformed(name, row, None) for row in to_batch(grad, param_ndim)]
        assert equal_bits(together, torch.stack(alone))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
@in_each_dtype
@for_each_transform
def test_empty(name, dtype, shape):
    for param_ndim in [None, *range(-len(shape), len(shape) + 1)]:
        assert transformed(name, torch.empty(shape, dtype=dtype), param_ndim).shape == shape


@in_each_dtype
@for_each_transform
def test_zero_rows_stay_zero_beside_others(name, dtype):
    grad = random((5, 7), dtype)
    grad[1], grad[3] = 0.0, -0.0
    result = transformed(name, grad)
    assert (result[[1, 3]] == 0).all()
    assert (result[[0, 2, 4]] != 0).any(dim=1).all()
    assert not transformed(name, torch.zeros(3, 2, dtype=dtype), 0).any()


@in_each_dtype
@pytest.mark.parametrize(
    ("name", "expected"), [("sign", -1), ("l1", -1), ("l2", -1), ("largest_sign", -1), ("top_q", 0)]
)
def test_no_dims(name, expected, dtype):
    for param_ndim in (None, 0):
        assert transformed(name, torch.tensor(-3.0, dtype=dtype), param_ndim).item() == expected


@in_each_dtype
@for_each_transform
def test_nan_stays_visible_and_only_in_its_row(name, dtype):
    grad = random((4, 3), dtype)
    clean = transformed(name, grad)
    grad[1, 2] = math.nan
    result = transformed(name, grad)
    assert result[1, 2].isnan()
    assert result[1].isnan().all() == (name in ("l1", "l2"))
    others = [0, 2, 3]
    assert equal_bits(result[others], clean[others])


# --------------------------------------------------------------------- sign


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_sign_of_every_number(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    expected = torch.where(x.isnan(), x, x.sign())
    for size in (2**16, 64):  # the list operator has a path for small tensors
        parts = [part.clone() for part in x.split(size)]
        sign_(parts)
        assert torch.equal(torch.cat(parts).nan_to_num(7), expected.nan_to_num(7))
    for part in parts:  # as it was first, alone
        part.copy_(x[:64])
        sign_([part])
        assert torch.equal(part.nan_to_num(7), expected[:64].nan_to_num(7))
        x, expected = x[64:], expected[64:]


@torch.no_grad()
def test_signs_whatever_the_default_dtype_is():
    expected = torch.tensor([1.0, -1.0, math.nan])
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            parts = [2 * expected, 3 * expected]
            sign_(parts)
            assert equal_bits(parts[0], expected) and equal_bits(parts[1], expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("at", [0, 783, 500])
@torch.no_grad()
def test_a_nan_in_one_small_tensor_is_not_hidden(at):
    for dtype in (torch.float32, torch.float64):
        for x in (torch.ones(784, dtype=dtype), torch.ones(2, 784, dtype=dtype).T[:, 0]):
            x[at], x[at - 1], x[at - 2] = math.nan, -math.inf, 0.0
            sign_([x])
            assert x[at].isnan()
            assert (x[at - 1], x[at - 2], x.nansum()) == (-1, 0, 780)


@in_each_dtype
@torch.no_grad()
def test_a_nan_at_any_place_of_many_small_tensors_is_not_hidden(dtype):
    for size in (1, 9, 67):  # in vectors, and what is left over
        for at in range(size):
            xs = [random((size,), dtype, seed) for seed in range(3)]
            xs[1][at] = math.nan
            expected = [torch.where(x.isnan(), x, x.sign()) for x in xs]
            sign_(xs)
            torch.testing.assert_close(xs, expected, rtol=0, atol=0, equal_nan=True)


@in_each_dtype
def test_sign_at_the_ends_of_the_range(dtype):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    sizes = torch.tensor(
        [least, 3 * least, info.tiny, info.eps, 1, info.max, math.inf], dtype=dtype
    )
    x = torch.cat([sizes, -sizes])
    assert (sizes > 0).all()
    sign_([x])
    assert x.tolist() == [1] * 7 + [-1] * 7


@pytest.mark.parametrize("strides", ["dense", "transposed"])
def test_signs_of_a_tensor_beyond_the_cache(strides):
    x = torch.ones(3, 2**19)
    x[0, 5], x[1, 7], x[2, -1], x[2, -2] = torch.nan, 0.0, -1e-45, 3e38
    expected = x.sign()
    expected[0, 5] = torch.nan
    if strides == "transposed":
        x, expected = x.t(), expected.t()
    sign_([x])
    assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_sign_of_complex_numbers(dtype):
    info = torch.finfo(dtype)
    sizes = [1e-25, 1.0, 1e20, info.tiny, info.max / 2]
    units = [1, 1j, -1, 0.6 - 0.8j]
    x = torch.tensor([[size * unit for unit in units] for size in sizes], dtype=dtype)
    sign_([x])
    for row in x:
        assert torch.allclose(row, torch.tensor(units, dtype=dtype))
    x = torch.tensor([0, complex(math.nan, 0), complex(1, math.nan)], dtype=dtype)
    sign_([x])
    assert x[0] == 0
    assert x[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("copies", [1, 33])  # one by one, and in vectors
def test_sign_of_complex_numbers_at_the_ends_of_the_range(dtype, copies):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    for size in (info.max, least):  # the modulus of the first is beyond the range
        x = torch.full((copies,), complex(size, -size), dtype=dtype)
        sign_([x])
        assert torch.allclose(x, torch.full_like(x, complex(0.5**0.5, -(0.5**0.5))))


# ------------------------------------------------------- one row, by few calls


def one_rows(dtype):
    """Tensors of one sub-tensor, and the `param_ndim` by which they are that."""
    x = random((2, 3, 4), dtype)
    yield from ((x[:1], -1), (x[:1], 2), (x, None), (x[0, 0], None), (x[0, :1], -1))
    yield from ((x.transpose(0, 2), None), (x[:1, :, 1:3], -1), (x[0, 0, :1], None))
    yield from ((x[:1].to(memory_format=torch.contiguous_format).mT, -1), (x[0, 0, 0], None))


@in_each_dtype
@for_each_transform
@torch.no_grad()
def test_one_row_is_transformed_as_in_a_stack(name, dtype):
    info = torch.finfo(dtype)
    ends = (1.0, info.tiny, info.smallest_normal * info.eps, info.max / 8, 0.0, math.inf, math.nan)
    for size in ends:
        for x, param_ndim in one_rows(dtype):
            x = x.clone() * torch.tensor(size, dtype=dtype)
            row, ndim = x.unsqueeze(0), x.ndim
            if param_ndim == -1 or param_ndim == 2:
                row, ndim = x, x.ndim - 1
            stacked = transformed(name, torch.cat([row, row]), ndim)[:1].reshape(x.shape)
            alone = transformed(name, x, param_ndim)
            assert torch.allclose(alone, stacked, rtol=9 * info.eps, atol=0, equal_nan=True)


@for_each_transform
@torch.no_grad()
def test_a_vector_of_sub_tensors_is_no_row(name):
    grad = torch.tensor([3.0, -4.0, 0.5])
    expected = transformed(name, grad[:, None], 1).view(-1)
    assert torch.equal(transformed(name, grad, -1), expected)


# ---------------------------------------------------------------- normalize


@pytest.mark.parametrize("p", [1, 2])
@in_each_dtype
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-25, 20),
    eps=st.sampled_from([0.0, TINY, 1e-12, 0.5]),
)
def test_normalized_as_in_exact_arithmetic(dtype, p, rows, size, seed, scale, eps):
    grad = (random((rows, size), torch.float64, seed) * 10**scale).to(dtype)
    grad = grad.nan_to_num(posinf=torch.finfo(dtype).max, neginf=torch.finfo(dtype).min)
    for before, after in zip(grad.tolist(), normalized(grad, p, eps).tolist(), strict=True):
        power = sum(abs(Fraction(entry)) ** p for entry in before)
        length = power if p == 1 else root(power)
        divisor = max(length, Fraction(eps)) if length else Fraction(1)
        assert after == pytest.approx(
            [float(Fraction(entry) / divisor) for entry in before], **to(dtype)
        )


def root(square):
    """The square root, to 400 digits."""
    return Fraction(math.isqrt(square.numerator * 10**800 // square.denominator), 10**400)


def to(dtype):
    """Roundings of the divisor, of the quotient, and of the sum."""
    info = torch.finfo(dtype)
    return {"rel": 2 * info.eps + 1e-14, "abs": info.smallest_normal * info.eps}


@pytest.mark.parametrize("copies", [1, 3, 40])
@pytest.mark.parametrize(
    ("entry", "eps", "dtype"),
    [
        (1e20, TINY, torch.float32),
        (1e-25, TINY, torch.float32),
        (1e20, TINY, torch.bfloat16),
        (1e-25, TINY, torch.bfloat16),
        (65504.0, TINY, torch.float16),  # the norm is beyond float16
        (6e-8, TINY, torch.float16),  # a subnormal number
        (6e-8, 1e-8, torch.float16),  # eps would be 0 in float16
        (1e150, TINY, torch.float64),
        (1e-30, TINY, torch.float64),
        (3e38, TINY, torch.float32),  # the norm is beyond float32
        (3e38, TINY, torch.bfloat16),
        (1e-45, 0.0, torch.float32),  # the norm is a subnormal number
        (1e-150, 0.0, torch.float64),
    ],
)
@pytest.mark.parametrize("p", [1, 2])
def test_normalized_whatever_the_scale(p, entry, eps, dtype, copies):
    result = normalized(torch.full((2, copies), entry, dtype=dtype), p, eps).double()
    assert result.numpy() == pytest.approx(copies ** (-1 / p), rel=2 * torch.finfo(dtype).eps)


@in_each_dtype
@pytest.mark.parametrize("eps", [0.0, 1e-50, TINY, 1e-7, 1.0])
def test_zero_rows_whatever_eps_is(dtype, eps):
    assert not normalized(torch.zeros(3, 4, dtype=dtype), 2, eps).any()


@in_each_dtype
def test_small_rows_are_divided_by_eps(dtype):
    grad = torch.tensor([[0.03, 0.04], [30.0, 40.0]], dtype=dtype)
    expected = torch.tensor([[0.3, 0.4], [0.6, 0.8]], dtype=torch.float64)
    result = normalized(grad, 2, 0.1).double()
    assert torch.allclose(result, expected, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p", [1, 2])
@in_each_dtype
def test_a_row_with_an_infinity_becomes_nan(dtype, p):
    grad = torch.tensor([[1.0, math.inf], [-math.inf, 0.0], [3.0, 4.0]], dtype=dtype)
    result = normalized(grad, p)
    assert result[:2].isnan().all()
    assert equal_bits(result[2:], normalized(grad[2:], p))


def test_complex_rows():
    grad = torch.tensor([[3 + 4j, 0], [3e20j, 4e20], [0, 0]], dtype=torch.complex64)
    expected = torch.tensor([[0.6 + 0.8j, 0], [0.6j, 0.8], [0, 0]], dtype=torch.complex64)
    assert torch.allclose(normalized(grad, 2), expected)


# ---------------------------------------------------------- top-q and largest


def kept(grad, q):
    result = grad.clone()
    top_q_each_([result], q, -1)
    return result


@settings(deadline=None, derandomize=True)
@given(n=st.integers(0, 40), q=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@in_each_dtype
def test_top_q_keeps_the_largest_as_they_are(dtype, n, q, seed):
    """Integers below 2^8 are numbers of each dtype: with signs, n distinct magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [1 + torch.randperm(n, generator=generator) for _ in range(3)]
    grad = torch.stack(rows) * (1 - 2 * torch.randint(0, 2, (3, n), generator=generator))
    k = round((1 - q) * n)
    expected = torch.where(grad.abs() > n - k, grad, 0)
    assert equal_bits(kept(grad.to(dtype), q), expected.to(dtype))


@in_each_dtype
@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.7, 0.95, 1.0])
def test_ties_leave_exactly_so_many(dtype, q):
    for value in (1.0, 65504.0, 6e-8, math.inf):
        grad = torch.full((3, 20), value, dtype=dtype)
        grad[:, ::3] *= -1
        result = kept(grad, q)
        assert ((result != 0).sum(dim=1) == round((1 - q) * 20)).all()
        assert ((result == 0) | (result == grad)).all()


@in_each_dtype
def test_ties_leave_exactly_one(dtype):
    for value in (1.0, 65504.0, 6e-8, math.inf):
        grad = torch.full((3, 20), value, dtype=dtype)
        grad[:, ::3] *= -1
        result = transformed("largest_sign", grad)
        assert ((result != 0).sum(dim=1) == 1).all()
        assert ((result == 0) | (result == grad.sign())).all()


@in_each_dtype
def test_largest_sign(dtype):
    grad = torch.tensor(
        [[1.0, -3.0, 2.0], [6e-8, 0.0, -6e-8 / 2], [1.0, 5.0, -math.inf]], dtype=dtype
    )
    assert transformed("largest_sign", grad).tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, -1]]


@in_each_dtype
def test_nan_is_the_largest(dtype):
    grad = torch.tensor([[math.inf, math.nan, 1.0, 2.0]], dtype=dtype)
    assert kept(grad, 0.75).isnan().tolist() == [[False, True, False, False]]
    assert kept(grad, 0.5)[0, [0, 2, 3]].tolist() == [math.inf, 0, 0]
    largest = transformed("largest_sign", grad)
    assert largest[0, 1].isnan()
    assert largest[0, [0, 2, 3]].tolist() == [0, 0, 0]


def test_complex_magnitudes():
    grad = torch.tensor([[3 + 4j, -4.5, 1j, 5e-3], [1e20j, 2e20, 1e19, 0]], dtype=torch.complex64)
    expected = [[3 + 4j, -4.5, 0, 0], [1e20j, 2e20, 0, 0]]
    assert torch.equal(kept(grad, 0.5), torch.tensor(expected, dtype=torch.complex64))
    largest = [[0.6 + 0.8j, 0, 0, 0], [0, 1, 0, 0]]
    result = transformed("largest_sign", grad)
    assert torch.allclose(result, torch.tensor(largest, dtype=torch.complex64))
