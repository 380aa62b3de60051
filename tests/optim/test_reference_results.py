"""The documented results, class relations, signatures and representations, one table of each."""

import doctest
import inspect
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer

from rai_toolbox import optim
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
    LinfFrankWolfe,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

# --- the founding document's example, as it is there ----------------------------------------------

SEED = """
>>> import torch as tr
>>> from rai_toolbox.optim import ClampedParameterOptimizer
>>> x = tr.ones(2, requires_grad=True)
>>> optim = ClampedParameterOptimizer(params=[x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
>>> x.backward(gradient=tr.tensor([0.5, -10.0]))
>>> optim.step()
>>> x
tensor([0.5000, 3.0000], requires_grad=True)
"""


def test_the_example_of_the_founding_document():
    report = []
    example = doctest.DocTestParser().get_doctest(SEED, {}, "founding document", None, 0)
    assert len(example.examples) == 7
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.failed == 0, "".join(report)


# --- results of one step --------------------------------------------------------------------------


class Case(NamedTuple):
    make: Any
    settings: dict[str, Any]
    x: list
    grad: list
    new_grad: list | None  # None: not documented
    new_x: list | None

    def __str__(self):
        cls = self.make.func if isinstance(self.make, partial) else self.make
        return f"{cls.__name__}-{self.settings}"


_chain = partial(ChainedParamTransformingOptimizer, TopQGradientOptimizer, ClampedGradientOptimizer)
_top_q = [[0.5, 1.0], [-2.5, 0.3]]
_top_q_case = partial(Case, TopQGradientOptimizer, x=[[1, 1], [1, 1]], grad=_top_q)
_box, _whole = {"clamp_min": -1.0, "clamp_max": 3.0}, {"param_ndim": None}
_ball = {"epsilon": 1.8, **_whole}

# fmt: off
BY_SGD = [  # all with lr=1
    Case(ClampedParameterOptimizer, _box, [1, 1], [0.5, -10], None, [0.5, 3]),
    Case(ClampedGradientOptimizer, _box, [1, 1], [-0.5, 10], [-0.5, 3], [1.5, -2]),
    Case(SignedGradientOptim, {}, [-1.5, 1.5], [-2, 20], [-1, 1], [-0.5, 0.5]),
    Case(L1NormedGradientOptim, _whole, [-1, 1], [2, 2], [0.5, 0.5], [-1.5, 0.5]),
    Case(L2NormedGradientOptim, _whole, [-1, 1], [2, 2], [0.7071, 0.7071], [-1.7071, 0.2929]),
    Case(L2ProjectedOptim, {"epsilon": 0.8, **_whole}, [-1, 1], [2, 2], None, [-0.7885, 0.1353]),
    Case(LinfProjectedOptim, {"epsilon": 1.8}, [-1, 0.5], [2, -2], None, [-1.8, 1.5]),
    _top_q_case({"q": 0.25, **_whole}, new_grad=[[0.5, 1], [-2.5, 0]], new_x=None),
    _top_q_case({"q": 0.5, **_whole}, new_grad=[[0, 1], [-2.5, 0]], new_x=None),
    _top_q_case({"q": 0.75, **_whole}, new_grad=[[0, 0], [-2.5, 0]], new_x=None),
    _top_q_case({"q": 1.0, **_whole}, new_grad=[[0, 0], [0, 0]], new_x=[[1, 1], [1, 1]]),
    _top_q_case({"q": 0.0, **_whole}, new_grad=_top_q, new_x=None),
    Case(L1qNormedGradientOptim, {"q": 0.3, "grad_scale": 1.8, **_whole},
         [1, 1, 1], [0, 1, 2], [0, 0.9, 0.9], [1, 0.1, 0.1]),
    Case(_chain, {"q": 0.33, "clamp_max": 2.8, **_whole},
         [1, 1, 1], [1, 2, 3], [0, 2, 2.8], [1, -1, -1.8]),
]
BY_FRANK_WOLFE = [
    Case(L1FrankWolfe, _ball, [1, 1], [1, 2], None, [0, -1.8]),
    Case(L2FrankWolfe, _ball, [1, 1], [1, 2], None, [-0.8050, -1.6100]),
    Case(LinfFrankWolfe, _ball, [1, 1], [1, 2], None, [-1.8, -1.8]),
    Case(L1qFrankWolfe, {"q": 0.3, **_ball}, [1, 1, 1], [0, 1, 2], None, [0, -0.9, -0.9]),
]
# fmt: on


