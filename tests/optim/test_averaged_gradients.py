"""The average of gradients by which ProjectedOptimizer tells what pushes against a constraint."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from files import through_a_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import LBFGS, SGD, Adam
from torch_versions import differentiates_lr, takes_grad_dtype

from rai_toolbox.constraints import (
    Affine,
    Box,
    Hyperplane,
    L1Ball,
    L2Ball,
    Simplex,
    UnitNorm,
)
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    L2NormedGradientOptim,
    ProjectedOptimizer,
)

NAME = "gradient_average"
NAME_IN_CHAIN = f"0.{NAME}"
AdamOnL1 = partial(ProjectedOptimizer, InnerOpt=Adam, lr=0.1, constraint=L1Ball(1.0))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def feed(opt, param, seeds):
    for seed in seeds:
        param.grad = normal(*param.shape, seed=seed, dtype=param.dtype)
        opt.step()


@pytest.mark.parametrize("averaging", [None, 0.0, 0.5, 0.99])
def test_the_step_is_that_of_the_formula(averaging):
    x = L1Ball(1.0).project(normal(3, 5, seed=9)).requires_grad_()
    opt = AdamOnL1([x], averaging=averaging)
    share = 0.9 if averaging is None else averaging
    bare = x.detach().clone().requires_grad_()
    adam, mean = Adam([bare], lr=0.1), None
    for seed in range(5):
        grad = normal(3, 5, seed=seed)
        mean = grad if mean is None else share * mean + (1 - share) * grad
        slope = torch.maximum(grad.norm(dim=1, keepdim=True), mean.norm(dim=1, keepdim=True))
        e = 0.1 * bare.detach().norm(dim=1, keepdim=True) / slope
        y = bare.detach() - e * mean
        bare.grad = grad + (y - L1Ball(1.0).project(y)) / e
        adam.step()
        L1Ball(1.0).project_(bare.detach())
        feed(opt, x, [seed])
        torch.testing.assert_close(x, bare, rtol=0, atol=1e-12)
        if share:
            torch.testing.assert_close(opt.state[x][NAME], mean, rtol=0, atol=1e-14)
    assert (NAME in opt.state[x]) == (share > 0)


@pytest.mark.parametrize(
    ("inner", "constraint"),
    [
        (SGD, L2Ball(1.0)),  # no mapping
        (Adam, Box(-1.0, 1.0)),
        (partial(LBFGS, max_iter=1), L2Ball(1.0)),
        (Adam, Affine(normal(2, 4), normal(2))),
        (Adam, Hyperplane(normal(4), 1.0)),
        (Adam, UnitNorm()),  # not convex
        (Adam, None),
    ],
)
def test_where_no_average_is_kept(inner, constraint):
    x = normal(3, 4).requires_grad_()
    opt = ProjectedOptimizer([x], inner, lr=0.1, constraint=constraint)

    def closure():
        x.grad = normal(3, 4, seed=1)
        return 0.0

    for _ in range(3):
        opt.step(closure)
    assert NAME not in opt.state[x]


@pytest.mark.parametrize("constraint", [L2Ball(1e9), L1Ball(1e9)])
def test_an_idle_constraint_leaves_the_trajectory_of_the_inner_bit_for_bit(constraint):
    x, bare = (normal(3, 4, dtype=torch.float32).requires_grad_() for _ in range(2))
    feed(ProjectedOptimizer([x], Adam, lr=0.1, constraint=constraint), x, range(6))
    feed(Adam([bare], lr=0.1), bare, range(6))
    assert torch.equal(x, bare)


@pytest.mark.slow
def test_averaging_lessens_the_bias_of_noise():
    """What the mapping makes of noise is not 0 on average, where the constraint is active."""
    target = torch.tensor([[2.0, 0.0, -0.5, -0.5]], dtype=torch.float64)
    best, bias = Simplex().project(target).expand(64, 4), {}
    for averaging in (0.0, 0.9):
        x = best.clone().requires_grad_()
        opt = ProjectedOptimizer(
            [x], SGD, lr=0.0, constraint=Simplex(), averaging=averaging, gradient_mapping=True
        )
        total = torch.zeros_like(x)
        for seed in range(600):
            x.grad = best - target + normal(64, 4, seed=seed)
            opt.step()
            if seed >= 300:
                total += x.grad
        bias[averaging] = float((total / 300).mean(0).norm())
    assert bias[0.9] < 0.1 * bias[0.0]


def double(params=None, **settings):
    """Both members map, each with an average of its own."""
    return ChainedParamTransformingOptimizer(
        partial(ProjectedOptimizer, constraint=L2Ball(1.0), gradient_mapping=True),
        L2NormedGradientOptim,
        partial(ProjectedOptimizer, constraint=Simplex(), gradient_mapping=True, averaging=0.5),
        params=params,
        InnerOpt=Adam,
        lr=0.1,
        **settings,
    )


MAKES = {"alone": AdamOnL1, "chained": double}


def test_members_of_a_chain_have_averages_of_their_own():
    x = normal(3, 4).requires_grad_()
    opt = double([x])
    feed(opt, x, range(3))
    ours = [name for name in opt.state[x] if name.endswith(NAME)]
    assert ours == [f"0.{NAME}", f"2.{NAME}"]
    first, last = (opt.state[x][name] for name in ours)
    assert not torch.equal(first, last)
    mean = normal(3, 4, seed=0)
    for seed in (1, 2):
        mean = 0.9 * mean + 0.1 * normal(3, 4, seed=seed)
    torch.testing.assert_close(first, mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_resumed_is_uninterrupted(make, dtype):
    x, y = (normal(3, 4, dtype=dtype).requires_grad_() for _ in range(2))
    opt = make([x])
    feed(opt, x, range(3))
    state, saved = through_a_file([opt.state_dict(), x.detach()])
    feed(opt, x, range(3, 6))
    y.detach().copy_(saved)
    other = make([y])
    other.load_state_dict(state)
    feed(other, y, range(3, 6))
    assert torch.equal(x, y)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_a_copy_goes_on_alike_and_apart(make):
    x = normal(3, 4).requires_grad_()
    opt = make([x])
    feed(opt, x, range(3))
    other, y = deepcopy((opt, x))
    feed(other, y, range(3, 6))
    before = x.detach().clone()
    assert not torch.equal(x, y)
    feed(opt, x, range(3, 6))
    assert torch.equal(x, y) and not torch.equal(before, x)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("warmup", [0, 100])
def test_distributed_checkpoints_hold_it(flat, warmup):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    ends = []
    model = torch.nn.Linear(4, 3, bias=False)
    opt = AdamOnL1(model.named_parameters(), warmup=warmup)
    feed(opt, model.weight, range(3))
    saved = deepcopy((model.state_dict(), get_optimizer_state_dict(model, opt, options=options)))
    for interrupted in (False, True):
        if interrupted:
            model = torch.nn.Linear(4, 3, bias=False)
            model.load_state_dict(saved[0])
            opt = AdamOnL1(model.named_parameters(), warmup=warmup)
            set_optimizer_state_dict(model, opt, saved[1], options=options)
        feed(opt, model.weight, range(3, 6))
        ends.append(model.weight.detach().clone())
        assert NAME in opt.state[model.weight]
    assert torch.equal(*ends)


def test_a_checkpoint_of_the_bare_inner_starts_a_new_average():
    x, bare = (normal(3, 4).requires_grad_() for _ in range(2))
    adam = Adam([bare], lr=0.1)
    feed(adam, bare, range(2))
    opt = AdamOnL1([x])
    opt.load_state_dict(adam.state_dict())
    feed(opt, x, [7])
    assert torch.equal(opt.state[x][NAME], normal(3, 4, seed=7))


def test_the_average_of_warm_up_steps_counts():
    x = normal(3, 4).requires_grad_()
    opt = AdamOnL1([x], warmup=2, averaging=0.5)
    feed(opt, x, range(2))
    expected = (normal(3, 4, seed=0) + normal(3, 4, seed=1)) / 2
    torch.testing.assert_close(opt.state[x][NAME], expected)


def test_a_failed_step_leaves_no_trace_in_the_state():
    class Failing(Adam):
        def step(self, closure=None):
            raise RuntimeError("as asked")

    x = normal(3, 4).requires_grad_()
    opt = ProjectedOptimizer([x], Failing, lr=0.1, constraint=L1Ball(1.0))
    x.grad = normal(3, 4)
    with pytest.raises(RuntimeError, match="as asked"):
        opt.step()
    assert not opt.state


@takes_grad_dtype
def test_the_gradient_may_have_another_dtype():
    x = normal(3, 4, dtype=torch.bfloat16).requires_grad_()
    x.grad_dtype = torch.float32
    opt = ProjectedOptimizer([x], SGD, lr=0.1, constraint=L1Ball(1.0), gradient_mapping=True)
    for seed in range(3):
        x.grad = normal(3, 4, seed=seed, dtype=torch.float32)
        opt.step()
    assert opt.state[x][NAME].dtype == torch.bfloat16
    assert L1Ball(1.0).violation(x.detach()).max() == 0


@differentiates_lr
def test_a_differentiable_step_can_be_differentiated():
    start = L1Ball(1.0).project(normal(1, 4)).requires_grad_()

    def end(shift):
        x = start.clone()
        opt = ProjectedOptimizer(
            [x], partial(Adam, differentiable=True), lr=0.1, constraint=L2Ball(0.5)
        )
        for seed in range(3):
            x.grad = normal(1, 4, seed=seed) + shift
            opt.step()
        return x.sum()

    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(end(shift), shift)
    h = 1e-6
    with torch.no_grad():
        by_differences = (end(torch.tensor(h)) - end(torch.tensor(-h))) / (2 * h)
    torch.testing.assert_close(slope, by_differences, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_bad_shares(value):
    with pytest.raises(ValueError, match=r"`averaging` must"):
        AdamOnL1([normal(2, 2).requires_grad_()], averaging=value)


def test_a_share_is_a_number():
    with pytest.raises(TypeError, match=r"`averaging`"):
        AdamOnL1([normal(2, 2).requires_grad_()], averaging="0.9")


class HookedMember(ProjectedOptimizer):
    def _pre_step_transform_(self, param, optim_group):
        super()._pre_step_transform_(param, optim_group=optim_group)

    def _post_step_transform_(self, param, optim_group):
        super()._post_step_transform_(param, optim_group=optim_group)


class HookedChain(ChainedParamTransformingOptimizer):
    def _pre_step_transform_(self, param, optim_group):
        super()._pre_step_transform_(param, optim_group=optim_group)

    def _post_step_transform_(self, param, optim_group):
        super()._post_step_transform_(param, optim_group=optim_group)


@pytest.mark.parametrize("settings", [{}, {"warmup": 2}, {"every": 2}, {"warmup": 1, "every": 3}])
@pytest.mark.parametrize("member", [ProjectedOptimizer, HookedMember])
@pytest.mark.parametrize("chain", [ChainedParamTransformingOptimizer, HookedChain])
def test_hooks_change_neither_averages_nor_counts(chain, member, settings):
    ends = []
    for make_chain, make in (
        (ChainedParamTransformingOptimizer, ProjectedOptimizer),
        (chain, member),
    ):
        x, y = (normal(2, 3, 4, seed=i).requires_grad_() for i in (0, 1))
        opt = make_chain(
            partial(make, constraint=L1Ball(1.0), **settings),
            params=[x, y],
            InnerOpt=Adam,
            lr=0.1,
            param_ndim=1,
        )
        for seed in range(7):
            x.grad, y.grad = (normal(2, 3, 4, seed=seed + i) for i in (2, 3))
            opt.step()
        ends.append([x.detach(), y.detach(), *(opt.state[p][NAME_IN_CHAIN] for p in (x, y))])
        assert list(opt.state) == [x, y]
        assert opt.param_groups[0]["steps_taken"] == (7 if settings else 0)
    for plain, hooked in zip(*ends, strict=True):
        assert torch.equal(plain, hooked)
