"""Bad input is refused, by name, rule and value, wherever it enters, before anything is changed."""

import copy
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bitwise import copied, same_bits
from files import through_a_file
from torch.optim import SGD, Adam

from rai_toolbox.constraints import Box, MaxNorm
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    L1NormedGradientOptim,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinearSetting,
    LinfFrankWolfe,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    ProjectedOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

NAN, INF = float("nan"), float("inf")


class Chain(ChainedParamTransformingOptimizer):
    """Three members, two of which have the same names of settings."""

    def __init__(self, params=None, InnerOpt=SGD, **kwargs):
        super().__init__(
            partial(TopQGradientOptimizer, q=0.5),
            partial(ClampedGradientOptimizer, clamp_max=1.0),
            partial(ClampedParameterOptimizer, clamp_max=2.0),
            params=params,
            InnerOpt=InnerOpt,
            **kwargs,
        )


# Each class, with settings that are right.
GOOD = {
    ParamTransformingOptimizer: {},
    ClampedParameterOptimizer: {"clamp_min": -1.0, "clamp_max": 1.0},
    ClampedGradientOptimizer: {"clamp_min": -1.0, "clamp_max": 1.0},
    SignedGradientOptim: {},
    L1NormedGradientOptim: {},
    L2NormedGradientOptim: {},
    L2ProjectedOptim: {"epsilon": 0.5},
    LinfProjectedOptim: {"epsilon": 0.5},
    TopQGradientOptimizer: {"q": 0.5},
    L1qNormedGradientOptim: {"q": 0.5},
    Chain: {},
    ProjectedOptimizer: {"constraint": MaxNorm(1.0), "param_ndim": None},
    FrankWolfe: {},
    L1FrankWolfe: {"epsilon": 0.5},
    L2FrankWolfe: {"epsilon": 0.5},
    LinfFrankWolfe: {"epsilon": 0.5},
    L1qFrankWolfe: {"epsilon": 0.5, "q": 0.5},
}
BALLS = [L1FrankWolfe, L2FrankWolfe, LinfFrankWolfe, L1qFrankWolfe]
WRAPPERS = [cls for cls in GOOD if cls is not FrankWolfe]
WITH_INNER = [cls for cls in WRAPPERS if cls not in BALLS]
ELEMENTWISE = [
    ClampedParameterOptimizer,
    ClampedGradientOptimizer,
    SignedGradientOptim,
    LinfProjectedOptim,
    LinearSetting,
    LinfFrankWolfe,
]
with_inner = pytest.mark.parametrize("cls", WITH_INNER, ids=lambda cls: cls.__name__)
every_class = pytest.mark.parametrize("cls", GOOD, ids=lambda cls: cls.__name__)

# --- the settings ---------------------------------------------------------------------------------


class Bad(NamedTuple):
    cls: type
    settings: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]  # all of them are in the message


NOT_NUMBERS = ["1", None, True, 1j, torch.tensor(1.0), np.ones(2)]


def no_number(cls, name, values=NOT_NUMBERS):
    return [
        Bad(cls, {name: v}, TypeError, (f"`{name}` must be a number", f"got {v!r}")) for v in values
    ]


def out_of_range(cls, name, rule, values, **more):
    return [
        Bad(cls, {name: v, **more}, ValueError, (f"`{name}` must ", rule, _shown(v)))
        for v in values
    ]


def _shown(value):
    """What errors show: the value, or in the place of another library's number Python's own."""
    return f"{value.item()}" if hasattr(value, "item") else f"got {value!r}"


TABLE: list[Bad] = []
for _cls in (ClampedParameterOptimizer, ClampedGradientOptimizer):
    _rule = ("`clamp_min` must be <= `clamp_max`", "clamp_min=3.0", "clamp_max=-1.0")
    TABLE += [
        Bad(_cls, {"clamp_min": 3.0, "clamp_max": -1.0}, ValueError, _rule),
        Bad(_cls, {"clamp_min": INF}, ValueError, (_rule[0], "clamp_min=inf", "clamp_max=1.0")),
        *(
            Bad(_cls, {name: bound}, ValueError, (f"`{name}` must {rule}", *words, "parameter"))
            for name, bound, rule, *words in (
                ("clamp_min", torch.zeros(3), "broadcast against", "(3, 2)", "got shape (3,)"),
                ("clamp_max", torch.zeros(1, 3, 2), "broadcast against", "got shape (1, 3, 2)"),
            )
        ),
        Bad(_cls, {"clamp_max": torch.tensor([0, -2])}, ValueError, (_rule[0], "at (1,)")),
        Bad(_cls, {"clamp_max": torch.tensor([1j, 0])}, TypeError, ("must hold real numbers",)),
    ]
    for _name in ("clamp_min", "clamp_max"):
        TABLE += out_of_range(_cls, _name, "not be NaN", [NAN, np.float64(NAN)])
        not_bounds = [v for v in NOT_NUMBERS if not isinstance(v, (torch.Tensor, type(None)))]
        TABLE += no_number(_cls, _name, not_bounds)