def _other():  # its own settings are none of the group's business
    return torch.ones(1, requires_grad=True)


def by_partials(case, x):
    """The chain as it is documented: settings in the partials of its members."""
    ours, lr = dict(case.settings), {"lr": 1.0}
    if case.make is not _chain:
        return case.make([x], **ours, **lr)
    members = (
        partial(TopQGradientOptimizer, q=ours.pop("q")),
        partial(ClampedGradientOptimizer, clamp_max=ours.pop("clamp_max")),
    )
    return ChainedParamTransformingOptimizer(*members, params=[x], **ours, **lr)


# All the ways by which an optimizer can get its settings, its parameters and its inner optimizer.
WAYS = {
    "keywords": by_partials,
    "defaults": lambda c, x: c.make(params=[x], defaults=c.settings, lr=1.0),
    "group": lambda c, x: c.make(params=[{"params": x, **c.settings}], lr=1.0),
    "partial": lambda c, x: c.make(params=[x], InnerOpt=partial(SGD, lr=1.0), defaults=c.settings),
    "instance": lambda c, x: c.make(params=None, InnerOpt=SGD([x], lr=1.0), defaults=c.settings),
    "instance's group": lambda c, x: c.make(
        params=None, InnerOpt=SGD([{"params": [x], **c.settings}], lr=1.0)
    ),
    "names": lambda c, x: c.make(params=[("x", x)], defaults=c.settings, lr=1.0),
    "generator": lambda c, x: c.make(params=(p for p in [x]), defaults=c.settings, lr=1.0),
}
WAYS_OF_FRANK_WOLFE = {
    "keywords": lambda c, x: c.make([x], **c.settings),
    "group": lambda c, x: c.make([{"params": x, **c.settings}]),
    "names": lambda c, x: c.make([("x", x)], **c.settings),
}


def added(case, x):
    """The group comes later, to an optimizer with other settings of its own."""
    others = {"epsilon": 9.0, "q": 0.9, "clamp_max": 9.0, "clamp_min": -9.0}
    of_case = {k: v for k, v in others.items() if k in case.settings}
    opt = case.make(params=[{"params": [_other()], **of_case, "param_ndim": 0}])
    lr = {} if (case in BY_FRANK_WOLFE) else {"lr": 1.0}
    opt.add_param_group({"params": [x], **case.settings, **lr})
    return opt


WAYS["added"] = WAYS_OF_FRANK_WOLFE["added"] = added


@pytest.mark.parametrize(
    ("case", "way"),
    [pytest.param(c, w, id=f"{c}-{n}") for c in BY_SGD for n, w in WAYS.items()]
    + [
        pytest.param(c, w, id=f"{c}-{n}")
        for c in BY_FRANK_WOLFE
        for n, w in WAYS_OF_FRANK_WOLFE.items()
    ],
)
def test_one_step(case, way):
    x = torch.tensor(case.x, dtype=torch.float32, requires_grad=True)
    opt = way(case, x)
    x.backward(gradient=torch.tensor(case.grad, dtype=torch.float32))
    assert opt.step() is None
    expected = partial(torch.tensor, dtype=torch.float32)
    digits = {"rtol": 0, "atol": 0.5e-4}  # the results are documented to four decimals
    if case.new_grad is not None:
        torch.testing.assert_close(x.grad, expected(case.new_grad), **digits)
        new_x = expected(case.x) - expected(case.new_grad)  # SGD with lr=1
        torch.testing.assert_close(x.detach(), new_x, **digits)
    if case.new_x is not None:
        torch.testing.assert_close(x.detach(), expected(case.new_x), **digits)
    if case.make is L2ProjectedOptim:
        assert x.detach().norm().item() == pytest.approx(0.8, rel=1e-6)


