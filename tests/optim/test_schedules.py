"""Schedules of any setting: where values land, what is refused, and how they are resumed."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from files import through_a_file
from torch.optim import SGD, Adam, lr_scheduler

from rai_toolbox.constraints import (
    BoundedBall,
    Box,
    Hyperplane,
    Intersection,
    L2Ball,
    LinfBall,
    Masked,
    MaxNorm,
    NonNegative,
    Simplex,
)
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    TopQGradientOptimizer,
)
from rai_toolbox.optim.projected import ProjectedOptimizer
from rai_toolbox.optim.schedules import LinearSetting, SettingScheduler


def two_clamps(params, **kwargs):
    return ChainedParamTransformingOptimizer(
        partial(TopQGradientOptimizer, q=0.5),
        partial(ClampedGradientOptimizer, clamp_max=4.0),
        partial(ClampedParameterOptimizer, clamp_max=4.0),
        params=params,
        **kwargs,
    )


def falling(step):
    return 0.5**step


MASK = torch.tensor([True, False])
SHARED = Intersection(Hyperplane(1.0, 0.0), L2Ball(4.0))

# How an optimizer is made, and a setting of it; then a set, a path into it, and the set of a value.
SETTINGS = {
    "L2 epsilon": (partial(L2ProjectedOptim, epsilon=4.0), "epsilon"),
    "Linf epsilon": (partial(LinfProjectedOptim, epsilon=4.0), "epsilon"),
    "grad_scale": (ParamTransformingOptimizer, "grad_scale"),
    "grad_bias": (partial(ParamTransformingOptimizer, InnerOpt=Adam), "grad_bias"),
    "clamp_max": (partial(ClampedParameterOptimizer, clamp_min=0.0), "clamp_max"),
    "gradient clamp_min": (partial(ClampedGradientOptimizer, clamp_max=2.0), "clamp_min"),
    "q": (partial(TopQGradientOptimizer, q=0.5), "q"),
    "dq": (partial(TopQGradientOptimizer, q=0.5), "dq"),
    "q in a chain by name": (partial(L1qNormedGradientOptim, q=0.5), "q"),
    "q in a chain": (two_clamps, "q"),
    "clamp in a chain": (two_clamps, "2.clamp_max"),
    "Frank-Wolfe lr": (FrankWolfe, "lr"),
    "Frank-Wolfe scaling": (FrankWolfe, "lmo_scaling_factor"),
    "Frank-Wolfe epsilon": (partial(L1FrankWolfe, epsilon=4.0), "epsilon"),
    "Frank-Wolfe q": (partial(L1qFrankWolfe, q=0.5, epsilon=4.0), "q"),
    "lr of the inner": (partial(L2ProjectedOptim, InnerOpt=Adam, epsilon=4.0), "lr"),
    "a part of a tuple": (partial(L2ProjectedOptim, InnerOpt=Adam, epsilon=4.0), "betas.1"),
    "torch's own": (SGD, "weight_decay"),
}
SETS = {
    "ball": (L2Ball(4.0), "epsilon", L2Ball),
    "norm": (MaxNorm(4.0, p=1, dim=0), "max_norm", lambda v: MaxNorm(v, p=1, dim=0)),
    "sum": (Simplex(4.0), "total", Simplex),
    "bound": (Box(-2.0, 4.0), "upper", lambda v: Box(-2.0, v)),
    "ball of a bounded ball": (
        BoundedBall(L2Ball(4.0), 0.0, None),
        "ball.epsilon",
        lambda v: BoundedBall(L2Ball(v), 0.0, None),
    ),
    "masked": (
        Masked(LinfBall(4.0), MASK),
        "constraint.epsilon",
        lambda v: Masked(LinfBall(v), MASK),
    ),
    "intersection": (
        SHARED,
        "sets.1.epsilon",
        lambda v: Intersection(Hyperplane(1.0, 0.0), L2Ball(v)),
    ),
    "tolerance": (SHARED, "tolerance", lambda v: Intersection(*SHARED.sets, tolerance=v)),
}
KINDS = {"plain": SGD, "projected": partial(ProjectedOptimizer, param_ndim=1)}


def part(group, path):
    """What is at a path, by the words of Python."""
    name = next(name for name in group if path == name or path.startswith(f"{name}."))
    value = group[name]
    for word in path.removeprefix(name).strip(".").split(".") if path != name else ():
        value = value[int(word)] if isinstance(value, tuple) else getattr(value, word)
    return value


def in_set(make, constraint):
    return make([{"params": tensors((3, 2)), "constraint": constraint}], lr=0.1)


# --- where values land ----------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "setting"), SETTINGS.values(), ids=SETTINGS)
def test_values_land_in_the_groups_of_any_optimizer(make, setting):
    opt = make([{"params": tensors((3, 2))}, {"params": tensors((4,))}])
    before = [dict(group) for group in opt.param_groups]
    scheduler = SettingScheduler(opt, setting, lambda step: 0.5 ** (step + 1))
    for step in range(3):
        expected = 0.5 ** (step + 1)
        assert [part(group, setting) for group in opt.param_groups] == [expected, expected]
        assert scheduler.get_last_value() == [expected, expected]
        assert scheduler.last_step == step
        new_gradients([p for group in opt.param_groups for p in group["params"]], step)
        opt.step()
        scheduler.step()
    own = setting.removesuffix(".1")
    for group, old in zip(opt.param_groups, before, strict=True):
        assert {k: v for k, v in group.items() if k != own} == {
            k: v for k, v in old.items() if k != own
        }


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("constraint", "path", "expected"), SETS.values(), ids=SETS)
def test_values_land_in_sets(constraint, path, expected, make):
    plain = constraint.to_plain()
    opt = in_set(make, constraint)
    scheduler = SettingScheduler(opt, f"constraint.{path}", lambda step: 0.5 ** (step + 1))
    for step in range(3):
        assert opt.param_groups[0]["constraint"] == expected(0.5 ** (step + 1))
        opt.step()
        scheduler.step()
    assert constraint.to_plain() == plain  # a set is immutable


def test_a_whole_set_can_be_a_value():
    opt = in_set(KINDS["projected"], None)
    sets = [None, NonNegative(), L2Ball(1.0)]
    scheduler = SettingScheduler(opt, "constraint", sets.__getitem__)
    for expected in sets:
        assert opt.param_groups[0]["constraint"] == expected
        if expected is not sets[-1]:
            scheduler.step()
    saved = scheduler.state_dict()
    assert saved["last_value"] == [{"set": "L2Ball", "epsilon": 1.0, "center": None, "dim": None}]
    opt.param_groups[0]["constraint"] = None
    scheduler.load_state_dict(saved)
    assert opt.param_groups[0]["constraint"] == L2Ball(1.0)


@pytest.mark.parametrize("way", ["epsilon", "constraint.epsilon"])
def test_the_next_step_goes_by_the_new_value(way):
    x = torch.full((4,), 8.0, requires_grad=True)
    if way == "epsilon":
        opt = L2ProjectedOptim([x], epsilon=8.0, param_ndim=None)
    else:
        opt = ProjectedOptimizer([x], constraint=L2Ball(8.0), param_ndim=None)
    scheduler = SettingScheduler(opt, way, falling)
    for step in range(4):
        opt.step()
        assert x.detach().norm().item() == pytest.approx(0.5**step, rel=1e-6)
        scheduler.step()


def test_one_schedule_for_each_group_or_none():
    groups = [{"params": tensors((2, 2)), "epsilon": float(i)} for i in range(3)]
    opt = L2ProjectedOptim(groups)
    scheduler = SettingScheduler(opt, "epsilon", [falling, None, lambda step: step])
    for _ in range(2):
        scheduler.step()
    assert [group["epsilon"] for group in opt.param_groups] == [0.25, 1.0, 2]
    assert scheduler.get_last_value() == [0.25, None, 2]


def test_groups_without_the_setting_are_left_alone_by_none():
    free, ball = {"params": tensors((2,)), "constraint": None}, {"params": tensors((2, 2))}
    opt = ProjectedOptimizer([{**ball, "constraint": L2Ball(4.0)}, free], lr=0.1)
    SettingScheduler(opt, "constraint.epsilon", (falling, None))
    assert [g["constraint"] for g in opt.param_groups] == [L2Ball(1.0), None]


def test_it_is_torchs_lambda_scheduler_for_the_learning_rate():
    runs = []
    for ours in (True, False):
        params = tensors((3, 2))
        opt = Adam(params, lr=0.25)
        if ours:
            scheduler = SettingScheduler(opt, "lr", lambda step: 0.25 * 0.95**step)
        else:
            scheduler = lr_scheduler.LambdaLR(opt, lambda step: 0.95**step)
        lrs = []
        for step in range(5):
            new_gradients(params, step)
            opt.step()
            lrs.append(opt.param_groups[0]["lr"])
            scheduler.step()
        runs.append((lrs, [p.detach() for p in params]))
    assert same_bits(*runs)


def test_last_step_says_where_to_begin():
    opt = L2ProjectedOptim(tensors((2, 2)), epsilon=4.0)
    scheduler = SettingScheduler(opt, "epsilon", lambda step: step, last_step=6)
    assert scheduler.get_last_value() == [7] and scheduler.last_step == 7
    assert LinearSetting(opt, "epsilon", 0.0, 8.0, 8, last_step=3).get_last_value() == [4.0]


def test_several_schedulers_at_once():
    opt = ClampedParameterOptimizer(tensors((3, 2)), clamp_min=-1.0, clamp_max=1.0, lr=0.5)
    schedulers = [
        lr_scheduler.ExponentialLR(opt, gamma=0.5),
        SettingScheduler(opt, "clamp_min", lambda step: -falling(step)),
        SettingScheduler(opt, "clamp_max", lambda step: 2 * falling(step)),
    ]
    for _ in range(3):
        opt.step()
        for scheduler in schedulers:
            scheduler.step()
    group = opt.param_groups[0]
    assert (group["lr"], group["clamp_min"], group["clamp_max"]) == (1 / 16, -1 / 8, 1 / 4)


def test_numbers_of_other_libraries_are_saved_as_plain_ones():
    opt = L2ProjectedOptim(tensors((2, 2)), epsilon=4.0)
    scheduler = SettingScheduler(opt, "epsilon", lambda step: np.float64(0.5))
    assert type(opt.param_groups[0]["epsilon"]) is type(scheduler.get_last_value()[0]) is float


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_tensors_as_settings_of_sets(make):
    radii = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    kept = radii.clone()
    opt = in_set(make, L2Ball(1.0))
    scheduler = SettingScheduler(opt, "constraint.epsilon", radii.__getitem__)
    for step in range(2):
        expected = L2Ball(kept[step])
        assert opt.param_groups[0]["constraint"] == expected
        if step == 0:
            scheduler.step()
    radii.zero_()  # what the user does with it is not seen
    assert opt.param_groups[0]["constraint"] == expected
    scheduler.get_last_value()[0].zero_()
    assert torch.equal(scheduler.state_dict()["last_value"][0], kept[1])


def test_the_tensors_of_the_user_are_not_written_to():
    table = torch.tensor([1.0, 2.0, 4.0])
    opt = SGD(tensors((2, 2)), lr=0.1)
    scheduler = SettingScheduler(opt, "lr", table.__getitem__)
    scheduler.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"].item() == 4.0
    assert table.tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_tensor_in_a_group_stays_where_it_is(value, learned):
    """A captured graph goes on to read it there."""
    lr = torch.tensor(1.0, requires_grad=learned)
    opt = SGD(tensors((2, 2)), lr=lr)
    SettingScheduler(opt, "lr", lambda step: value)
    assert opt.param_groups[0]["lr"] is lr and lr.item() == 0.5
    assert lr.requires_grad == learned and lr.is_leaf


def test_groups_that_share_a_tensor_get_their_own_values():
    lr = torch.tensor(1.0)
    opt = SGD([{"params": tensors((2,))}, {"params": tensors((3,))}], lr=lr)
    assert opt.param_groups[0]["lr"] is opt.param_groups[1]["lr"]
    scheduler = SettingScheduler(opt, "lr", [lambda step: 2.0 + step, lambda step: 4.0 + step])
    assert [group["lr"].item() for group in opt.param_groups] == [2.0, 4.0]
    held = [group["lr"] for group in opt.param_groups]
    scheduler.step()
    assert [group["lr"].item() for group in opt.param_groups] == [3.0, 5.0]
    assert all(group["lr"] is own for group, own in zip(opt.param_groups, held, strict=True))


def test_no_device_is_waited_for():
    """A tensor without data raises as soon as anybody asks for its value."""
    opt = SGD(tensors((2, 2)), lr=0.1)
    for start in (torch.zeros((), device="meta"), 0.1):
        opt.param_groups[0]["lr"] = start
        scheduler = SettingScheduler(opt, "lr", lambda step: torch.ones((), device="meta") * step)
        scheduler.step()
        scheduler.load_state_dict(scheduler.state_dict())
        assert scheduler.get_last_value()[0].device.type == "meta"


# --- linear -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.1), (0.3, 0.3), (2, 8)])
@pytest.mark.parametrize("total", [1, 3, 7])
def test_linear_goes_in_equal_steps_and_stays(start, end, total):
    opt = L2ProjectedOptim(tensors((2, 2)), epsilon=4.0)
    scheduler = LinearSetting(opt, "epsilon", start, end, total)
    seen = []
    for _ in range(total + 3):
        seen.append(opt.param_groups[0]["epsilon"])
        scheduler.step()
    assert seen[0] == start
    assert seen[total:] == [end] * 3  # exactly
    expected = np.linspace(start, end, total + 1)
    np.testing.assert_allclose(seen[: total + 1], expected, rtol=1e-15)


def test_linear_for_each_group_and_of_tensors():
    radii = torch.tensor([[0.0], [2.0], [4.0]])
    groups = [
        {"params": tensors((3, 2)), "constraint": L2Ball(radii)},
        {"params": tensors((2,)), "constraint": None},
        {"params": tensors((2, 2)), "constraint": L2Ball(1.0)},
    ]
    opt = ProjectedOptimizer(groups, lr=0.1)
    scheduler = LinearSetting(
        opt, "constraint.epsilon", [0 * radii, None, 1.0], [radii, None, 3.0], 4
    )
    scheduler.step()
    sets = [group["constraint"] for group in opt.param_groups]
    assert sets == [L2Ball(radii / 4), None, L2Ball(1.5)]
    for _ in range(3):
        scheduler.step()
    assert opt.param_groups[0]["constraint"] == L2Ball(radii)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, 0), ValueError, "`total_steps` must be an int >= 1, got 0"),
        ((0.0, 1.0, 2.0), ValueError, "`total_steps` must be an int >= 1, got 2.0"),
        ((0.0, 1.0, True), ValueError, "`total_steps` must be an int >= 1, got True"),
        ((math.nan, 1.0, 2), ValueError, "`start` must not be NaN, got nan"),
        ((0.0, math.inf, 2), ValueError, "`end` must be finite, got inf"),
        (("0", 1.0, 2), TypeError, "`start` must be a number or a tensor, got '0'"),
        (([0.0], 1.0, 2), ValueError, "`start` must be of 2 groups, got 1"),
        ((0.0, [1.0, 2.0, 3.0], 2), ValueError, "`end` must be of 2 groups, got 3"),
        (([0.0, None], 1.0, 2), ValueError, "must be None for the same groups, got None and 1.0"),
        ((1.0, -1.0, 1), ValueError, "`epsilon` must be >= 0, got -1.0 .* group 0 at step 1"),
    ],
)
def test_linear_refuses(arguments, error, message):
    opt = L2ProjectedOptim([{"params": tensors((2,))}, {"params": tensors((3,))}], epsilon=4.0)
    with pytest.raises(error, match=message):
        LinearSetting(opt, "epsilon", *arguments).step()


# --- what is refused ------------------------------------------------------------------------------

WRONG = {
    "rule of the optimizer": ("epsilon", -4.0, r"`epsilon` must be >= 0, got -4.0 "),
    "NaN": ("epsilon", math.nan, "`epsilon` must not be NaN, got nan "),
    "inner setting": ("lr", math.nan, "`lr` must not be NaN"),
    "radius of a set": ("constraint.epsilon", -4.0, "`epsilon` must be >= 0, got -4.0 "),
    "nested": ("constraint.ball.epsilon", math.inf, "`epsilon` of `ball` must be finite"),
    "no set": ("constraint", 4.0, "`constraint` must be a set .* or None, got 4.0 "),
    "does not fit a parameter": (
        "constraint.epsilon",
        torch.ones(7, 1),
        "`epsilon` must broadcast against the batch of shape",
    ),
}


def wrong_case(setting):
    if not setting.startswith("constraint"):
        make = L1FrankWolfe if setting == "lr" else L2ProjectedOptim
        return make([{"params": tensors((3, 2))}, {"params": tensors((4, 2))}], epsilon=4.0)
    ball = L2Ball(4.0)
    constraint = BoundedBall(ball, 0.0, 8.0) if "ball" in setting else ball
    groups = [{"params": tensors((3, 2))}, {"params": tensors((4, 2))}]
    return ProjectedOptimizer(groups, constraint=constraint, lr=0.1)


@pytest.mark.parametrize(("setting", "wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_changes_nothing(setting, wrong, message):
    opt = wrong_case(setting)
    right = L2Ball(1.0) if setting == "constraint" else 1.0
    second = [right, wrong, right]
    before = snapshot([p for g in opt.param_groups for p in g["params"]], opt)
    with pytest.raises(
        (TypeError, ValueError), match=f"{message}.*`{setting}` of group 1 at step 0"
    ):
        SettingScheduler(opt, setting, [lambda step: right, lambda step: wrong])
    assert same_bits(snapshot([p for g in opt.param_groups for p in g["params"]], opt), before)

    scheduler = SettingScheduler(opt, setting, [lambda step: right, second.__getitem__])
    before = snapshot([p for g in opt.param_groups for p in g["params"]], opt)
    for _ in range(2):  # it does not go on by itself
        with pytest.raises((TypeError, ValueError), match=message):
            scheduler.step()
        assert same_bits(snapshot([p for g in opt.param_groups for p in g["params"]], opt), before)
        assert scheduler.last_step == 0 and scheduler.get_last_value() == [right, right]
    second[1] = right
    scheduler.step()
    assert scheduler.last_step == 1


def test_rules_between_settings_hold():
    opt = ClampedParameterOptimizer(tensors((2,)), clamp_min=0.0, clamp_max=1.0)
    with pytest.raises(ValueError, match="`clamp_min` must be <= `clamp_max`, got clamp_min=2.0"):
        SettingScheduler(opt, "clamp_min", lambda step: 2.0)
    assert opt.param_groups[0]["clamp_min"] == 0.0


@pytest.mark.parametrize(
    ("make", "setting", "there"),
    [
        (partial(L2ProjectedOptim, epsilon=1.0), "epsilom", "epsilon, "),
        (partial(L2ProjectedOptim, epsilon=1.0), "epsilon.center", "epsilon, "),
        (partial(L2ProjectedOptim, epsilon=1.0), "", "epsilon, "),
        (two_clamps, "clamp_max", "1.clamp_min, 1.clamp_max, 2.clamp_min, 2.clamp_max"),
        (partial(ProjectedOptimizer, constraint=NonNegative()), "constraint.lower", "constraint, "),
        (
            partial(ProjectedOptimizer, constraint=Intersection(L2Ball(1.0))),
            "constraint.sets.1.epsilon",
            "constraint.sets.0.epsilon, constraint.sets.0.center, ",
        ),
        (partial(ProjectedOptimizer, constraint=L2Ball(1.0)), "params", "constraint.epsilon, "),
        (partial(ProjectedOptimizer, constraint=None), "constraint.epsilon", "constraint, "),
    ],
)
def test_a_setting_that_is_not_there_lists_what_there_is(make, setting, there):
    opt = make(tensors((3, 2)), lr=0.1)
    with pytest.raises(ValueError) as error:
        SettingScheduler(opt, setting, falling)
    message = str(error.value)
    assert message.startswith("`setting` must be one of ") and there in message
    assert message.endswith(f" for group 0 at step 0, got {setting!r}")
    assert "params" not in message.removesuffix("'params'")


def test_a_group_without_the_setting_needs_none():
    groups = [{"params": tensors((2, 2)), "constraint": c} for c in (L2Ball(4.0), None)]
    opt = ProjectedOptimizer(groups, lr=0.1)
    with pytest.raises(
        ValueError, match=r"\(in a list .* None leaves one unchanged\) for group 1 at step 0, got"
    ):
        SettingScheduler(opt, "constraint.epsilon", falling)
    assert opt.param_groups[0]["constraint"] == L2Ball(4.0)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (1.0, TypeError, "`values` must be a callable .*, got 1.0"),
        (None, TypeError, "`values` must be a callable .*, got None"),
        ([falling, 1.0], TypeError, "`values` must be a callable"),
        ([falling], ValueError, "`values` must be of 2 groups, got 1"),
        ([], ValueError, "`values` must be of 2 groups, got 0"),
        ([None, None], ValueError, "`values` must not be None for all groups"),
    ],
)
def test_wrong_values_are_refused(values, error, message):
    opt = L2ProjectedOptim([{"params": tensors((2,))}, {"params": tensors((3,))}], epsilon=4.0)
    with pytest.raises(error, match=message):
        SettingScheduler(opt, "epsilon", values)


@pytest.mark.parametrize("last_step", [-2, 0.0, None, True])
def test_a_wrong_last_step_is_refused(last_step):
    opt = L2ProjectedOptim(tensors((2,)), epsilon=4.0)
    with pytest.raises(ValueError, match="`last_step` must be an int >= -1, got "):
        SettingScheduler(opt, "epsilon", falling, last_step=last_step)


def test_wrong_optimizers_and_names_are_refused():
    opt = L2ProjectedOptim(tensors((2,)), epsilon=4.0)
    with pytest.raises(TypeError, match="`optimizer` must be a torch.optim.Optimizer, got "):
        SettingScheduler(opt.param_groups, "epsilon", falling)
    with pytest.raises(TypeError, match="`optimizer` must be a torch.optim.Optimizer, got None"):
        LinearSetting(None, "epsilon", 0.0, 1.0, 2)
    with pytest.raises(TypeError, match="`setting` must be the name of a setting, got 0"):
        SettingScheduler(opt, 0, falling)


def test_a_group_that_came_later_has_no_schedule():
    opt = L2ProjectedOptim(tensors((2,)), epsilon=4.0)
    scheduler = SettingScheduler(opt, "epsilon", falling)
    opt.add_param_group({"params": tensors((3,))})
    with pytest.raises(ValueError, match="`values` must be of 2 groups, got 1"):
        scheduler.step()
    assert scheduler.last_step == 0 and opt.param_groups[0]["epsilon"] == 1.0


# --- saved, and gone on with ----------------------------------------------------------------------


class Decay:
    """A schedule with something to remember."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate**step


