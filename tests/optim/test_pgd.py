"""PGD, and the projection that it and APGD take: where they lead, and what they cost."""

import copy
import math
from functools import partial

import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox._torch import set_grad_dtype
from rai_toolbox.constraints import BoundedBall, Box, Constraint, L1Ball, L2Ball, LinfBall, Simplex
from rai_toolbox.optim import PGD

BALLS = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}
each_ball = pytest.mark.parametrize("kind", BALLS)


def bounds(shape, seed=0, dtype=torch.float32):
    """Of a perturbation of data in [0, 1], some of which is on the bounds of that."""
    generator = torch.Generator().manual_seed(seed)
    data = (torch.rand(shape, generator=generator, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    return -data, 1 - data


# --- the projection -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 7, 9), (2, 1500)])
@each_ball
def test_the_quick_projection_is_that_of_the_set(kind, shape, scale, dtype):
    generator = torch.Generator().manual_seed(1)
    radius = torch.tensor([0.0, 0.3, 2.0, 9.0, 1e3, 0.1], dtype=dtype)[: shape[0]]
    epsilon = radius.view(-1, *(1,) * (len(shape) - 1)) * {"linf": 0.1, "l2": 0.5, "l1": 1}[kind]
    constraint = BoundedBall(BALLS[kind](epsilon), *bounds(shape, dtype=dtype))
    constraint = constraint.to(torch.float64)  # settings of another dtype than x
    x = torch.randn(shape, generator=generator, dtype=dtype) * scale
    expected = Constraint.project_(constraint, x.clone())  # the general way, in float64
    found = constraint.project_(x.clone())
    # to some roundings of the largest entry that comes in, of which sums have some more
    close = 8 * math.sqrt(x[0].numel()) * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=close * max(1.0, scale))
    assert (constraint.violation(found) == 0).all()
    assert torch.equal(constraint.project_(found.clone()), found)
    inside = constraint.sample_(torch.empty_like(x), generator) * 0.999
    assert torch.equal(constraint.project_(inside.clone()), inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("epsilon", [1e-30, 0.01, 1.0, 6.0])
def test_one_row_in_an_l2_ball_is_projected_as_the_set_does(epsilon, one_sided, dtype):
    generator = torch.Generator().manual_seed(2)
    for scale in (1e-3, 0.05, 0.5, 30.0, 1e30):
        lower, upper = bounds((1, 3, 40), seed=int(scale * 1e3) % 97, dtype=dtype)
        constraint = BoundedBall(L2Ball(epsilon), lower, 0.25 if one_sided else upper)
        x = torch.randn((1, 3, 40), generator=generator, dtype=dtype) * scale
        expected = Constraint.project_(constraint, x.clone())  # the general way, in float64
        found = constraint.project_(x.clone())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=64 * eps, atol=64 * eps * epsilon)
        assert (constraint.violation(found) == 0).all()
        assert same_bits(constraint.project_(found.clone()), found)


@each_ball
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(kind, bad):
    constraint = BoundedBall(BALLS[kind](0.5), *bounds((2, 6)))
    x = torch.full((2, 6), 0.3)
    x[0, 2] = bad
    found = constraint.project_(x)
    assert kind == "linf" or found[0].isnan().all()
    assert kind != "linf" or math.isinf(bad) or found[0, 2].isnan()
    assert found[1].isfinite().all()


@each_ball
def test_other_centers_bounds_and_dtypes_are_those_of_the_set(kind):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for constraint, dtype in (
        (BoundedBall(BALLS[kind](0.5, center=0.2), -0.1, 0.9), torch.float32),
        (BoundedBall(BALLS[kind](2.0), 0.1, 0.9), torch.float32),  # 0 is outside the bounds
        (BoundedBall(BALLS[kind](0.5), -0.1, None), torch.float32),
        (BoundedBall(BALLS[kind](0.5), -0.1, 0.4), torch.bfloat16),
        (BALLS[kind](0.5), torch.float32),
    ):
        found = constraint.project_(x.to(dtype, copy=True))
        exact = constraint.project(x.to(dtype).double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=max(1e-6, eps))
        assert (constraint.violation(found) == 0).all()


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ball", "q", "expected"),
    [
        (LinfBall(5.0), 0.0, [[-1.0, 1.0, 0.0, -1.0]]),
        (L2Ball(5.0), 0.0, [[-0.6, 0.0, 0.0, -0.8]]),
        (L1Ball(5.0), 0.5, [[-0.5, 0.0, 0.0, -0.5]]),
        (L1Ball(5.0), 1.0, [[0.0, 0.0, 0.0, -1.0]]),  # one entry at least
    ],
)
def test_a_step_has_length_lr_in_the_norm_of_the_ball(ball, q, expected):
    x = torch.zeros(1, 4, requires_grad=True)
    x.grad = torch.tensor([[3.0, -1e-30, 0.0, 4.0]])
    PGD([x], constraint=ball, q=q, lr=1.0).step()
    torch.testing.assert_close(x.detach(), torch.tensor(expected))