for _cls in [c for c in WRAPPERS if issubclass(c, (L1NormedGradientOptim, L2NormedGradientOptim))]:
    TABLE += out_of_range(_cls, "div_by_zero_eps", ">= 0", [-1e-9, -INF])
    TABLE += out_of_range(_cls, "div_by_zero_eps", "not be NaN", [NAN])
    TABLE += no_number(_cls, "div_by_zero_eps")
for _cls in [c for c in WRAPPERS if "epsilon" in GOOD[c]]:
    TABLE += out_of_range(_cls, "epsilon", ">= 0", [-4.0, -1, -1e-30, -INF])
    TABLE += out_of_range(_cls, "epsilon", "not be NaN", [NAN])
    TABLE += no_number(_cls, "epsilon")
for _cls in [c for c in WRAPPERS if "q" in GOOD[c]] + [Chain]:
    for _name in ("q", "dq"):
        TABLE += out_of_range(_cls, _name, "in [0, 1]", [-0.1, 1.1, 2, INF])
        TABLE += out_of_range(_cls, _name, "not be NaN", [NAN])
        TABLE += no_number(_cls, _name)
for _cls in [FrankWolfe, *BALLS]:
    TABLE += out_of_range(_cls, "lr", ">= 0", [-1.0, torch.tensor(-1.0)])
    TABLE += out_of_range(_cls, "lr", "not be NaN", [NAN])
    TABLE += out_of_range(_cls, "lr", "finite", [INF])  # lr / (lr + k) has no value
    TABLE += no_number(_cls, "lr", ["1", None, True, 1j])
    _constant = {"use_default_lr_schedule": False}
    _too_large = [1.5, 2, torch.tensor(1.5)]
    TABLE += out_of_range(_cls, "lr", "in [0, 1]", _too_large, **_constant)
TABLE += out_of_range(FrankWolfe, "lmo_scaling_factor", "not be NaN", [NAN])
TABLE += no_number(FrankWolfe, "lmo_scaling_factor")
TABLE += out_of_range(FrankWolfe, "div_by_zero_eps", ">= 0", [-1.0])
TABLE += [
    *(
        Bad(
            ProjectedOptimizer,
            {"constraint": v},
            TypeError,
            ("`constraint` must be a set", repr(v)),
        )
        for v in (1.0, "ball", [Box(0.0, 1.0)])
    ),
    *no_number(ProjectedOptimizer, "reach"),
    *out_of_range(ProjectedOptimizer, "reach", "must be > 0 and finite", [0, -1.0, INF]),
    *out_of_range(ProjectedOptimizer, "every", "must be an int >= 1", [0, -1, 1.5, True]),
    *out_of_range(ProjectedOptimizer, "warmup", "must be an int >= 0", [-1, 1.5, True]),
    *(
        Bad(
            ProjectedOptimizer,
            {"gradient_mapping": v},
            TypeError,
            ("must be a bool or None", repr(v)),
        )
        for v in (1, "yes")
    ),
]
for _cls in WITH_INNER:
    for _name in ("grad_scale", "grad_bias"):
        TABLE += out_of_range(_cls, _name, "not be NaN", [NAN])
        TABLE += no_number(_cls, _name)
for _cls in WRAPPERS:
    TABLE += [
        Bad(_cls, {"param_ndim": v}, TypeError, ("`param_ndim` must be an int or None", repr(v)))
        for v in (1.0, "1", True, (1,), torch.tensor(1))
    ]
    if _cls not in ELEMENTWISE:  # which it has no effect on
        TABLE += [
            Bad(
                _cls,
                {"param_ndim": v},
                ValueError,
                ("`param_ndim` must be None or lie in [-2, 2]", f"got {v}", "parameter 'bad'"),
            )
            for v in (3, -3, 10)
        ]
