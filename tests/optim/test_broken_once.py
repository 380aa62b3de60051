"""Faults that were found by trying to break things; each test fails without its mend."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch._dynamo
from bitwise import same_bits
from torch.optim import SGD, Adam
from torch_versions import compiles, takes_grad_dtype

from rai_toolbox import foreach
from rai_toolbox.constraints import L1Ball, L2Ball, Simplex
from rai_toolbox.optim import (
    APGD,
    ChainedParamTransformingOptimizer,
    ExponentiatedGradient,
    FrankWolfe,
    LinearSetting,
    ProjectedOptimizer,
    SettingScheduler,
)

Mapped = partial(ProjectedOptimizer, constraint=L1Ball(1.0), gradient_mapping=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def feed(step, param, seeds):
    for seed in seeds:
        param.grad = normal(*param.shape, seed=seed)
        step()


class Hooked(ChainedParamTransformingOptimizer):
    """A chain of which a user has overridden a hook, which is shown views of parameters."""

    def _post_step_transform_(self, param, optim_group):
        super()._post_step_transform_(param, optim_group=optim_group)


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_averages_in_a_chain_with_a_hook_of_its_own_are_saved(inner):
    def make(x):
        return Hooked(Mapped, params=[x], InnerOpt=inner, lr=0.1, param_ndim=1)

    x = normal(2, 2, 3).requires_grad_()
    opt = make(x)
    feed(opt.step, x, range(3))
    assert "0.gradient_average" in opt.state[x]
    y = x.detach().clone().requires_grad_()
    other = make(y)
    other.load_state_dict(deepcopy(opt.state_dict()))
    feed(opt.step, x, range(3, 6))
    feed(other.step, y, range(3, 6))
    assert same_bits(x.detach(), y.detach())


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("chained", [False, True])
def test_averages_begin_in_a_compiled_step(chained):
    x, y = (normal(3, 4).requires_grad_() for _ in range(2))

    def make(param):
        if chained:
            return ChainedParamTransformingOptimizer(
                Mapped, Mapped, params=[param], InnerOpt=Adam, lr=0.1
            )
        return Mapped([param], Adam, lr=0.1)

    torch._dynamo.reset()
    compiled, eager = make(x), make(y)
    feed(torch.compile(compiled.step, backend="eager"), x, range(3))
    torch._dynamo.reset()
    feed(eager.step, y, range(3))
    assert compiled.state[x].keys() == eager.state[y].keys()
    torch.testing.assert_close(x, y)


@takes_grad_dtype
def test_the_empty_state_for_a_checkpoint_is_of_the_dtype_of_the_parameter():
    x = normal(3, 4).bfloat16().requires_grad_()
    x.grad_dtype = torch.float32
    opt = Mapped([x], lr=0.0)
    x.grad = torch.zeros(3, 4)
    opt.step()  # as `torch.distributed.checkpoint` does
    assert opt.state[x]["gradient_average"].dtype == torch.bfloat16
    opt.param_groups[0]["lr"] = 0.1
    feed(opt.step, x, range(2))


@pytest.mark.parametrize("averaging", [0.0, 0.5])
@pytest.mark.parametrize("constraint", [L1Ball(1.0), L2Ball(1.0), Simplex()], ids=str)
def test_the_derivative_of_mapped_steps(averaging, constraint):
    def end(scale):
        x = (0.5 * normal(2, 4, dtype=torch.float64)).requires_grad_().clone()
        opt = Mapped([x], lr=0.1, constraint=constraint, averaging=averaging, differentiable=True)
        for seed in range(3):
            x.grad = scale * normal(2, 4, seed=5 + seed, dtype=torch.float64) + 0.3 * x
            opt.step()
        return (x * normal(2, 4, seed=9, dtype=torch.float64)).sum()

    assert torch.autograd.gradcheck(end, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))


def test_in_a_chain_frank_wolfe_is_refused_too():
    with pytest.raises(TypeError, match="`InnerOpt` must not be FrankWolfe, .*got FrankWolfe$"):
        ChainedParamTransformingOptimizer(
            Mapped, params=[normal(3, 4).requires_grad_()], InnerOpt=FrankWolfe
        )


BALL = {"constraint": L2Ball(1.0)}


@pytest.mark.parametrize(
    ("make", "setting", "value", "message"),
    [
        (FrankWolfe, "lr", -1.0, "`lr` must be >= 0, got -1.0"),
        (
            partial(FrankWolfe, lr=0.5, use_default_lr_schedule=False),
            "lr",
            1.5,
            r"`lr` must be in \[0, 1\]",
        ),
        (FrankWolfe, "div_by_zero_eps", -1.0, "`div_by_zero_eps` must be >= 0, got -1.0"),
        (partial(FrankWolfe, **BALL), "lmo_scaling_factor", 2.0, "`lmo_scaling_factor` .*got 2.0"),
        (partial(FrankWolfe, smoothness=1.0, **BALL), "smoothness", 0.0, "`smoothness` must be >"),
        (partial(FrankWolfe, **BALL), "constraint", L2Ball(torch.ones(2, 1)), "broadcast"),
        (partial(ExponentiatedGradient, lr=0.1), "lr", -1.0, "`lr` must be >= 0, got -1.0"),
        (partial(ExponentiatedGradient, lr=0.1), "total", 0.0, "`total` must be > 0, got 0.0"),
    ],
)
def test_schedulers_refuse_wrong_values(make, setting, value, message):
    opt = make([normal(3, 4).requires_grad_()])
    before = opt.param_groups[0][setting]
    with pytest.raises(ValueError, match=message + rf".*\(`{setting}` of group 0 at step 0\)"):
        SettingScheduler(opt, setting, lambda step: value)
    assert opt.param_groups[0][setting] is before


def test_a_line_leaves_the_range_at_its_step_and_changes_nothing():
    opt = FrankWolfe([normal(3, 4).requires_grad_()], lr=0.5, use_default_lr_schedule=False)
    schedule = LinearSetting(opt, "lr", start=0.5, end=1.5, total_steps=2)
    schedule.step()
    with pytest.raises(ValueError, match=r"`lr` must be in .* got 1.5 \(`lr` of group 0 at step 2"):
        schedule.step()
    assert opt.param_groups[0]["lr"] == 1.0
    assert schedule.last_step == 1


def test_a_search_that_somebody_sets_in_one_group_is_refused():
    x, y = (normal(3, 4, seed=seed).requires_grad_() for seed in range(2))
    opt = FrankWolfe([{"params": [x]}, {"params": [y]}], **BALL)
    opt.param_groups[0]["line_search"] = True
    before = [x.detach().clone(), y.detach().clone()]
    with pytest.raises(ValueError, match=r"`line_search` must be the same in all groups"):
        opt.step(lambda: (x.sum() + y.sum()).detach())
    assert same_bits([x.detach(), y.detach()], before)


def test_frank_wolfe_loads_a_set_to_the_device_of_its_parameters():
    opt = FrankWolfe([torch.empty(3, 2, device="meta", requires_grad=True)], **BALL)
    other = FrankWolfe([normal(3, 2).requires_grad_()], constraint=L2Ball(torch.ones(3, 1)))
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["constraint"].epsilon.device.type == "meta"


def test_a_short_step_of_a_tiny_smoothness():
    x = torch.full((1, 3), 5e-4, requires_grad=True)
    opt = FrankWolfe([x], constraint=L2Ball(1e-3), smoothness=1e-322)
    x.grad = torch.zeros(1, 3)  # 0 / (L |p - s|^2), where that product is 0 in float64
    opt.step()
    assert same_bits(x.detach(), torch.full((1, 3), 5e-4))


def test_exponentiated_gradient_of_a_number():
    x = torch.tensor(3.0, requires_grad=True)
    opt = ExponentiatedGradient([x], lr=0.1)  # FrankWolfe takes a number by default, too
    x.grad = torch.tensor(1.0)
    opt.step()
    assert x.item() == 1.0


def test_an_exponent_beyond_the_largest_number_is_a_very_large_one():
    x = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    opt = ExponentiatedGradient([x], lr=10.0, param_ndim=None)
    x.grad = torch.tensor([-1e308, 0.0, 1e308], dtype=torch.float64)
    opt.step()
    assert x.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [0.9, 1 / 3, 1e-3])
def test_a_number_times_one_tensor_is_as_among_others(dtype, number):
    for operator in (foreach.mul_, foreach.add_):
        alone = torch.linspace(-3, 3, 64).to(dtype)
        first, second = alone.clone(), alone.clone()
        operator([alone], number)
        operator([first, second], number)
        assert torch.equal(alone, first)


@pytest.mark.parametrize(
    ("setting", "value"), [("momentum", 2.0), ("rho", -1.0), ("steps", 0), ("constraint", None)]
)
def test_apgd_refuses_a_bad_value_that_is_scheduled(setting, value):
    opt = APGD([torch.zeros(2, 3, requires_grad=True)], constraint=L2Ball(1.0), steps=5)
    before = opt.param_groups[0][setting]
    with pytest.raises((TypeError, ValueError), match=setting):
        SettingScheduler(opt, setting, lambda step: value)
    assert opt.param_groups[0][setting] is before