# --- classes --------------------------------------------------------------------------------------

_base = {ParamTransformingOptimizer}
BASES = {  # of each public class: the public classes that it is, besides itself
    FrankWolfe: set(),
    ParamTransformingOptimizer: set(),
    ClampedParameterOptimizer: _base,
    ClampedGradientOptimizer: _base,
    SignedGradientOptim: _base,
    L1NormedGradientOptim: _base,
    L2NormedGradientOptim: _base,
    L2ProjectedOptim: _base | {L2NormedGradientOptim},
    LinfProjectedOptim: _base | {SignedGradientOptim},
    TopQGradientOptimizer: _base,
    ChainedParamTransformingOptimizer: _base,
    L1qNormedGradientOptim: _base | {ChainedParamTransformingOptimizer},
    L1FrankWolfe: _base,
    L2FrankWolfe: _base | {L2NormedGradientOptim},
    LinfFrankWolfe: _base | {SignedGradientOptim},
    L1qFrankWolfe: _base | {L1qNormedGradientOptim, ChainedParamTransformingOptimizer},
}
CLASSES = list(BASES)

# What makes an instance of each class, from params=.
MAKE = {cls: cls for cls in CLASSES} | {
    ClampedParameterOptimizer: partial(ClampedParameterOptimizer, clamp_max=1.0),
    ClampedGradientOptimizer: partial(ClampedGradientOptimizer, clamp_max=1.0),
    L2ProjectedOptim: partial(L2ProjectedOptim, epsilon=1.0),
    LinfProjectedOptim: partial(LinfProjectedOptim, epsilon=1.0),
    TopQGradientOptimizer: partial(TopQGradientOptimizer, q=0.5),
    ChainedParamTransformingOptimizer: partial(
        ChainedParamTransformingOptimizer, SignedGradientOptim
    ),
    L1qNormedGradientOptim: partial(L1qNormedGradientOptim, q=0.5),
    L1FrankWolfe: partial(L1FrankWolfe, epsilon=1.0),
    L2FrankWolfe: partial(L2FrankWolfe, epsilon=1.0),
    LinfFrankWolfe: partial(LinfFrankWolfe, epsilon=1.0),
    L1qFrankWolfe: partial(L1qFrankWolfe, epsilon=1.0, q=0.5),
}

each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def test_the_sixteen_public_names():
    assert {cls.__name__ for cls in CLASSES} <= set(optim.__all__)
    assert len(CLASSES) == 16


@each_class
def test_class_relations(cls):
    opt = MAKE[cls](params=[torch.ones(2, requires_grad=True)])
    assert type(opt) is cls
    assert isinstance(opt, Optimizer)
    assert {other for other in CLASSES if isinstance(opt, other)} == BASES[cls] | {cls}
    assert {other for other in CLASSES if issubclass(cls, other)} == BASES[cls] | {cls}


@each_class
def test_the_normed_classes_show_their_order(cls):
    opt = MAKE[cls](params=[torch.ones(2, requires_grad=True)])
    if isinstance(opt, L1NormedGradientOptim):
        assert opt.p == cls.p == 1
    if isinstance(opt, L2NormedGradientOptim):
        assert opt.p == cls.p == 2


# --- signatures -----------------------------------------------------------------------------------

_TINY = torch.finfo(torch.float32).tiny
_DEFAULT = torch.default_generator