# What several members have goes by their numbers, and is checked by whose it is.
_numbers = ("`clamp_max` must be spelled as one of 1.clamp_max, 2.clamp_max", "got clamp_max=0.5")
TABLE += [
    Bad(Chain, {"clamp_max": 0.5}, ValueError, _numbers),
    Bad(Chain, {"2.clamp_max": NAN}, ValueError, ("clamp_max` must not be NaN, got nan",)),
    Bad(Chain, {"2.clamp_min": 5}, ValueError, ("clamp_min` must be <= ", "clamp_max=2.0")),
]


def tensors(name, *shapes):
    """Named leaf tensors, with gradients."""
    generator = torch.Generator().manual_seed(len(name))
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for tensor in made:
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    return [(f"{name}{i or ''}", tensor) for i, tensor in enumerate(made)]


def seen(value):
    """A copy of everything in it that a call could change; tensors in containers stay themselves.

    Optimizers and generators are taken apart. Dicts and lists keep their contents' identity, so
    that an equal copy in the place of an object would show, too.
    """
    if isinstance(value, torch.optim.Optimizer):
        state = [copied(value.state.get(p, {})) for g in value.param_groups for p in g["params"]]
        inside = [seen(value.param_groups), seen(value.defaults)]
        return [id(value), id(value.state), len(value.state), state, inside]
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.Tensor):
        grad = seen(value.grad) if value.is_leaf and value.grad is not None else None
        return [id(value), copied(value), grad]
    if isinstance(value, dict):
        return [id(value), {k: seen(v) for k, v in value.items()}]
    if isinstance(value, (list, tuple)):
        return [id(value), *map(seen, value)]
    return repr(value)  # NaN too is itself then


def assert_refused(call, error, words, *watched):
    """Calling raises the error, with all the words, and everything watched is as it was."""
    before = seen(watched)
    random = torch.get_rng_state()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert same_bits(seen(watched), before)
    assert same_bits(torch.get_rng_state(), random)


def in_use(cls, **kwargs):
    """An optimizer that has taken a step, so that there is state."""
    opt = cls(
        params=[{"params": tensors("ok", (2, 3))}, {"params": tensors("bad", (3, 2))}], **kwargs
    )
    opt.step()
    return opt


# Each way by which settings get into an optimizer: what to call, and what it must leave alone.


def by_keyword(cls, good, bad):
    params = tensors("bad", (3, 2))
    return partial(cls, params=params, **{**good, **bad}), params


def by_defaults(cls, good, bad):
    params = tensors("bad", (3, 2))
    bad = dict(bad)
    return partial(cls, params=params, defaults=bad, **good), params, bad


def by_keyword_around_an_instance(cls, good, bad):
    inner = in_use(Adam)
    inner.param_groups.pop(0)
    return partial(cls, InnerOpt=inner, defaults=bad, **good), inner


def by_the_group_of_an_instance(cls, good, bad):
    inner = in_use(Adam)
    inner.param_groups[1].update(bad)
    return partial(cls, InnerOpt=inner, **good), inner


def by_a_group(cls, good, bad):
    groups = [{"params": tensors("ok", (2, 3))}, {"params": tensors("bad", (3, 2)), **bad}]
    return partial(cls, params=groups, **good), groups


def by_add_param_group(cls, good, bad):
    opt = in_use(cls, **good)
    group = {"params": tensors("bad", (3, 2)), **bad}
    return partial(opt.add_param_group, group), opt, group


def by_load_state_dict(cls, good, bad):
    opt = in_use(cls, **good)
    loaded = copy.deepcopy(opt.state_dict())
    loaded["param_groups"][1].update(bad)
    for state in loaded["state"].values():  # would show if it got in
        state["step"] += 1
    return partial(opt.load_state_dict, loaded), opt, loaded


def by_param_groups(cls, good, bad):
    opt = in_use(cls, **good)
    groups = [dict(group) for group in opt.param_groups]
    groups[1].update(bad)
    return partial(setattr, opt, "param_groups", groups), opt, groups


