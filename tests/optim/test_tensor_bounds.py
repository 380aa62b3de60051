"""Bounds that are tensors, and groups that are left free, in the optimizers that clamp."""

import copy
import pickle
from functools import partial

import pytest
import torch
from files import through_a_file
from tiers import slow_but
from torch.optim import LBFGS, SGD, Adam
from torch_versions import compiles

from rai_toolbox.constraints import Box
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    LinearSetting,
    ProjectedOptimizer,
    SettingScheduler,
    compiled,
)

LOW = torch.tensor([-0.5, -1.5, 0.25])
HIGH = torch.tensor([[0.5], [2.0]])
FREE = ("clamp_min", "clamp_max")


def leaf(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    x.grad = torch.randn(shape, generator=generator).to(dtype)
    return x


def run(optim, steps=3):
    for _ in range(steps):
        optim.step()
    return [p.detach().clone() for group in optim.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize(
    ("low", "high"), [(LOW, HIGH), (LOW.double(), 1.0), (None, HIGH), (torch.tensor(-1), HIGH)]
)
def test_parameters_are_clamped_to_them(low, high, inner, dtype):
    x, y = leaf(2, 3, dtype=dtype), leaf(2, 3, dtype=dtype)
    optim = ClampedParameterOptimizer([x], inner, clamp_min=low, clamp_max=high, lr=0.3)
    reference = inner([y], lr=0.3)
    for _ in range(3):
        optim.step()
        reference.step()
        with torch.no_grad():
            low_, high_ = (
                None if b is None else torch.as_tensor(b).to(dtype).expand(2, 3)
                for b in (low, high)
            )
            y.copy_(torch.clamp(y, low_, high_))
        assert torch.equal(x, y)
    assert optim.violation()[0] == 0


BOUND = torch.linspace(-0.3, 0.9, 6).reshape(2, 3)


@pytest.mark.parametrize("param_ndim", [0, 1, -1, 2])
@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((), BOUND[0, 0]),
        ((3,), BOUND[0]),
        ((2, 3), BOUND),
        ((4, 2, 3), BOUND),
        ((3, 2), BOUND.mT[:, :1]),
    ],
)
def test_the_shape_of_sub_tensors_has_no_effect(shape, bound, param_ndim):
    for inner in (SGD, partial(LBFGS, max_iter=2)):
        found = []
        for ndim in (None, param_ndim):
            x = leaf(*shape)
            optim = ClampedParameterOptimizer([x], inner, clamp_max=bound, lr=0.1, param_ndim=ndim)

            def closure(x=x):
                x.grad = 3 * x.detach() + 1
                return (1.5 * x**2 + x).sum()

            optim.step(closure)
            assert (x <= bound).all()
            x.data.add_(1.0)
            optim.make_feasible_()
            assert (x <= bound).all()
            found += [x.detach(), optim.kkt_residual()[0]]
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])
    x = leaf(*shape)
    expected = x.grad.clamp(max=bound)
    ClampedGradientOptimizer([x], clamp_max=bound, param_ndim=param_ndim, lr=0.0).step()
    assert torch.equal(x.grad, expected)


class Noted(ClampedParameterOptimizer):
    """Hooks that get views of sub-tensors, which other bounds fit."""

    def _pre_step_transform_(self, param, optim_group):
        super()._pre_step_transform_(param, optim_group)

    def _post_step_transform_(self, param, optim_group):
        super()._post_step_transform_(param, optim_group)


@pytest.mark.parametrize("inner", [SGD, partial(LBFGS, max_iter=2)])
@pytest.mark.parametrize("param_ndim", [None, 0, 1, -1])
@pytest.mark.parametrize("chained", [False, True])
def test_hooks_clamp_their_view_of_the_parameter(chained, param_ndim, inner):
    bounds = {"clamp_min": LOW, "clamp_max": LOW.new_tensor([[0.5], [2.0]])}
    found = []
    for cls in (ClampedParameterOptimizer, Noted):
        x = leaf(2, 3)
        if chained and cls is Noted:
            optim = ChainedParamTransformingOptimizer(
                partial(cls, **bounds), params=[x], InnerOpt=inner, lr=0.7, param_ndim=param_ndim
            )
        else:
            optim = cls([x], inner, lr=0.7, param_ndim=param_ndim, **bounds)

        def closure(x=x):
            x.grad = 3 * x.detach() + 1
            return (1.5 * x**2 + x).sum()

        optim.step(closure)
        found.append(x.detach())
    assert torch.equal(*found)


