"""A wrapper steps as torch, its schedulers, scalers and hooks expect of a plain optimizer."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial
from threading import Thread
from types import MethodType

import pytest
import torch
from engine_cases import WITH_INNER, WRAPPERS, new_gradients, recording, tensors, unbounded
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_versions import TORCH, differentiates_lr

from rai_toolbox import optim
from rai_toolbox._torch import plain_step
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

by_name = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
by_name_with_inner = pytest.mark.parametrize("make", WITH_INNER.values(), ids=WITH_INNER.keys())


def names(log):
    return [entry[0] for entry in log]


class Plain(Optimizer):
    """An optimizer in which nothing but the one line happens."""

    def __init__(self, params, log):
        super().__init__(params, {"lr": 0.1})
        self.log = log

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.log.append(("inner step",))
        return loss


# --- hooks -------------------------------------------------------------------------------------

GIVEN_AS = {
    "class": lambda cls, params, log: cls(params, Plain, log=log),
    "partial": lambda cls, params, log: cls(params, partial(Plain, log=log)),
    "instance": lambda cls, params, log: cls(None, Plain(params, log)),
}
given_as = pytest.mark.parametrize("given_as", GIVEN_AS.values(), ids=GIVEN_AS.keys())


@contextmanager
def global_hooks(pre, post):
    handles = register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@given_as
@pytest.mark.parametrize("with_closure", [False, True])
def test_every_hook_runs_once_and_around_what_it_belongs_to(given_as, with_closure):
    log = []
    opt = given_as(recording(log), tensors(2), log)
    opt.register_step_pre_hook(lambda o, *_: log.append(("wrapper pre", o)))
    opt.register_step_post_hook(lambda o, *_: log.append(("wrapper post", o)))
    opt.inner_opt.register_step_pre_hook(lambda o, *_: log.append(("inner pre", o)))
    opt.inner_opt.register_step_post_hook(lambda o, *_: log.append(("inner post", o)))

    def pre(o, *_):
        log.append(("global pre", o))

    def post(o, *_):
        log.append(("global post", o))

    with global_hooks(pre, post):
        opt.step(*[lambda: 0.0] * with_closure)
    before_the_inner_step = (
        ["inner pre", "transform"] if with_closure else ["transform", "inner pre"]
    )
    assert names(log) == [
        "global pre",
        "wrapper pre",
        *before_the_inner_step,
        "inner step",
        "inner post",
        "project",
        "wrapper post",
        "global post",
    ]
    for entry in log:
        if "global" in entry[0] or "wrapper" in entry[0]:
            assert entry[1] is opt
        elif entry[0] in ("inner pre", "inner post"):
            assert entry[1] is opt.inner_opt


@by_name
def test_global_hooks_see_one_step_of_the_wrapper(make):
    seen = []
    opt = make(tensors((3, 2)))
    with global_hooks(lambda o, *_: seen.append(o), lambda o, *_: seen.append(o)):
        opt.step()
    assert seen == [opt, opt]


@pytest.mark.parametrize("of", ["wrapper", "inner"])
def test_a_pre_hook_may_change_the_arguments(of):
    opt = ParamTransformingOptimizer(tensors(2))
    target = opt if of == "wrapper" else opt.inner_opt
    seen = []
    target.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: "changed"), kwargs))
    target.register_step_post_hook(lambda o, args, kwargs: seen.append(args[1]()))
    assert opt.step(lambda: "given") == "changed"
    assert seen == ["changed"]


def test_the_closure_that_an_inner_hook_sees_transforms():
    # An inner hook may evaluate it (some optimizers probe the loss): never without the transform.
    opt = SignedGradientOptim([x := torch.tensor([2.0], requires_grad=True)], lr=0.0)
    seen = []

    def evaluate(inner, args, kwargs):
        args[1]()
        seen.append(x.grad.item())

    def closure():
        x.grad = torch.tensor([5.0])

    opt.inner_opt.register_step_pre_hook(evaluate)
    opt.step(closure)
    assert seen == [1.0]


def test_removed_hooks_run_no_more():
    log = []
    opt = ParamTransformingOptimizer(tensors(2))
    for o in (opt, opt.inner_opt):
        o.register_step_pre_hook(lambda *_: log.append("pre")).remove()
        o.register_step_post_hook(lambda *_: log.append("post")).remove()
    opt.step()
    assert log == []


# --- profiler ----------------------------------------------------------------------------------


@by_name
def test_the_profiler_shows_one_step_by_the_name_of_the_wrapper(make):
    opt = make(tensors((3, 2)))
    with torch.autograd.profiler.profile() as profile:
        opt.step()
    ranges = [e.name for e in profile.function_events if e.name.startswith("Optimizer.step")]
    assert ranges == [f"Optimizer.step#{type(opt).__name__}.step"]


@pytest.mark.parametrize("make", [WRAPPERS["Signed"], optim.FrankWolfe], ids=["wrapper", "own"])
def test_a_profile_of_all_threads_shows_steps_in_each(make):
    opt = make(tensors((3, 2)))
    try:
        config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        pytest.skip("this torch profiles one thread")
    with torch.profiler.profile(experimental_config=config, acc_events=True) as profile:
        opt.step()
        thread = Thread(target=opt.step)
        thread.start()
        thread.join()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{type(opt).__name__}.step") == 2


@pytest.mark.parametrize("make", [WRAPPERS["Signed"], optim.FrankWolfe], ids=["wrapper", "own"])
def test_a_step_without_hooks_takes_no_time_for_a_profile_that_nobody_makes(make, monkeypatch):
    opt = make(tensors((3, 2)))
    entered, record = [], torch.autograd.profiler.record_function
    recording = lambda name: entered.append(name) or record(name)  # noqa: E731
    monkeypatch.setattr(torch.autograd.profiler, "record_function", recording)
    opt.step()
    assert entered == []
    opt.register_step_pre_hook(lambda *_: None)
    opt.step()
    assert entered == [f"Optimizer.step#{type(opt).__name__}.step"]


# --- a step of its own on an instance of the inner optimizer -----------------------------------


def methods(inner, log):
    def step(self, closure=None):
        log.append(self)
        return closure and closure()

    return MethodType(step, inner)


def functions(inner, log):
    def step(closure=None):
        log.append(inner)
        return closure and closure()

    return step


@pytest.mark.parametrize("make_step", [methods, functions])
def test_an_instance_level_step_of_the_inner_is_honored(make_step):
    log = []
    (x,) = tensors(1)
    x.grad.fill_(5.0)
    opt = SignedGradientOptim([x], lr=1.0)
    before = x.detach().clone()
    opt.inner_opt.step = make_step(opt.inner_opt, log)
    opt.step()
    assert log == [opt.inner_opt]
    assert torch.equal(x, before)  # SGD's own step was not called,
    assert x.grad.item() == 1.0  # the transform was
    assert opt.step(lambda: 3.0) == 3.0
    assert len(log) == 2


def test_an_instance_level_step_is_honored_below_a_scheduler_too():
    log = []
    opt = ParamTransformingOptimizer(tensors(1), lr=1.0)
    opt.inner_opt.step = methods(opt.inner_opt, log)
    scheduler = lr_scheduler.StepLR(opt.inner_opt, 1)
    opt.step()
    scheduler.step()
    assert log == [opt.inner_opt]


# --- learning rate schedulers ------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda k: 1 / (k + 1)),
    "Cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=3),
    "WarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "OneCycle": partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=6),  # sets betas, too
    "Cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.3, step_size_up=2),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "Chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.5), lr_scheduler.StepLR(o, 2)]
    ),
    "SWALR": partial(torch.optim.swa_utils.SWALR, swa_lr=0.01, anneal_epochs=2),
}


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_do_what_they_do_to_the_bare_optimizer(make, on, tensor_lr):
    def trajectory(params, opt, scheduled):
        scheduler = make(scheduled)
        for k in range(5):  # a warning would be an error
            new_gradients(params, k)
            opt.step()
            scheduler.step()
            # (as numbers: it may give the tensor that the next step changes)
            yield [p.detach().clone() for p in params], [float(x) for x in scheduler.get_last_lr()]

    def lr():
        return torch.tensor(0.1) if tensor_lr else 0.1

    bare_params, params = tensors(3), tensors(3)
    bare = Adam(bare_params, lr=lr())
    wrapper = unbounded(params, Adam, lr=lr())
    on_it = wrapper if on == "wrapper" else wrapper.inner_opt
    expected = list(trajectory(bare_params, bare, bare))
    if not tensor_lr or TORCH >= (2, 9):  # before, some schedulers left tensors as they were
        assert len({lr for _, (lr,) in expected}) > 1  # there is a schedule to follow
    for (ours, our_lr), (theirs, their_lr) in zip(
        trajectory(params, wrapper, on_it), expected, strict=True
    ):
        assert our_lr == their_lr
        assert torch.equal(ours[0], theirs[0])


def test_a_plateau_scheduler():
    opt = ClampedParameterOptimizer(tensors(3), lr=1.0, clamp_min=0.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        opt.step()
        scheduler.step(1.0)
    assert opt.inner_opt.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_a_scheduler_detects_the_wrong_order_and_no_other(on):
    opt = ParamTransformingOptimizer(tensors(1), lr=1.0)
    scheduler = lr_scheduler.StepLR(opt if on == "wrapper" else opt.inner_opt, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    opt = ParamTransformingOptimizer(tensors(1), lr=1.0)
    scheduler = lr_scheduler.StepLR(opt if on == "wrapper" else opt.inner_opt, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
        scheduler.step()
    assert caught == []


def test_schedulers_on_both_count_one_step_each():
    (x,) = tensors(1)
    x.grad.fill_(1.0)
    opt = ParamTransformingOptimizer([x], lr=1.0)
    before = x.item()
    schedulers = [lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (opt, opt.inner_opt)]
    opt.step()
    for scheduler in schedulers:
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.25
    assert x.item() == before - 1.0


@by_name
def test_step_stays_a_method_of_the_class(make):
    # A scheduler reads `opt.step.__func__`, and takes an instance attribute for its own.
    opt = make(tensors((3, 2)))
    opt.step()
    opt.load_state_dict(opt.state_dict())
    for o in (opt, copy.deepcopy(opt)):
        assert "step" not in o.__dict__
        assert "step" not in o.inner_opt.__dict__
        assert o.step.__func__ is type(o).step


# --- closures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", ["by position", "by keyword"])
@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad])
def test_a_closure_is_evaluated_with_grad_and_its_value_returned(passed, caller):
    log = []
    (x,) = tensors(2)
    opt = recording(log)([x], lr=1.0)
    losses = []

    def closure():
        opt.zero_grad()
        loss = x.square().sum()
        loss.backward()  # would raise without grad mode
        losses.append(loss)
        return loss

    expected = (-x).tolist()
    with caller():
        mode = torch.is_grad_enabled()
        got = opt.step(closure) if passed == "by position" else opt.step(closure=closure)
        assert torch.is_grad_enabled() == mode
    assert got is losses[0]
    assert names(log) == ["transform", "project"]
    assert log[0][1] == x.grad.tolist()
    assert log[1][1] == expected


def test_a_closure_gets_grad_also_from_an_inner_that_does_not_switch_it_on():
    (x,) = tensors(2)
    opt = ParamTransformingOptimizer([x], Plain, log=[])
    with torch.no_grad():
        assert opt.step(lambda: x.square().sum()).requires_grad


@by_name
def test_step_returns_what_the_closure_returned_and_none_without(make):
    opt = make(tensors((3, 2)))
    value = object()
    assert opt.step(lambda: value) is value
    assert opt.step() is None


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_sees_a_transformed_gradient_at_each_evaluation(line_search):
    log, evaluations = [], []
    x = torch.tensor([3.0, -2.0], requires_grad=True)

    class Doubled(recording(log)):
        def _pre_step_transform_(self, param, optim_group):
            super()._pre_step_transform_(param, optim_group)
            param.grad.mul_(2)

    opt = Doubled([x], LBFGS, lr=0.5, max_iter=4, line_search_fn=line_search)

    def closure():
        opt.zero_grad()
        loss = (x.square() * torch.tensor([1.0, 5.0])).sum() / 2
        loss.backward()
        evaluations.append(x.grad.tolist())
        return loss

    first = opt.step(closure)
    assert first.item() == pytest.approx(14.5)
    assert len(evaluations) > 2
    assert names(log) == ["transform"] * len(evaluations) + ["project"]
    assert [entry[1] for entry in log[:-1]] == evaluations  # each evaluation, untouched so far

    # And LBFGS has worked with twice the gradient: as if that were the problem's own.
    y = torch.tensor([3.0, -2.0], requires_grad=True)
    bare = LBFGS([y], lr=0.5, max_iter=4, line_search_fn=line_search)

    def doubled():
        bare.zero_grad()
        loss = (y.square() * torch.tensor([1.0, 5.0])).sum() / 2
        (2 * loss).backward()
        return loss

    bare.step(doubled)
    assert torch.equal(x, y)


def test_lbfgs_with_projection_ends_on_the_constrained_optimum():
    x = torch.zeros(2, requires_grad=True)
    opt = ClampedParameterOptimizer([x], LBFGS, clamp_max=1.0)

    def closure():
        opt.zero_grad()
        loss = (x - torch.tensor([3.0, 0.5])).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    torch.testing.assert_close(x.detach(), torch.tensor([1.0, 0.5]))


def test_an_error_in_a_closure_projects_nothing_and_restores_grad_mode():
    log = []
    opt = recording(log)(tensors(2), lr=1.0)

    def closure():
        raise KeyError("mine")

    for mode in (True, False):
        with torch.set_grad_enabled(mode), pytest.raises(KeyError, match="mine"):
            opt.step(closure)
    with torch.no_grad(), pytest.raises(KeyError):
        opt.step(closure)
    assert torch.is_grad_enabled()
    assert log == []


# --- grad mode, and what a step leaves alone ---------------------------------------------------


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad])
def test_transforms_run_without_grad(with_closure, caller):
    log = []
    opt = recording(log)(tensors(2, (3, 2)))
    with caller():
        opt.step(*[lambda: 0.0] * with_closure)
    assert [entry[0] for entry in log] == ["transform"] * 2 + ["project"] * 2
    assert not any(entry[2] for entry in log)


@by_name
def test_the_step_is_in_place(make):
    params = tensors((3, 2), (2, 2))
    grads = [p.grad for p in params]
    before = [p.data_ptr() for p in params]
    make(params).step()
    assert [p.data_ptr() for p in params] == before
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(p.is_leaf and p.requires_grad for p in params)


# --- arguments ---------------------------------------------------------------------------------

REQUIRED = {
    optim.L2ProjectedOptim: {"epsilon": 1.0},
    optim.LinfProjectedOptim: {"epsilon": 1.0},
    optim.TopQGradientOptimizer: {"q": 0.5},
    optim.L1qNormedGradientOptim: {"q": 0.5},
    optim.L1FrankWolfe: {"epsilon": 1.0},
    optim.L2FrankWolfe: {"epsilon": 1.0},
    optim.LinfFrankWolfe: {"epsilon": 1.0},
    optim.L1qFrankWolfe: {"q": 0.5, "epsilon": 1.0},
}


@pytest.mark.parametrize("cls", REQUIRED, ids=lambda cls: cls.__name__)
def test_a_required_setting_has_no_silent_default(cls):
    (x,) = tensors((2, 2))
    (y,) = tensors((2, 2), seed=1)
    for missing in REQUIRED[cls]:
        others = {k: v for k, v in REQUIRED[cls].items() if k != missing}
        with pytest.raises(TypeError, match=f"`{missing}`"):
            cls([x], **others)
        with pytest.raises(TypeError, match=f"`{missing}`"):
            cls([{"params": [x], missing: 0.5}, {"params": [y]}], **others)
        opt = cls([{"params": [x], missing: 0.25}, {"params": [y], missing: 0.5}], **others)
        assert [group[missing] for group in opt.param_groups] == [0.25, 0.5]
        with pytest.raises(TypeError, match=f"`{missing}`"):
            opt.add_param_group({"params": tensors((2, 2))})
        assert len(opt.param_groups) == 2
        opt.step()


def test_a_required_argument_of_the_inner_stays_required():
    class Needs(SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)

    with pytest.raises(TypeError, match="lr"):
        ParamTransformingOptimizer(tensors(1), Needs)
    assert ParamTransformingOptimizer(tensors(1), Needs, lr=0.5).param_groups[0]["lr"] == 0.5


@by_name_with_inner
@pytest.mark.parametrize("given", ["params", "lr", "momentum"])
def test_nothing_of_the_inner_is_given_beside_an_instance(make, given):
    params = tensors((3, 2))
    inner = SGD(params, lr=0.5)
    before = dict(inner.param_groups[0])
    with pytest.raises(TypeError, match=f"`{given}`.*InnerOpt instance"):
        if given == "params":
            make(params, InnerOpt=inner)
        else:
            make(params=None, InnerOpt=inner, **{given: 0.1})
    assert inner.param_groups[0] == before  # not even half wrapped
    assert make(params=None, InnerOpt=inner).inner_opt is inner


OPTIONS = {
    "tensor lr": (Adam, {"lr": torch.tensor(0.05), "foreach": False}),
    "tensor lr, foreach": (Adam, {"lr": torch.tensor(0.05), "capturable": False}),
    "maximize": (SGD, {"maximize": True}),
    "foreach": (SGD, {"foreach": True, "momentum": 0.9}),
    "no foreach": (Adam, {"foreach": False}),
    "fused SGD": (SGD, {"fused": True, "momentum": 0.9}),
    "fused Adam": (Adam, {"fused": True, "amsgrad": True}),
    "fused AdamW": (AdamW, {"fused": True, "lr": torch.tensor(0.05)}),
    "differentiable": (Adam, {"differentiable": True}),
}


@pytest.mark.parametrize(("inner", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_reach_the_inner(inner, options):
    options = {"lr": 0.1} | options
    bare_params, params = tensors((3, 2), 4), tensors((3, 2), 4)
    bare = inner(bare_params, **copy.deepcopy(options))
    opt = unbounded(params, inner, **copy.deepcopy(options))
    for name, value in options.items():
        assert opt.inner_opt.param_groups[0][name] == value
        assert opt.inner_opt.defaults[name] == value
    with torch.no_grad() if options.get("differentiable") else torch.enable_grad():
        for k in range(3):
            for some, o in ((bare_params, bare), (params, opt)):
                new_gradients(some, k)
                if options.get("differentiable"):  # a leaf may not be written with grad
                    some[:] = [p.detach().clone().requires_grad_(False) for p in some]
                    o.param_groups[0]["params"][:] = some
                    new_gradients(some, k)
                o.step()
            assert all(map(torch.equal, params, bare_params))


def test_capturable_reaches_the_inner_which_has_the_last_word():
    def step(opt):
        opt.step()

    bare = Adam(tensors(1), capturable=True)
    opt = unbounded(tensors(1), Adam, capturable=True)
    assert opt.param_groups[0]["capturable"] is True
    with pytest.raises(AssertionError, match="capturable") as theirs:
        step(bare)
    with pytest.raises(AssertionError, match="capturable") as ours:
        step(opt)
    assert str(ours.value) == str(theirs.value)


# --- zero_grad, add_param_group ----------------------------------------------------------------


@by_name
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    params = tensors((3, 2), (2, 2))
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    opt.zero_grad(set_to_none=set_to_none)
    for p in params:
        assert p.grad is None if set_to_none else not p.grad.any()


def test_zero_grad_shows_in_profiles():
    opt = ClampedParameterOptimizer(tensors(1), clamp_max=1.0)
    with torch.autograd.profiler.profile() as profile:
        opt.zero_grad()
    (event,) = [e for e in profile.key_averages() if "ClampedParameterOptimizer" in e.key]
    assert event.key == "Optimizer.zero_grad#ClampedParameterOptimizer.zero_grad"
    assert event.count == 1


def test_zero_grad_of_the_inner_is_honored():
    calls = []

    class Inner(SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)

    ParamTransformingOptimizer(tensors(1), Inner).zero_grad(set_to_none=False)
    assert calls == [False]


class Tagging(SGD):
    """An optimizer that, as some do, adds options of its own to each group."""

    def add_param_group(self, param_group):
        super().add_param_group({**param_group, "tag": len(self.param_groups)})


def test_add_param_group_of_the_inner_is_honored():
    x, y, z = tensors(1, 1, 1)
    opt = ClampedParameterOptimizer([x], Tagging, lr=0.1, clamp_max=0.0)
    opt.add_param_group({"params": y, "clamp_max": 0.5, "lr": 0.2})
    opt.inner_opt.add_param_group({"params": [z], "clamp_min": -1.0})
    assert [group["tag"] for group in opt.param_groups] == [0, 1, 2]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2, 0.1]
    bounds = [(group["clamp_min"], group["clamp_max"]) for group in opt.param_groups]
    assert bounds == [(None, 0.0), (None, 0.5), (-1.0, 0.0)]  # complete, by whichever way
    for p, value in zip((x, y, z), (3.0, 3.0, -3.0), strict=True):
        p.detach().fill_(value)
        p.grad = None
    opt.step()
    assert (x.item(), y.item(), z.item()) == (0.0, 0.5, -1.0)


@by_name
def test_an_added_group_is_treated_as_one_that_was_there(make):
    def run(added):
        params = tensors((3, 2), (2, 2))
        if added:
            opt = make(params[:1])
            opt.add_param_group({"params": params[1:]})
        else:
            opt = make([{"params": params[:1]}, {"params": params[1:]}])
        for k in range(2):
            new_gradients(params, k)
            opt.step()
        return params

    assert all(map(torch.equal, run(True), run(False)))


def test_bad_groups_are_refused_before_anything_is_added():
    x, y = tensors(1, 1)
    opt = ClampedParameterOptimizer([x], clamp_max=0.0)
    with pytest.raises(ValueError, match="clamp_min"):
        opt.add_param_group({"params": y, "clamp_min": 1.0})
    with pytest.raises(ValueError, match="more than one"):  # torch's own rule
        opt.add_param_group({"params": x})
    assert len(opt.param_groups) == 1


# --- AMP ---------------------------------------------------------------------------------------

AMP_INNERS = {
    "SGD": {"InnerOpt": SGD, "momentum": 0.9},
    "fused SGD": {"InnerOpt": SGD, "fused": True, "momentum": 0.9},
    "Adam": {"InnerOpt": Adam},
    "fused Adam": {"InnerOpt": Adam, "fused": True},
}
amp_inner = pytest.mark.parametrize("inner", AMP_INNERS.values(), ids=AMP_INNERS.keys())


@amp_inner
@pytest.mark.parametrize("unscale_first", [False, True])
def test_scaling_the_loss_changes_nothing(inner, unscale_first):
    # The scale is a power of 2, so that unscaled gradients are exact. A clamp and a bias tell
    # scaled from unscaled gradients.
    def run(scaler):
        (x,) = tensors(4)
        opt = ClampedGradientOptimizer([x], clamp_max=0.5, grad_bias=0.1, lr=0.1, **inner)
        for _ in range(3):
            opt.zero_grad()
            scaler.scale((x - 1).square().sum()).backward()
            if unscale_first:
                scaler.unscale_(opt)
            assert scaler.step(opt) is None
            scaler.update()
        return x

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    assert torch.equal(scaled, run(torch.amp.GradScaler("cpu", enabled=False)))


@amp_inner
def test_a_skipped_step_transforms_nothing(inner):
    log = []
    (x,) = tensors(2)
    opt = recording(log)([x], lr=0.1, **inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = x.detach().clone()
    scaler.scale((x * torch.tensor([1.0, torch.inf])).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert log == []
    assert torch.equal(x, before)
    assert not opt.state
    assert scaler.get_scale() == 2.0**11


@amp_inner
def test_transforms_see_unscaled_gradients(inner):
    log = []
    (x,) = tensors(2)
    x.grad = None
    opt = recording(log)([x], lr=0.1, **inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale((x * torch.tensor([1.0, -3.0])).sum()).backward()
    assert x.grad.tolist() == [2.0**12, -3 * 2.0**12]
    scaler.step(opt)
    assert log[0][:2] == ("transform", [1.0, -3.0])


@by_name_with_inner
def test_no_flag_of_a_fused_inner_shows_on_the_wrapper(make):
    # GradScaler would hand the scaling to the inner's kernel: the transforms would see gradients
    # that are scaled, and run on steps that are skipped.
    opt = make(tensors((3, 2)), InnerOpt=Adam, fused=True)
    assert opt.inner_opt._step_supports_amp_scaling
    assert not hasattr(opt, "_step_supports_amp_scaling")
    opt.step()
    assert not hasattr(opt, "_step_supports_amp_scaling")
    assert not hasattr(copy.deepcopy(opt), "_step_supports_amp_scaling")


# --- differentiable=True -----------------------------------------------------------------------


class Squared(ParamTransformingOptimizer):
    """A user's subclass: both hooks, not linear."""

    def _pre_step_transform_(self, param, optim_group):
        param.grad.mul_(param.grad.clone())

    def _post_step_transform_(self, param, optim_group):
        param.mul_(param.clone())


