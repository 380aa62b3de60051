"""The laws of the sparse: over dtypes, scales, ties; and the selection that it is made of."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS, equal_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.sparse import TopK, are_largest, keep_largest_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-20, 1e-3, 1.0, 1e3, 1e20]

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
at_each_scale = pytest.mark.parametrize("scale", SCALES)


def random(shape, dtype=torch.float64, scale=1.0, ties=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = ((x.mul(2).round() if ties else x) * scale).to(dtype)
    return torch.where(x.isinf(), torch.finfo(dtype).max, x)


def expected(row, k):
    """By a stable sort of Python's: large first, then in the order of indices."""
    order = sorted(range(len(row)), key=lambda i: -abs(row[i]))
    return [row[i] if i in order[:k] else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 6, 7, 8])
@at_each_scale
@in_each_dtype
def test_projection(dtype, scale, k, ties):
    x = random((50, 7), dtype, scale, ties)
    y = TopK(k).project(x)
    assert y.tolist() == [expected(row, k) for row in x.tolist()]
    assert (TopK(k).violation(y) == 0).all()
    assert equal_bits(TopK(k).project(y), y)
    inside = (x != 0).sum(1) <= k
    assert equal_bits(y[inside], x[inside])  # its zeros keep their signs
    assert torch.equal(TopK(k).violation(x) > 0, ~inside)
    assert torch.equal(TopK(k).project(-x), -y)
    ranked = x.double().abs().sort(dim=1, descending=True).values
    assert torch.equal(TopK(k).violation(x), ranked[:, k] if k < 7 else torch.zeros(50).double())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(row=st.lists(st.floats(-1e3, 1e3, width=16), min_size=1, max_size=7), k=st.integers(0, 7))
def test_no_other_support_is_nearer(row, k):
    x = torch.tensor([row], dtype=torch.float64)
    y = TopK(k).project(x)
    nearest = min(
        sum(v * v for i, v in enumerate(row) if i not in support)
        for support in combinations(range(len(row)), min(k, len(row)))
    )
    assert (x - y).square().sum().item() == pytest.approx(nearest, rel=1e-12)


def test_zeros_keep_their_signs():
    x = torch.tensor([[-0.0, 1.0, -0.0, 0.0], [-0.0, -0.0, 0.0, 0.0]])
    for k in (1, 2, 4):
        assert equal_bits(TopK(k).project(x), x)


def test_tiniest_numbers_count():
    x = torch.tensor([[5e-324, 0.0, -5e-324], [1e-320, 2e308, 1e308]], dtype=torch.float64)
    x[1, 1] = 1.5e308
    assert TopK(1).project(x).tolist() == [[5e-324, 0, 0], [0, 1.5e308, 0]]
    assert TopK(1).violation(x).tolist() == [5e-324, 1e308]


@in_each_dtype
def test_not_finite(dtype):
    x = torch.tensor([[3.0, 1.0], [math.nan, 1.0], [1.0, math.inf]], dtype=dtype)
    y = TopK(1).project(x)
    assert y[0].tolist() == [3, 0]
    assert y[1:].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (7, 9), (3, 30_000), (0, 3), (3, 0), (2, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_one_by_one_and_in_any_layout_alike(ties, shape, layout):
    x = random(shape, torch.float32, ties=ties)
    rows = [TopK(5).project(row[None]) for row in x]
    y = LAYOUTS[layout](x)
    assert TopK(5).project_(y) is y
    assert equal_bits(y, torch.cat(rows) if rows else x)
    assert TopK(5).violation(y).tolist() == [0] * shape[0]


# torch 2.13 says it of its own decompositions, the first time that a forward derivative needs one
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_derivatives(k):
    x = random((4, 7)).requires_grad_()
    assert torch.autograd.gradcheck(TopK(k).project, x, check_forward_ad=True)
    (gradient,) = torch.autograd.grad(TopK(k).project(x).sum(), x)
    assert torch.equal(gradient, are_largest(x, k).double())


# ------------------------------------------------------------ the selection


@in_each_dtype
@pytest.mark.parametrize("k", range(7))
def test_keeps_exactly_so_many_with_nan_the_largest(dtype, k):
    x = torch.tensor(
        [[0, 1, -math.inf, math.nan, -1, 1], [1, 1, 1, 1, 1, 1], [math.nan, -math.nan, 0, 2, 0, 2]],
        dtype=dtype,
    )
    ranks = torch.tensor([[5, 2, 1, 0, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 4, 2, 5, 3]])
    assert torch.equal(are_largest(x, k), ranks < k)
    y = x.clone()
    assert keep_largest_(y, k) is y
    assert equal_bits(y, torch.where(ranks < k, x, 0))


def test_complex_magnitudes():
    x = torch.tensor([[3 + 4j, -4.5, 1j, 5.0], [1e20j, 2e20, 1e19, 0]], dtype=torch.complex64)
    assert are_largest(x, 2).tolist() == [[True, False, False, True], [True, True, False, False]]
    assert keep_largest_(x, 1).tolist() == [[3 + 4j, 0, 0, 0], [0, x[1, 1].item(), 0, 0]]


def test_selection_in_a_graph_and_under_autograd():
    x = random((4, 9), ties=True).requires_grad_()
    y = keep_largest_(x * 1.0, 3)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, are_largest(x, 3).double())
    keep = torch.compile(lambda rows: keep_largest_(rows, 3), fullgraph=True, backend="eager")
    assert equal_bits(keep(x.detach().clone()), y.detach())


def test_reads_no_value_on_the_host():
    with FakeTensorMode():  # whose tensors have none
        x = torch.empty(3, 9)
        TopK(2).project_(x)
        TopK(2).violation(x)


# ----------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, "`k` must be >= 0, got -1"),
        (math.nan, ValueError, "`k` must not be NaN, got nan"),
        (2.0, TypeError, "`k` must be an int, got 2.0"),
        (math.inf, TypeError, "`k` must be an int, got inf"),
        (True, TypeError, "`k` must be a number, got True"),
        ("2", TypeError, "`k` must be a number, got '2'"),
        (None, TypeError, "`k` must be a number, got None"),
    ],
)
def test_wrong_settings(k, error, message):
    with pytest.raises(error, match=message):
        TopK(k)


def test_plain_data_and_words_it_has_not():
    assert Constraint.from_plain(TopK(3).to_plain()) == TopK(3) != TopK(4)
    assert not TopK.convex
    with pytest.raises(ValueError, match="`lmo` needs a bounded set"):
        TopK(3).lmo(torch.ones(1, 2))
    with pytest.raises(ValueError, match="`sample_` needs a bounded set"):
        TopK(3).sample_(torch.ones(1, 2))
