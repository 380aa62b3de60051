"""Frank-Wolfe: its schedule, its oracles, and where it gets to."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from files import through_a_file
from torch.optim import lr_scheduler

from rai_toolbox.foreach import with_gradients
from rai_toolbox.optim import (
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2FrankWolfe,
    L2NormedGradientOptim,
    LinfFrankWolfe,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

# The optimizers on balls: which norm is bounded, and which is its dual.
BALLS = {
    "L1": (L1FrankWolfe, 1, math.inf),
    "L2": (L2FrankWolfe, 2, 2),
    "Linf": (LinfFrankWolfe, math.inf, 1),
    "L1q": (partial(L1qFrankWolfe, q=0.5), 1, None),
}
each_ball = pytest.mark.parametrize("ball", BALLS)
EVERY = {"FrankWolfe": FrankWolfe} | {
    f"{name}FrankWolfe": partial(make, epsilon=1.5, param_ndim=None)
    for name, (make, _, _) in BALLS.items()
}
each = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
SHAPE = (4, 3, 5)


def rows(x, param_ndim):
    """Each sub-tensor as a row, in float64."""
    k = {None: x.ndim, -1: x.ndim - 1}.get(param_ndim, param_ndim)
    return x.detach().double().reshape(*x.shape[: x.ndim - k], -1)


def norms(x, p, param_ndim):
    return torch.linalg.vector_norm(rows(x, param_ndim), p, dim=-1)


# --- the step -------------------------------------------------------------------------------------


def by_the_formula(x, grads, *, lr, scale=1.0, schedule=True):
    for k, grad in enumerate(grads):
        a = lr / (lr + k) if schedule else lr
        x = (1 - a) * x + a * (-scale * grad)
    return x


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("lr", [2.0, 1.0, 0.25, 5.0, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1.8, 0.0, -1.0])
def test_steps_are_those_of_the_formula(lr, schedule, scale, as_tensor):
    if lr > 1 and not schedule:
        return  # refused, see below
    (x,) = tensors((3, 2), dtype=torch.float64)
    start = x.detach().clone()
    grads = torch.randn(6, 3, 2, dtype=torch.float64)
    opt = FrankWolfe(
        [x],
        lr=torch.tensor(lr, dtype=torch.float64) if as_tensor else lr,
        lmo_scaling_factor=scale,
        use_default_lr_schedule=schedule,
    )
    for grad in grads:
        x.grad = grad.clone()
        opt.step()
        assert torch.equal(x.grad, grad)  # it is read only
    if lr == 0:  # no step at all, rather than 0 / 0
        assert torch.equal(x.detach(), start)
    else:
        expected = by_the_formula(start, grads, lr=lr, scale=scale, schedule=schedule)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-14, atol=1e-14)


@each
def test_each_parameter_counts_its_own_steps(make):
    """Whatever the others do: each goes as if it were alone, from its own first gradient on."""
    together, alone = tensors(3, 3, 3, 3), tensors(3, 3, 3, 3)
    opt = make(together[:3])
    opts = [make([x]) for x in alone]
    begins = [0, 2, 1, 3]  # the last one's group is added then
    gaps = {(0, 2), (1, 4)}  # without a gradient in between
    for step in range(6):
        if step == begins[3]:
            opt.add_param_group({"params": [together[3]]})
        for params in (together, alone):
            new_gradients(params, step)
            for i, x in enumerate(params):
                if step < begins[i] or (i, step) in gaps:
                    x.grad = None
        opt.step()
        for single in opts:
            single.step()
    assert same_bits([x.detach() for x in together], [x.detach() for x in alone])
    assert [opt.state[x]["step"].item() for x in together] == [5, 3, 5, 3]


@each
def test_a_parameter_without_a_gradient_does_not_move(make):
    x, y = tensors(3, 3)
    y.grad = None
    before = y.detach().clone()
    opt = make([x, y])
    opt.step()
    assert torch.equal(y.detach(), before)
    assert y not in opt.state


@pytest.mark.parametrize("lr", [0.0, 0.3, 1.0])
def test_without_the_schedule_lr_is_the_step(lr):
    x = torch.tensor([4.0, -2.0], dtype=torch.float64, requires_grad=True)
    opt = L1FrankWolfe([x], epsilon=2.0, lr=lr, use_default_lr_schedule=False, param_ndim=None)
    for k in range(1, 5):
        x.grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
        opt.step()
        kept = (1 - lr) ** k  # of the start; the rest is the vertex
        expected = torch.tensor([4 * kept, -2 * kept - 2 * (1 - kept)], dtype=torch.float64)
        torch.testing.assert_close(x.detach(), expected)


@each
def test_closures(make):
    x, y = tensors(3, 3)
    with torch.no_grad():
        y.copy_(x)
    y.grad = x.grad.clone()
    one, other = make([x], lr=1.5), make([y], lr=1.5)
    one.step()

    def closure():
        assert torch.is_grad_enabled()
        return 7.0

    assert other.step(closure) == 7.0
    assert torch.equal(x, y)


def test_schedulers_change_lr():
    x = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    opt = LinfFrankWolfe([x], epsilon=1.0, lr=1.0, use_default_lr_schedule=False)
    scheduler = lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    expected = 4.0
    for epoch in range(4):
        x.grad = torch.ones(1, dtype=torch.float64)
        opt.step()
        scheduler.step()
        a = 0.5**epoch
        expected = (1 - a) * expected - a
        assert x.item() == expected


def test_settings_per_group():
    params = tensors(*[(2, 3)] * 4, dtype=torch.float64)
    settings = [
        {},
        {"epsilon": 2.0, "lr": 1.0},
        {"param_ndim": None, "epsilon": 0.5},
        {"use_default_lr_schedule": False, "lr": 0.5},
    ]
    expected = tensors(*[(2, 3)] * 4, dtype=torch.float64)
    groups = [{"params": p, **more} for p, more in zip(params, settings, strict=True)]
    opt = L2FrankWolfe(groups[:3], epsilon=1.0)
    opt.add_param_group(groups[3])
    alone = [
        L2FrankWolfe([x], **{"epsilon": 1.0, **more})
        for x, more in zip(expected, settings, strict=True)
    ]
    for step in range(3):
        for some in (params, expected):
            new_gradients(some, step)
        opt.step()
        for single in alone:
            single.step()
    assert same_bits([x.detach() for x in params], [x.detach() for x in expected])
    radii = [norms(x, 2, k).max().item() for x, k in zip(params, (-1, -1, None), strict=False)]
    assert radii[1] > 1.0 >= radii[0] * (1 - 1e-12) > radii[2]


def test_resumed_is_uninterrupted():
    for make in EVERY.values():
        params = tensors(3, (2, 2))
        opt = make(params, lr=1.5)
        for step in range(3):
            new_gradients(params, step)
            opt.step()
        theirs = [p.detach().clone().requires_grad_() for p in params]
        fresh = make(theirs, lr=9.0)
        fresh.load_state_dict(through_a_file(opt.state_dict()))
        again = copy.deepcopy(opt)
        for step in range(3, 6):
            for some in (params, theirs, again.param_groups[0]["params"]):
                new_gradients(some, step)
            opt.step()
            fresh.step()
            again.step()
        expected = snapshot(params, opt)
        assert same_bits(snapshot(theirs, fresh), expected)
        assert same_bits(snapshot(again.param_groups[0]["params"], again), expected)


# --- lr out of range ------------------------------------------------------------------------------

OUT_OF_RANGE = [  # lr, with the schedule or not
    (-1.0, True),
    (math.nan, True),
    (math.inf, True),
    (torch.tensor(-1.0), True),
    (-1e-9, False),
    (1.0000001, False),
    (2, False),
    (math.nan, False),
    (torch.tensor(1.5), False),
]


@each
@pytest.mark.parametrize(("lr", "schedule"), OUT_OF_RANGE, ids=str)
@pytest.mark.parametrize("when", ["at once", "later", "later, in the second group"])
def test_lr_out_of_range_moves_nothing(make, lr, schedule, when):
    params = tensors(3, 4)
    before = snapshot(params, torch.optim.SGD(params))
    if when == "at once":
        with pytest.raises(ValueError, match="`lr` must "):
            make(params, lr=lr, use_default_lr_schedule=schedule)
        assert same_bits(snapshot(params, torch.optim.SGD(params)), before)
        return
    groups = [{"params": p} for p in params]
    opt = make(groups, lr=0.5, use_default_lr_schedule=schedule)
    for step in range(2):
        new_gradients(params, step)
        opt.step()
    new_gradients(params, 2)
    opt.param_groups[1 if "second" in when else 0]["lr"] = lr
    before = snapshot(params, opt)
    with pytest.raises(ValueError, match="`lr` must "):
        opt.step()
    after = snapshot(params, opt)
    for kind in before:
        if kind != "groups":  # nan is not equal to itself
            assert same_bits(after[kind], before[kind]), kind


# --- oracles --------------------------------------------------------------------------------------


def oracle(make, grad, **settings):
    """The oracle's answer: a step of size 1 goes to it."""
    x = torch.ones_like(grad, requires_grad=True)
    x.grad = grad.clone()
    make([x], **settings).step()
    return x.detach()


