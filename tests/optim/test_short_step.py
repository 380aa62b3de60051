"""Steps of one parameter in few calls: the same bits as the general step, whatever a user does."""

import copy
import gc
import math
import pickle
from functools import partial
from weakref import ref

import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import FRANK_WOLFE, WITH_INNER
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from rai_toolbox import optim
from rai_toolbox.constraints import BoundedBall, LinfBall, Simplex, UnitNorm
from rai_toolbox.optim import SignedGradientOptim

SHAPES = [(1, 60), (60,), (4, 15), (2, 3, 4), (), (1, 1), (0, 3), (1, 5_000), (300, 200)]
KINDS = [(shape, torch.float32) for shape in SHAPES] + [
    (shape, dtype)
    for shape in SHAPES[:3]
    for dtype in (torch.float64, torch.float16, torch.bfloat16)
]
INNERS = {
    "SGD": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": partial(SGD, lr=0.1, maximize=True),
    "foreach": partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "Adam": partial(Adam, lr=0.1),
    "FrankWolfe": partial(optim.FrankWolfe, use_default_lr_schedule=False, lr=0.3),
}
OPTIMIZERS = {
    **{name: partial(make, InnerOpt=INNERS["momentum"]) for name, make in WITH_INNER.items()},
    **FRANK_WOLFE,
    **{
        f"Signed {name}": partial(SignedGradientOptim, InnerOpt=inner, grad_scale=2.0)
        for name, inner in INNERS.items()
    },
    "Sphere": partial(optim.ProjectedOptimizer, constraint=UnitNorm(), gradient_mapping=True),
    "Warmup": partial(optim.ProjectedOptimizer, constraint=Simplex(), warmup=2, every=2),
    "L2Normed bias": partial(optim.L2NormedGradientOptim, grad_bias=0.1, div_by_zero_eps=3.0),
    "L1qNormed eps": partial(optim.L1qNormedGradientOptim, q=0.5, div_by_zero_eps=1e3),
    "TopQ all": partial(optim.TopQGradientOptimizer, q=0.0),
    "TopQ none": partial(optim.TopQGradientOptimizer, q=1.0),
    "TopQ drawn": partial(optim.TopQGradientOptimizer, q=0.5, dq=0.2),
}


def gradient(x, step):
    """Of some ties, zeros, ends of the range, and numbers that are not finite in later steps."""
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(x.shape, generator=generator).to(x.dtype)
    flat = grad.view(-1)
    if step == 3:
        grad.mul_(2).round_()
    if step == 4:
        flat[::2] = torch.finfo(x.dtype).smallest_normal / 4
    if step == 5:
        grad.zero_()
    if step == 6:
        flat[:1] = torch.finfo(x.dtype).max
    if step == 7:
        grad.fill_(-0.0)
    if step == 8:
        flat[-1:] = math.nan
    if step == 9:
        flat[-1:] = -math.inf
    return grad


def run(make, is_short, monkeypatch, *, shape=(1, 60), dtype=torch.float32, change=None, steps=10):
    """Where steps lead, with changes before the fourth; and what each short step has returned."""
    torch.manual_seed(0)
    x, returned, ends = torch.rand(shape).to(dtype).requires_grad_(), [], []
    opt = make([x], **({"param_ndim": None} if len(shape) < 2 else {}))
    made = type(opt)._make_short_step

    def make_short_step(opt):
        step = made(opt) if is_short else None
        return step and (lambda opt: returned.append(step(opt)) or returned[-1])

    with monkeypatch.context() as patch:
        patch.setattr(type(opt), "_make_short_step", make_short_step)
        for step in range(steps):
            x.grad = gradient(x, step)
            if change is not None and step == 4:
                opt = change(opt, patch) or opt
                (x,) = opt.param_groups[0]["params"][:1]
            failed = None
            try:
                opt.step()
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                failed = repr(error)
            params = [param for group in opt.param_groups for param in group["params"]]
            params = list(dict.fromkeys([*params, *opt.state]))
            ends.append((snapshot(params, opt), failed))
    return ends, returned


