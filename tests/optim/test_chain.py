"""Chains: what their members do one after the other, with settings that do not get mixed up."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from files import through_a_file
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    L1NormedGradientOptim,
    L1qNormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

Chain = ChainedParamTransformingOptimizer


class Shifted(ParamTransformingOptimizer):
    """A user's: both hooks for a tensor, and a setting."""

    def __init__(self, params=None, InnerOpt=SGD, *, shift=0.25, defaults=None, **kw):
        defaults = {} if defaults is None else defaults
        defaults.setdefault("shift", shift)
        super().__init__(params, InnerOpt, defaults=defaults, **kw)

    def _pre_step_transform_(self, param, optim_group):
        param.grad += optim_group["shift"]

    def _post_step_transform_(self, param, **kwargs):
        param -= kwargs["optim_group"]["shift"]


class RowMaximum(ParamTransformingOptimizer):
    """A user's, for which it matters how tensors are seen: divides by the largest of a row."""

    def _pre_step_transform_(self, param, optim_group):
        rows = param.grad.flatten(1)
        rows /= rows.abs().amax(dim=1, keepdim=True)


MEMBERS = {
    "top-q": partial(TopQGradientOptimizer, q=0.4),
    "sign": SignedGradientOptim,
    "L1": L1NormedGradientOptim,
    "L2": partial(L2NormedGradientOptim, grad_scale=3.0, grad_bias=-0.125),
    "clamp gradient": partial(ClampedGradientOptimizer, clamp_min=-0.5, clamp_max=0.75),
    "clamp parameter": partial(ClampedParameterOptimizer, clamp_min=-1.5, clamp_max=1.0),
    "L2 ball": partial(L2ProjectedOptim, epsilon=1.25),
    "Linf ball": partial(LinfProjectedOptim, epsilon=0.75),
    "shift": partial(Shifted, shift=0.5),
    "row maximum": RowMaximum,
}


def one_by_one(members, params, **kwargs):
    """The slow and obvious chain: each member's own optimizer, called on its own."""
    transforming = [member(params=params, lr=0.0, **kwargs) for member in members]

    def step():
        before = [p.detach().clone() for p in params]
        for opt in transforming:  # with lr=0 they leave the parameters to their projections
            opt.step()
        with torch.no_grad():
            for param, start in zip(params, before, strict=True):
                param.copy_(start)
                param.add_(param.grad, alpha=-1.0)
        grads = [p.grad for p in params]
        for param in params:
            param.grad = None
        for opt in transforming:  # without gradients they project only
            opt.step()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    return step


PAIRS = list(itertools.permutations(MEMBERS, 2))
LONGER = [
    ("top-q", "sign", "L1"),
    ("clamp gradient", "clamp parameter", "L2 ball", "Linf ball"),
    ("shift", "clamp gradient", "shift", "clamp gradient", "clamp parameter", "shift"),
    tuple(MEMBERS),
    tuple(reversed(MEMBERS)),
]


@pytest.mark.parametrize("param_ndim", [None, 1])
@pytest.mark.parametrize("names", PAIRS + LONGER, ids=" then ".join)
def test_a_chain_is_its_members_from_left_to_right(names, param_ndim):
    members = [MEMBERS[name] for name in names]
    runs = []
    for make in (Chain, one_by_one):
        params = tensors((3, 4), (5,), (2, 2, 3))
        if make is Chain:
            step = Chain(*members, params=params, param_ndim=param_ndim, lr=1.0).step
        else:
            step = one_by_one(members, params, param_ndim=param_ndim)
        for number in range(2):
            new_gradients(params, number)
            step()
        runs.append([p.detach() for p in params] + [p.grad for p in params])
    assert same_bits(*runs)


def test_scale_and_bias_of_the_chain_come_last():
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    own = partial(SignedGradientOptim, grad_scale=2.0, grad_bias=1.0)
    bounded = partial(ClampedGradientOptimizer, clamp_max=2.0)
    opt = Chain(own, bounded, params=[x], grad_scale=8.0, grad_bias=0.5)
    x.grad = torch.tensor([3.0, -4.0])
    opt.step()
    assert x.grad.tolist() == [2.0 * 8 + 0.5, -1.0 * 8 + 0.5]