def stepped(make, param, grad, **kwargs):
    param = param.clone()
    param.grad = grad
    make([param], lr=0.1, differentiable=True, **kwargs).step()
    return param


@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize("param_ndim", [-1, 0, None])
@pytest.mark.parametrize(
    "make", [*WITH_INNER.values(), Squared], ids=[*WITH_INNER.keys(), "Squared"]
)
def test_the_gradient_through_a_step_is_right(make, param_ndim, inner):
    (param,) = tensors((2, 3), seed=3, dtype=torch.float64)
    grad = param.grad.requires_grad_()
    settings = {"grad_scale": 1.5, "grad_bias": 0.1, "param_ndim": param_ndim, "InnerOpt": inner}
    assert torch.autograd.gradcheck(partial(stepped, make, **settings), (param, grad))
    assert torch.equal(grad, tensors((2, 3), seed=3, dtype=torch.float64)[0].grad)  # as it was


@by_name_with_inner
def test_the_gradient_through_a_step_is_finite_at_zero(make):
    # Rows of zeros are where norms have no gradient, and zeros where signs have none.
    param = torch.zeros(2, 3, requires_grad=True)
    grad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]], requires_grad=True)
    got = torch.autograd.grad(stepped(make, param, grad).sum(), [param, grad])
    assert all(g.isfinite().all() for g in got)


