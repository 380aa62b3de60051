"""What a wrapper remembers is the inner optimizer's own, whatever happens to either of them."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from bitwise import same_bits
from engine_cases import FRANK_WOLFE, WITH_INNER, WRAPPERS, new_gradients, tensors
from files import through_a_file
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler

from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    ParamTransformingOptimizer,
    TopQGradientOptimizer,
)
from rai_toolbox.optim.settings import as_saved
from rai_toolbox.optim.transforms import TopQ

by_name = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
by_name_with_inner = pytest.mark.parametrize("make", WITH_INNER.values(), ids=WITH_INNER.keys())

# Frank-Wolfe's named optimizers have their inner one built in.
STATEFUL = FRANK_WOLFE | {
    f"{name}-{inner.__name__}": partial(make, InnerOpt=inner, **kwargs)
    for name, make in WITH_INNER.items()
    for inner, kwargs in [(SGD, {"momentum": 0.9}), (Adam, {})]
}
stateful = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())

SHAPES = (3, 2), (2, 2)


def parameters(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def run(opt, first, last):
    for k in range(first, last):
        new_gradients(parameters(opt), k)
        opt.step()


def same(ours, theirs):
    return all(map(torch.equal, parameters(ours), parameters(theirs)))


def is_one(opt):
    inner = opt.inner_opt
    return (
        opt.state is inner.state
        and opt.param_groups is inner.param_groups
        and opt.defaults is inner.defaults
    )


def snapshot(opt):
    """All that a refused change must leave alone: the objects, and what is in them."""
    objects = [id(x) for x in (opt.inner_opt, opt.state, opt.param_groups, opt.defaults)]
    return repr((objects, opt.param_groups, dict(opt.state), opt.defaults))


# --- wrapper and inner stay one ----------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "pickle, protocol 2": lambda opt: pickle.loads(pickle.dumps(opt, protocol=2)),
    "torch.save": partial(through_a_file, weights_only=False),
    "deepcopy of a pickle": lambda opt: copy.deepcopy(pickle.loads(pickle.dumps(opt))),
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
DEEP = {name: copied for name, copied in COPIES.items() if copied is not copy.copy}
deep_copies = pytest.mark.parametrize("copied", DEEP.values(), ids=DEEP.keys())


@stateful
@copies
def test_a_copy_is_one_with_its_inner_and_goes_on_alike(make, copied):
    opt = make(tensors(*SHAPES), lr=0.3)
    run(opt, 0, 2)
    reference = make(tensors(*SHAPES), lr=0.3)
    run(reference, 0, 5)
    other = copied(opt)
    assert type(other) is type(opt)
    assert is_one(other) and is_one(opt)
    assert other.inner_opt is not opt.inner_opt
    assert repr(other) == repr(opt)
    run(other, 2, 5)
    assert same(other, reference)
    assert is_one(other)
    if copied is not copy.copy:  # which shares the parameters, as it does of any optimizer
        assert not same(other, opt)
        run(opt, 2, 5)
        assert same(opt, reference)


@stateful
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(make, weights_only):
    opt = make(tensors(*SHAPES), lr=0.3)
    run(opt, 0, 2)
    saved = through_a_file(
        {"params": [p.detach() for p in parameters(opt)], "opt": opt.state_dict()},
        weights_only=weights_only,
    )
    resumed = make([p.requires_grad_() for p in saved["params"]], lr=0.3)
    resumed.load_state_dict(saved["opt"])
    assert is_one(resumed)
    run(opt, 2, 5)
    run(resumed, 2, 5)
    assert same(opt, resumed)


def test_a_copy_beside_its_model_has_the_parameters_of_the_model():
    model = torch.nn.Linear(3, 2)
    opt = L2ProjectedOptim(model.named_parameters(), epsilon=1.0)
    for copied in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        new_model, new_opt = copied
        assert [id(p) for p in parameters(new_opt)] == [id(p) for p in new_model.parameters()]
        assert new_opt.param_groups[0]["param_names"] == ["weight", "bias"]


@by_name
def test_rebinding_goes_through_to_the_inner(make):
    # As Accelerate does, when it has moved parameters.
    old, new = tensors(*SHAPES), tensors(*SHAPES, seed=1)
    opt = make(old, lr=0.3)
    state, groups, defaults = type(opt.state)(dict), copy.copy(opt.param_groups), {**opt.defaults}
    groups[0] = {**groups[0], "params": new}
    opt.state, opt.param_groups, opt.defaults = state, groups, defaults
    assert opt.state is state and opt.param_groups is groups and opt.defaults is defaults
    assert is_one(opt)
    before = [p.detach().clone() for p in old]
    reference = make(tensors(*SHAPES, seed=1), lr=0.3)
    run(opt, 0, 2)
    run(reference, 0, 2)
    assert same(opt, reference)
    assert all(map(torch.equal, old, before))


def test_rebound_groups_are_completed_and_checked():
    x, y = tensors(2, 2)
    opt = ClampedParameterOptimizer([x], clamp_max=0.5)
    opt.param_groups = [dict(SGD([y], lr=1.0).param_groups[0])]
    assert opt.param_groups[0]["clamp_max"] == 0.5
    before = snapshot(opt)
    with pytest.raises(ValueError, match="clamp_min"):
        opt.param_groups = [{**opt.param_groups[0], "clamp_min": 1.0}]
    assert snapshot(opt) == before


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_what_the_inner_rebinds_shows_on_the_wrapper(inner):
    # A bare load, or a trainer that holds the inner, replaces its state and its groups.
    opt = ClampedParameterOptimizer(tensors(2), inner, clamp_max=0.5)
    run(opt, 0, 1)
    state, groups = opt.state, opt.param_groups
    opt.inner_opt.load_state_dict(opt.inner_opt.state_dict())
    assert opt.state is not state and opt.param_groups is not groups
    assert is_one(opt)
    run(opt, 1, 2)


# --- stand-ins of trainers ---------------------------------------------------------------------


@by_name
def test_without_an_inner_yet_attributes_are_missing_as_attributes_are(make):
    cls = type(make(tensors(*SHAPES)))
    blank = cls.__new__(cls)
    for name in ("state", "param_groups", "defaults", "inner_opt", "anything"):
        assert not hasattr(blank, name)  # raises anything but an AttributeError
    for name in ("state", "defaults"):
        with pytest.raises(AttributeError):
            setattr(blank, name, {})


class LightningOptimizerLike:
    """Becomes an optimizer of the class that it stands in for, as Lightning's does."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        cls = type(optimizer)
        self.__class__ = type(f"Lightning{cls.__name__}", (LightningOptimizerLike, cls), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


@by_name
def test_a_stand_in_is_one_with_the_optimizer(make):
    opt = make(tensors(*SHAPES), lr=0.3)
    lr_scheduler.StepLR(opt, 1)
    reference = make(tensors(*SHAPES), lr=0.3)
    stand_in = LightningOptimizerLike(opt)
    assert isinstance(stand_in, Optimizer) and isinstance(stand_in, type(opt))
    assert stand_in.param_groups is opt.param_groups
    for k in range(3):
        new_gradients(parameters(opt), k)
        assert stand_in.step(lambda: 2.0) == 2.0
        stand_in.zero_grad()
    run(reference, 0, 3)
    assert same(opt, reference)
    assert stand_in.state is opt.state
    stand_in.load_state_dict(stand_in.state_dict())
    assert stand_in.state is opt.state and stand_in.param_groups is opt.param_groups
    assert is_one(opt)
    assert repr(stand_in).startswith("Lightning")


# --- memory ------------------------------------------------------------------------------------


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


USES = {
    "nothing": lambda opt: None,
    "step": lambda opt: run(opt, 0, 2),
    "closure": lambda opt: opt.step(lambda: 0.0),
    "checkpoint": lambda opt: opt.load_state_dict(opt.state_dict()),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "repr": repr,
    "hook": lambda opt: opt.register_step_pre_hook(lambda *_: None),
    "added group": lambda opt: opt.add_param_group({"params": tensors((2, 3))}),
}


@by_name
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_no_cycle_keeps_an_optimizer_alive(make, use, no_collector):
    opt = make(tensors(*SHAPES), lr=0.3)
    use(opt)
    gone = [weakref.ref(x) for x in (opt, opt.inner_opt, *parameters(opt))]
    del opt
    assert [ref() for ref in gone] == [None] * len(gone)


def test_no_cycle_in_a_copy(no_collector):
    opt = copy.deepcopy(L1qNormedGradientOptim(tensors((3, 2)), Adam, q=0.5))
    run(opt, 0, 1)
    gone = [weakref.ref(opt), weakref.ref(opt.inner_opt)]
    del opt
    assert [ref() for ref in gone] == [None, None]


# --- what a copy has, and has not --------------------------------------------------------------

HOOKS = [
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
]


@copies
def test_a_copy_leaves_schedulers_and_hooks_behind(copied):
    opt = ClampedParameterOptimizer(tensors(2), Adam, clamp_max=0.5)
    calls = []
    for o in (opt, opt.inner_opt):
        scheduler = lr_scheduler.StepLR(o, 1)
        for register in HOOKS:
            getattr(o, register)(lambda *_: calls.append(_) and None)  # cannot be pickled
    opt.step()
    scheduler.step()
    calls.clear()
    other = copied(opt)
    for o in (other, other.inner_opt):
        assert not {"step", "_opt_called"} & o.__dict__.keys()
    other.step()
    other.load_state_dict(other.state_dict())
    assert calls == []
    lr_scheduler.StepLR(other, 1)  # can be scheduled anew, in spite of `initial_lr`
    for o in (opt, opt.inner_opt):  # which still have theirs
        assert {"step", "_opt_called"} <= o.__dict__.keys()
    opt.step()
    assert len(calls) == 4


class Counting(ClampedParameterOptimizer):
    """A user's subclass with attributes of its own."""

    def __init__(self, *args, note, **kwargs):
        self.note = note
        super().__init__(*args, **kwargs)
        self.steps = 0

    def _post_step_transform_(self, param, optim_group):
        super()._post_step_transform_(param, optim_group)
        self.steps += 1


@copies
def test_attributes_survive_a_copy(copied):
    opt = Counting(tensors(2), Adam, fused=True, clamp_max=0.5, note=["mine"])
    opt.step()
    other = copied(opt)
    assert (other.note, other.steps) == (["mine"], 1)
    other.step()
    assert (other.steps, opt.steps) == (2, 1)
    assert other.inner_opt._step_supports_amp_scaling  # of the inner, too
    assert copied(L2NormedGradientOptim(tensors((2, 2)), div_by_zero_eps=0.25)).p == 2
    flagged = FRANK_WOLFE["L1FrankWolfe"](tensors((2, 2)), use_default_lr_schedule=False, lr=0.5)
    assert copied(flagged).param_groups[0]["use_default_lr_schedule"] is False


@copies
def test_lbfgs_survives_a_copy(copied):
    def go(opt, steps):
        for _ in range(steps):
            (x,) = parameters(opt)

            def closure(x=x):
                x.grad = None
                loss = (x - torch.tensor([1.0, 2.0])).pow(4).sum()
                loss.backward()
                return loss

            opt.step(closure)

    opt, reference = (
        ClampedParameterOptimizer([torch.zeros(2, requires_grad=True)], LBFGS, clamp_max=1.5)
        for _ in range(2)
    )
    go(opt, 1)
    other = copied(opt)
    go(other, 2)
    go(reference, 3)
    assert same(other, reference)


RANDOM = {
    "TopQ": partial(TopQGradientOptimizer, q=0.5, dq=0.5, param_ndim=None),
    "L1q": partial(L1qNormedGradientOptim, q=0.5, dq=0.5, param_ndim=None),
    "L1qFrankWolfe": partial(L1qFrankWolfe, q=0.5, dq=0.5, param_ndim=None, epsilon=1.0),
}


def two_draws(params, generator, **kwargs):
    return ChainedParamTransformingOptimizer(
        partial(TopQGradientOptimizer, q=0.3, dq=0.3, generator=generator),
        partial(ClampedGradientOptimizer, clamp_max=0.5),
        partial(TopQGradientOptimizer, q=0.5, dq=0.5, generator=seeded(7)),
        params=params,
        param_ndim=None,
        **kwargs,
    )


RANDOM["a chain of two"] = two_draws
by_random = pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def generators(opt):
    """The generators that an optimizer draws from; None stands for torch's own."""
    found = [t.generator or torch.default_generator for t in opt._before if isinstance(t, TopQ)]
    assert found
    return found


def stale_states(opt):
    """States of generators that lie about in the groups, where the next step would outdate them."""
    items = [item for group in opt.param_groups for item in group.items()]
    return [value for name, value in items if "generator" in name and value is not None]


@by_random
@deep_copies
def test_a_copy_draws_what_the_original_draws_and_not_in_its_place(make, copied):
    opt = make(tensors(20), generator=seeded(1), lr=0.3)
    run(opt, 0, 2)
    other = copied(opt)
    run(other, 2, 6)
    run(opt, 2, 6)
    assert same(opt, other)


@by_random
@copies
def test_a_copy_of_torchs_own_generator_is_that_generator(make, copied):
    # Else a copy would draw the same numbers again. It is the program's to save.
    opt = make(tensors(20), generator=torch.default_generator)
    assert generators(opt)[0] is generators(copied(opt))[0] is torch.default_generator
    saved = [name for name in opt.state_dict()["param_groups"][0] if "generator" in name]
    assert saved == ["2.generator_state"] * (make is two_draws)  # its second has one of its own


@by_random
@pytest.mark.parametrize("saved_by", [copy.deepcopy, through_a_file])
def test_random_draws_go_on_where_they_were_saved(make, saved_by):
    opt = make(tensors(20), generator=seeded(1), lr=0.3)
    run(opt, 0, 2)
    saved = saved_by({"opt": opt.state_dict(), "params": [p.detach() for p in parameters(opt)]})
    resumed = make([p.requires_grad_() for p in saved["params"]], generator=seeded(99), lr=0.3)
    unseeded = make(
        [p.detach().clone().requires_grad_() for p in saved["params"]], generator=seeded(99), lr=0.3
    )
    resumed.load_state_dict(saved["opt"])
    for o in (opt, resumed, unseeded):
        run(o, 2, 6)
    assert same(opt, resumed)
    assert not same(opt, unseeded)  # the draws do matter
    assert not any(stale_states(o) for o in (opt, resumed))


def test_a_generator_state_is_welcome_where_there_is_no_generator():
    opt = TopQGradientOptimizer(tensors(4), q=0.5, dq=0.5, generator=seeded(1), param_ndim=None)
    saved = opt.state_dict()
    for cls in (TopQGradientOptimizer, partial(ParamTransformingOptimizer, defaults={})):
        other = cls(tensors(4), **({"q": 0.5} if cls is TopQGradientOptimizer else {}))
        before = torch.default_generator.get_state()
        other.load_state_dict(saved)
        assert torch.equal(torch.default_generator.get_state(), before)
        assert not stale_states(other)
    # And its absence leaves the generator as it is.
    before = opt.generator.get_state()
    opt.load_state_dict(SGD(tensors(4)).state_dict())
    assert torch.equal(opt.generator.get_state(), before)


# --- state_dict and its hooks ------------------------------------------------------------------


@by_name
def test_state_dict_is_that_of_the_inner(make):
    opt = make(tensors(*SHAPES), lr=0.3)
    run(opt, 0, 2)
    ours, theirs = opt.state_dict(), opt.inner_opt.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["param_groups"] == [as_saved(group) for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys()
    ours["param_groups"][0]["lr"] = 7.0  # a copy, which may be edited
    ours["state"].clear()
    assert opt.param_groups[0]["lr"] == 0.3
    assert opt.state_dict()["state"].keys() == theirs["state"].keys()


def test_hooks_of_wrapper_and_inner_run_once_in_order():
    log = []
    opt = ClampedParameterOptimizer(tensors(2), clamp_max=0.5)

    def note(name):
        return lambda o, *_: log.append((name, o))

    for name, o in (("wrapper", opt), ("inner", opt.inner_opt)):
        for register in HOOKS[2:]:
            part = register.removeprefix("register_").removesuffix("_hook")
            getattr(o, register)(note(f"{name} {part}"))
    saved = opt.state_dict()
    assert [name for name, _ in log] == [
        "wrapper state_dict_pre",
        "inner state_dict_pre",
        "inner state_dict_post",
        "wrapper state_dict_post",
    ]
    assert [o for _, o in log] == [opt, opt.inner_opt, opt.inner_opt, opt]
    log.clear()
    opt.load_state_dict(saved)
    assert [name for name, _ in log] == [
        "wrapper load_state_dict_pre",
        "inner load_state_dict_pre",
        "inner load_state_dict_post",
        "wrapper load_state_dict_post",
    ]
    assert [o for _, o in log] == [opt, opt.inner_opt, opt.inner_opt, opt]


@pytest.mark.parametrize("of", ["wrapper", "inner"])
@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_may_change_what_is_saved_and_loaded(of, in_place):
    opt = ClampedParameterOptimizer(tensors(2), clamp_max=0.5)
    target = opt if of == "wrapper" else opt.inner_opt

    def add(_, state_dict):
        if in_place:
            state_dict["extra"] = 1
            return None
        return {**state_dict, "extra": 1}

    def change(_, state_dict):
        group = {**state_dict["param_groups"][0], "clamp_max": 0.25}
        if in_place:
            state_dict["param_groups"] = [group]
            return None
        return {**state_dict, "param_groups": [group]}

    target.register_state_dict_post_hook(add)
    target.register_load_state_dict_pre_hook(change)
    saved = opt.state_dict()
    assert saved["extra"] == 1
    before = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["clamp_max"] == 0.25
    assert saved == before


# --- loading -----------------------------------------------------------------------------------


def test_load_state_dict_takes_its_argument_by_name():
    opt = ClampedParameterOptimizer(tensors(2), clamp_max=0.5)
    saved = opt.state_dict()
    saved["param_groups"][0]["clamp_max"] = 0.25
    opt.load_state_dict(state_dict=saved)
    assert opt.param_groups[0]["clamp_max"] == 0.25


class Own(SGD):
    """Saves and loads in a way of its own, as sharded and 8-bit optimizers do."""

    def state_dict(self):
        return {**super().state_dict(), "format": "own"}

    def load_state_dict(self, state_dict):
        assert state_dict["format"] == "own"
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "format"})
        self.loaded = True


