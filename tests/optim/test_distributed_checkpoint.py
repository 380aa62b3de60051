"""Distributed checkpoints: they make empty state by a step that must do nothing else.

`torch.distributed.checkpoint` sets every lr and every gradient to 0 and calls `step(closure=None)`.
It works in one process, without a process group.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from engine_cases import FRANK_WOLFE, WITH_INNER, new_gradients, recording, tensors, unbounded
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from rai_toolbox.constraints import L2Ball, SpectralBall
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    Scion,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

OPTIONS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "on cpu": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

WHOLE = {"Projected": {"param_ndim": None}}  # it refuses to take each element of a bias as a row
MAKERS = FRANK_WOLFE | {
    f"{name}-{inner}": partial(make, InnerOpt=InnerOpt, **kwargs, **WHOLE.get(name, {}))
    for name, make in WITH_INNER.items()
    for inner, InnerOpt, kwargs in [
        ("SGD", SGD, {}),
        ("momentum", SGD, {"momentum": 0.9}),
        ("Adam", Adam, {}),
    ]
}


def scion(params, **kwargs):
    """Scion with a set for matrices, and one for biases."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.ndim == 2], "constraint": SpectralBall(0.9)},
        {"params": [p for p in params if p.ndim < 2], "constraint": L2Ball(0.9)},
    ]
    return Scion(groups, **kwargs)


MAKERS["Scion"] = partial(scion, nesterov=True)
MAKERS["Scion-unconstrained"] = partial(scion, unconstrained=True, weight_decay=0.1)