class _Signatures:
    """The documented signatures; a parameter without a default is required, here or per group."""

    # fmt: off
    def ParamTransformingOptimizer(self, params=None, InnerOpt=SGD, *, param_ndim=-1,
            grad_scale=1.0, grad_bias=0.0, defaults=None, **inner): ...
    def ClampedParameterOptimizer(self, params=None, InnerOpt=SGD, *, clamp_min=None,
            clamp_max=None, defaults=None, param_ndim=None, **inner): ...
    ClampedGradientOptimizer = ClampedParameterOptimizer
    def SignedGradientOptim(self, params=None, InnerOpt=SGD, *, grad_scale=1.0, grad_bias=0.0,
            defaults=None, param_ndim=None, **inner): ...
    def L1NormedGradientOptim(self, params=None, InnerOpt=SGD, *, param_ndim=-1, defaults=None,
            grad_scale=1.0, grad_bias=0.0, div_by_zero_eps=_TINY, **inner): ...
    L2NormedGradientOptim = L1NormedGradientOptim
    def L2ProjectedOptim(self, params=None, InnerOpt=SGD, *, epsilon, param_ndim=-1,
            grad_scale=1.0, grad_bias=0.0, defaults=None, div_by_zero_eps=_TINY, **inner): ...
    def LinfProjectedOptim(self, params=None, InnerOpt=SGD, *, epsilon, param_ndim=None,
            grad_scale=1.0, grad_bias=0.0, defaults=None, **inner): ...
    def TopQGradientOptimizer(self, params=None, InnerOpt=SGD, *, q, dq=0.0, param_ndim=-1,
            defaults=None, generator=_DEFAULT, **inner): ...
    def L1qNormedGradientOptim(self, params=None, InnerOpt=SGD, *, q, dq=0.0, param_ndim=-1,
            grad_scale=1.0, grad_bias=0.0, defaults=None, div_by_zero_eps=_TINY,
            generator=_DEFAULT, **inner): ...
    def ChainedParamTransformingOptimizer(self, *transforming_optimizers, params=None,
            InnerOpt=SGD, param_ndim=-1, grad_scale=1.0, grad_bias=0.0, defaults=None,
            **inner): ...
    def FrankWolfe(self, params, *, lr=2.0, lmo_scaling_factor=1.0, use_default_lr_schedule=True,
            div_by_zero_eps=_TINY): ...
    def L1FrankWolfe(self, params, *, epsilon, lr=2.0, use_default_lr_schedule=True,
            param_ndim=-1, div_by_zero_eps=_TINY): ...
    L2FrankWolfe = LinfFrankWolfe = L1FrankWolfe
    def L1qFrankWolfe(self, params, *, q, epsilon, dq=0.0, lr=2.0, use_default_lr_schedule=True,
            param_ndim=-1, div_by_zero_eps=_TINY, generator=_DEFAULT): ...
    # fmt: on


# What has come to the documented classes since, with defaults that change nothing.
_ADDED = {
    FrankWolfe: {
        "constraint": None,
        "param_ndim": -1,
        "smoothness": None,
        "line_search": False,
        "initial_step": 0,
        "momentum": 0.0,
    }
}

# Wherever there is an inner optimizer, these are welcome too.
_COMMON = {"grad_scale": 1.0, "grad_bias": 0.0}