OF_ALL = [by_a_group, by_add_param_group, by_load_state_dict]
OF_WRAPPERS = [*OF_ALL, by_param_groups]
OF_THOSE_WITH_INNER = [
    *OF_WRAPPERS,
    by_defaults,
    by_keyword_around_an_instance,
    by_the_group_of_an_instance,
]


def routes(cls):
    listed = OF_THOSE_WITH_INNER if cls in WITH_INNER else OF_WRAPPERS if cls in BALLS else OF_ALL
    return listed if cls is Chain else [by_keyword, *listed]


ROWS: dict[tuple[type, str], list[Bad]] = {}  # by class and by what is wrong
for _bad in TABLE:
    ROWS.setdefault((_bad.cls, next(iter(_bad.settings))), []).append(_bad)


@pytest.mark.parametrize(
    ("rows", "route"),
    [
        pytest.param(rows, route, id=f"{cls.__name__}-{name}-{route.__name__}")
        for (cls, name), rows in ROWS.items()
        for route in routes(cls)
    ],
)
def test_bad_settings(rows, route):
    for bad in rows:
        good = dict(GOOD[bad.cls])
        if bad.cls in WITH_INNER and "instance" not in route.__name__:
            good["InnerOpt"] = Adam
        call, *watched = route(bad.cls, good, bad.settings)
        assert_refused(call, bad.error, bad.words, *watched)


@pytest.mark.parametrize(
    "route", [by_keyword, by_defaults, by_keyword_around_an_instance], ids=lambda r: r.__name__
)
@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (ClampedParameterOptimizer, ("clamp_min", "clamp_max")),
        (ClampedGradientOptimizer, ("clamp_min", "clamp_max")),
        (Chain, ("1.clamp_min", "1.clamp_max")),
    ],
    ids=["ClampedParameterOptimizer", "ClampedGradientOptimizer", "Chain"],
)
def test_no_bound_at_all(cls, names, route):
    route = by_defaults if cls is Chain and route is by_keyword else route
    call, *watched = route(cls, {}, dict.fromkeys(names))
    words = (f"`{names[0]}` or `{names[1]}` must be given", *(f"{name}=None" for name in names))
    assert_refused(call, ValueError, words, *watched)


@pytest.mark.parametrize(
    "route",
    [r for r in OF_THOSE_WITH_INNER if r is not by_load_state_dict],
    ids=lambda r: r.__name__,
)
@pytest.mark.parametrize(
    "cls",
    [ClampedParameterOptimizer, ClampedGradientOptimizer, LinfProjectedOptim],
    ids=lambda cls: cls.__name__,
)
def test_order_is_of_real_numbers(cls, route, monkeypatch):
    def complex_tensors(name, *shapes):
        dtype = torch.complex64 if name == "bad" else torch.float32
        return [(name, torch.ones(shape, dtype=dtype, requires_grad=True)) for shape in shapes]

    good = dict(GOOD[cls])
    if route in (by_add_param_group, by_param_groups):  # the optimizer is right, the group is not
        opt = cls(params=tensors("ok", (2,)), **good)
        group = {"params": complex_tensors("bad", (2,))}
        call, watched = partial(opt.add_param_group, group), [opt, group]
        if route is by_param_groups:
            raw = {"params": [group["params"][0][1]], "param_names": ["bad"]}
            call = partial(setattr, opt, "param_groups", [*opt.param_groups, raw])
    else:
        monkeypatch.setitem(globals(), "tensors", complex_tensors)
        call, *watched = route(cls, good, {})
    words = ("must bound real numbers", "torch.complex64", "parameter 'bad'")
    assert_refused(call, TypeError, words, *watched)


# --- required settings ----------------------------------------------------------------------------

NEEDED = ("epsilon", "q", "constraint")
REQUIRED = [(cls, name) for cls in WRAPPERS for name in NEEDED if name in GOOD[cls]]