GRADIENTS = {
    "random": lambda: torch.randn(SHAPE),
    "huge": lambda: torch.randn(SHAPE) * 1e20,
    "tiny": lambda: torch.randn(SHAPE) * 1e-25,
    "sparse": lambda: torch.randn(SHAPE) * (torch.rand(SHAPE) < 0.2),
    "ties": lambda: torch.randint(-1, 2, SHAPE).float(),
    "all equal": lambda: torch.full(SHAPE, -2.0),
    "zero": lambda: torch.zeros(SHAPE),
}


@pytest.mark.parametrize("param_ndim", [None, -1, 0, 1])
@pytest.mark.parametrize("kind", GRADIENTS)
@each_ball
def test_the_oracle_answers_from_the_ball_and_as_low_as_it_gets(ball, kind, param_ndim):
    make, p, dual = BALLS[ball]
    torch.manual_seed(0)
    grad, ulp = GRADIENTS[kind](), 2.0**-23
    for epsilon in (0.0, 0.3, 1.8, 1e6):
        s = oracle(make, grad, epsilon=epsilon, param_ndim=param_ndim)
        assert torch.isfinite(s).all()
        assert (norms(s, p, param_ndim) <= epsilon * (1 + 4 * ulp)).all()
        if dual is not None:  # the lowest <s, g> is minus the dual norm of g
            values = (rows(s, param_ndim) * rows(grad, param_ndim)).sum(dim=-1)
            lowest = -epsilon * norms(grad, dual, param_ndim)
            torch.testing.assert_close(values, lowest, rtol=8 * ulp, atol=0)


