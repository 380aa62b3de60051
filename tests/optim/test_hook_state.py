"""State of a user's transforms: where hooks find it, and what is saved and loaded."""

import copy

import pytest
import torch
from engine_cases import new_gradients, tensors
from files import through_a_file
from torch.optim import SGD, Adam

from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ParamTransformingOptimizer,
    ProjectedOptimizer,
)


class Averaged(ParamTransformingOptimizer):
    """Descends an average of gradients, and counts its projections."""

    def __init__(self, params=None, InnerOpt=SGD, *, beta=0.5, defaults=None, **kwargs):
        super().__init__(params, InnerOpt, defaults={"beta": beta, **(defaults or {})}, **kwargs)

    def _pre_step_transform_(self, param, optim_group):
        state = self.state[param]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(param)
        state["mean"].lerp_(param.grad, 1 - optim_group["beta"])
        param.grad.copy_(state["mean"])

    def _post_step_transform_(self, param, optim_group):
        state = self.state[param]
        state["steps"] = state.get("steps", 0) + 1


INNER = [(SGD, {}), (SGD, {"momentum": 0.9}), (Adam, {})]
SHAPES = (3, 2), (4,)


def run(opt, first, last):
    for k in range(first, last):
        new_gradients([p for group in opt.param_groups for p in group["params"]], k)
        opt.step()


@pytest.mark.parametrize("param_ndim", [-1, None, 0])
@pytest.mark.parametrize(("inner", "kwargs"), INNER)
def test_it_is_that_of_the_parameter(inner, kwargs, param_ndim):
    x, y = tensors(*SHAPES)
    opt = Averaged([x, y], inner, lr=0.1, param_ndim=param_ndim, **kwargs)
    means = [torch.zeros_like(p) for p in (x, y)]
    for k in range(4):
        new_gradients([x, y], k)
        for mean, p in zip(means, (x, y), strict=True):
            mean.lerp_(p.grad, 0.5)
        opt.step()
        assert len(opt.state) == 2
        for mean, p in zip(means, (x, y), strict=True):
            assert torch.equal(p.grad, mean)
            assert torch.equal(opt.state[p]["mean"].reshape(p.shape), mean)
            assert opt.state[p]["steps"] == k + 1


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("inner", "kwargs"), INNER)
def test_it_is_saved_and_loaded(inner, kwargs, chained):
    def make(params):
        if not chained:
            return Averaged(params, inner, lr=0.1, **kwargs)
        return ChainedParamTransformingOptimizer(
            Averaged, Averaged, params=params, InnerOpt=inner, lr=0.1, **kwargs
        )

    straight, stopped = make(tensors(*SHAPES)), make(tensors(*SHAPES))
    run(straight, 0, 5)
    run(stopped, 0, 2)
    params = [p.detach().clone().requires_grad_() for p in stopped.param_groups[0]["params"]]
    resumed = make(params)
    resumed.load_state_dict(through_a_file(stopped.state_dict()))
    copied = copy.deepcopy(stopped)
    for opt in (resumed, copied):
        run(opt, 2, 5)
        for a, b in zip(
            straight.param_groups[0]["params"], opt.param_groups[0]["params"], strict=True
        ):
            assert torch.equal(a, b)


def test_each_member_of_a_chain_has_its_own():
    (x,) = tensors((3, 2))
    opt = ChainedParamTransformingOptimizer(Averaged, Averaged, params=[x], lr=0.1)
    new_gradients([x], 0)
    first = x.grad / 2
    opt.step()
    assert torch.equal(opt.state[x]["0."]["mean"], first)
    assert torch.equal(opt.state[x]["1."]["mean"], first / 2)
    assert torch.equal(x.grad, first / 2)


@pytest.mark.parametrize(("inner", "kwargs"), INNER)
def test_a_parameter_that_gets_its_first_gradient_later(inner, kwargs):
    x, y = tensors(*SHAPES)
    opt = Averaged([x, y], inner, lr=0.1, **kwargs)
    y.grad = None
    opt.step()
    assert y not in opt.state and opt.state[x]["steps"] == 1
    run(opt, 0, 2)
    assert (opt.state[x]["steps"], opt.state[y]["steps"]) == (3, 2)
    y.grad = None
    opt.step()  # its state is kept
    assert opt.state[y]["steps"] == 3


def test_a_hook_without_state_leaves_none():
    class Halved(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            param.grad.mul_(0.5)

    (x,) = tensors((3, 2))
    opt = Halved([x], lr=0.1)
    opt.step()
    assert not opt.state
    chain = ChainedParamTransformingOptimizer(Halved, Halved, params=[x], InnerOpt=Adam, lr=0.1)
    chain.step()
    assert chain.state[x].keys() == {"step", "exp_avg", "exp_avg_sq"}

    class Failing(Halved):
        def _pre_step_transform_(self, param, optim_group):
            assert self.state[param] == {}
            raise RuntimeError

    opt = Failing([x], lr=0.1)
    with pytest.raises(RuntimeError):
        opt.step()
    assert not opt.state


def test_a_step_that_fails_leaves_no_average():
    class Fragile(Adam):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError
            return super().step(closure)

    (x,), (y,) = tensors((2, 3)), tensors((2, 3))
    failed, fresh = (
        ProjectedOptimizer([p], Fragile, lr=0.1, constraint=L2Ball(0.5)) for p in (x, y)
    )
    new_gradients([x], 0)
    with pytest.raises(RuntimeError):
        failed.step()
    failed.inner_opt.broken = fresh.inner_opt.broken = False
    for opt in (failed, fresh):
        run(opt, 1, 3)
    assert torch.equal(x, y)
