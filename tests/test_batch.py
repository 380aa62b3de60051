"""to_batch: the shape for every `param_ndim`, views wherever strides allow one, and its errors."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim.memory_layouts import LAYOUTS

from rai_toolbox import to_batch

# shape -> {param_ndim: shape of the batch}
SHAPES = {
    (3, 5, 2): {
        0: (30, 1),
        1: (15, 2),
        2: (3, 5, 2),
        3: (1, 3, 5, 2),
        None: (1, 3, 5, 2),
        -1: (3, 5, 2),
        -2: (15, 2),
        -3: (30, 1),
    },
    (4,): {0: (4, 1), 1: (1, 4), None: (1, 4), -1: (4, 1)},
    (): {0: (1, 1), None: (1, 1)},
    (1,): {0: (1, 1), 1: (1, 1), None: (1, 1), -1: (1, 1)},
    (0, 3): {0: (0, 1), 1: (0, 3), 2: (1, 0, 3), None: (1, 0, 3), -1: (0, 3), -2: (0, 1)},
    (3, 0): {0: (0, 1), 1: (3, 0), 2: (1, 3, 0), None: (1, 3, 0), -1: (3, 0), -2: (0, 1)},
    (2, 0, 3): {1: (0, 3), 2: (2, 0, 3), -1: (2, 0, 3), -2: (0, 3), None: (1, 2, 0, 3)},
    (0,): {0: (0, 1), 1: (1, 0), None: (1, 0), -1: (0, 1)},
}
CASES = [(shape, k, batch) for shape, batches in SHAPES.items() for k, batch in batches.items()]
DTYPES = [torch.float32, torch.float16, torch.complex64, torch.int64, torch.bool]


def numbered(shape):
    return torch.arange(prod(shape)).reshape(shape)


def is_view_possible(tensor, leading):
    """Whether the first `leading` dims can be one dim: each steps over exactly the next ones."""
    if tensor.numel() == 0:
        return True
    real = [(tensor.shape[i], tensor.stride(i)) for i in range(leading) if tensor.shape[i] != 1]
    return all(step == size * inner for (_, step), (size, inner) in itertools.pairwise(real))


@pytest.mark.parametrize(("shape", "param_ndim", "expected"), CASES)
def test_shape_and_order(shape, param_ndim, expected):
    x = numbered(shape)
    batch = to_batch(x, param_ndim)
    assert batch.shape == expected
    assert batch.flatten().tolist() == list(range(x.numel()))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 4), max_size=5), data=st.data())
def test_any_layout_is_seen_alike_and_as_a_view_if_there_is_one(layout, shape, data):
    x = LAYOUTS[layout](numbered(shape))
    k = data.draw(st.none() | st.integers(-len(shape), len(shape)))
    batch = to_batch(x, k)

    sub = len(shape) if k is None else k % (len(shape) + 1) if k >= 0 else len(shape) + k
    assert batch.shape == (prod(shape[: len(shape) - sub]), *(shape[len(shape) - sub :] or [1]))
    assert batch.flatten().tolist() == list(range(x.numel()))
    if is_view_possible(x, len(shape) - sub):
        assert batch.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        batch.fill_(-1)
        assert (x == -1).all()
    else:
        batch.fill_(-1)
        assert x.flatten().tolist() == list(range(x.numel()))  # a copy, and nothing in between


def test_the_sub_tensors_own_dims_may_have_any_strides():
    """Only dims that become one must fit together: rows stay views in every memory format."""
    x = numbered((2, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    assert {k: to_batch(x, k).data_ptr() == x.data_ptr() for k in (None, 4, 3, 2, 1, 0)} == {
        None: True,
        4: True,
        3: True,
        2: False,
        1: False,
        0: False,
    }


@pytest.mark.parametrize(
    ("k", "is_view"), [(None, True), (2, True), (1, True), (-1, True), (0, False), (-2, False)]
)
def test_expanded(k, is_view):
    x = torch.arange(4).expand(3, 4)
    batch = to_batch(x, k)
    assert batch.shape == to_batch(x.contiguous(), k).shape
    assert batch.flatten().tolist() == [0, 1, 2, 3] * 3
    assert (batch.data_ptr() == x.data_ptr()) == is_view


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype(dtype):
    x = numbered((2, 3)).to(dtype)
    assert to_batch(x, None).dtype == dtype
    assert torch.equal(to_batch(x, None)[0], x)


def test_gradients_flow():
    x = torch.ones(2, 3, 4).transpose(0, 2).requires_grad_()
    weights = torch.arange(24.0).view(12, 2)
    (to_batch(x, 1) * weights).sum().backward()
    assert torch.equal(x.grad, weights.view(4, 3, 2))


@pytest.mark.parametrize(
    ("shape", "k"),
    [((), 1), ((), -1), ((4,), 2), ((4,), -2), ((3, 5, 2), 4), ((3, 5, 2), -4), ((0, 3), 3)],
)
def test_refuses_more_dims_than_there_are(shape, k):
    n = len(shape)
    allowed = rf"None or lie in \[-{n}, {n}\]" if n else "None"
    message = rf"`param_ndim` must be {allowed} .*{n} dims, got {k}$"
    with pytest.raises(ValueError, match=message):
        to_batch(torch.zeros(shape), k)


@pytest.mark.parametrize("k", [True, False, 1.0, "1", (1,), torch.tensor(1), float("nan")])
def test_refuses_what_is_no_int(k):
    with pytest.raises(TypeError, match=r"`param_ndim` must be an int or None, got "):
        to_batch(torch.zeros(3, 5, 2), k)
