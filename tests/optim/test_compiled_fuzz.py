"""Random programs around an optimizer: compiled steps do what eager ones do, at every step.

A program is drawn from a seed. Between steps it changes groups, gradients, settings and sets, adds
schedulers and hooks, and loads checkpoints.
"""

import copy
import random
import warnings
from functools import partial

import pytest
import torch
import torch._dynamo
from tiers import slow_but
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop, lr_scheduler
from torch_versions import compiles

from rai_toolbox.constraints import (
    BoundedBall,
    Box,
    Intersection,
    L1Ball,
    L2Ball,
    LinfBall,
    Masked,
    MaxNorm,
    NonNegative,
    Simplex,
    TopK,
    UnitNorm,
)
from rai_toolbox.optim import (
    PGD,
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    ExponentiatedGradient,
    FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ProjectedOptimizer,
    SettingScheduler,
    SignedGradientOptim,
    compiled,
)

pytestmark = compiles

SHAPES = [(3, 4), (2, 4), (5, 4)]  # a set may have a setting for each of 4 columns


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def any_set(rng, ball=False):
    """A set; one of the last is a ball."""
    makers = [
        NonNegative,
        UnitNorm,
        lambda: UnitNorm(dim=rng.choice([0, 1])),
        lambda: MaxNorm(rng.uniform(0.1, 2)),
        lambda: TopK(rng.choice([1, 2, 3])),
        lambda: Masked(L2Ball(rng.uniform(0.1, 2)), torch.tensor(rng.choice(MASKS))),
        lambda: Masked(NonNegative(), torch.tensor(rng.choice(MASKS))),
        lambda: Intersection(L2Ball(1.0), NonNegative()),
        lambda: Masked(Intersection(L2Ball(1.0), NonNegative()), torch.tensor(MASKS[0])),
        lambda: Box(-rng.uniform(0.1, 2), rng.uniform(0.1, 2)),
        lambda: Box(torch.linspace(-2, 0, 4), rng.uniform(0.1, 2)),
        lambda: Simplex(rng.uniform(0.1, 2)),
        lambda: L2Ball(torch.tensor(rng.uniform(0.1, 2)), center=torch.linspace(0, 1, 4)),
        lambda: LinfBall(rng.uniform(0.1, 2)),
        lambda: L1Ball(rng.uniform(0.1, 2)),
        lambda: L2Ball(rng.uniform(0.1, 2)),
        lambda: BoundedBall(LinfBall(rng.uniform(0.5, 2)), -rng.uniform(0.1, 1), 1.0),
    ]
    return rng.choice(makers[-4:] if ball else makers)()


MASKS = [[True, False, True, True], [True, True, True, False]]


def an_optimizer(rng):
    """What makes an optimizer of groups; and the settings of them that a program may change."""
    inner, options, settings = rng.choice(
        [
            (SGD, {}, {}),
            (SGD, {"momentum": 0.9}, {"momentum": [0.0, 0.5]}),
            (Adam, {}, {"betas": [(0.5, 0.9), (0.9, 0.99)], "weight_decay": [0.0, 0.1]}),
            (AdamW, {"amsgrad": True}, {"betas": [(0.5, 0.9)], "weight_decay": [0.0, 0.1]}),
            (RMSprop, {}, {"alpha": [0.9, 0.5], "centered": [False]}),
            (Adagrad, {}, {"weight_decay": [0.0, 0.1]}),
        ]
    )
    settings = {**settings, "lr": [0.0, 0.01, 0.2, torch.tensor(0.03)], "maximize": [True, False]}
    ours = {"grad_scale": [1.0, -0.5], "grad_bias": [0.0, 0.1], "param_ndim": [-1, None]}
    bounds = {"clamp_min": [None, -0.5, -0.1], "clamp_max": [0.2, 0.7]}
    radius = {"epsilon": [0.1, 0.5, 2.0]}
    one, other = any_set(rng), [any_set(rng) for _ in range(3)]
    if rng.random() < 0.15:
        return partial(inner, lr=0.1, **options), settings
    cls, own = rng.choice(
        [
            (ClampedParameterOptimizer, bounds),
            (ClampedGradientOptimizer, bounds),
            (L2ProjectedOptim, radius),
            (LinfProjectedOptim, radius),
            (SignedGradientOptim, {}),
            (L2NormedGradientOptim, {}),
            (ProjectedOptimizer, {"constraint": [*other, None]}),
            (ProjectedOptimizer, {"constraint": other, "reach": [0.1, 0.3]}),
            (ProjectedOptimizer, {"constraint": other}),
            (partial(ProjectedOptimizer, every=2, warmup=1), {"constraint": other}),
            (
                partial(ChainedParamTransformingOptimizer, SignedGradientOptim, ProjectedOptimizer),
                {"constraint": other},
            ),
            (PGD, {"constraint": [any_set(rng, True) for _ in range(3)]}),
            (FrankWolfe, {"constraint": [any_set(rng, True) for _ in range(3)]}),
            (ExponentiatedGradient, {}),
        ]
    )
    given = {name: values[-1] for name, values in own.items() if name in (*bounds, *radius)}
    if "constraint" in own:
        given["constraint"] = any_set(rng, True) if cls in (PGD, FrankWolfe) else one
    if cls in (PGD, ExponentiatedGradient):
        return partial(cls, lr=0.1, **given), {"lr": [0.01, 0.2], **own}
    if cls is FrankWolfe:
        return partial(cls, **given), own
    if isinstance(cls, partial) and cls.func is ChainedParamTransformingOptimizer:

        def make(groups):
            return cls(params=groups, InnerOpt=inner, lr=0.1, defaults=given, **options)
    else:
        make = partial(cls, InnerOpt=inner, lr=0.1, **options, **given)
    return make, {**settings, **ours, **own}