@each_class
def test_signature(cls):
    documented = inspect.signature(getattr(_Signatures, cls.__name__)).parameters
    actual = inspect.signature(cls.__init__).parameters
    has_inner = "inner" in documented

    of_kind = {
        kind: [(p.name, p.default) for p in actual.values() if p.kind is kind]
        for kind in {p.kind for p in [*actual.values(), *documented.values()]}
    }
    # positions, keyword-only-ness, order and names; tunnels have a name of their own
    keywords = []
    for name, p in documented.items():
        if p.kind is p.VAR_KEYWORD:
            assert len(of_kind[p.kind]) == 1
        elif p.kind is p.KEYWORD_ONLY:
            keywords.append(name)
        else:
            assert list(actual).index(name) == list(documented).index(name)
            assert actual[name].kind is p.kind
            assert actual[name].default is p.default
    kw_only = dict(of_kind[inspect.Parameter.KEYWORD_ONLY])
    assert [name for name in kw_only if name in documented] == keywords
    more = {name: kw_only[name] for name in kw_only if name not in documented}
    welcome = {k: _COMMON[k] for k in _COMMON if k not in documented} if has_inner else {}
    assert more == welcome | _ADDED.get(cls, {})
    tunnels = [p for p in actual.values() if p.kind is p.VAR_KEYWORD]
    assert len(tunnels) == has_inner

    x = torch.ones(2, requires_grad=True)
    for name in keywords:
        default = documented[name].default
        if default is inspect.Parameter.empty:
            without = {k: v for k, v in MAKE[cls].keywords.items() if k != name}
            with pytest.raises(TypeError, match=f"`{name}` must be given"):
                cls(params=[x], **without)
        else:
            assert actual[name].default is default or actual[name].default == default
            assert type(actual[name].default) is type(default)


# --- representations ------------------------------------------------------------------------------


def test_repr():
    x = torch.ones(2, requires_grad=True)
    opt = ClampedParameterOptimizer([x], FrankWolfe, clamp_max=3.0, lr=1.0)
    opt.add_param_group({"params": [torch.ones(1, requires_grad=True)], "clamp_min": -1})
    assert repr(opt) == (
        """\
ClampedParameterOptimizer [FrankWolfe](
Parameter Group 0
    clamp_max: 3.0
    clamp_min: None
    constraint: None
    differentiable: False
    div_by_zero_eps: 1.1754943508222875e-38
    grad_bias: 0.0
    grad_scale: 1.0
    initial_step: 0
    line_search: False
    lmo_scaling_factor: 1.0
    lr: 1.0
    momentum: 0.0
    param_ndim: None
    smoothness: None
    use_default_lr_schedule: True

Parameter Group 1
    clamp_max: 3.0
    clamp_min: -1
    constraint: None
    differentiable: False
    div_by_zero_eps: 1.1754943508222875e-38
    grad_bias: 0.0
    grad_scale: 1.0
    initial_step: 0
    line_search: False
    lmo_scaling_factor: 1.0
    lr: 1.0
    momentum: 0.0
    param_ndim: None
    smoothness: None
    use_default_lr_schedule: True
)"""
    )


@each_class
@pytest.mark.parametrize("inner", [SGD, Adam], ids=["SGD", "Adam"])
def test_repr_names_both_and_shows_groups_as_torch_does(cls, inner):
    x = torch.ones(2, requires_grad=True)
    if cls is FrankWolfe:
        assert repr(cls([x])).startswith("FrankWolfe (\nParameter Group 0\n")
        return
    if "InnerOpt" in inspect.signature(cls).parameters:
        opt = MAKE[cls](params=[x], InnerOpt=inner)
    else:
        opt, inner = MAKE[cls](params=[x]), FrankWolfe
    name = "SignedGradientOptim" if cls is ChainedParamTransformingOptimizer else cls.__name__
    groups = repr(opt.inner_opt).removeprefix(f"{inner.__name__} ")
    assert groups.startswith("(\nParameter Group 0\n")
    assert repr(opt) == f"{name} [{inner.__name__}]{groups}"


def test_repr_of_a_chain_is_a_composition():
    x = torch.ones(2, requires_grad=True)
    members = (partial(TopQGradientOptimizer, q=0.5), SignedGradientOptim, L1NormedGradientOptim)
    opt = ChainedParamTransformingOptimizer(*members, params=[x], InnerOpt=Adam)
    composition = "L1NormedGradientOptim ○ SignedGradientOptim ○ TopQGradientOptimizer [Adam](\n"
    assert repr(opt).startswith(composition)