@pytest.mark.parametrize("value", [1.0, -2.0, 1e-30])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_of_ties_one_vertex(n, value):
    """Two halves of it would be in the ball too, but sums of several whole ones are not."""
    s = oracle(L1FrankWolfe, torch.full((5, n), value), epsilon=1.5, param_ndim=1)
    assert ((s != 0).sum(dim=1) == 1).all()
    assert torch.equal(s.sum(dim=1), torch.full((5,), -math.copysign(1.5, value)))


@pytest.mark.parametrize(
    ("q", "kept"), [(0.0, 8), (0.25, 6), (0.5, 4), (0.8, 2), (0.9, 1), (1.0, 0)]
)
def test_l1q_goes_to_points_of_so_many_equal_entries(q, kept):
    for grad in (torch.ones(3, 8), torch.randn(3, 8)):
        s = oracle(L1qFrankWolfe, grad, q=q, epsilon=2.0, param_ndim=1)
        assert ((s != 0).sum(dim=1) == kept).all()
        assert (s.abs().sum(dim=1) - 2.0 * (kept > 0)).abs().max() <= 1e-6
        assert (s * grad <= 0).all()
        if kept:  # no smaller entry is taken in the place of a larger one
            taken = torch.where(s != 0, grad.abs(), torch.inf).amin(dim=1)
            left = torch.where(s == 0, grad.abs(), -torch.inf).amax(dim=1)
            assert (taken >= left).all()


def test_l1q_draws_q_anew():
    generator = torch.Generator().manual_seed(2)
    make = partial(L1qFrankWolfe, q=0.5, dq=0.5, generator=generator, param_ndim=None)
    counts = {(oracle(make, torch.randn(64), epsilon=1.0) != 0).sum().item() for _ in range(20)}
    assert len(counts) > 10