def test_param_ndim_of_a_member_counts_for_that_member():
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
    x = torch.zeros(2, 3, requires_grad=True)
    opt = Chain(
        partial(TopQGradientOptimizer, q=1 / 3, param_ndim=1),
        partial(RowMaximum, param_ndim=None),
        L1NormedGradientOptim,
        params=[x],
        param_ndim=0,
    )
    x.grad = grad.clone()
    opt.step()
    assert x.grad.tolist() == [[0, 1, 1], [0, 1, 1]]
    opt.param_groups[0].update({"0.param_ndim": None, "1.param_ndim": 1, "param_ndim": 1})
    x.grad = grad.clone()
    opt.step()  # of all six the four largest, then rows
    expected = torch.tensor([[0, 0, 1.0], [4 / 18, 5 / 18, 9 / 18]])
    torch.testing.assert_close(x.grad, expected)


# --- names of settings ----------------------------------------------------------------------------

clamp_both = partial(
    Chain,
    partial(ClampedGradientOptimizer, clamp_min=-1.0, clamp_max=2.0),
    partial(ClampedParameterOptimizer, clamp_min=-8.0, clamp_max=16.0),
)
three = partial(  # one member of which has names to itself
    Chain,
    partial(TopQGradientOptimizer, q=0.5),
    partial(ClampedGradientOptimizer, clamp_max=2.0),
    partial(ClampedParameterOptimizer, clamp_max=16.0),
)


def _one(**settings):
    x = torch.full((2,), 32.0, requires_grad=True)
    x.grad = torch.full((2,), 64.0)
    return x, {"params": [x], **settings}


def test_equal_names_do_not_overwrite_each_other():
    x, group = _one()
    opt = clamp_both(params=[group], lr=1.0)
    opt.step()
    assert x.grad.tolist() == [2.0, 2.0]
    assert x.tolist() == [16.0, 16.0]
    x.grad = torch.full((2,), -64.0)
    opt.param_groups[0]["lr"] = 64.0
    opt.step()
    assert x.grad.tolist() == [-1.0, -1.0]
    assert x.tolist() == [16.0, 16.0]


def test_groups_and_schedules_speak_to_one_member():
    (x, first), (y, second) = _one(**{"0.clamp_max": 4.0}), _one(**{"1.clamp_max": 1.0})
    z, third = _one(**{"0.clamp_max": 8.0, "1.clamp_max": 2.0})
    opt = clamp_both(params=[first, second], lr=1.0)
    opt.add_param_group(third)
    opt.step()
    assert [t.grad[0].item() for t in (x, y, z)] == [4.0, 2.0, 8.0]
    assert [t[0].item() for t in (x, y, z)] == [16.0, 1.0, 2.0]
    for group in opt.param_groups:
        group.update({"lr": 0.0, "1.clamp_max": group["1.clamp_max"] / 2})
    opt.step()
    assert [t[0].item() for t in (x, y, z)] == [8.0, 0.5, 1.0]
    # what others read and schedule is there by the same names
    assert [group["1.clamp_max"] for group in opt.param_groups] == [8.0, 0.5, 1.0]
    assert opt.defaults["1.clamp_max"] == 16.0


@pytest.mark.parametrize("name", ["q", "0.q"])
@pytest.mark.parametrize("way", ["group", "add_param_group", "defaults", "param_groups"])
def test_a_name_that_one_member_has_needs_no_number(name, way):
    x, group = _one()
    if way == "group":
        opt = three(params=[{**group, name: 1.0}])
    elif way == "defaults":
        opt = three(params=[group], defaults={name: 1.0})
    elif way == "add_param_group":
        opt = three(params=[_one()[1]])
        opt.add_param_group({**group, name: 1.0})
    else:
        opt = three(params=[group])
        bare = {k: v for k, v in opt.param_groups[0].items() if k != "q"}
        opt.param_groups = [{**bare, name: 1.0}]
    assert opt.param_groups[-1]["q"] == 1.0
    opt.step()
    assert x.grad.tolist() == [0.0, 0.0]