def test_a_step_has_no_length_but_a_given_one():
    x, other = tensors((2, 3), (2, 3))
    for InnerOpt in (SGD, torch.optim.Adam, partial(SGD, momentum=0.9)):
        with pytest.raises(TypeError, match="`lr` must be given, to PGD or in every"):
            PGD([x], InnerOpt, constraint=LinfBall(1.0))
        with pytest.raises(TypeError, match="`lr` must be given, to PGD or in every"):
            PGD([{"params": [x], "lr": 0.1}, {"params": [other]}], constraint=LinfBall(1.0))
    lr = torch.tensor(0.25)
    for opt in (
        PGD([{"params": [x], "lr": lr}], constraint=LinfBall(1.0)),
        PGD([x], partial(SGD, lr=lr), constraint=LinfBall(1.0)),
        PGD(InnerOpt=SGD([{"params": [x], "constraint": LinfBall(1.0)}], lr=lr)),
    ):
        assert opt.param_groups[0]["lr"] is lr
        x.detach().zero_()
        x.grad = torch.ones_like(x)
        opt.step()
        assert x.eq(-0.25).all()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_sparse_step_is_not_wasted_on_a_bound(maximize):
    x = torch.tensor([[0.5, 0.0]], requires_grad=True)
    x.grad = torch.tensor([[-9.0, -1.0]]) * (-1 if maximize else 1)
    constraint = BoundedBall(L1Ball(5.0), -0.5, 0.5)
    PGD([x], constraint=constraint, q=0.5, lr=0.25, maximize=maximize).step()
    assert x.tolist() == [[0.5, 0.25]]


def worst_case(c, kind, epsilon, lower, upper):
    """min c.d over the ball within bounds, in closed form (by bisection for L2), one row."""
    room = torch.where(c > 0, -lower, upper)
    if kind == "linf":
        return -(c.abs() * room.clamp(max=epsilon)).sum()
    if kind == "l1":
        order = c.abs().argsort(descending=True)
        room, c = room[order], c[order]
        before = room.cumsum(0) - room
        return -(c.abs() * torch.minimum(room, (epsilon - before).clamp(min=0))).sum()
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        long = torch.minimum(t * c.abs(), room).norm() > epsilon
        low, high = (low, t) if long else (t, high)
    return -(c.abs() * torch.minimum(low * c.abs(), room)).sum()


def linear_cases(kind, n=4, size=30):
    generator = torch.Generator().manual_seed(7)
    c = torch.randn(n, size, generator=generator, dtype=torch.float64)
    epsilon = {"linf": 0.2, "l2": 1.0, "l1": 3.0}[kind]
    lower, upper = bounds((n, size), seed=8, dtype=torch.float64)
    least = [worst_case(c[i], kind, epsilon, lower[i], upper[i]) for i in range(n)]
    return c, BoundedBall(BALLS[kind](epsilon), lower, upper), torch.stack(least)