@each_ball
def test_zero_gradients_draw_to_the_center(ball):
    x = torch.tensor([[3.0, -4.0]], requires_grad=True)
    opt = BALLS[ball][0]([x], epsilon=1.0, lr=0.5, use_default_lr_schedule=False)
    x.grad = torch.zeros(1, 2)
    opt.step()
    assert x.tolist() == [[1.5, -2.0]]


@each_ball
def test_nan_is_not_hidden(ball):
    grad = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
    s = oracle(BALLS[ball][0], grad, epsilon=1.0, param_ndim=1)
    assert s[0].isnan().any()
    assert torch.isfinite(s[1]).all()


@pytest.mark.parametrize("param_ndim", [None, 1, 0])
def test_balls_are_their_gradient_optimizers_around_frank_wolfe(param_ndim):
    pairs = [
        (L2FrankWolfe, L2NormedGradientOptim, {}),
        (LinfFrankWolfe, SignedGradientOptim, {}),
        (L1qFrankWolfe, L1qNormedGradientOptim, {"q": 0.4}),
    ]
    for named, transforming, more in pairs:
        (x,), (y,) = tensors((3, 4)), tensors((3, 4))
        more = {**more, "lr": 1.5, "param_ndim": param_ndim}
        one = named([x], epsilon=1.7, **more)
        other = transforming([y], FrankWolfe, grad_scale=1.7, **more)
        for step in range(3):
            new_gradients([x], step)
            new_gradients([y], step)
            one.step()
            other.step()
        assert torch.equal(x, y)


# --- moved right after the transform, or by a step of its own -------------------------------------

# What has the inner optimizer step by itself, after all gradients have been transformed.
APART = {
    "a hook": lambda opt: opt.inner_opt.register_step_pre_hook(lambda *_: None),
    "an own step": lambda opt: setattr(
        opt.inner_opt, "step", partial(FrankWolfe.step, opt.inner_opt)
    ),
    "a subclass": lambda opt: setattr(opt.inner_opt, "__class__", type("Own", (FrankWolfe,), {})),
}


@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("as_tensor", [False, True])
@each_ball
def test_moved_right_after_its_transform_or_later_are_the_same(ball, as_tensor, apart):
    shapes = [(3, 4), (3, 4), (), (0, 2), (2, 3), (3, 4), (70, 80), (70, 80), (3, 4)]
    ours, theirs = tensors(*shapes), tensors(*shapes)
    make = BALLS[ball][0]
    optims = [
        make(
            [{"params": p[:5]}, {"params": p[5:], "epsilon": 2.0, "lr": 1.0}],
            epsilon=1.5,
            lr=torch.tensor(2.0) if as_tensor else 2.0,
            param_ndim=None,
        )
        for p in (ours, theirs)
    ]
    APART[apart](optims[1])
    for step in range(4):
        for params, optim in zip((ours, theirs), optims, strict=True):
            new_gradients(params, step)
            params[step].grad = None
            moving, grads = with_gradients(params)
            assert (optim.inner_opt.mover(moving, grads) is None) == (optim is optims[1])
            optim.step()
    assert same_bits(snapshot(ours, optims[0]), snapshot(theirs, optims[1]))