def test_unnumbered_names_that_several_have_are_refused():
    x, group = _one(clamp_max=1.0)
    start = copy.deepcopy(x)
    message = "`clamp_max` must be spelled as one of 1.clamp_max, 2.clamp_max, .* got clamp_max=1.0"
    for make in (
        lambda: three(params=[group]),
        lambda: three(params=[x], defaults={"clamp_max": 1.0}),
        lambda: three(params=[_one()[1]]).add_param_group(group),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert group.keys() == {"params", "clamp_max"}
    assert torch.equal(x, start)


@pytest.mark.parametrize(
    "settings",
    [
        {"7.q": 0.5},  # there is no such member
        {"1.q": 0.5},  # that member has no such setting
        {"0.grad_scale": 2.0},  # that member leaves it to the chain
        {"0.param_ndim": 0},
        {"q": 0.25, "0.q": 0.75},  # two values for one setting
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["group", "add_param_group", "defaults"])
def test_numbered_names_are_not_ignored(settings, way):
    """They mean a setting of a member: there is none, so that the value would have no effect."""
    group, other = _one()[1], _one()[1]
    with pytest.raises((TypeError, ValueError), match=next(reversed(settings))):
        if way == "group":
            three(params=[{**group, **settings}])
        elif way == "defaults":
            three(params=[group], defaults=settings)
        else:
            three(params=[other]).add_param_group({**group, **settings})


def test_grad_scale_and_param_ndim_without_a_number_are_those_of_the_chain():
    own = partial(SignedGradientOptim, grad_scale=2.0, param_ndim=0)
    (x, first), (y, second) = _one(), _one(grad_scale=8.0, **{"0.grad_scale": 4.0})
    opt = Chain(own, ClampedGradientOptimizer, params=[first, second], defaults={"clamp_max": 3.0})
    opt.step()
    assert [t.grad[0].item() for t in (x, y)] == [2.0, 3.0 * 8.0]
    assert [group["0.param_ndim"] for group in opt.param_groups] == [0, 0]
    assert [group["param_ndim"] for group in opt.param_groups] == [-1, -1]


@pytest.mark.parametrize("given", ["class", "instance"])
def test_a_setting_of_the_inner_optimizer_stays_its_own(given):
    """Also if several members have one of that name: without a number it is the inner's."""
    x, group = _one()
    tiny = torch.finfo(torch.float32).tiny
    inner = {"params": [group], "InnerOpt": FrankWolfe}
    opt = Chain(
        partial(L2NormedGradientOptim, div_by_zero_eps=0.5),
        partial(L1NormedGradientOptim, div_by_zero_eps=0.25),
        **(inner if given == "class" else {"InnerOpt": FrankWolfe([x])}),
    )
    for _ in range(2):
        names = {k: v for k, v in opt.param_groups[0].items() if "div_by_zero_eps" in k}
        assert names.pop("div_by_zero_eps") == tiny
        assert names == {"0.div_by_zero_eps": 0.5, "1.div_by_zero_eps": 0.25}
        opt.load_state_dict(opt.state_dict())
        opt.param_groups = opt.param_groups


def test_settings_of_the_users_classes():
    (x, first), (y, second) = _one(), _one(**{"1.shift": 4.0})
    opt = Chain(partial(Shifted, shift=1.0), Shifted, params=[first, second], lr=1.0)
    opt.step()
    assert [t.grad[0].item() for t in (x, y)] == [64 + 1 + 0.25, 64 + 1 + 4.0]
    assert x[0].item() == 32 - 65.25 - 1.25


class Counted(ParamTransformingOptimizer):
    """A user's: it writes to its group, and looks at what an optimizer has."""

    def __init__(self, params=None, InnerOpt=SGD, *, defaults=None, **kw):
        super().__init__(params, InnerOpt, defaults={"calls": 0, **(defaults or {})}, **kw)

    def _pre_step_transform_(self, param, optim_group):
        optim_group["calls"] += 1
        self.found = (self.state, self.param_groups, optim_group["grad_scale"])


def test_a_hook_of_a_member_has_a_group_to_write_to_and_the_inner_optimizer():
    x, group = _one()
    inner = partial(Chain, Counted, partial(Counted, grad_scale=4.0))
    opt = Chain(Counted, inner, params=[group], InnerOpt=Adam, grad_scale=2.0)
    for step in range(1, 3):
        opt.step()
        names = {k: v for k, v in opt.param_groups[0].items() if k.endswith("calls")}
        assert names == {"0.calls": step, "1.0.calls": step, "1.1.calls": step}
    assert x.grad.tolist() == [64.0 * 8**2] * 2
    found = [hook.owner.found for hook in opt._before if hasattr(hook, "owner")]
    assert [scale for *_, scale in found] == [1.0, 1.0, 4.0]
    assert all(state is opt.state and groups is opt.param_groups for state, groups, _ in found)
    assert not any(vars(hook.owner).get("inner_opt") for hook in opt._before[:2])


# --- nested chains --------------------------------------------------------------------------------

# Each sets every entry, or none, of large gradients and parameters: none may stand for another.
_clamps = [partial(ClampedGradientOptimizer, clamp_max=-high) for high in (2.0, 4.0, 8.0)]
_boxes = [partial(ClampedParameterOptimizer, clamp_max=-high) for high in (16.0, 32.0)]
_scaled = partial(Chain, _clamps[1], SignedGradientOptim, grad_scale=4.0, grad_bias=1.0)
NESTED = {  # each equals the chain of the members in a row
    "inside": (
        [partial(Chain, MEMBERS["top-q"], SignedGradientOptim), L1NormedGradientOptim],
        [MEMBERS["top-q"], SignedGradientOptim, L1NormedGradientOptim],
    ),
    "names within": (
        [SignedGradientOptim, partial(Chain, _clamps[0], _boxes[0])],
        [SignedGradientOptim, _clamps[0], _boxes[0]],
    ),
    "names within and after": (
        [partial(Chain, _clamps[1], _boxes[1]), _clamps[0]],
        [_clamps[1], _boxes[1], _clamps[0]],
    ),
    "names within and before": (
        [_clamps[1], _boxes[1], partial(Chain, _clamps[0], _boxes[0])],
        [_clamps[1], _boxes[1], _clamps[0], _boxes[0]],
    ),
    "names in both": (
        [partial(Chain, _clamps[1], _boxes[1]), partial(Chain, _clamps[0], _boxes[0])],
        [_clamps[1], _boxes[1], _clamps[0], _boxes[0]],
    ),
    "three deep": (
        [_clamps[2], partial(Chain, _boxes[1], partial(Chain, _clamps[1], _boxes[0])), _clamps[0]],
        [_clamps[2], _boxes[1], _clamps[1], _boxes[0], _clamps[0]],
    ),
    "param_ndim within and before": (
        [
            partial(L1NormedGradientOptim, param_ndim=None),
            partial(Chain, partial(TopQGradientOptimizer, q=0.4, param_ndim=0), RowMaximum),
        ],
        [
            partial(L1NormedGradientOptim, param_ndim=None),
            partial(TopQGradientOptimizer, q=0.4, param_ndim=0),
            RowMaximum,
        ],
    ),
    "grad_scale within and before": (
        [
            partial(SignedGradientOptim, grad_scale=4.0),
            partial(Chain, partial(Shifted, grad_scale=0.5), _clamps[0]),
        ],
        [
            partial(SignedGradientOptim, grad_scale=4.0),
            partial(Shifted, grad_scale=0.5),
            _clamps[0],
        ],
    ),
    "users' classes": (
        [Shifted, partial(Chain, partial(Shifted, shift=2.0), RowMaximum)],
        [Shifted, partial(Shifted, shift=2.0), RowMaximum],
    ),
    "scale of the inner chain": (
        [_scaled, Shifted],
        [_clamps[1], partial(SignedGradientOptim, grad_scale=4.0, grad_bias=1.0), Shifted],
    ),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_nested_chain_is_the_chain_of_all(case):
    runs = []
    for members in NESTED[case]:
        params = tensors((3, 4), (2, 3))
        opt = Chain(*members, params=params, param_ndim=1, lr=1.0)
        for step in range(2):
            new_gradients(params, step)
            opt.step()
        runs.append([p.detach() for p in params] + [p.grad for p in params])
    assert same_bits(*runs)


def test_settings_of_a_nested_chain_have_a_name_each():
    x, group = _one()
    opt = Chain(*NESTED["names within and before"][0], params=[group], lr=1.0)
    high = [name for name in opt.param_groups[0] if name.endswith("clamp_max")]
    assert sorted(opt.param_groups[0][name] for name in high) == [-32.0, -16.0, -4.0, -2.0]
    assert "clamp_max" not in high  # whose would it be?
    # a group that is given as it is shown does what it shows
    y, _ = _one()
    opt.add_param_group({**opt.param_groups[0], "params": [y]})
    assert {n: opt.param_groups[1][n] for n in high} == {n: opt.param_groups[0][n] for n in high}
    opt.step()
    assert torch.equal(x, y)


# --- subclasses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, 1, 2, -1], ids=lambda k: f"chain {k}")
@pytest.mark.parametrize("own", [None, 0, 1, 2, -1, -2], ids=lambda k: f"member {k}")
def test_a_subclass_that_calls_super_is_the_chain(whole, own):
    """Or refuses: in the view that the chain's hook gets, a member's own one may not exist."""

    class Subclass(Chain):
        def _pre_step_transform_(self, param, optim_group):
            super()._pre_step_transform_(param, optim_group)

        def _post_step_transform_(self, param, optim_group):
            super()._post_step_transform_(param, optim_group)

    members = (
        partial(L1NormedGradientOptim, param_ndim=own),
        partial(L2ProjectedOptim, epsilon=0.5, param_ndim=own),
        partial(RowMaximum, param_ndim=own),
    )
    runs = []
    for cls in (Chain, Subclass):
        params = tensors((2, 3, 4))
        try:
            opt = cls(*members, params=params, param_ndim=whole, lr=1.0)
        except ValueError as error:
            assert "param_ndim" in str(error)
            assert cls is Subclass and own != whole
            return
        opt.step()
        runs.append([params[0].detach(), params[0].grad])
    # sums over other shapes may differ in float64's last place, so in one of float32
    torch.testing.assert_close(*runs, rtol=2**-22, atol=0)


def test_a_named_chain_as_a_member():
    """A class of chains, as users write them, is a member like any other."""

    class Mine(Chain):
        def __init__(self, params=None, InnerOpt=SGD, *, high=2.0, **kw):
            clamp = partial(ClampedGradientOptimizer, clamp_max=high)
            super().__init__(SignedGradientOptim, clamp, params=params, InnerOpt=InnerOpt, **kw)

    x, group = _one()
    opt = Chain(partial(Mine, high=0.5), params=[group], lr=1.0)
    opt.step()
    assert x.grad.tolist() == [0.5, 0.5]
    assert repr(opt).startswith("Mine [SGD](")
    assert Mine([x]).param_groups[0]["clamp_max"] == 2.0


# --- inner optimizer, state, copies ---------------------------------------------------------------


def _random_chain(params, InnerOpt=SGD, seed=5, **kwargs):
    return Chain(
        partial(
            TopQGradientOptimizer, q=0.5, dq=0.5, generator=torch.Generator().manual_seed(seed)
        ),
        Shifted,
        partial(TopQGradientOptimizer, q=0.3, dq=0.3, generator=torch.Generator().manual_seed(9)),
        partial(ClampedGradientOptimizer, clamp_max=0.5),
        partial(ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=0.75),
        params=params,
        InnerOpt=InnerOpt,
        **kwargs,
    )


def _saved_and_loaded(opt):
    params = [p.detach().clone().requires_grad_() for p in opt.param_groups[0]["params"]]
    other = _random_chain(params, Adam, seed=77, lr=0.5, param_ndim=None)
    other.load_state_dict(through_a_file(opt.state_dict()))
    return other


COPIES = {
    "state_dict": _saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_and_checkpoints_go_on_as_the_chain_does(copied):
    params = tensors((3, 4), (6,))
    opt = _random_chain(params, Adam, lr=0.1)
    for step in range(2):
        new_gradients(params, step)
        opt.step()
        opt.param_groups[0]["4.clamp_max"] *= 0.5
    other = copied(opt)
    theirs = other.param_groups[0]["params"]
    assert not set(theirs) & set(params)
    for step in range(2, 5):
        new_gradients(params, step)
        new_gradients(theirs, step)
        opt.step()
        other.step()
    assert same_bits(snapshot(params, opt), snapshot(theirs, other))
    assert other.param_groups[0]["4.clamp_max"] == 0.75 / 4
    assert repr(other) == repr(opt)


def test_groups_of_a_chain_with_generators_are_taken_again():
    (x,), (y,) = tensors(6), tensors(4)
    opt = _random_chain([x])
    opt.param_groups = opt.param_groups
    opt.add_param_group({**opt.param_groups[0], "params": [y]})
    opt.step()
    assert [group["0.generator_state"] for group in opt.param_groups] == [None, None]


def test_a_checkpoint_of_the_bare_inner_optimizer():
    params = tensors((3, 4))
    bare = AdamW(params, lr=0.25)
    bare.step()
    opt = three(params=params, InnerOpt=AdamW, lr=0.5)
    opt.load_state_dict(bare.state_dict())
    assert opt.param_groups[0]["lr"] == 0.25
    assert opt.param_groups[0]["2.clamp_max"] == 16.0
    assert same_bits(opt.state[params[0]], bare.state[params[0]])


@pytest.mark.parametrize(
    "inner",
    [SGD, partial(SGD, lr=0.5), Adam, "instance"],
    ids=["class", "partial", "Adam", "instance"],
)
def test_one_inner_optimizer_steps_for_all_members(inner):
    x, y = _one()[0], _one()[0]
    if inner == "instance":
        opt, bare = three(InnerOpt=SGD([x], momentum=0.5), param_ndim=None), SGD([y], momentum=0.5)
    else:
        opt, bare = three(params=[x], InnerOpt=inner, param_ndim=None), inner([y])
    y.grad = torch.tensor([0.0, 2.0])  # of two equal ones top-q keeps one
    opt.step()
    bare.step()
    assert sorted(x.grad.tolist()) == [0.0, 2.0]
    assert sorted(x.tolist()) == sorted(y.clamp(max=16).tolist())
    assert opt.state is opt.inner_opt.state
    assert opt.param_groups is opt.inner_opt.param_groups


def test_schedulers():
    x, group = _one()
    opt = clamp_both(params=[group], lr=1.0)
    scheduler = lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for _ in range(3):
        opt.step()
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.125


def test_closures():
    x = torch.tensor([1.0, -4.0], requires_grad=True)
    opt = Chain(
        SignedGradientOptim,
        partial(ClampedParameterOptimizer, clamp_max=1.0),
        params=[x],
        InnerOpt=torch.optim.LBFGS,
        max_iter=1,
    )

    def closure():
        opt.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 17.0
    assert x.grad.tolist() == [1.0, -1.0]
    assert x[0].item() == 0.5


def test_sparse_gradients_where_all_members_keep_zeros():
    index = torch.tensor([[0, 2, 0]])
    x = torch.zeros(3, 2, requires_grad=True)
    values = torch.full((3, 2), 2.0)  # one row comes twice
    x.grad = torch.sparse_coo_tensor(index, values, (3, 2), check_invariants=True)
    elementwise = (SignedGradientOptim, partial(ClampedGradientOptimizer, clamp_max=0.5))
    Chain(*elementwise, params=[("w", x)], lr=1.0).step()
    assert x.tolist() == [[-0.5, -0.5], [0, 0], [-0.5, -0.5]]
    for member in (
        L1NormedGradientOptim,
        Shifted,
        partial(SignedGradientOptim, grad_bias=1.0),
        partial(Chain, L1NormedGradientOptim),
        partial(Chain, SignedGradientOptim, grad_bias=1.0),
    ):
        with pytest.raises(ValueError, match="parameter 'w'"):
            Chain(SignedGradientOptim, member, params=[("w", x)]).step()


# --- L1q ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dq", [0.0, 0.3])
@pytest.mark.parametrize("param_ndim", [None, -1, 0, 1])
def test_l1q_is_the_chain_spelled_by_hand(param_ndim, dq):
    runs = []
    for by_hand in (False, True):
        params = tensors((3, 4), (5,))
        more = {"param_ndim": param_ndim, "grad_scale": 2.0, "grad_bias": 0.5, "lr": 0.1}
        top = {"q": 0.4, "dq": dq, "generator": torch.Generator().manual_seed(3)}
        if by_hand:
            top_q = partial(TopQGradientOptimizer, **top)
            l1 = partial(L1NormedGradientOptim, div_by_zero_eps=1e-3)
            opt = Chain(top_q, SignedGradientOptim, l1, params=params, InnerOpt=Adam, **more)
        else:
            opt = L1qNormedGradientOptim(params, Adam, **top, div_by_zero_eps=1e-3, **more)
        for step in range(4):
            new_gradients(params, step)
            opt.step()
        runs.append(snapshot(params, opt))
    assert same_bits(*runs)


# --- what a chain refuses -------------------------------------------------------------------------

(_x,) = tensors(2)
REFUSED = {
    "no member": ((), ValueError, "`transforming_optimizers` must not be empty"),
    "instance": ((SignedGradientOptim([_x]),), TypeError, "`transforming_optimizers` must be "),
    "partial function": ((partial(print),), TypeError, "`transforming_optimizers` must be .*print"),
    "inner optimizer": ((SGD,), TypeError, "`transforming_optimizers` must be .* got <class"),
    "Frank-Wolfe": ((FrankWolfe,), TypeError, "`transforming_optimizers` must be "),
    "Frank-Wolfe on a ball": ((partial(L1FrankWolfe, epsilon=1.0),), TypeError, "L1FrankWolfe"),
    "parameters": (([_x], SignedGradientOptim), TypeError, "`transforming_optimizers` must be "),
    "function": ((lambda **kw: None,), TypeError, "`transforming_optimizers` must be "),
    "its own params": ((partial(SignedGradientOptim, params=[_x]),), TypeError, "`params` must be"),
    "its own inner": ((partial(SignedGradientOptim, InnerOpt=Adam),), TypeError, "`InnerOpt` must"),
    "its own lr": ((partial(SignedGradientOptim, lr=1.0),), TypeError, "`lr` must "),
    "bad setting": ((partial(TopQGradientOptimizer, q=7),), ValueError, r"`q` must be in \[0, 1\]"),
    "bad setting of two": (
        (_clamps[0], partial(ClampedParameterOptimizer, clamp_min=3, clamp_max=1)),
        ValueError,
        "clamp_min` must be <= ",
    ),
    "bad type of a member's scale": (
        (partial(SignedGradientOptim, grad_scale="2"),),
        TypeError,
        "grad_scale` must be a number, got '2'",
    ),
    "bad param_ndim of a member": (
        (partial(L1NormedGradientOptim, param_ndim=3),),
        ValueError,
        "`param_ndim` must be None or lie in .* got 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    members, error, message = REFUSED[case]
    grad, start = _x.grad.clone(), _x.detach().clone()
    with pytest.raises(error, match=message):
        Chain(*members, params=[_x])
    assert torch.equal(_x.grad, grad)
    assert torch.equal(_x.detach(), start)


def test_repr_is_the_composition():
    opt = Chain(*NESTED["names within"][0], params=[_x], InnerOpt=Adam)
    composition = (
        "ClampedParameterOptimizer ○ ClampedGradientOptimizer ○ SignedGradientOptim [Adam]("
    )
    assert repr(opt).startswith(composition)
    assert repr(three(params=[_x])).splitlines()[0].count("○") == 2