@pytest.mark.parametrize(("cls", "name"), REQUIRED, ids=lambda v: getattr(v, "__name__", v))
def test_a_required_setting_is_given_somewhere(cls, name):
    others = {k: v for k, v in GOOD[cls].items() if k != name}
    words = (f"`{name}` must be given", cls.__name__)
    value = GOOD[cls][name]

    params = tensors("w", (2, 3))
    assert_refused(partial(cls, params=params, **others), TypeError, words, params)
    groups = [{"params": tensors("v", (2,)), name: value}, {"params": tensors("w", (2,))}]
    assert_refused(partial(cls, params=groups, **others), TypeError, words, groups)
    if cls in WITH_INNER:
        inner = in_use(Adam)
        assert_refused(partial(cls, InnerOpt=inner, **others), TypeError, words, inner)

    groups[1][name] = value
    opt = cls(params=groups, **others)  # by groups it is given, too
    group = {"params": tensors("u", (2,))}
    assert_refused(partial(opt.add_param_group, group), TypeError, words, opt, group)
    opt.add_param_group({**group, name: value})
    bare = [{k: v for k, v in g.items() if k != name} for g in opt.param_groups]
    assert_refused(partial(setattr, opt, "param_groups", bare), TypeError, words, opt, bare)


def test_a_member_lacks_what_it_requires():
    params = tensors("w", (2, 3))
    members = (TopQGradientOptimizer, TopQGradientOptimizer)
    for n, name in [(1, "q"), (2, "0.q")]:
        make = partial(ChainedParamTransformingOptimizer, *members[:n], params=params)
        assert_refused(make, TypeError, (f"`{name}` must be given",), params)


# --- the inner optimizer --------------------------------------------------------------------------