UNUSUAL = {
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "negated": lambda g: torch.complex(g, g).conj().imag,
    "strided": lambda g: g.T.contiguous().T,
    "sparse": lambda g: g.where(g == g.max(), 0.0).to_sparse(),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("number", [1, 3])
def test_unusual_gradients_move_as_usual_ones(number, kind):
    shapes = [(3, 4)] * number
    ours, theirs = tensors(*shapes), tensors(*shapes)
    optims = [
        ParamTransformingOptimizer(params, FrankWolfe, grad_scale=2.0) for params in (ours, theirs)
    ]
    for step in range(3):
        new_gradients(ours, step)
        for x, y in zip(ours, theirs, strict=True):
            x.grad = UNUSUAL[kind](x.grad)
            y.grad = x.grad.to_dense().resolve_neg().clone(memory_format=torch.contiguous_format)
        for optim in optims:
            optim.step()
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "make", [FrankWolfe, partial(ParamTransformingOptimizer, InnerOpt=FrankWolfe)]
)
def test_under_vmap(make, number):
    def stepped(x, g):
        params = [x.clone() for _ in range(number)]
        for param in params:
            param.grad = g.clone()
        make(params).step()
        return torch.stack(params)

    gs = torch.arange(6.0).reshape(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (of performance)
        ends = torch.func.vmap(stepped)(torch.ones(2, 3), gs)
    assert torch.equal(ends, -gs[:, None].expand_as(ends))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lr", [2.0, 0.0, torch.tensor(2.0)], ids=str)
def test_moved_together_or_one_by_one_are_the_same(lr, shared):
    """With several dtypes, counts of steps, strides and layouts."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)

    def made():
        torch.manual_seed(0)
        xs = [torch.randn(4, 6, dtype=dtype) for dtype in dtypes for _ in range(2)]
        xs += [torch.randn(4, 6).T, torch.randn(0, 3), torch.randn(()), torch.randn(300, 300)]
        if shared:
            xs += [xs[0][1:3], xs[0].view(-1)[5:7]]
        return [x.requires_grad_() for x in xs]

    ours, theirs = made(), made()
    together = FrankWolfe(ours, lr=lr, lmo_scaling_factor=0.7)
    alone = [FrankWolfe([x], lr=lr, lmo_scaling_factor=0.7) for x in theirs]
    for step in range(4):
        for params in (ours, theirs):
            new_gradients(params, step)
            params[step].grad = None
            params[8].grad = params[8].grad.contiguous()
            if shared:
                params[1].grad = params[0].grad
        if step == 2 and not shared:
            for params in (ours, theirs):
                params[6].grad = params[6].grad.to_sparse()
        together.step()
        for opt in alone:
            opt.step()
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])
    for opt, x, y in zip(alone, ours, theirs, strict=True):
        assert same_bits(together.state.get(x), opt.state.get(y))


def test_a_gradient_of_several_groups_is_transformed_once_and_before_all_moves():
    a, b, gradient = torch.zeros(2), torch.zeros(2), torch.ones(2)
    for x in (a, b):
        x.requires_grad_().grad = gradient
    groups = [{"params": [a]}, {"params": [b], "grad_scale": 2.0}]
    ParamTransformingOptimizer(groups, FrankWolfe, lr=2.0).step()
    assert a.tolist() == b.tolist() == [-2, -2]


def test_gradients_that_share_memory_are_transformed_before_all_moves():
    a, b, memory = torch.zeros(3), torch.zeros(3), torch.ones(3)
    for x in (a, b):
        x.requires_grad_().grad = memory.view(3)
    groups = [{"params": [a]}, {"params": [b]}]
    ParamTransformingOptimizer(groups, FrankWolfe, lr=2.0, grad_scale=2.0).step()
    assert a.tolist() == b.tolist() == [-4, -4, -4]


def test_parameters_that_share_a_gradient_without_elements_count_their_steps():
    params = tensors((0, 3), (2, 3), (0, 3))
    params[2].grad = params[0].grad
    opt = ParamTransformingOptimizer(params, FrankWolfe, grad_scale=2.0)
    opt.step()
    assert [opt.state[x]["step"].item() for x in params] == [1, 1, 1]


def test_parameters_that_share_memory_are_moved_one_after_the_other():
    memory = torch.ones(4)
    params = [memory[:3].requires_grad_(), memory[1:].requires_grad_()]
    opt = FrankWolfe(params, lr=2.0)
    for _ in range(2):
        for x in params:
            x.grad = torch.ones(3)
        opt.step()
    expected = torch.ones(4)
    for a in (1.0, 2 / 3):
        for part in (expected[:3], expected[1:]):
            part.mul_(1 - a).sub_(a)
    assert torch.allclose(memory, expected)


def test_a_replaced_step_of_frank_wolfe_is_called(monkeypatch):
    (x,) = tensors(3)
    opt, calls = LinfFrankWolfe([x], epsilon=2.0), []
    monkeypatch.setattr(FrankWolfe, "step", lambda self, closure=None: calls.append(closure))
    opt.step()
    assert calls == [None]


class PassesOn(torch.optim.SGD):
    """An optimizer with a step of its own that looks like the `FrankWolfe` within it."""

    def __init__(self, params):
        params = list(params)
        self.within = FrankWolfe(params)
        super().__init__(params, lr=1.0)

    number = 0

    def __getattr__(self, name):
        return getattr(self.within, name)

    def step(self, closure=None):
        self.number += 1


class Mover(torch.optim.SGD):
    mover = "a name that a user has chosen, too"
    number = 0

    def step(self, closure=None):
        self.number += 1


@pytest.mark.parametrize("inner", [PassesOn, Mover])
def test_the_step_of_an_optimizer_of_the_user_is_called(inner):
    (x,) = tensors(3)
    start = x.detach().clone()
    opt = SignedGradientOptim([x], inner)
    opt.step()
    assert opt.inner_opt.number == 1 and x.equal(start)


def test_a_hook_of_the_inner_optimizer_comes_between_all_transforms_and_all_moves():
    params = tensors(3, 3)
    starts = [x.detach().clone() for x in params]
    opt = LinfFrankWolfe([{"params": [x]} for x in params], epsilon=2.0)
    seen = []

    def look(*_):
        seen.extend(x.grad.abs().eq(2).all().item() for x in params)
        seen.extend(torch.equal(x, start) for x, start in zip(params, starts, strict=True))

    opt.inner_opt.register_step_pre_hook(look)
    opt.step()
    assert seen == [True] * 4


def test_a_users_transform_sees_no_parameter_that_has_moved():
    class Mine(LinfFrankWolfe):
        def _pre_step_transform_(self, param, optim_group):
            seen.append(torch.equal(params[0], start))
            super()._pre_step_transform_(param, optim_group)

    seen, params = [], tensors(3, 3)
    start = params[0].detach().clone()
    Mine([{"params": [x]} for x in params], epsilon=2.0).step()
    assert seen == [True, True]
    assert not torch.equal(params[0], start)


def test_a_gradient_that_is_refused_moves_nothing():
    params = tensors(3, (3, 2))
    params[1].grad = params[1].grad.to_sparse()
    start = params[0].detach().clone()
    opt = L2FrankWolfe([{"params": [x], "param_ndim": None} for x in params], epsilon=2.0)
    with pytest.raises(ValueError, match="dense gradients"):
        opt.step()
    assert torch.equal(params[0], start)
    assert not opt.state


# --- iterates stay in the ball --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param_ndim", [None, -1, 1])
@each_ball
def test_iterates_stay_in_the_ball(ball, param_ndim, dtype, schedule):
    """From anywhere after the first step of the schedule; at any rate from inside."""
    make, p, _ = BALLS[ball]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    epsilon = 0.75 * norms(x, p, param_ndim).min().item()  # all start outside
    if not schedule:
        x *= 0.5 * epsilon / norms(x, p, None).item()  # all start inside
    x = x.to(dtype).requires_grad_()
    lr = 2.0 if schedule else 0.3
    opt = make([x], epsilon=epsilon, lr=lr, use_default_lr_schedule=schedule, param_ndim=param_ndim)
    steps = 30
    for _ in range(steps):
        x.grad = torch.randn(SHAPE, generator=generator).to(dtype)
        opt.step()
        # a step rounds four times: the oracle's answer, two products and their sum
        assert (norms(x, p, param_ndim) <= epsilon * (1 + 4 * steps * torch.finfo(dtype).eps)).all()


def test_around_another_constraint():
    """As the inner optimizer of one that projects."""
    x = torch.tensor([0.5, 0.5], requires_grad=True)
    opt = ClampedParameterOptimizer([x], FrankWolfe, clamp_max=0.25, lmo_scaling_factor=2.0)
    x.grad = torch.tensor([-1.0, 1.0])
    opt.step()
    assert x.tolist() == [0.25, -2.0]


# --- convergence ----------------------------------------------------------------------------------

# Minimize (x - t)' Q (x - t) / 2 on the unit ball; the optima are from independent solvers.
Q = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
T = torch.tensor([2.0, 0.5, -0.4], dtype=torch.float64)
OPTIMA = {
    "L1": ([0.875, 0.125, 0.0], 0.88375),
    "L2": ([0.925007941716, 0.360391217747, -0.120326547085], 0.626594190877),
    "Linf": ([1.0, 0.5, -0.4], 0.5),
}
# The curvature constant: the largest (s - x)' Q (s - x) of two points of the ball.
CURVATURE = {"L1": 4 * Q.max().item(), "L2": 4 * Q.max().item(), "Linf": 4 * Q.sum().item()}


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (-9.0, 5.0, 7.0)])
@pytest.mark.parametrize("ball", OPTIMA)
def test_the_rate_of_convergence_is_the_proven_one(ball, start):
    """f(x_k) - f* <= 2 C / (k + 2) after k steps (Jaggi, 2013), and the gap certifies it."""
    optimum, lowest = OPTIMA[ball]
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    opt = BALLS[ball][0]([x], epsilon=1.0, param_ndim=None)
    smallest_gap = math.inf
    for k in range(1, 401):
        x.grad = Q * (x.detach() - T)
        opt.step()
        point = x.detach()
        grad = Q * (point - T)
        value = (Q * (point - T).square()).sum().item() / 2
        dual = BALLS[ball][2]
        gap = (grad @ point).item() + torch.linalg.vector_norm(grad, dual).item()
        smallest_gap = min(smallest_gap, gap)
        assert value - lowest <= 2 * CURVATURE[ball] / (k + 2)
        assert value - lowest <= gap + 1e-9  # convexity
    assert smallest_gap <= 27 / 4 * CURVATURE[ball] / (k + 2)  # Jaggi, theorem 2
    # strong convexity: a value so close is a point so close
    distance = math.sqrt(2 * 2 * CURVATURE[ball] / (k + 2) / Q.min().item())
    assert torch.linalg.vector_norm(point - torch.tensor(optimum, dtype=torch.float64)) <= distance


def test_l1q_with_one_entry_is_l1():
    (x,), (y,) = tensors((2, 5)), tensors((2, 5))
    one = L1FrankWolfe([x], epsilon=1.2)
    other = L1qFrankWolfe([y], epsilon=1.2, q=0.8)
    for step in range(5):
        new_gradients([x], step)
        new_gradients([y], step)
        one.step()
        other.step()
    assert torch.equal(x, y)


@pytest.mark.parametrize("lr", [-1.0, math.nan, torch.tensor(-1.0)], ids=str)
@pytest.mark.parametrize("params", [1, 2])
def test_a_wrong_lr_is_refused_before_gradients_change(params, lr):
    xs = tensors(*[(1, 3)] * params)
    opt = ParamTransformingOptimizer(xs, FrankWolfe, grad_scale=2.0)
    new_gradients(xs, 0)
    before = [x.grad.clone() for x in xs]
    opt.param_groups[0]["lr"] = lr
    for closure in (None, lambda: 0.0):
        with pytest.raises(ValueError, match="`lr` must"):
            opt.step(closure)
        assert same_bits([x.grad for x in xs], before)


@pytest.mark.parametrize("inner", [FrankWolfe, torch.optim.SGD])
def test_the_step_of_an_inner_class_may_have_no_hash(inner):
    class Step:
        __hash__ = None
        calls = 0

        def __call__(self, optimizer, closure=None):
            self.calls += 1

    (x,) = tensors((1, 3))
    new_gradients([x], 0)
    opt = ParamTransformingOptimizer([x], inner, lr=1.0)
    opt.inner_opt.__class__ = type("Own", (inner,), {"step": Step()})
    opt.step()
    assert type(opt.inner_opt).step.calls == 1


def test_a_sparse_gradient_of_a_view():
    """Torch would add it to another place of the buffer."""
    buffer = torch.zeros(7)
    x = buffer[2:5].detach().requires_grad_()
    x.grad = torch.sparse_coo_tensor([[1]], [-3.0], (3,), check_invariants=True).coalesce()
    FrankWolfe([x]).step()
    assert buffer.tolist() == [0, 0, 0, 3, 0, 0, 0]


def test_a_step_that_parameters_share_counts_each_of_them():
    params = [torch.ones(2, 3), torch.ones(2, 3)]
    opt = FrankWolfe(params)
    count = torch.tensor(4.0)
    for x in params:
        opt.state[x]["step"] = count
        x.grad = torch.zeros_like(x)
    with torch.no_grad():
        opt._move_together_(params, [x.grad for x in params], opt.param_groups[0])
    assert [x[0, 0].item() for x in params] == pytest.approx([2 / 3, 5 / 7])


@pytest.mark.parametrize("number", [1, 2])
def test_steps_are_counted_on_the_host_whatever_the_default_device(number):
    opt = FrankWolfe(tensors(*[(3, 4)] * number))
    with torch.device("meta"):
        opt.step()
    assert [state["step"].item() for state in opt.state.values()] == [1] * number