def test_a_vector_is_not_clamped_as_a_matrix():
    x = leaf(3)
    optim = Noted([x], clamp_min=LOW, clamp_max=LOW + 0.1, lr=0.1, param_ndim=-1)
    optim.step()
    assert ((x >= LOW) & (x <= LOW + 0.1)).all()


def test_each_group_has_its_own():
    x, y, z = leaf(2, 3), leaf(4, seed=1), leaf(4, seed=1)
    optim = ClampedParameterOptimizer(
        [
            {"params": [x], "clamp_max": HIGH},
            {"params": [y], "clamp_min": None, "clamp_max": None},
            {"params": [z], "clamp_max": 0.1},
        ],
        clamp_min=-0.1,
        lr=0.1,
    )
    bare = leaf(4, seed=1)
    reference = SGD([bare], lr=0.1)
    for _ in range(3):
        optim.step()
        reference.step()
    assert torch.equal(y, bare)
    assert (x >= -0.1).all()
    assert (x <= HIGH).all()
    assert ((z >= -0.1) & (z <= 0.1)).all()
    assert optim.violation()[1] == 0
    assert optim.kkt_residual()[1] == pytest.approx(bare.grad.double().norm().item())


@pytest.mark.parametrize("cls", [ClampedParameterOptimizer, ClampedGradientOptimizer])
def test_a_group_without_bounds_of_its_own_is_free_only_if_it_says_so(cls):
    free, open_above = {"clamp_min": None, "clamp_max": None}, {"clamp_max": None}
    for settings in (free, open_above):
        x = torch.randn(3, dtype=torch.complex64).requires_grad_()
        x.grad = torch.ones_like(x)
        optim = cls([{"params": [x], **settings}], lr=1.0)
        before = x.detach().clone()
        optim.step()
        assert torch.equal(x, before - 1)
    with pytest.raises(ValueError, match=r"must be given \(None for both, in a group"):
        cls([{"params": [leaf(3)], "clamp_max": 1.0}, {"params": [leaf(3)]}])
    optim = cls([leaf(3)], clamp_max=1.0)
    optim.add_param_group({"params": [leaf(3)], **free})
    optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    optim.step()


def test_a_free_group_around_an_optimizer_that_mixes_elements():
    x, y = leaf(3), leaf(3, seed=1)
    groups = [{"params": [x], "clamp_min": None, "clamp_max": None}]
    optim, bare = ClampedParameterOptimizer(groups, LBFGS, lr=0.5), LBFGS([y], lr=0.5)
    y.data.copy_(x)

    def loss(p, o):
        o.zero_grad()
        value = (p**4).sum() + p.sum()
        value.backward()
        return value

    optim.step(lambda: loss(x, optim))
    bare.step(lambda: loss(y, bare))
    assert torch.equal(x, y)


def test_a_mixing_optimizer_stops_at_the_solution():
    torch.manual_seed(0)
    a, b = torch.randn(6, 6).double(), 3 * torch.randn(6).double()
    h, high = a @ a.T + 0.1 * torch.eye(6), torch.linspace(0.1, 1.0, 6).double()

    def solved(make):
        x = torch.zeros(6, dtype=torch.double, requires_grad=True)
        optim = make([x])

        def closure():
            optim.zero_grad()
            value = 0.5 * x @ h @ x + b @ x
            value.backward()
            return value

        for _ in range(60):
            optim.step(closure)
        return closure().item()

    bounds = {"clamp_min": -high.flip(0), "clamp_max": high}
    box = Box(-high.flip(0), high)
    exact = solved(lambda p: ProjectedOptimizer(p, SGD, constraint=box, param_ndim=None, lr=0.05))
    ours = solved(lambda p: ClampedParameterOptimizer(p, LBFGS, **bounds))
    assert ours == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "checkpoint", "bare"])
def test_they_survive_copies(copied):
    x = leaf(2, 3)
    optim = ClampedParameterOptimizer([x], Adam, clamp_min=LOW, clamp_max=HIGH, lr=0.3)
    run(optim, 2)
    if copied == "deepcopy":
        other = copy.deepcopy(optim)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(optim))
    else:
        y = x.detach().clone().requires_grad_()
        other = ClampedParameterOptimizer([y], Adam, clamp_min=-9.0, lr=0.1)
        saved = (optim if copied == "checkpoint" else optim.inner_opt).state_dict()
        other.load_state_dict(through_a_file(saved))
    (y,) = other.param_groups[0]["params"]
    assert y is not x
    y.grad = x.grad.clone()
    assert torch.equal(other.param_groups[0]["clamp_max"], HIGH)
    assert other.param_groups[0]["clamp_max"] is not HIGH
    assert torch.equal(run(other)[0], run(optim)[0])