@with_inner
@pytest.mark.parametrize(
    "inner",
    [
        None,
        "SGD",
        0.1,
        lambda params: SGD(params),
        [SGD],
        torch.nn.Module,
        partial(print),
        object(),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_inner_opt_is_an_optimizer(cls, inner):
    params = tensors("w", (2, 3))
    words = ("`InnerOpt` must be a torch.optim.Optimizer class", f"got {inner!r}")
    make = partial(cls, params=params, InnerOpt=inner, **GOOD[cls])
    assert_refused(make, TypeError, words, params)


@with_inner
@pytest.mark.parametrize(
    "nested",
    [
        SignedGradientOptim,
        partial(L1FrankWolfe, epsilon=1.0),
        SignedGradientOptim(tensors("v", (2,))),
        Chain(tensors("v", (2,))),
    ],
    ids=["class", "partial", "instance", "chain"],
)
def test_inner_opt_is_no_wrapper(cls, nested):
    params = None if isinstance(nested, torch.optim.Optimizer) else tensors("w", (2, 3))
    words = ("`InnerOpt` must not transform parameters itself", f"got {nested!r}")
    make = partial(cls, params=params, InnerOpt=nested, **GOOD[cls])
    watched = [nested] if params is None else params
    assert_refused(make, TypeError, words, *watched)


@with_inner
@pytest.mark.parametrize("inner", [SGD, partial(SGD, momentum=0.9), Adam], ids=str)
def test_inner_keywords_are_known(cls, inner):
    params = tensors("w", (2, 3))
    make = partial(cls, params=params, InnerOpt=inner, momentun=0.1, **GOOD[cls])
    name = "Adam" if inner is Adam else "SGD"
    words = ("`momentun` must be an argument of", name, "got momentun=0.1")
    assert_refused(make, TypeError, words, params)


def test_a_misspelt_keyword_is_named_before_what_is_then_missing():
    make = partial(ProjectedOptimizer, tensors("w", (2, 3)), set=MaxNorm(1.0), lr=0.1)
    words = (
        "`set` must be an argument of ProjectedOptimizer (constraint, param_ndim,",
        "or of SGD (params, lr, momentum,",
        "got set=MaxNorm(",
    )
    assert_refused(make, TypeError, words)


@with_inner
def test_inner_opt_refuses_its_own_bad_values(cls):
    groups = [{"params": tensors("w", (2, 3))}]
    make = partial(cls, params=groups, lr=-1.0, **GOOD[cls])
    assert_refused(make, ValueError, ("learning rate", "-1.0"), groups)


@with_inner
def test_nothing_is_dropped_that_is_given_beside_an_instance(cls):
    inner, params = in_use(Adam), tensors("w", (2, 3))
    for extra in ({"params": params}, {"params": []}, {"lr": 0.1}, {"params": params, "lr": 0.1}):
        make = partial(cls, InnerOpt=inner, **extra, **GOOD[cls])
        words = (", ".join(extra), "must not be given together with an InnerOpt instance", "Adam")
        assert_refused(make, TypeError, words, inner, params)


def test_settings_are_not_dropped_if_the_instance_has_loaded_those_of_a_wrapper():
    saved = ClampedParameterOptimizer(tensors("w", (2, 3)), Adam, clamp_max=0.5).state_dict()
    bare = Adam(tensors("w", (2, 3)))
    bare.load_state_dict(saved)
    for make in (ClampedParameterOptimizer, SignedGradientOptim):
        kwargs = {"clamp_max": 5.0} if make is ClampedParameterOptimizer else {}
        with pytest.raises(ValueError, match="nor have loaded what a wrapper saved"):
            make(InnerOpt=bare, **kwargs)


@pytest.mark.parametrize("given", [SGD, SGD([torch.ones(2, requires_grad=True)], lr=0.1)])
def test_an_optimizer_in_the_place_of_the_parameters(given):
    with pytest.raises(TypeError, match=r"\(an optimizer is given as InnerOpt=\), got"):
        ClampedParameterOptimizer(given, clamp_max=5.0)


def test_a_group_without_a_constraint():
    groups = [{"params": tensors("w", (2, 3))}]
    with pytest.raises(TypeError, match="`constraint` must be given.*None leaves it unconstrained"):
        ProjectedOptimizer(groups, lr=0.1)


def test_settings_are_not_dropped_if_the_instance_is_wrapped_already():
    x = torch.full((2,), 9.0, requires_grad=True)
    inner = SGD([x], lr=1.0)
    ClampedParameterOptimizer(InnerOpt=inner, clamp_max=1.0)
    try:
        opt = ClampedParameterOptimizer(InnerOpt=inner, clamp_max=5.0)
    except ValueError as error:
        assert "clamp_max" in str(error)  # refused by name, or:
    else:
        opt.step()
        assert x.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("cls", [TopQGradientOptimizer, L1qNormedGradientOptim, L1qFrankWolfe])
@pytest.mark.parametrize("generator", [None, 0, torch.Generator], ids=str)
def test_a_generator_is_one(cls, generator):
    params = tensors("w", (2, 3))
    make = partial(cls, params=params, generator=generator, **GOOD[cls])
    words = ("`generator` must be a torch.Generator", f"got {generator!r}")
    assert_refused(make, TypeError, words, params)


# --- parameters and groups ------------------------------------------------------------------------

_x, _y = (tensor for _, tensor in tensors("x", (2, 2), (2, 2)))
BAD_PARAMS = {  # with the words that there must be
    "tensor": (  # torch's own words
        _x,
        TypeError,
        ("params argument given to the optimizer should be an iterable of Tensors or dicts",),
    ),
    "None": (None, TypeError, ("params", "None")),
    "number": (5, TypeError, ("params", "5")),
    "module": (torch.nn.Linear(1, 1), TypeError, ("params", "Linear")),
    "set": ({_x}, TypeError, ("params", "order", "set")),
    "frozenset": (frozenset([_x]), TypeError, ("params", "order", "set")),
    "empty": ([], ValueError, ("params", "empty")),
    "used up": (iter(()), ValueError, ("params", "empty")),
    "set in a group": ([{"params": {_x}}], TypeError, ("order", "set")),
    "None in a group": ([{"params": None}], TypeError, ("params", "None")),
    "group without params": ([{"lr": 0.1}], ValueError, ("`params`", "lr")),
    "tensor for a group": ([{"params": [_x]}, _y], TypeError, ("group", "dict", "tensor")),
    "group for a tensor": ([_x, {"params": [_y]}], TypeError, ("Tensors", "dict")),
    "not a tensor": ([_x, 1.0], TypeError, ("Tensors", "float")),
    "names for some": ([("x", _x), _y], ValueError, ("names",)),
    "names for some groups": (
        [{"params": [("x", _x)]}, {"params": [_y]}],
        ValueError,
        ("names",),
    ),
    "not a leaf": ([_x * 2], ValueError, ("non-leaf",)),
    "twice": ([{"params": [_x]}, {"params": [_x]}], ValueError, ("more than one",)),
}


@every_class
@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(cls, case):
    params, error, words = BAD_PARAMS[case]
    call = partial(cls, params=params, **GOOD[cls])
    watched = params if isinstance(params, list) else []
    assert_refused(call, error, words, _x, _y, watched)


BAD_GROUPS = {
    "list": ([_x], TypeError, ("group must be a dict",)),
    "tensor": (_x, TypeError, ("group must be a dict",)),
    "None": (None, TypeError, ("group must be a dict", "None")),
    "without params": ({"lr": 0.1}, ValueError, ("`params`", "lr")),
    "set": ({"params": {_x}}, TypeError, ("order", "set")),
    "None for params": ({"params": None}, TypeError, ("params", "None")),
    "not a tensor": ({"params": [_x, 1.0]}, TypeError, ("Tensors", "float")),
    "names for some": ({"params": [("x", _x), _y]}, ValueError, ("names",)),
    "no names": ({"params": [_x]}, ValueError, ("names",)),
    "not a leaf": ({"params": [("x", _x * 2)]}, ValueError, ("non-leaf",)),
}


@every_class
@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups_to_add(cls, case):
    group, error, words = BAD_GROUPS[case]
    opt = in_use(cls, **GOOD[cls])
    watched = group if isinstance(group, dict) else []
    assert_refused(partial(opt.add_param_group, group), error, words, opt, _x, _y, watched)


@every_class
def test_a_parameter_is_added_once(cls):
    opt = in_use(cls, **GOOD[cls])
    group = {"params": [("again", opt.param_groups[0]["params"][0])]}
    words = ("more than one",)
    assert_refused(partial(opt.add_param_group, group), ValueError, words, opt, group)


# --- checkpoints ----------------------------------------------------------------------------------


def _more_groups(loaded):
    loaded["param_groups"] = loaded["param_groups"] * 2


def _fewer_groups(loaded):
    del loaded["param_groups"][0]


def _more_params(loaded):
    loaded["param_groups"][1]["params"] += [7]


def _fewer_params(loaded):
    loaded["param_groups"][1]["params"] = []


def _no_groups(loaded):
    del loaded["param_groups"]


def _no_params(loaded):
    del loaded["param_groups"][1]["params"]


def _no_state(loaded):
    del loaded["state"]


MISFITS = {  # with the words that there must be
    _more_groups: ("2 parameter groups", "got 4"),
    _fewer_groups: ("2 parameter groups", "got 1"),
    _more_params: ("1 parameters in group 1", "got 2"),
    _fewer_params: ("1 parameters in group 1", "got 0"),
    _no_groups: ("`state_dict` must", "param_groups"),
    _no_params: ("`state_dict` must", "params"),
    _no_state: ("`state_dict` must", "state"),
}


@pytest.mark.parametrize("cls", [SignedGradientOptim, Chain, L1FrankWolfe])
@pytest.mark.parametrize("misfit", MISFITS, ids=lambda f: f.__name__.strip("_"))
def test_checkpoints_that_do_not_fit(cls, misfit):
    opt = in_use(cls, **GOOD[cls])
    loaded = copy.deepcopy(opt.state_dict())
    misfit(loaded)
    load = partial(opt.load_state_dict, loaded)
    assert_refused(load, ValueError, ("state_dict", *MISFITS[misfit]), opt, loaded)


@pytest.mark.parametrize("cls", [TopQGradientOptimizer, L1qNormedGradientOptim, L1qFrankWolfe])
@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), "x"])
def test_generator_state_of_a_checkpoint_that_does_not_fit(cls, state):
    generator = torch.Generator().manual_seed(1)
    opt = in_use(cls, generator=generator, dq=0.1, **GOOD[cls])
    loaded = copy.deepcopy(opt.state_dict())
    (name,) = [k for k in loaded["param_groups"][0] if k.endswith("generator_state")]
    loaded["param_groups"][0].update({name: state, "q": 0.9})
    watched = [opt, generator, loaded]
    before = seen(watched)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        opt.load_state_dict(loaded)
    assert same_bits(seen(watched), before)