by_name = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def net():
    """A module whose parameters are outside of every set of the cases."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for p, value in zip(module.parameters(), tensors((4, 3), 4, (2, 4), 2), strict=True):
            p.copy_(5 * value)
    return module


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def run(module, opt, first, last):
    for k in range(first, last):
        new_gradients(module.parameters(), k)
        opt.step()
        opt.zero_grad()


# --- the step that initializes -----------------------------------------------------------------


@by_name
@by_options
def test_initializing_changes_nothing(make, options):
    module = net()
    opt = make(module.parameters(), lr=0.3)
    before, randomness = values(module), torch.get_rng_state()
    get_optimizer_state_dict(module, opt, options=options)
    assert all(map(torch.equal, values(module), before))
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(p.grad is None for p in module.parameters())
    assert opt.param_groups[0]["lr"] == 0.3


@by_options
def test_initializing_calls_no_transform(options):
    log = []
    module = net()
    opt = recording(log)(module.parameters(), Adam)
    get_optimizer_state_dict(module, opt, options=options)
    set_optimizer_state_dict(
        module, opt, get_optimizer_state_dict(module, opt), options=OPTIONS["plain"]
    )
    assert log == []
    assert len(opt.state) == 4  # the inner did its part


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)], ids=["lr", "tensor lr"])
@pytest.mark.parametrize("inner", [Adam, partial(AdamW, amsgrad=True), partial(SGD, momentum=0.9)])
def test_initializing_leaves_the_moments_of_the_inner_at_zero(inner, lr):
    module = net()
    opt = SignedGradientOptim(module.parameters(), inner, lr=lr, grad_scale=2.0, grad_bias=1.0)
    got = get_optimizer_state_dict(module, opt)
    for state in got["state"].values():
        for name, moment in state.items():
            assert name == "step" or not moment.any()


def test_initializing_draws_no_random_numbers():
    module = net()
    generator = torch.Generator().manual_seed(3)
    for given in (generator, torch.default_generator):
        before = given.get_state()
        opt = TopQGradientOptimizer(module.parameters(), Adam, q=0.5, dq=0.5, generator=given)
        get_optimizer_state_dict(module, opt)
        assert torch.equal(given.get_state(), before)


def test_initializing_in_the_midst_of_a_run_moves_nothing():
    # Plain SGD never has a state, so that each checkpoint makes that step.
    module = net()
    opt = ClampedParameterOptimizer(module.parameters(), lr=0.1, clamp_max=0.5)
    run(module, opt, 0, 2)
    with torch.no_grad():
        module[0].bias.fill_(3.0)  # by the user, who projects at the next step
    before = values(module)
    get_optimizer_state_dict(module, opt)
    assert all(map(torch.equal, values(module), before))
    run(module, opt, 2, 3)
    assert module[0].bias.max() == 0.5


def test_initializing_leaves_frozen_parameters_alone():
    module = net()
    module[0].requires_grad_(False)
    opt = ClampedParameterOptimizer(
        [{"params": module[0].parameters()}, {"params": module[1].parameters()}], clamp_max=0.0
    )
    before = values(module)
    get_optimizer_state_dict(module, opt)
    assert all(map(torch.equal, values(module), before))


@pytest.mark.parametrize("make", FRANK_WOLFE.values(), ids=FRANK_WOLFE.keys())
def test_afterwards_a_run_is_as_if_nothing_had_been(make):
    ours, theirs = net(), net()
    opt, reference = make(ours.parameters()), make(theirs.parameters())
    get_optimizer_state_dict(ours, opt)
    run(ours, opt, 0, 3)
    run(theirs, reference, 0, 3)
    assert all(map(torch.equal, values(ours), values(theirs)))


@pytest.mark.parametrize(
    "inner", [SGD, partial(SGD, momentum=0.9), Adam, partial(Adam, fused=True)]
)
def test_afterwards_a_run_is_that_of_the_inner_treated_likewise(inner):
    # Not of the inner left alone: torch's Adam counts the step that initializes.
    ours, theirs = net(), net()
    opt, bare = unbounded(ours.parameters(), inner), inner(theirs.parameters())
    for module, o in ((ours, opt), (theirs, bare)):
        get_optimizer_state_dict(module, o)
        run(module, o, 0, 3)
    assert all(map(torch.equal, values(ours), values(theirs)))


# --- round trips -------------------------------------------------------------------------------


RESUMED = {
    f"{name}-{by}": (make, options)
    for name, make in MAKERS.items()
    for by, options in OPTIONS.items()
    # torch 2.13 cannot load the full state of an optimizer whose state has no tensor of ndim > 0
    if not options.full_state_dict or name.endswith(("momentum", "Adam"))
}


@pytest.mark.parametrize(("make", "options"), RESUMED.values(), ids=RESUMED.keys())
def test_a_resumed_run_is_the_uninterrupted_one(make, options):
    module, again = net(), net()
    opt = make(module.parameters(), lr=0.3)
    run(module, opt, 0, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(module, opt, options=options))
    resumed = make(again.parameters(), lr=0.01)
    again.load_state_dict(module.state_dict())
    set_optimizer_state_dict(again, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == 0.3
    assert resumed.state is getattr(resumed, "inner_opt", resumed).state
    run(module, opt, 2, 4)
    run(again, resumed, 2, 4)
    assert all(map(torch.equal, values(module), values(again)))


def drawing(module, seed):
    return ChainedParamTransformingOptimizer(
        partial(
            TopQGradientOptimizer, q=0.5, dq=0.5, generator=torch.Generator().manual_seed(seed)
        ),
        partial(ClampedParameterOptimizer, clamp_max=2.0),
        params=module.named_parameters(),
        InnerOpt=Adam,
        param_ndim=None,
    )


@by_options
def test_random_draws_go_on_where_they_were_saved(options):
    module, again = net(), net()
    opt = drawing(module, seed=1)
    run(module, opt, 0, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(module, opt, options=options))
    resumed = drawing(again, seed=2)
    again.load_state_dict(module.state_dict())
    set_optimizer_state_dict(again, resumed, saved, options=options)
    run(module, opt, 2, 5)
    run(again, resumed, 2, 5)
    assert all(map(torch.equal, values(module), values(again)))


def test_a_round_trip_through_files(tmp_path):
    module, again = net(), net()
    opt, resumed = drawing(module, seed=1), drawing(again, seed=2)
    run(module, opt, 0, 2)
    again.load_state_dict(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about there being no process group
        dcp.save({"opt": get_optimizer_state_dict(module, opt)}, checkpoint_id=tmp_path)
        into = {"opt": get_optimizer_state_dict(again, resumed)}
        dcp.load(into, checkpoint_id=tmp_path)
    set_optimizer_state_dict(again, resumed, into["opt"])
    run(module, opt, 2, 5)
    run(again, resumed, 2, 5)
    assert all(map(torch.equal, values(module), values(again)))


# --- Frank-Wolfe, whose first move has the step size 1 -----------------------------------------


@pytest.mark.parametrize("lr", [2.0, torch.tensor(2.0)], ids=["lr", "tensor lr"])
@pytest.mark.parametrize("make", [FrankWolfe, partial(L1FrankWolfe, epsilon=1.5, param_ndim=None)])
def test_the_schedule_of_frank_wolfe_starts_at_zero(make, lr):
    module = nn.Linear(2, 1, bias=False)
    opt = make(module.parameters(), lr=lr)
    before = values(module)
    get_optimizer_state_dict(module, opt)
    assert all(map(torch.equal, values(module), before))
    assert opt.state[module.weight]["step"] == 0
    module.weight.grad = torch.tensor([[0.0, 3.0]])
    opt.step()
    expected = [[0.0, -3.0]] if make is FrankWolfe else [[0.0, -1.5]]  # all the way to s
    assert module.weight.tolist() == expected
    assert opt.state[module.weight]["step"] == 1


def test_a_fixed_step_size_of_zero_is_allowed_while_initializing():
    module = nn.Linear(2, 1)
    opt = FrankWolfe(module.parameters(), lr=0.5, use_default_lr_schedule=False)
    before = values(module)
    get_optimizer_state_dict(module, opt)
    assert all(map(torch.equal, values(module), before))


# --- steps of a user that look alike -----------------------------------------------------------


@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["lr", "tensor lr"])
def test_a_step_at_lr_zero_without_gradients_projects(inner, lr):
    (x,) = tensors(3)
    x.grad = None
    x.detach().fill_(5.0)
    ClampedParameterOptimizer([x], inner, lr=lr, clamp_max=1.0).step()
    assert x.tolist() == [1.0] * 3


@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["lr", "tensor lr"])
def test_a_first_step_of_a_warm_up_transforms_and_projects(inner, lr):
    x, y = tensors(3, 3)
    x.detach().fill_(5.0)
    x.grad, y.grad = torch.tensor([0.0, -4.0, 0.0]), torch.zeros(3)  # one is enough
    opt = ChainedParamTransformingOptimizer(
        SignedGradientOptim,
        partial(ClampedParameterOptimizer, clamp_max=1.0),
        params=[y, x],
        InnerOpt=inner,
        lr=lr,
    )
    opt.step()
    assert x.tolist() == [1.0] * 3
    assert x.grad.tolist() == [0.0, -1.0, 0.0]


def test_one_group_that_moves_makes_a_step():
    x, y = tensors(3, 3)
    x.grad, y.grad = torch.zeros(3), torch.zeros(3)
    y.detach().fill_(5.0)
    groups = [{"params": [x], "lr": 0.1}, {"params": [y], "lr": 0.0}]
    ClampedParameterOptimizer(groups, clamp_max=1.0).step()
    assert y.tolist() == [1.0] * 3


def test_a_step_at_lr_zero_with_a_state_projects():
    (x,) = tensors(3)
    opt = ClampedParameterOptimizer([x], Adam, clamp_max=1.0)
    opt.step()
    x.detach().fill_(5.0)
    x.grad.zero_()
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert x.tolist() == [1.0] * 3


def test_a_scheduled_warm_up_from_zero():
    (x,) = tensors(3)
    x.detach().fill_(5.0)
    opt = ClampedParameterOptimizer([x], lr=1.0, clamp_max=1.0)
    scheduler = lr_scheduler.LambdaLR(opt, lambda k: min(1.0, k / 2))
    x.grad = torch.full((3,), 2.0)
    got = []
    for _ in range(3):
        opt.step()
        scheduler.step()
        got.append(x[0].item())
    assert got == [1.0, 0.0, -2.0]


def test_a_closure_at_lr_zero_is_a_step():
    (x,) = tensors(3)
    x.detach().fill_(5.0)
    x.grad.zero_()
    ClampedParameterOptimizer([x], lr=0.0, clamp_max=1.0).step(lambda: 0.0)
    assert x.tolist() == [1.0] * 3


def test_steps_at_lr_zero_project_if_the_inner_keeps_no_state():
    (x,) = tensors(3)
    x.detach().fill_(5.0)
    x.grad.zero_()
    opt = ClampedParameterOptimizer([x], lr=0.0, clamp_max=1.0)
    opt.step()  # may be that of a checkpoint
    opt.step()
    assert x.tolist() == [1.0] * 3