def test_they_need_not_fit_integer_parameters_which_do_not_change():
    packed = torch.nn.Parameter(torch.full((4,), 9, dtype=torch.int8), requires_grad=False)
    optim = ClampedParameterOptimizer([packed, leaf(2, 3)], clamp_min=LOW, clamp_max=HIGH, lr=0.1)
    optim.step()
    optim.make_feasible_()
    assert packed.tolist() == [9] * 4
    assert optim.violation() == [0.0]


@pytest.mark.parametrize("name", FREE)
def test_nan_in_them_is_refused(name):
    bound = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match=rf"`{name}` must not be NaN, got nan at \(1,\)"):
        ClampedParameterOptimizer([leaf(3)], **{name: bound})


def test_groups_may_get_other_ones_between_steps():
    x = leaf(2, 3)
    optim = ClampedParameterOptimizer([x], clamp_min=LOW, clamp_max=HIGH, lr=0.3)
    optim.step()
    group = dict(optim.param_groups[0])
    with pytest.raises(ValueError, match=r"`clamp_max` must broadcast .* \(parameter 0"):
        optim.param_groups = [{**group, "clamp_max": torch.ones(4)}]
    with pytest.raises(ValueError, match="`clamp_min` must be <= `clamp_max`.* at "):
        optim.param_groups = [{**group, "clamp_max": HIGH - 1}]
    optim.step()
    assert (x <= HIGH).all()
    optim.param_groups = [{**group, "clamp_max": HIGH + 1, "clamp_min": None}]
    x.grad.fill_(-99.0)
    optim.step()
    assert torch.equal(x, (HIGH + 1).expand(2, 3))
    optim.param_groups[0]["clamp_max"] = LOW
    optim.step()
    assert torch.equal(x, LOW.expand(2, 3))


def test_they_can_be_scheduled():
    x = leaf(2, 3)
    optim = ClampedParameterOptimizer(
        [{"params": [x], "clamp_max": HIGH}, {"params": [leaf(2)], "clamp_max": None}],
        clamp_min=None,
        lr=0.3,
    )
    schedule = LinearSetting(optim, "clamp_max", [HIGH, None], [HIGH - 1, None], 2)
    for k in (1, 2):
        x.grad.fill_(-9.0)
        optim.step()
        schedule.step()
        torch.testing.assert_close(optim.param_groups[0]["clamp_max"], HIGH - k / 2)
    assert HIGH.tolist() == [[0.5], [2.0]]  # (that is not overwritten)
    with pytest.raises(ValueError, match=r"broadcast against .* of group 0 at step 0"):
        SettingScheduler(optim, "clamp_max", [lambda step: torch.ones(5), None])


def test_sparse_gradients_are_refused_for_tensor_bounds_and_pass_in_free_groups():
    for bounds, works in (({"clamp_max": torch.ones(3)}, False), (dict.fromkeys(FREE), True)):
        x = torch.zeros(2, 3, requires_grad=True)
        x.grad = torch.sparse_coo_tensor(
            [[1]], torch.full((1, 3), 2.0), (2, 3), check_invariants=True
        )
        optim = ClampedGradientOptimizer([{"params": [x], **bounds}], lr=1.0)
        if works:
            optim.step()
            assert torch.equal(x, torch.tensor([[0.0] * 3, [-2.0] * 3]))
        else:
            with pytest.raises(ValueError, match="needs dense gradients"):
                optim.step()


@compiles
@pytest.mark.parametrize("cls", slow_but([ClampedParameterOptimizer, ClampedGradientOptimizer]))
@pytest.mark.parametrize("inner", slow_but([SGD, Adam]))
def test_compiled_steps_do_the_same_and_follow_changes(cls, inner):
    found = []
    for compile_it in (False, True):
        x, y, z = leaf(2, 3), leaf(2, 3, seed=1), leaf(3, seed=2)
        groups = [
            {"params": [x]},
            {"params": [y], "clamp_min": LOW.clone()},
            {"params": [z], **dict.fromkeys(FREE)},
        ]
        optim = cls(groups, inner, clamp_max=HIGH, clamp_min=-1.0, lr=0.2)
        step = compiled(optim, backend="eager") if compile_it else optim.step
        for k in range(6):
            if k == 3:
                optim.param_groups[1]["clamp_max"] = HIGH / 2
            if k == 4:
                optim.param_groups[1]["clamp_min"].sub_(0.1)
            for p in (x, y, z):
                p.grad = torch.sin(3 * p.detach() + k)
            step()
        if compile_it:
            assert step.graphs > 0
            assert not step._is_eager
        found.append([x, y, z])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