def a_program(seed, steps=9):
    """What makes the optimizer, and for each step the changes before it and its gradients."""
    rng = random.Random(seed)
    make, settings = an_optimizer(rng)
    groups = [[rng.choice(SHAPES) for _ in range(rng.choice([1, 1, 2]))] for _ in range(3)]
    groups = groups[: rng.choice([1, 2, 2, 3])]
    plan = [
        [(rng.choice(CHANGES), rng.randrange(10**6)) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
        for _ in range(steps)
    ]
    return make, settings, groups, plan


def new_params(shapes, rng):
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    return [torch.rand(s, generator=generator).sub_(0.2).requires_grad_() for s in shapes]


def add_group(optimizer, settings, rng):
    optimizer.add_param_group({"params": new_params([rng.choice(SHAPES)], rng)})


def drop_group(optimizer, settings, rng):
    if len(optimizer.param_groups) > 1:
        del optimizer.param_groups[rng.randrange(len(optimizer.param_groups))]


def one_of(optimizer, rng):
    group = rng.choice(optimizer.param_groups)
    return group, rng.choice(group["params"])


def freeze(optimizer, settings, rng):
    _, param = one_of(optimizer, rng)
    param.requires_grad_(False)
    param.grad = None


def thaw(optimizer, settings, rng):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.requires_grad_()


def change_setting(optimizer, settings, rng):
    group, _ = one_of(optimizer, rng)
    name = rng.choice(list(settings))
    group[name] = copy.deepcopy(rng.choice(settings[name]))


def change_own_setting(optimizer, settings, rng):
    group, _ = one_of(optimizer, rng)
    name = list(settings)[-1]
    group[name] = rng.choice(settings[name])


def change_lr_of_all(optimizer, settings, rng):
    lr = rng.uniform(0.01, 0.2)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = lr


def save(optimizer, settings, rng):
    optimizer.saved = copy.deepcopy(optimizer.state_dict())


def load(optimizer, settings, rng):
    saved = getattr(optimizer, "saved", None)
    if saved is not None:
        optimizer.load_state_dict(copy.deepcopy(saved))


def clear_state(optimizer, settings, rng):
    optimizer.state.clear()


def schedule_lr(optimizer, settings, rng):
    if "lr" in optimizer.param_groups[0]:
        optimizer.schedulers.append(lr_scheduler.ExponentialLR(optimizer, 0.8))


def schedule_setting(optimizer, settings, rng):
    constraint = optimizer.param_groups[0].get("constraint")
    if isinstance(constraint, TopK):
        name, values = "constraint.k", lambda step: 1 + step % 3
    elif hasattr(constraint, "epsilon"):
        name, values = "constraint.epsilon", lambda step: 1 / (1 + step)
    elif "epsilon" in settings:
        name, values = "epsilon", lambda step: 1 / (1 + step)
    else:
        return
    others = [None] * (len(optimizer.param_groups) - 1)
    optimizer.schedulers.append(SettingScheduler(optimizer, name, [values, *others]))


def step_hooks(optimizer, settings, rng):
    def before(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = group["lr"] * 0.9

    def after(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            if group.get("clamp_max") is not None:
                group["clamp_max"] = group["clamp_max"] * 0.9

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def hook_of_instance(optimizer, settings, rng):
    if hasattr(optimizer, "_post_step_transform_"):
        if rng.random() < 0.5:
            optimizer._post_step_transform_ = lambda param, optim_group: param.clamp_(-0.3, 0.3)
        else:
            optimizer._pre_step_transform_ = lambda param, optim_group: param.grad.neg_()


def hooks_of_inner(optimizer, settings, rng):
    def after(inner, args, kwargs):
        for group in inner.param_groups:
            group["lr"] = group["lr"] * 0.9

    if hasattr(optimizer, "inner_opt"):
        optimizer.inner_opt.register_step_post_hook(after)


def eager_step(optimizer, settings, rng):
    optimizer.step()


def other_data(optimizer, settings, rng):
    _, param = one_of(optimizer, rng)
    param.data = torch.full_like(param, 0.1)


CHANGES = [
    *[change_setting, change_own_setting, change_own_setting] * 3,
    *[add_group, drop_group, freeze, thaw, change_lr_of_all, save, load, load, clear_state],
    *[schedule_lr, schedule_setting, schedule_setting, step_hooks, hook_of_instance],
    *[hooks_of_inner, eager_step, other_data],
]


def give_gradients(optimizer, rng, odd):
    """Gradients, some of which are None or zero, and some of an `odd` program in other strides."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            generator = torch.Generator().manual_seed(rng.randrange(10**6))
            grad = torch.randn(param.shape, generator=generator)
            kind = rng.random()
            if kind < 0.1 or not param.requires_grad:
                param.grad = None
            elif odd and kind < 0.2:
                param.grad = grad.T.contiguous().T
            elif odd and kind < 0.25:
                param.grad = grad[:, :1].expand(param.shape)
            elif kind < 0.3:
                param.grad = torch.zeros_like(param)
            else:
                param.grad = grad


def run(seed, backend=None):
    """The values after each step, up to an exception, which is the last item; and the warnings."""
    make, settings, groups, plan = a_program(seed)
    rng = random.Random(seed)
    optimizer = make([{"params": new_params(shapes, rng)} for shapes in groups])
    optimizer.schedulers = []
    step = compiled(optimizer, backend=backend) if backend else lambda: optimizer.step()
    trace, said = [], []
    for changes in plan:
        try:
            for change, own_seed in changes:
                change(optimizer, settings, random.Random(own_seed))
            give_gradients(optimizer, rng, odd=seed % 8 == 0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
            said += [str(w.message) for w in caught if "stays eager" in str(w.message)]
            for scheduler in optimizer.schedulers:
                scheduler.step()
        except Exception as error:
            trace.append(error)
            break
        trace.append(values(optimizer))
    return trace, said, plan, getattr(step, "graphs", None)


def values(optimizer):
    """All that a step may change, copied, by its place."""
    found = {}
    for i, group in enumerate(optimizer.param_groups):
        for j, param in enumerate(group["params"]):
            found[f"param {i}.{j}"] = param.detach().clone()
            found[f"grad {i}.{j}"] = None if param.grad is None else param.grad.clone()
            for name, value in optimizer.state.get(param, {}).items():
                found[f"state {i}.{j}.{name}"] = copy.deepcopy(value)
        for name in group.keys() - {"params"}:
            found[f"group {i}.{name}"] = copy.deepcopy(group[name])
    return found


def agree(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.allclose(
            one.double(), other.double(), rtol=5e-3, atol=2e-4, equal_nan=True
        )
    return type(one) is type(other) and bool(one == other)


def differences(seed, backend):
    """Where a compiled program differs from the eager one, in words."""
    eager, _, plan, _ = run(seed)
    found, said, _, graphs = run(seed, backend)
    for k, (one, other) in enumerate(zip(eager, found, strict=False)):
        if isinstance(one, Exception) or isinstance(other, Exception):
            if type(one) is not type(other):
                return f"step {k}: {one!r} and {other!r}"[:2000], said, plan, graphs
            break
        if one.keys() != other.keys():
            return f"step {k}: {one.keys() ^ other.keys()}", said, plan, graphs
        for name in one:
            if not agree(one[name], other[name]):
                both = f"step {k}, {name}: {one[name]} and {other[name]}"
                return both, said, plan, graphs
    return "", said, plan, graphs


@pytest.mark.parametrize("seed", slow_but([0, 2, 4, 10, 11, 318]))
def test_compiled_steps_do_what_eager_ones_do(seed):
    found, *_ = differences(seed, "eager")
    assert not found