def test_state_dict_and_load_state_dict_of_the_inner_are_honored():
    opt = ClampedParameterOptimizer(tensors(2), Own, momentum=0.9, clamp_max=0.5)
    run(opt, 0, 2)
    saved = opt.state_dict()
    assert saved["format"] == "own"
    opt.load_state_dict(saved)
    assert opt.inner_opt.loaded
    assert is_one(opt)


@by_name_with_inner
@pytest.mark.parametrize("inner", [partial(SGD, momentum=0.9), Adam])
def test_a_checkpoint_of_the_bare_inner_loads(make, inner):
    bare = inner(tensors(*SHAPES), lr=0.3)
    run(bare, 0, 2)
    opt = make(tensors(*SHAPES, seed=1), InnerOpt=inner, grad_scale=0.5)
    expected = {k: v for k, v in opt.param_groups[0].items() if k not in bare.param_groups[0]}
    assert {"param_ndim", "grad_scale", "grad_bias"} <= expected.keys()
    opt.load_state_dict(bare.state_dict())
    group = opt.param_groups[0]
    assert {k: group[k] for k in expected} == expected
    assert group["lr"] == 0.3
    for ours, theirs in zip(parameters(opt), parameters(bare), strict=True):
        for name, value in bare.state[theirs].items():
            assert torch.equal(torch.as_tensor(opt.state[ours][name]), torch.as_tensor(value))
    run(opt, 2, 3)