def optimizer_of(kind):
    params = tensors((3, 2), (2, 2))
    if kind == "constraint":
        make = partial(ProjectedOptimizer, constraint=L2Ball(4.0))
    else:
        make = partial(L2ProjectedOptim, epsilon=4.0)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return params, make(groups, InnerOpt=Adam, lr=0.1)


def schedulers_of(kind, opt):
    setting = "constraint.epsilon" if kind == "constraint" else "epsilon"
    return [
        LinearSetting(opt, "grad_scale", 0.5, 1.0, 5),
        SettingScheduler(opt, setting, [Decay(0.75), Decay(0.5)]),
    ]


def training(kind):
    params, opt = optimizer_of(kind)
    return params, opt, schedulers_of(kind, opt)


def run(params, opt, schedulers, first, last):
    for step in range(first, last):
        new_gradients(params, step)
        opt.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("first", ["optimizer", "schedulers"])
@pytest.mark.parametrize("kind", ["constraint", "setting"])
def test_training_goes_on_as_if_it_had_not_stopped(kind, first):
    params, opt, schedulers = training(kind)
    run(params, opt, schedulers, 0, 7)

    half, half_opt, half_schedulers = training(kind)
    run(half, half_opt, half_schedulers, 0, 3)
    of_opt = through_a_file(half_opt.state_dict())
    of_schedulers = through_a_file([s.state_dict() for s in half_schedulers])

    again, opt_again = optimizer_of(kind)
    with torch.no_grad():
        for param, value in zip(again, half, strict=True):
            param.copy_(value)
    if first == "optimizer":  # whose values the new schedulers overwrite
        opt_again.load_state_dict(of_opt)
    schedulers_again = schedulers_of(kind, opt_again)
    for scheduler, state in zip(schedulers_again, of_schedulers, strict=True):
        scheduler.load_state_dict(state)
    if first == "schedulers":
        opt_again.load_state_dict(of_opt)
    assert [g["grad_scale"] for g in opt_again.param_groups] == [0.8, 0.8]
    run(again, opt_again, schedulers_again, 3, 7)
    assert same_bits(snapshot(again, opt_again), snapshot(params, opt))
    assert [s.get_last_value() for s in schedulers_again] == [
        s.get_last_value() for s in schedulers
    ]


