"""Random starts: inside the ball, and uniform there."""

import pytest
import torch
from scipy.stats import kstest

from rai_toolbox.perturbations.init import (
    uniform_like_l1_n_ball_,
    uniform_like_l2_n_ball_,
    uniform_like_linf_n_ball_,
)

FILL = {
    1: uniform_like_l1_n_ball_,
    2: uniform_like_l2_n_ball_,
    float("inf"): uniform_like_linf_n_ball_,
}
ORDERS = pytest.mark.parametrize("order", FILL)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def norms(x, order):
    return torch.linalg.vector_norm(x.double().flatten(1), order, dim=1)


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_is_inside_in_every_dtype(order, dtype):
    x = FILL[order](torch.full((200, 3, 7), 9.0, dtype=dtype), 0.7, -1, generator())
    # elementwise bounds count as rounded to the dtype, radii as given
    bound = torch.tensor(0.7, dtype=dtype).item() if order == float("inf") else 0.7 + 1e-15
    assert norms(x, order).max() <= bound
    assert (x != 0).all(0).any()


@ORDERS
def test_the_radius_is_that_of_a_uniform_point(order):
    # P(|x| <= r) = (r / epsilon)^n
    n = 4
    x = FILL[order](torch.empty(4000, n), 2.0, -1, generator())
    radii = (norms(x, order) / 2.0).numpy()
    assert kstest(radii, lambda r: r**n).pvalue > 1e-3


@ORDERS
def test_the_sign_of_each_entry_is_fair(order):
    x = FILL[order](torch.empty(20000, 3), generator=generator())
    shares = (x > 0).double().mean(0)
    assert (shares - 0.5).abs().max() < 5 * 0.5 / 20000**0.5
    pairs = ((x[:, 0] > 0) & (x[:, 1] > 0)).double().mean()
    assert abs(pairs - 0.25) < 5 * (0.25 * 0.75 / 20000) ** 0.5


@ORDERS
@pytest.mark.parametrize("param_ndim", [1, 2, -1, None])
def test_param_ndim_says_what_a_sub_tensor_is(order, param_ndim):
    x = FILL[order](torch.empty(5, 4, 3), 1.5, param_ndim, generator())
    size = {1: 3, 2: 12, -1: 12, None: 60}[param_ndim]
    found = norms(x.reshape(-1, size), order)
    assert (found <= 1.5 + 1e-12).all()
    if order != float("inf"):  # and no smaller part: a wrong view would leave them far inside
        assert found.max() > 1.5 * 0.6


@ORDERS
def test_any_strides_and_in_place(order):
    store = torch.full((3, 4, 10), 7.0)
    x = store.transpose(0, 2)[:, :, ::2]
    assert FILL[order](x, 0.5, -1, generator()) is x
    assert norms(x, order).max() <= 0.5 + 1e-12
    assert (store[1] == 7.0).all()


@ORDERS
def test_the_generator_decides(order):
    a, b, c = (FILL[order](torch.empty(4, 5), generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(5)
    d = FILL[order](torch.empty(4, 5))
    torch.manual_seed(5)
    assert torch.equal(d, FILL[order](torch.empty(4, 5)))


@ORDERS
def test_a_parameter_can_be_filled(order):
    x = torch.nn.Parameter(torch.zeros(4, 5))
    FILL[order](x, generator=generator())
    assert x.any() and x.requires_grad and x.is_leaf


@ORDERS
@pytest.mark.parametrize("epsilon", [0, -1.0, float("inf"), float("nan")])
def test_epsilon_is_positive(order, epsilon):
    x = torch.full((2, 2), 3.0)
    with pytest.raises(ValueError, match="`epsilon` must"):
        FILL[order](x, epsilon)
    assert (x == 3.0).all()