def test_missing_settings_are_filled_group_by_group():
    def groups():
        x, y, z = tensors(2, 2, 2)
        return [{"params": [x], "clamp_max": 0.1}, {"params": [y, z], "clamp_min": -0.2}]

    opt = ClampedParameterOptimizer(groups(), Adam, clamp_max=0.5)
    bare = Adam([{"params": group["params"]} for group in groups()])
    opt.load_state_dict(bare.state_dict())
    bounds = [(group["clamp_min"], group["clamp_max"]) for group in opt.param_groups]
    assert bounds == [(None, 0.1), (-0.2, 0.5)]


@stateful
def test_a_checkpoint_of_the_wrapper_loads_into_the_bare_inner(make):
    opt = make(tensors(*SHAPES), lr=0.3)
    run(opt, 0, 2)
    bare = type(opt.inner_opt)([p.detach().clone().requires_grad_() for p in parameters(opt)])
    bare.load_state_dict(opt.state_dict())
    reference = copy.deepcopy(opt).inner_opt
    run(bare, 2, 4)
    run(reference, 2, 4)
    assert same(bare, reference)


BAD = {
    "crossed bounds": ({"clamp_min": 1.0}, ValueError, "clamp_min"),
    "bounds of another shape": ({"clamp_max": torch.ones(7)}, ValueError, "clamp_max"),
    "NaN bound": ({"clamp_max": float("nan")}, ValueError, "clamp_max"),
    "NaN scale": ({"grad_scale": float("nan")}, ValueError, "grad_scale"),
    "bias of another type": ({"grad_bias": "0"}, TypeError, "grad_bias"),
    "param_ndim": ({"param_ndim": 1.0}, TypeError, "param_ndim"),
    "parameters": ({"params": [0, 1]}, ValueError, "2 parameters|1 parameters"),
}