def without_nan(value):
    """A nested value with each tensor, and where it is NaN."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        is_nan = value.isnan()
        return [value.masked_fill(is_nan, 0.0), is_nan]
    return value


def same_ends(ours, theirs):
    for i, both in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(*map(without_nan, both)), f"step {i}: {both[0]} != {both[1]}"
    return True


@pytest.mark.parametrize(("shape", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_has_the_bits_of_the_general_step(name, shape, dtype, monkeypatch):
    both = [
        run(OPTIMIZERS[name], is_short, monkeypatch, shape=shape, dtype=dtype)
        for is_short in (True, False)
    ]
    assert same_ends(both[0][0], both[1][0])
    # (a count is a setting that each step changes; Adam is another inner optimizer)
    assert both[0][1].count(True) == {"Warmup": 5, "Signed Adam": 0}.get(name, 9)


def settings(**new):
    return lambda opt, _: opt.param_groups[0].update(new)


def other_group(opt, _):
    other = torch.ones(2, 60, requires_grad=True)
    other.grad = torch.ones(2, 60)
    opt.add_param_group({"params": [other], "param_ndim": None})


def frozen(opt, _):
    opt.param_groups[0]["params"][0].requires_grad_(False)


def loaded(opt, _):
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 0.6
    opt.load_state_dict(state)


def more_params(opt, _):
    other = torch.ones(2, 3, requires_grad=True)
    other.grad = torch.ones(2, 3)
    opt.param_groups[0]["params"].append(other)


def another_param(opt, _):
    other = torch.ones(1, 60, requires_grad=True)
    other.grad = torch.ones(1, 60)
    opt.param_groups[0]["params"][0] = other


def another_inner(opt, _):
    inner = copy.copy(opt.inner_opt)
    inner.param_groups = [{**opt.param_groups[0], "lr": 0.6}]
    opt.inner_opt = inner


def without(name):
    return lambda opt, _: opt.param_groups[0].__delitem__(name)


def without_dq_and_gradient(opt, _):
    opt.param_groups[0].pop("dq", None)
    opt.param_groups[0]["params"][0].grad = None


def other_data(shape=(1, 60), dtype=torch.float32):
    def change(opt, _):
        (x,) = opt.param_groups[0]["params"]
        x.data, x.grad = torch.full(shape, 0.3, dtype=dtype), None
        x.grad = torch.full(shape, -3.0, dtype=dtype)

    return change


def other_shape_than_gradient(opt, _):
    opt.param_groups[0]["params"][0].data = torch.rand(4, 60)


def of_inner(**new):
    return lambda opt, _: opt.inner_opt.__dict__.update(new)


def grad(change):
    def set_grad(opt, _):
        (x,) = opt.param_groups[0]["params"]
        x.grad = change(x.grad)

    return set_grad


def negated(param, optim_group):
    param.grad.neg_()


def class_hook(opt, patch):
    patch.setattr(type(opt), "_pre_step_transform_", lambda self, **args: negated(**args))


def own_hook(opt, _):
    opt._pre_step_transform_ = negated


def replaced_step(opt, patch):
    inner = type(opt.inner_opt)
    patch.setattr(
        inner, "step", lambda self, closure=None: self.param_groups[0]["params"][0].neg_()
    )


def wrapped_by_scheduler(opt, _):
    ExponentialLR(opt.inner_opt, 0.5)


def hooks(opt, _):
    def halve(inner, args, kwargs):
        inner.param_groups[0]["params"][0].grad.mul_(0.5)

    opt.inner_opt.register_step_pre_hook(halve)


def left_over(opt, _):
    opt._new_state[opt.param_groups[0]["params"][0]] = {"a": torch.ones(1)}


CHANGES = {
    "lr": settings(lr=0.7),
    "lr 0": settings(lr=0.0),
    "lr < 0": settings(lr=-1.0),
    "lr inf": settings(lr=math.inf),
    "lr of one tensor": settings(lr=torch.tensor(0.2)),
    "lr int": settings(lr=1),
    "scale": settings(grad_scale=3.0),
    "bias": settings(grad_bias=3.0),
    "param_ndim": settings(param_ndim=None),
    "another setting": settings(mine=3),
    "frozen": frozen,
    "no gradient": grad(lambda g: None),
    "strided gradient": grad(lambda g: torch.stack([g, g], -1)[..., 0]),
    "expanded gradient": grad(lambda g: g[..., :1].expand(g.shape)),
    "sparse gradient": grad(lambda g: g.to_sparse()),
    "other group": other_group,
    "loaded": loaded,
    "copied": lambda opt, _: copy.deepcopy(opt),
    "pickled": lambda opt, _: pickle.loads(pickle.dumps(opt)),
    "other data": other_data((4, 15)),
    "other dtype": other_data(dtype=torch.float64),
    "complex data": other_data(dtype=torch.complex64),
    "other shape than the gradient": other_shape_than_gradient,
    "no lr": without("lr"),
    "no bias": without("grad_bias"),
    "no dq, no gradient": without_dq_and_gradient,
    "dampening": settings(dampening=None),
    "scale of several": settings(grad_scale=torch.full((2,), 2.0)),
    "scale of one tensor": settings(grad_scale=torch.tensor(2.0)),
    "q": settings(q="a"),
    "eps": settings(div_by_zero_eps=None),
    "class hook": class_hook,
    "own hook": own_hook,
    "replaced step": replaced_step,
    "inner step": of_inner(step=lambda: None),
    "GradScaler": of_inner(found_inf=torch.tensor(0.0), grad_scale=None),
    "scheduler": wrapped_by_scheduler,
    "hooks": hooks,
    "left over": left_over,
    "state lost": lambda opt, _: opt.state.clear(),
    "differentiable": lambda opt, _: opt.defaults.update(differentiable=True),
    "more params": more_params,
    "another param": another_param,
    "another inner": another_inner,
}
_BOUNDED = BoundedBall(LinfBall(0.3), -0.1, torch.linspace(0.5, 0.9, 60))
CHANGED = {
    "PGD": partial(optim.PGD, constraint=_BOUNDED, lr=0.1),
    "Signed SGD": OPTIMIZERS["Signed SGD"],
    **{name: OPTIMIZERS[name] for name in ("ClampedParameter", "L2Projected", "L1qNormed")},
    **{name: OPTIMIZERS[name] for name in (*FRANK_WOLFE, "Signed momentum")},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CHANGED)
def test_follows_what_has_changed(name, change, monkeypatch):
    ends = [
        run(CHANGED[name], is_short, monkeypatch, change=CHANGES[change])[0]
        for is_short in (True, False)
    ]
    assert same_ends(*ends)


def test_members_of_a_chain_have_sub_tensors_of_their_own():
    x = torch.zeros(60, requires_grad=True)
    members = [
        partial(optim.TopQGradientOptimizer, q=0.5),
        SignedGradientOptim,
        partial(optim.L1NormedGradientOptim, param_ndim=0),
    ]
    opt = optim.ChainedParamTransformingOptimizer(*members, params=[x], lr=1.0, param_ndim=None)
    for step in range(3):
        x.grad = gradient(x, step)
        opt.step()
        assert x.grad.abs().sum() == 30


def test_default_device():
    x = torch.zeros(1, 60, requires_grad=True)
    opt = optim.L1qNormedGradientOptim([x], q=0.5, lr=1.0)
    for step in range(3):
        x.grad = gradient(x, step)
        with torch.device("meta"):
            opt.step()
        assert x.grad.norm(p=1).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["PGD", "L1qNormed", "ClampedParameter", "LinfFrankWolfe"])
def test_is_freed_without_the_garbage_collector(name):
    x = torch.zeros(1, 60, requires_grad=True)
    opt = CHANGED[name]([x])
    for step in range(3):
        x.grad = gradient(x, step)
        opt.step()
    assert opt._short_step is not None
    weak = ref(opt)
    gc.disable()
    try:
        del opt
        assert weak() is None
    finally:
        gc.enable()


def test_a_copy_of_attributes_has_a_short_step_of_its_own():
    (x,) = params = [torch.zeros(4, 15, requires_grad=True)]
    opt = optim.ClampedGradientOptimizer(params, lr=1.0, clamp_max=0.25)
    copied = object.__new__(type(opt))  # as trainers make it
    for step in range(4):
        x.grad = torch.ones(4, 15)
        if step == 2:
            copied.__dict__.update(opt.__dict__)
            del opt
        (opt if step < 2 else copied).step()
    assert (x == -1).all()


def test_conjugate_gradients_stay_as_they_are():
    x = torch.ones(1, 3, dtype=torch.complex64, requires_grad=True)
    opt = SignedGradientOptim([x], lr=0.1)
    for _ in range(3):
        given = torch.full((1, 3), 3 + 4j, dtype=torch.complex64)
        x.grad = given.conj()
        opt.step()
        assert (given == 3 + 4j).all()
        torch.testing.assert_close(x.grad, torch.full_like(given, 0.6 - 0.8j))


def test_bounds_that_are_tensors():
    x, bound = torch.zeros(1, 3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
    opt = optim.ClampedParameterOptimizer([x], lr=1.0, clamp_max=bound)
    for _ in range(3):
        x.grad = torch.full((1, 3), -10.0)
        opt.step()
        assert x.equal(bound[None])
        bound += 1


@pytest.mark.parametrize("schedule", [partial(ExponentialLR, gamma=0.8), OneCycleLR])
def test_schedules(schedule):
    ends = []
    for is_short in (True, False):
        x = torch.linspace(-1, 1, 8)[None].requires_grad_()
        opt = optim.L2ProjectedOptim([x], INNERS["momentum"], epsilon=0.9)
        if not is_short:
            opt._make_short_step = lambda: None
        each = schedule(opt, max_lr=0.5, total_steps=9) if schedule is OneCycleLR else schedule(opt)
        for step in range(8):
            x.grad = gradient(x, step)
            opt.step()
            each.step()
        ends.append(x.detach())
    assert same_bits(*ends)