def test_values_are_in_the_checkpoint_of_the_optimizer():
    _, opt, schedulers = training("constraint")
    schedulers[1].step()
    groups = opt.state_dict()["param_groups"]
    assert [group["constraint"]["epsilon"] for group in groups] == [0.75, 0.5]
    other = training("constraint")[1]
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [group["constraint"] for group in other.param_groups] == [L2Ball(0.75), L2Ball(0.5)]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(way):
    whole = training("constraint")
    run(*whole, 0, 2)
    other = copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert all(scheduler.optimizer is other[1] for scheduler in other[2])
    run(*other, 2, 5)
    assert whole[1].param_groups[0]["constraint"] == L2Ball(0.75**2)
    run(*whole, 2, 5)
    assert same_bits(snapshot(*other[:2]), snapshot(*whole[:2]))


def test_callable_objects_are_saved_and_functions_are_not():
    opt = L2ProjectedOptim([{"params": tensors((2,))} for _ in range(4)], epsilon=4.0)
    others = Decay(0.25).__call__, math.exp
    scheduler = SettingScheduler(opt, "epsilon", [Decay(0.5), falling, *others])
    state = through_a_file(scheduler.state_dict())
    assert state["values"] == [{"rate": 0.5}, None, None, None]
    new = SettingScheduler(opt, "epsilon", [Decay(0.125), lambda step: 3.0, *others])
    kept = copy.deepcopy(state)
    new.load_state_dict(state)
    assert state == kept
    assert [group["epsilon"] for group in opt.param_groups] == [1.0, 1.0, 1.0, 1.0]
    new.step()
    assert [group["epsilon"] for group in opt.param_groups] == [0.5, 3.0, 0.25, math.e]


