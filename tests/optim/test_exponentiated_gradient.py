"""Exponentiated gradient: its formula, where it gets to, and the ends of the range."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from files import through_a_file
from scipy.optimize import minimize
from tiers import slow_but
from torch.optim import lr_scheduler
from torch_versions import takes_grad_dtype

from rai_toolbox.constraints import Birkhoff, L1Ball, Simplex, Transport
from rai_toolbox.optim.exponentiated_gradient import ExponentiatedGradient

NARROW = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, *NARROW])


def shares(*shape, total=1.0, dtype=torch.float64, seed=0):
    """Random points of the simplex, one for each row."""
    x = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return Simplex(total).sample_(x, generator).requires_grad_()


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("total", [1.0, 0.01, 300.0])
@pytest.mark.parametrize("lr", [0.0, 0.1, 3.0])
def test_steps_are_those_of_the_formula(lr, total, maximize, as_tensor):
    x = shares(4, 5, total=total)
    expected = x.detach().clone()
    opt = ExponentiatedGradient(
        [x],
        lr=torch.tensor(lr, dtype=torch.float64) if as_tensor else lr,
        total=total,
        maximize=maximize,
    )
    for step in range(5):
        new_gradients([x], step)
        grad = x.grad.clone()
        weights = expected * (lr * (grad if maximize else -grad)).exp()
        expected = total * weights / weights.sum(1, keepdim=True)
        opt.step()
        torch.testing.assert_close(x.detach(), expected, rtol=1e-13, atol=0)
        assert torch.equal(x.grad, grad)  # it is read only


def test_a_single_step_goes_to_the_best_point_within_reach():
    """It minimizes ``lr <g, y> + KL(y, x)`` over the simplex: found by scipy, too."""
    x = shares(1, 4, total=2.0)
    before = x.detach().clone()[0].numpy()
    x.grad = torch.tensor([[0.3, -0.5, 0.2, 1.0]], dtype=torch.float64)
    g = x.grad[0].numpy()
    found = minimize(
        lambda y: 0.7 * g @ y + (y * np.log(y / before)).sum(),
        before,
        jac=lambda y: 0.7 * g + np.log(y / before) + 1,
        bounds=[(1e-9, 2)] * 4,
        constraints={"type": "eq", "fun": lambda y: y.sum() - 2, "jac": np.ones_like},
        tol=1e-14,
    )
    ExponentiatedGradient([x], lr=0.7, total=2.0).step()
    torch.testing.assert_close(x[0].detach(), torch.tensor(found.x), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("param_ndim", "sums"), [(1, 6), (2, 2), (-1, 2), (-2, 6), (None, 1)])
def test_sub_tensors(param_ndim, sums):
    (x,) = tensors((2, 3, 4))
    with torch.no_grad():
        x.abs_()
    ExponentiatedGradient([x], lr=0.5, param_ndim=param_ndim).step()
    assert x.sum().item() == pytest.approx(sums, abs=1e-6)
    assert x.detach().reshape(sums, -1).sum(1).tolist() == pytest.approx([1.0] * sums, abs=1e-6)


def test_settings_per_group_and_parameters_without_a_gradient():
    x, y, z = shares(2, 3), shares(1, 6), shares(2, 3)
    before = z.detach().clone()
    opt = ExponentiatedGradient([x], lr=0.5)
    opt.add_param_group({"params": [y, z], "total": 2.0, "param_ndim": None, "maximize": True})
    x.grad, y.grad = torch.ones(2, 3).double(), torch.arange(6).double()[None]
    opt.step()
    torch.testing.assert_close(x.detach(), shares(2, 3).detach())  # a constant changes nothing
    assert y.sum().item() == pytest.approx(2.0)
    assert torch.equal(z.detach(), before)
    assert not opt.state


def test_schedulers_and_closures():
    x, y = shares(2, 3), shares(2, 3)
    opt = ExponentiatedGradient([x], lr=1.0)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)

    def closure():
        assert torch.is_grad_enabled()
        new_gradients([x], 0)
        return 7.0

    for epoch in range(3):
        assert opt.step(closure) == 7.0
        scheduler.step()
        y.grad = x.grad.clone()
        ExponentiatedGradient([y], lr=0.5**epoch).step()
    assert torch.equal(x, y)


# --- where it gets to -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", slow_but(range(5), 3))
def test_quadratics_over_the_simplex(seed):
    """The loss is that of scipy and of projected gradient descent, inside and at faces."""
    generator = torch.Generator().manual_seed(seed)
    n = 8
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    Q = (basis * torch.linspace(0.2, 2, n, dtype=torch.float64)) @ basis.T
    t = torch.randn(n, generator=generator, dtype=torch.float64) * (0.1 + 0.2 * seed)

    def f(x):
        return (x - t) @ Q @ (x - t) / 2

    projected = torch.full((n,), 1 / n, dtype=torch.float64)
    for _ in range(2000):
        projected = Simplex().project_((projected - Q @ (projected - t) / 2)[None])[0]
    found = minimize(
        lambda x: f(torch.tensor(x)).item(),
        np.full(n, 1 / n),
        jac=lambda x: (Q @ (torch.tensor(x) - t)).numpy(),
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        tol=1e-14,
    )
    x = torch.full((n,), 1 / n, dtype=torch.float64, requires_grad=True)
    opt = ExponentiatedGradient([x], lr=0.5, param_ndim=None)  # 1 / L
    losses = []
    for _ in range(3000):
        opt.zero_grad()
        loss = f(x)
        loss.backward()
        losses.append(loss.item())
        opt.step()
    lowest = f(projected).item()
    assert lowest == pytest.approx(found.fun, abs=1e-9)
    # f falls, for |y - x|_2 <= |y - x|_1; and as KL(x*, x_0) / (lr k) (Beck & Teboulle, 2003)
    assert all(b <= a + 1e-14 for a, b in zip(losses, losses[1:], strict=False))
    for k, loss in enumerate(losses[1:], 1):
        assert loss - lowest <= math.log(n) / (0.5 * k)
    assert f(x.detach()).item() - lowest <= 1e-6
    gradient = (Q @ (x - t)).detach()
    residual = x.detach() - Simplex().project_((x.detach() - gradient)[None])[0]
    assert residual.abs().max() <= 2e-3


# --- the ends of the range ------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1.0, 0.3, 7.7, 1000.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
@each_dtype
def test_sums_hold_after_rounding(dtype, scale, total):
    """To within what rounding each entry does: all points count as ones of the simplex."""
    for n in (1, 2, 7, 500):
        x = shares(3, n, total=total, dtype=dtype)
        opt = ExponentiatedGradient([x], lr=1.0, total=total)
        for step in range(15):
            new_gradients([x], step)
            x.grad.mul_(scale)
            opt.step()
            assert Simplex(total).violation(x.detach()).max() == 0
            assert (x >= 0).all()


@pytest.mark.parametrize("lr", [1.0, 1e-3])
@each_dtype
def test_no_overflow(dtype, lr):
    largest = torch.finfo(dtype).max
    x = torch.full((4, 3), 1 / 3, dtype=dtype, requires_grad=True)
    x.grad = torch.tensor(
        [
            [1e4, -1e4, 0],
            [largest, largest, largest],
            [-largest, largest, 0],
            [1e4, 1e4, 1e4 + 100],
        ],
        dtype=dtype,
    )
    ExponentiatedGradient([x], lr=lr).step()
    assert x.isfinite().all()
    assert x[1].tolist() == pytest.approx([1 / 3] * 3, rel=torch.finfo(dtype).eps)
    assert x[2].tolist() == [1, 0, 0]
    if lr == 1.0:
        assert x[0].tolist() == [0, 1, 0]


def test_zeros_stay_and_do_not_set_the_scale():
    """Also where their gradient alone would have them grow beyond all others."""
    x = torch.tensor([[0.0, 0.25, 0.75], [0.0, 1e-40, 1.0]], requires_grad=True)
    x.grad = torch.tensor([[-1e30, 1.0, 1.0], [-1e30, -400.0, 1e20]])
    ExponentiatedGradient([x], lr=1.0).step()
    assert x.tolist() == [[0.0, 0.25, 0.75], [0.0, 1.0, 0.0]]


def test_what_underflows_stays_0():
    x = torch.tensor([[0.5, 0.5]], requires_grad=True)
    opt = ExponentiatedGradient([x], lr=1.0)
    for sign in (1, -1):
        x.grad = torch.tensor([[200.0 * sign, 0.0]])
        opt.step()
        assert x.tolist() == [[0.0, 1.0]]


BAD_ROWS = {  # values, gradients
    "NaN": ([math.nan, 0.5, 0.5], [0.0, 0.0, 0.0]),
    "infinite": ([math.inf, 0.5, 0.5], [0.0, 0.0, 0.0]),
    "negative": ([-0.5, 0.5, 1.0], [0.0, 0.0, 0.0]),
    "all 0": ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),
    "gradient NaN": ([0.2, 0.3, 0.5], [math.nan, 0.0, 0.0]),
    "gradient NaN at 0": ([0.0, 0.5, 0.5], [math.nan, 0.0, 0.0]),
    "gradient infinite": ([0.2, 0.3, 0.5], [math.inf, 0.0, 0.0]),
    "gradient -infinite at 0": ([0.0, 0.5, 0.5], [-math.inf, 0.0, 0.0]),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_what_is_wrong_is_not_hidden(kind):
    """It makes its own row NaN, and no other."""
    values, grads = BAD_ROWS[kind]
    x = torch.tensor([values, [0.2, 0.3, 0.5]], requires_grad=True)
    x.grad = torch.tensor([grads, [0.0, 0.0, 0.0]])
    ExponentiatedGradient([x], lr=1.0).step()
    assert x[0].isnan().all()
    assert x[1].tolist() == pytest.approx([0.2, 0.3, 0.5])


def test_any_sum_becomes_the_total_but_not_by_an_lr_of_0():
    for lr, expected in ((0.5, [[0.25, 0.75]]), (0.0, [[1.0, 3.0]])):
        x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        x.grad = torch.zeros(1, 2)
        ExponentiatedGradient([x], lr=lr).step()
        assert x.tolist() == expected


# --- kinds of parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_any_strides_give_the_same(dtype):
    x, y = shares(2, 12, dtype=dtype), shares(2, 12, dtype=dtype)
    with torch.no_grad():
        x, y = x.view(2, 3, 4), y.view(2, 3, 4).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    assert not y.is_contiguous()
    for param in (x, y):
        opt = ExponentiatedGradient([param], lr=0.7)
        for step in range(3):
            param.grad = torch.linspace(-1, step, 24, dtype=dtype).view(2, 3, 4)
            opt.step()
    assert torch.equal(x, y)


@takes_grad_dtype
def test_gradients_of_another_dtype_and_layout():
    x = torch.full((2, 2), 0.5, dtype=torch.float16, requires_grad=True)
    x.grad_dtype = torch.float32
    x.grad = torch.tensor([[1e6, 1e6], [0.0, math.log(3)]])
    ExponentiatedGradient([x], lr=1.0).step()
    assert x.tolist() == [[0.5, 0.5], [0.75, 0.25]]
    embedding = torch.nn.Embedding.from_pretrained(torch.full((3, 2), 0.5), False, sparse=True)
    opt = ExponentiatedGradient(embedding.parameters(), lr=1.0)
    (embedding(torch.tensor([1, 1])) @ torch.tensor([0.0, math.log(3) / 2])).sum().backward()
    opt.step()
    torch.testing.assert_close(
        embedding.weight.detach(), torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]])
    )


def test_empty_and_0d():
    empty, none, single = tensors((0, 3), (3, 0), ())
    with torch.no_grad():
        single.abs_()
    ExponentiatedGradient([empty, none], lr=1.0).step()
    ExponentiatedGradient([single], lr=1.0, total=2.5, param_ndim=None).step()
    assert single.item() == 2.5


def test_nothing_waits_for_a_device():
    """No value is read, of tensors that may be on one: they are said to have none."""
    x = torch.zeros(2, 3, device="meta", requires_grad=True)
    x.grad = torch.zeros(2, 3, device="meta")
    ExponentiatedGradient([x], lr=1.0).step()


# --- state ----------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted():
    x = shares(2, 3, total=2.0)
    opt = ExponentiatedGradient([("x", x)], lr=0.5, total=2.0, maximize=True)
    for step in range(3):
        new_gradients([x], step)
        opt.step()
    y = x.detach().clone().requires_grad_()
    fresh = ExponentiatedGradient([("x", y)], lr=9.0)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    everyone = [(opt, x), (fresh, y), copy.deepcopy((opt, x)), pickle.loads(pickle.dumps((opt, x)))]
    for optimizer, param in everyone:
        assert optimizer.param_groups[0]["params"][0] is param
        for step in range(3, 6):
            new_gradients([param], step)
            optimizer.step()
    for optimizer, param in everyone[1:]:
        assert same_bits(snapshot([param], optimizer), snapshot([x], opt))


def test_a_checkpoint_of_another_optimizer_leaves_what_it_does_not_name():
    x = shares(2, 3)
    opt = ExponentiatedGradient([x], lr=0.5, total=2.0)
    opt.load_state_dict(torch.optim.SGD([x], lr=0.25).state_dict())
    new_gradients([x], 0)
    opt.step()
    assert opt.param_groups[0]["lr"] == 0.25
    assert x.sum(1).tolist() == pytest.approx([2.0, 2.0])


# --- bad input ------------------------------------------------------------------------------------

BAD = [
    ({"lr": -1.0}, ValueError, "`lr` must be >= 0, got -1.0"),
    ({"lr": math.nan}, ValueError, "`lr` must not be NaN"),
    ({"lr": math.inf}, ValueError, "`lr` must be finite"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "`lr` must be >= 0, got -1.0"),
    ({"lr": "1"}, TypeError, "`lr` must be a number"),
    ({"total": 0.0}, ValueError, "`total` must be > 0, got 0.0"),
    ({"total": -1.0}, ValueError, "`total` must be >= 0, got -1.0"),
    ({"total": math.inf}, ValueError, "`total` must be finite"),
    ({"total": None}, TypeError, "`total` must be a number"),
    ({"maximize": 1}, TypeError, "`maximize` must be True or False, got 1"),
    ({"param_ndim": "all"}, TypeError, "`param_ndim` must be an int or None, got 'all'"),
    ({"param_ndim": 3}, ValueError, r"`param_ndim` must be None .* \(parameter 'w'\)"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
@pytest.mark.parametrize("when", ["at once", "in a group", "in a checkpoint"])
def test_wrong_settings(settings, error, message, when):
    params = [("w", shares(2, 3))]
    if when == "at once":
        with pytest.raises(error, match=message):
            ExponentiatedGradient(params, **{"lr": 1.0, **settings})
        return
    opt = ExponentiatedGradient([("x", shares(2, 3))], lr=1.0)
    if when == "in a group":
        with pytest.raises(error, match=message):
            opt.add_param_group({"params": params, **settings})
        assert len(opt.param_groups) == 1
        return
    state_dict = opt.state_dict()
    state_dict["param_groups"][0].update(settings)
    with pytest.raises(error, match=message.replace("'w'", "'x'")):
        opt.load_state_dict(state_dict)
    assert opt.param_groups[0]["lr"] == 1.0


def test_wrong_parameters():
    (x,) = tensors((3,))
    with pytest.raises(ValueError, match="`param_ndim` must be None or 1 for a vector.*'w'"):
        ExponentiatedGradient([("w", x)], lr=1.0)
    y = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real numbers.*'w'"):
        ExponentiatedGradient([("w", y)], lr=1.0)
    with pytest.raises(TypeError, match="lr"):
        ExponentiatedGradient([x])
    with pytest.raises(ValueError, match="`params` must not be empty"):
        ExponentiatedGradient([], lr=1.0)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        ExponentiatedGradient([1.0], lr=1.0)


# --- plans of transport ---------------------------------------------------------------------------


def uniform_plan(constraint, *shape):
    x = constraint.project(torch.zeros(shape, dtype=torch.float64))
    return x.requires_grad_()


def test_a_step_on_plans_is_the_nearest_plan_in_relative_entropy():
    constraint = Transport(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.4]))
    x = uniform_plan(constraint, 2, 3, 2)
    opt = ExponentiatedGradient([x], lr=0.7, constraint=constraint, param_ndim=2)
    start = x.detach().clone()
    new_gradients([x], 0)
    opt.step()
    assert (constraint.violation(x) == 0).all()
    # The factors that come on top of those of the gradient are one for each row and column.
    rest = (x.detach() / start).log() + 0.7 * x.grad
    assert (rest.diff(dim=1).diff(dim=2)).abs().max() < 1e-12


def test_steps_on_permutations_reach_the_nearest_doubly_stochastic_matrix():
    target = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = uniform_plan(Birkhoff(), 1, 4, 4)
    opt = ExponentiatedGradient([x], lr=0.5, constraint=Birkhoff(), param_ndim=2)
    for _ in range(600):
        x.grad = x.detach() - target
        opt.step()
    assert opt.violation() == [0]
    nearest = Birkhoff().project(target[None])
    gap = ((x.detach() - target).square().sum() - (nearest - target).square().sum()) / 2
    assert 0 <= gap < 4 * math.log(4) / (0.5 * 600)  # the rate of mirror descent


def test_steps_on_plans_resume_and_do_not_hide_nan():
    x = uniform_plan(Birkhoff(2.0), 2, 3, 3)
    opt = ExponentiatedGradient([x], lr=0.1, constraint=Birkhoff(2.0), param_ndim=2)
    new_gradients([x], 1)
    other = ExponentiatedGradient([x], lr=1.0, constraint=Birkhoff(1.0), param_ndim=2)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["constraint"] == Birkhoff(2.0)
    x.grad[0, 1, 1] = math.nan
    other.step()
    assert x[0].isnan().all()
    assert x[1].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": L1Ball(1.0)}, "`constraint` must be a Birkhoff or a Transport"),
        ({"constraint": Birkhoff(), "total": 2.0}, "`total` must be 1 with a constraint"),
        ({"constraint": Birkhoff(), "param_ndim": 1}, "Birkhoff takes a batch of shape"),
    ],
)
def test_bad_plans(settings, message):
    x = torch.full((3, 3), 1 / 3, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=message):
        ExponentiatedGradient([x], **{"lr": 0.1, "param_ndim": 2, **settings})