@each_ball
def test_the_worst_case_of_a_linear_objective(kind):
    c, constraint, least = linear_cases(kind)
    x = torch.zeros_like(c).requires_grad_()
    opt = PGD([x], constraint=constraint, lr=0.2 if kind == "linf" else 0.5, q=0.9)
    # For L2 the steps along c, projected, need more and more of it; for L1 they are exchanges
    for i in range(400):
        opt.param_groups[0]["lr"] = (0.2 if kind == "linf" else 0.5) * 0.98**i + 1e-9
        x.grad = c.clone()
        opt.step()
        assert (constraint.violation(x.detach()) == 0).all()
    reached = (c * x).sum(1)
    gap = {"linf": 1e-12, "l2": 1e-6, "l1": 2e-2}[kind]
    assert ((reached - least) >= -1e-9).all()
    assert ((reached - least) <= gap * least.abs()).all()


class General(PGD):
    """Takes the general step at all times."""

    def _make_short_step(self):
        return None

    def _prepared_step(self):
        return None


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 6), torch.float32),
        ((1, 2, 7, 9), torch.float64),
        ((3, 6), torch.float32),
        ((4, 2, 3), torch.float64),
        ((0, 3), torch.float32),
        ((90, 800), torch.float32),
        ((1, 70_000), torch.float64),
    ],
)
@each_ball
def test_the_quick_step_has_the_bits_of_the_general_one(kind, shape, dtype, within, monkeypatch):
    ball = BALLS[kind]({"linf": 0.2, "l2": 0.5, "l1": 1.0}[kind])
    constraint = BoundedBall(ball, *bounds(shape, dtype=dtype)) if within else ball
    quick = []
    make = PGD._make_short_step

    def make_recorded(opt):
        step = make(opt)
        return lambda opt: quick.append(step(opt)) or quick[-1]

    monkeypatch.setattr(PGD, "_make_short_step", make_recorded)

    def run(kind_of_pgd):
        (x,) = tensors(shape)
        x = x.detach().to(dtype).requires_grad_()
        opt = kind_of_pgd([x], constraint=constraint, lr=0.3, q=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.8)
        for i in range(6):
            new_gradients([x], i)
            opt.step()
            schedule.step()
        return x.detach()

    assert same_bits(run(General), run(PGD))
    assert quick == [True] * 5


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("shape", [(1, 6), (3, 6)])
@each_ball
def test_the_step_of_solvers_has_the_bits_of_the_general_one(kind, shape, within):
    ball = BALLS[kind]({"linf": 0.2, "l2": 0.5, "l1": 1.0}[kind])
    constraint = BoundedBall(ball, *bounds(shape)) if within else ball
    ends = []
    for kind_of_pgd in (General, PGD):
        (x,) = tensors(shape)
        opt = kind_of_pgd([x], constraint=constraint, lr=0.3, q=0.5)
        with torch.no_grad():
            prepared = opt._prepared_step()
            assert (prepared is None) == (kind_of_pgd is General)
            for i in range(6):
                new_gradients([x], i)
                if i == 3:  # which takes the general step
                    x.grad = torch.ones_like(x[:, :1]).expand_as(x)
                (prepared or opt.step)()
        ends.append(x.detach())
    assert same_bits(*ends)


@pytest.mark.parametrize(
    "new",
    [
        {"lr": 0.05},
        {"lr": torch.tensor(0.05)},
        {"constraint": LinfBall(0.07)},
        {"grad_scale": -1.0},
        {"momentum": 0.9},
    ],
)
def test_the_step_of_solvers_follows_settings(new):
    ends = []
    for is_prepared in (True, False):
        (x,) = tensors((3, 6))
        opt = PGD([x], constraint=LinfBall(0.2), lr=0.01)
        with torch.no_grad():
            step = opt._prepared_step() if is_prepared else opt.step
            for i in range(4):
                if i == 1:  # as a scheduler within the model does
                    opt.param_groups[0].update(new)
                new_gradients([x], i)
                step()
        ends.append(x.detach())
    assert same_bits(*ends)


@pytest.mark.parametrize("first", [False, True])
def test_groups_without_parameters(first):
    (x,) = tensors((3, 6))
    groups = [{"params": []}, {"params": [x]}] if first else [{"params": []}]
    opt = PGD(groups, constraint=LinfBall(0.2), lr=0.01)
    before = x.detach().clone()
    new_gradients([x], 0)
    opt.step()
    assert x.equal(before) != first
    with torch.no_grad():
        assert opt._prepared_step() is None