@differentiates_lr
def test_meta_learning_through_two_steps():
    # d/d(lr) of the loss after two steps, against a difference quotient.
    def loss(lr):
        p = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True).clone()
        opt = LinfProjectedOptim([p], epsilon=2.0, lr=lr, differentiable=True)
        for _ in range(2):
            # of a clone, because a step writes into what the graph of the gradient would keep
            p.grad = torch.autograd.grad(p.clone().pow(4).sum(), p, create_graph=True)[0]
            opt.step()
        return p.square().sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (lr,))
    assert torch.autograd.grad(loss(lr), lr)[0] != 0


# --- what a scaled inner step means: nothing of these is left over ------------------------------


def test_a_chain_runs_each_transform_once_per_step():
    log = []
    one, two = recording(log), recording(log)
    opt = ChainedParamTransformingOptimizer(one, two, params=tensors(2))
    opt.step()
    assert names(log) == ["transform", "transform", "project", "project"]


def test_transforms_come_before_and_projections_after_the_inner_step():
    x = torch.tensor([3.0, -4.0], requires_grad=True)
    x.grad = torch.tensor([30.0, 40.0])
    L2ProjectedOptim([x], epsilon=1.0, param_ndim=None, lr=1.0).step()
    moved = torch.tensor([3.0 - 0.6, -4.0 - 0.8])
    torch.testing.assert_close(x.detach(), moved / moved.norm())