def test_the_state_of_a_linear_one_is_its_line():
    opt = L2ProjectedOptim(tensors((2,)), epsilon=4.0)
    scheduler = LinearSetting(opt, "epsilon", 4.0, 8.0, 4)
    scheduler.step()
    other = LinearSetting(opt, "epsilon", 0.0, 1.0, 2)
    other.load_state_dict(through_a_file(scheduler.state_dict()))
    other.step()
    assert other.get_last_value() == [6.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": "lr"}, "`setting` in `state_dict` must be 'epsilon', got 'lr'"),
        ({"last_step": -2}, "`last_step` must be an int >= -1, got -2"),
        ({"last_value": [1.0]}, "`last_value` in `state_dict` must be of 2 groups, got 1"),
        ({"values": []}, "`values` in `state_dict` must be of 2 groups, got 0"),
        ({"last_value": [2.0, -1.0]}, "`epsilon` must be >= 0, got -1.0"),
        (None, "`state_dict` must have `setting`, got "),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    _, opt, (_, scheduler) = training("setting")
    scheduler.step()
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict({} if change is None else before | change)
    assert scheduler.state_dict() == before
    assert [group["epsilon"] for group in opt.param_groups] == [0.75, 0.5]


def test_the_schedule_finds_groups_that_were_replaced():
    _, opt, (_, scheduler) = training("setting")
    opt.load_state_dict(opt.state_dict())  # which makes new groups
    opt.param_groups = [dict(group) for group in opt.param_groups]
    scheduler.step()
    assert [group["epsilon"] for group in opt.param_groups] == [0.75, 0.5]


def test_trainers_find_the_learning_rates():
    groups = [{"params": tensors((2, 2)), "lr": lr} for lr in (0.5, torch.tensor(0.25))]
    opt = ClampedParameterOptimizer(groups, clamp_max=4.0)
    scheduler = LinearSetting(opt, "clamp_max", start=4.0, end=1.0, total_steps=3)
    assert scheduler.get_last_lr() == [0.5, torch.tensor(0.25)]
    opt.param_groups[0]["lr"] = 0.125
    assert scheduler.get_last_lr()[0] == 0.125
    assert LinearSetting(opt, "lr", [2.0, None], [1.0, None], 3).get_last_lr()[0] == 2.0