# --- what belongs to the caller -------------------------------------------------------------------


@pytest.mark.parametrize("cls", GOOD, ids=lambda cls: cls.__name__)
def test_dicts_of_the_caller_are_not_modified(cls):
    settings = GOOD[cls]
    first, second = (
        {"params": tensors("a", (2, 2))},
        {"params": tensors("b", (2,)), "param_ndim": 0},
    )
    third = {"params": tensors("c", (2,)), **settings}
    groups = [first, second]
    defaults = {**settings, "mine": [1]}
    given = {"defaults": defaults} if cls in WITH_INNER else settings
    of_the_caller = [groups, third, defaults]
    before = seen(of_the_caller)
    opt = cls(params=groups, **given)
    opt.add_param_group(third)
    # neither now nor later, by what the optimizer does with its own
    loaded = opt.state_dict()
    before_load = seen(loaded["param_groups"])
    opt.load_state_dict(loaded)
    assert same_bits(seen(loaded["param_groups"]), before_load)
    for group in opt.param_groups:
        group.update(lr=0.0, param_ndim=None)
    opt.defaults["lr"] = 7.0
    assert same_bits(seen(loaded["param_groups"]), before_load)
    assert same_bits(seen(of_the_caller), before)


# --- numbers of other types -----------------------------------------------------------------------