@pytest.mark.parametrize(("bad", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_groups_are_refused_before_anything_is_changed(bad, error, match):
    x, y = tensors(2, 2)
    opt = ClampedParameterOptimizer([{"params": [x]}, {"params": [y]}], Adam, clamp_max=0.5)
    run(opt, 0, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0]["lr"] = 9.0  # would do, alone
    saved["state"][0]["exp_avg"].fill_(9.0)
    saved["param_groups"][1] |= bad
    before = snapshot(opt)
    with pytest.raises(error, match=match):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before
    assert is_one(opt)


def test_a_wrong_number_of_groups_is_refused_before_anything_is_changed():
    opt = ClampedParameterOptimizer(tensors(2), Adam, clamp_max=0.5)
    run(opt, 0, 2)
    before = snapshot(opt)
    saved = opt.state_dict()
    for groups in ([], saved["param_groups"] * 2):
        with pytest.raises(ValueError, match="parameter groups"):
            opt.load_state_dict({**saved, "param_groups": groups})
    assert snapshot(opt) == before


def test_bad_settings_of_a_member_are_refused():
    opt = two_draws(tensors(4), seeded(1))
    start = [generator.get_state() for generator in generators(opt)]
    saved = copy.deepcopy(opt.state_dict())
    run(opt, 0, 1)
    before = snapshot(opt)
    now = [generator.get_state() for generator in generators(opt)]
    assert not any(map(torch.equal, start, now))
    saved["param_groups"][0]["2.q"] = 1.5
    with pytest.raises(ValueError, match="q"):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before
    after = [generator.get_state() for generator in generators(opt)]
    assert all(map(torch.equal, now, after))


# --- what belongs to the caller, and to the inner ----------------------------------------------


def frozen_copy(thing):
    """The structure of dicts and lists, with the very leaves."""
    if isinstance(thing, dict):
        return {k: frozen_copy(v) for k, v in thing.items()}
    return [frozen_copy(v) for v in thing] if isinstance(thing, (list, tuple)) else thing


def identical(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a is b


@by_name
@pytest.mark.parametrize("named", [False, True])
def test_dicts_of_the_caller_are_left_alone(make, named):
    def params(*shapes):
        made = tensors(*shapes)
        return [(f"p{shapes}{i}", p) for i, p in enumerate(made)] if named else made

    groups = [{"params": params((3, 2)), "lr": 0.1}, {"params": params((2, 2))}]
    added = {"params": params((4, 2))[0] if not named else params((4, 2))}
    before = frozen_copy([groups, added])
    opt = make(groups, lr=0.3)
    opt.add_param_group(added)
    run(opt, 0, 2)
    assert identical([groups, added], before)
    saved = opt.state_dict()
    before = frozen_copy(saved)
    opt.load_state_dict(saved)
    run(opt, 2, 4)
    assert identical(saved, before)


def test_defaults_and_partials_of_the_caller_are_left_alone():
    defaults, inner = {"clamp_max": 0.5}, partial(AdamW, lr=0.1)
    member = partial(ClampedParameterOptimizer, defaults=defaults)
    ChainedParamTransformingOptimizer(member, member, params=tensors(2), InnerOpt=inner).step()
    ClampedGradientOptimizer(tensors(2), inner, defaults=defaults).step()
    assert defaults == {"clamp_max": 0.5}
    assert inner.keywords == {"lr": 0.1}
    assert member.keywords == {"defaults": defaults}


def test_groups_of_frank_wolfe_are_left_alone():
    group = {"params": tensors(2)}
    opt = FrankWolfe([group])
    opt.add_param_group(other := {"params": tensors(3)[0]})
    assert list(group) == list(other) == ["params"]


@by_name_with_inner
@pytest.mark.parametrize(
    "inner",
    [
        partial(SGD, momentum=0.9),
        partial(SGD),
        partial(Adam, amsgrad=True),
        partial(Adam, fused=True),
    ],
)
def test_nothing_of_ours_comes_before_the_inner_state_of_a_parameter(make, inner):
    # Adam takes a state that is not empty for one that it has made.
    average = []
    if make is WITH_INNER["Projected"] and inner.keywords.keys() & {"amsgrad", "fused"}:
        average = ["gradient_average"]
    bare, opt = inner(tensors(*SHAPES)), make(tensors(*SHAPES), InnerOpt=inner)
    assert not opt.state
    for o in (bare, opt):
        run(o, 0, 2)
    for ours, theirs in zip(parameters(opt), parameters(bare), strict=True):
        assert list(opt.state.get(ours, {})) == list(bare.state.get(theirs, {})) + average
    assert len(opt.state) == len(bare.state)


@by_name
def test_the_state_holds_no_keys_but_parameters(make):
    opt = make(tensors(*SHAPES))
    run(opt, 0, 2)
    assert {id(p) for p in opt.state} <= {id(p) for p in parameters(opt)}


# --- nothing that a step depends on is kept from the step before ---------------------------------

EDITS = {
    "ClampedParameter": {"clamp_min": -0.1, "clamp_max": 0.2},
    "ClampedGradient": {"clamp_min": None, "clamp_max": -0.2},
    "L1Normed": {"param_ndim": None, "div_by_zero_eps": 5.0},
    "L2Projected": {"param_ndim": 0, "epsilon": 0.3, "div_by_zero_eps": 3.0},
    "LinfProjected": {"epsilon": 0.1},
    "TopQ": {"param_ndim": None, "q": 0.2},
    "L1qNormed": {"param_ndim": 1, "q": 0.8, "grad_scale": 2.0, "grad_bias": 0.1},
    "Projected": {"param_ndim": None, "constraint": L2Ball(0.2)},
    "L2FrankWolfe": {"epsilon": 0.4, "param_ndim": None, "use_default_lr_schedule": False},
}


@pytest.mark.parametrize("shape", [(2, 3), (1, 6), (5, 2)], ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_edited_settings_and_tensors_count_from_the_next_step_on(name, shape):
    ours, fresh = (WRAPPERS[name](tensors((2, 3)), lr=0.5) for _ in range(2))
    ours.step()
    for opt in (ours, fresh):
        (group,) = opt.param_groups
        for param, new in zip(group["params"], tensors(shape, seed=1), strict=True):
            param.grad, param.data = None, new.detach()
            param.grad = new.grad
            opt.state.pop(param, None)
        group.update(EDITS[name])
        opt.step()
    assert same(ours, fresh)
    assert same_bits([p.grad for p in parameters(ours)], [p.grad for p in parameters(fresh)])