def test_a_start_that_is_not_finite_is_left_to_the_general_step():
    (x,) = tensors((3, 6))
    x.detach()[0, 0] = math.inf
    with torch.no_grad():
        assert PGD([x], constraint=L2Ball(0.5), lr=0.1)._prepared_step() is None


def test_a_replaced_step_of_sgd_is_called(monkeypatch):
    (x,) = tensors((3, 6))
    new_gradients([x], 0)
    calls = []
    monkeypatch.setattr(SGD, "step", lambda self, closure=None: calls.append(self))
    opt = PGD([x], constraint=L2Ball(0.5), lr=0.1)
    opt.step()
    assert len(calls) == 1
    with torch.no_grad():
        assert opt._prepared_step() is None


def other_group(opt):
    opt.add_param_group({"params": [torch.zeros(2, 2, requires_grad=True)]})


def other_dtype(opt):
    (x,) = opt.param_groups[0]["params"]
    grad, x.grad = x.grad, None
    set_grad_dtype(x, torch.float64)
    x.grad = grad.double()


def own_hook(opt):
    opt._pre_step_transform_ = lambda param, optim_group: param.grad.neg_()


@pytest.mark.parametrize(
    "change",
    [
        other_group,
        own_hook,
        other_dtype,
        lambda opt: opt.inner_opt.register_step_post_hook(lambda *_: None),
        lambda opt: setattr(opt.inner_opt, "step", opt.inner_opt.step),
        *(
            lambda opt, new=new: opt.param_groups[0].update(new)
            for new in (
                {"momentum": 0.9},
                {"weight_decay": 0.1},
                {"maximize": True},
                {"foreach": True},
                {"grad_scale": 2.0},
                {"grad_bias": 0.5},
                {"param_ndim": None},
                {"lr": torch.tensor(0.1)},
                {"lr": 0.0},
                {"lr": 1e39},
            )
        ),
        lambda opt: setattr(opt.param_groups[0]["params"][0], "grad", None),
        lambda opt: opt.param_groups[0]["params"][0].grad.fill_(math.nan),
        lambda opt: opt.param_groups[0]["params"][0].detach()[0, 0].fill_(math.inf),
    ],
)
def test_what_the_quick_step_leaves_to_the_general_one(change):
    (x,) = tensors((3, 6))
    opt = PGD([x], constraint=L2Ball(0.5), lr=0.1)
    new_gradients([x], 0)
    with torch.no_grad():
        short_step = opt._make_short_step()
        change(opt)
        before = copy.deepcopy((x.detach(), x.grad))
        assert not short_step(opt)
    torch.testing.assert_close(x.detach(), before[0], rtol=0, atol=0)
    assert x.grad is None or x.grad.equal(before[1]) or before[1].isnan().all()


@pytest.mark.parametrize("bad", ["gradient", "parameter"])
@each_ball
def test_a_quick_step_does_not_hide_what_is_not_finite(kind, bad):
    (x,) = tensors((2, 6))
    new_gradients([x], 0)
    (x.grad if bad == "gradient" else x.detach())[0, 1] = math.nan
    PGD([x], constraint=BoundedBall(BALLS[kind](0.5), -0.4, 0.4), lr=0.1).step()
    assert x[0, 1].isnan()
    assert x[1].isfinite().all()