NUMBERS = {
    "0": 0,
    "1": 1,
    "-0.0": -0.0,
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(1),
}
MAY_BE_REFUSED = {"fraction": Fraction(1, 2), "inf": INF, "1e30": 10**30, "1e400": 10**400}
SETTINGS = [
    *(
        (c, n)
        for c in (ClampedParameterOptimizer, ClampedGradientOptimizer)
        for n in ("clamp_max",)
    ),
    *((cls, "epsilon") for cls in WRAPPERS if "epsilon" in GOOD[cls]),
    *((cls, name) for cls in WRAPPERS if "q" in GOOD[cls] for name in ("q", "dq")),
    (L2NormedGradientOptim, "div_by_zero_eps"),
    *((SignedGradientOptim, name) for name in ("grad_scale", "grad_bias")),
    *((FrankWolfe, name) for name in ("lr", "lmo_scaling_factor", "div_by_zero_eps")),
]


each_setting = pytest.mark.parametrize(
    ("cls", "name"), SETTINGS, ids=lambda v: v if isinstance(v, str) else v.__name__
)


def _after_a_step(cls, settings):
    torch.manual_seed(0)
    opt = in_use(cls, **{**GOOD[cls], **settings})
    return [p.detach() for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize("which", NUMBERS | MAY_BE_REFUSED)
@each_setting
def test_a_number_of_any_type_is_refused_or_counts_as_its_float(cls, name, which):
    number = (NUMBERS | MAY_BE_REFUSED)[which]
    try:
        actual = _after_a_step(cls, {name: number})
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"`{name}` must ")
        assert which in MAY_BE_REFUSED
    else:
        expected = _after_a_step(cls, {name: float(number)})
        assert not any(tensor.isnan().any() for tensor in actual)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_setting
def test_checkpoints_are_plain_data_whatever_type_a_number_had(cls, name):
    for number in NUMBERS.values():
        opt = in_use(cls, **{**GOOD[cls], name: number})
        loaded = through_a_file(opt.state_dict())
        assert loaded["param_groups"][0][name] == number


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: ProjectedOptimizer([("scale", x)], constraint=MaxNorm(1.0)),
            "`param_ndim` must be None for a tensor with 0 dims, got -1 (parameter 'scale')",
        ),
        (
            lambda x: ClampedParameterOptimizer([x], clamp_max=np.ones(3)),
            "`clamp_max` must be a number or a tensor, got array([1., 1., 1.])",
        ),
        (
            lambda x: ProjectedOptimizer([x], constraint=Box(0.0, [1.0, 2.0])),
            "`upper` must be a number or a tensor, got [1.0, 2.0]",
        ),
        (
            lambda x: ClampedParameterOptimizer(Adam([x]), clamp_max=1.0),
            "`params` must be an iterable, as `model.parameters()` (an optimizer is given as "
            "InnerOpt=), got Adam",
        ),
        (
            lambda x: LinearSetting(
                ProjectedOptimizer(
                    [
                        {"params": [x], "constraint": Box(0.0, 1.0)},
                        {"params": [x.detach().clone()], "constraint": None},
                    ]
                ),
                "constraint.upper",
                *(3.0, 1.0, 5),
            ),
            "(in a list for all groups, None leaves one unchanged) for group 1 at step 0",
        ),
    ],
    ids=["0-d parameter", "array", "list", "optimizer first", "schedule of a free group"],
)
def test_errors_say_what_to_do(call, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(torch.ones(()).requires_grad_())
    assert words in str(caught.value)