def test_a_parameter_without_gradient_is_projected_and_not_stepped():
    x, y = tensors(2, 2)
    x.detach().fill_(5.0)
    x.grad = None
    opt = ClampedParameterOptimizer([x, y], Adam, clamp_max=1.0)
    opt.step()
    assert x.tolist() == [1.0, 1.0]
    assert x not in opt.state and y in opt.state


def test_random_draws_are_one_per_parameter_and_step():
    generator = torch.Generator().manual_seed(0)
    reference = torch.Generator().manual_seed(0)
    params = tensors((3, 2), (2, 2))
    opt = TopQGradientOptimizer(params, q=0.5, dq=0.2, generator=generator)
    for _ in range(3):
        opt.step()
    torch.rand(3 * 2, generator=reference)
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=reference))


# --- arguments of the inner's step ----------------------------------------------------------------


class WithBatchSize(SGD):
    """An optimizer whose step takes more, as that of Sophia."""

    def step(self, closure=None, bs=1):
        self.bs = bs
        return super().step(closure)


@pytest.mark.parametrize("closure", [None, lambda: 0.5])
def test_more_arguments_go_to_the_inner_step(closure):
    seen = []
    (x,) = tensors((2, 3))
    opt = ClampedParameterOptimizer([x], WithBatchSize, lr=0.1, clamp_max=0.5)
    opt.inner_opt.register_step_pre_hook(lambda inner, args, kwargs: seen.append(kwargs))
    for attach in (lambda: None, lambda: lr_scheduler.StepLR(opt, 1)):
        attach()
        assert opt.step(closure, bs=7) == (None if closure is None else 0.5)
        assert opt.inner_opt.bs == 7 and seen[0] == {"bs": 7}
        seen.clear()
    opt.step()
    assert opt.inner_opt.bs == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'bs'"):
        ClampedParameterOptimizer([x], SGD, lr=0.1, clamp_max=0.5).step(bs=7)


def test_an_interrupted_step_leaves_the_groups_as_they_were(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    opt = ClampedParameterOptimizer(tensors((2, 3), (2, 8)), clamp_max=0.5, **settings)
    opt.step()
    groups, before = opt.param_groups, [dict(group) for group in opt.param_groups]
    monkeypatch.setitem(plain_step(SGD.step).__globals__, "sgd", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert opt.param_groups is groups and len(groups) == 1
    assert groups[0].keys() == before[0].keys()
    assert all(groups[0][name] is before[0][name] for name in before[0])