@each_ball
def test_batched_is_row_by_row(kind):
    lower, upper = bounds((3, 40))
    radius = torch.tensor([0.2, 0.4, 0.8]).view(3, 1)

    def run(rows):
        ball = BALLS[kind](radius[rows])
        (x,) = tensors((3, 40))
        x = x.detach()[rows].clone().requires_grad_()
        opt = PGD([x], constraint=BoundedBall(ball, lower[rows], upper[rows]), lr=0.1, momentum=0.5)
        for i in range(4):
            full = torch.zeros(3, 40, requires_grad=True)
            new_gradients([full], i)
            x.grad = full.grad[rows].clone()
            opt.step()
        return x.detach()

    whole = run(slice(0, 3))
    parts = torch.cat([run(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-6)


@each_ball
def test_any_strides_and_param_ndim(kind):
    constraint = BALLS[kind](0.5)
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for make in (torch.Tensor.contiguous, lambda t: t.t().contiguous().t()):
        x = make(base.clone()).requires_grad_()
        x.grad = make(base.flip(0).clone())
        PGD([x], constraint=constraint, lr=0.3, q=0.5).step()
        results.append(x.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)
    whole = base.clone().requires_grad_()
    whole.grad = base.flip(0).clone()
    PGD([whole], constraint=constraint, lr=0.3, param_ndim=None).step()
    assert constraint.violation(whole.detach().reshape(1, -1)).item() == 0


@each_ball
def test_state_resumes_bit_for_bit(kind):
    constraint = BoundedBall(BALLS[kind](0.5), *bounds((3, 6)))
    (x,) = tensors((3, 6))
    opt = PGD([x], constraint=constraint, lr=0.1, momentum=0.9)
    new_gradients([x], 0)
    opt.step()
    y = x.detach().clone().requires_grad_()
    other = PGD([y], constraint=LinfBall(9.0), lr=1.0, momentum=0.9)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in (1, 2):
        for param, each in ((x, opt), (y, other)):
            new_gradients([param], i)
            each.step()
    assert same_bits(snapshot([x], opt)["params"], snapshot([y], other)["params"])
    assert other.param_groups[0]["constraint"] == constraint


# --- what it costs --------------------------------------------------------------------------------


class Passes(TorchDispatchMode):
    """Notes all operators, and those whose result has a given number of entries."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names, self.all = size, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.all.append(func.overloadpacket.__name__)
        for value in result if isinstance(result, (tuple, list)) else [result]:
            is_whole = isinstance(value, torch.Tensor) and value.numel() == self.size
            if is_whole and func.overloadpacket.__name__ != "view":
                self.names.append(func.overloadpacket.__name__)
        return result


def test_an_linf_step_within_bounds_is_a_few_passes():
    (x,) = tensors((16, 40))
    opt = PGD([x], constraint=BoundedBall(LinfBall(0.1), *bounds((16, 40))), lr=0.01)
    opt.step()  # which intersects the ball and the bounds, once
    with Passes(x.numel()) as mode:
        opt.step()
    assert mode.names == ["sign_", "add_", "clamp_"]  # (a product looks for NaN)
    assert sum("_record_function" not in name for name in mode.all) <= 8


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, TypeError, "`constraint` must be given"),
        ({"constraint": None}, TypeError, "`constraint` must be a LinfBall"),
        ({"constraint": Box(0.0, 1.0)}, TypeError, "`constraint` must be a LinfBall"),
        ({"constraint": Simplex()}, TypeError, "`constraint` must be a LinfBall"),
        ({"constraint": L2Ball(math.inf)}, ValueError, "`epsilon` of `constraint` must be finite"),
        ({"constraint": L1Ball(1.0), "q": 1.5}, ValueError, r"`q` must be in \[0, 1\], got 1.5"),
        ({"constraint": L2Ball(torch.ones(4, 1))}, ValueError, "`epsilon` must broadcast"),
    ],
)
def test_what_is_refused(settings, error, message):
    x = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(error, match=message):
        PGD([x], lr=0.1, **settings)


def test_a_vector_is_no_batch_of_balls():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="`param_ndim` must be None or 1 for a vector"):
        PGD([x], constraint=L2Ball(1.0), lr=0.1)


def test_inner_optimizers_of_another_kind():
    x = torch.zeros(2, 3, requires_grad=True)
    opt = PGD([x], partial(SGD, momentum=0.9), constraint=LinfBall(0.1), lr=0.04)
    for _ in range(3):
        x.grad = torch.ones(2, 3)
        opt.step()
    torch.testing.assert_close(x.detach(), torch.full((2, 3), -0.1))


def test_a_group_that_is_given_another_set_is_refused():
    (x,) = tensors((3, 2))
    opt = PGD([x], constraint=L2Ball(1.0), lr=0.1)
    opt.param_groups[0]["constraint"] = Simplex()
    with pytest.raises(TypeError, match="`constraint` must be a LinfBall"):
        opt.step()
