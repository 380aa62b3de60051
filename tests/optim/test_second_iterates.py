"""Inner optimizers with a second iterate: slow weights of Lookahead, and schedule-free ones."""

import copy
import pickle
import warnings
from collections import defaultdict

import pytest
import torch
from files import through_a_file
from tiers import slow_but
from torch.optim import SGD, Adam, Optimizer

from rai_toolbox.constraints import Box, L1Ball, L2Ball, Simplex
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedParameterOptimizer,
    ProjectedOptimizer,
    compiled,
)


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al., 2024): parameters are y in training, else x."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    @torch.no_grad()
    def _move(self, training):
        for group in self.param_groups:
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            for p in group["params"] if group["train_mode"] != training else ():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = training

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            c, beta, lr = 1 / group["k"], group["beta"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, c).add_(p.grad, alpha=lr * (beta * (1 - c) - 1))
                    z.sub_(p.grad, alpha=lr)


class Lookahead(Optimizer):
    """Lookahead (Zhang et al., 2019), in the form of pytorch-optimizer."""

    def __init__(self, optimizer, k=3, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.state = defaultdict(dict)
        self.defaults = dict(optimizer.defaults)

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def state_dict(self):
        slow = [self.state[p] for group in self.param_groups for p in group["params"]]
        return {"slow": slow, "count": self.count, "fast": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict):
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update(zip(params, state_dict["slow"], strict=True))
        self.count = state_dict["count"]
        self.optimizer.load_state_dict(state_dict["fast"])

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.count += 1
        for group in self.param_groups if self.count % self.k == 0 else ():
            for p in group["params"]:
                slow = self.state[p].setdefault("slow_params", p.clone())
                p.copy_(slow.lerp_(p, self.alpha))


TARGET = torch.tensor([[3.0, 2.0, -1.0]], dtype=torch.float64)


def start():
    return torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64, requires_grad=True)


def run(opt, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        (x - TARGET).square().sum().backward()
        opt.step()


@pytest.mark.parametrize("constraint", [Box(-1.0, 1.0), Simplex(), L2Ball(1.0), L1Ball(1.0)])
def test_schedule_free_finds_the_nearest_point(constraint):
    x = start()
    opt = ProjectedOptimizer([x], ScheduleFree, constraint=constraint)
    opt.train()
    for steps in (1, 1, 5, 93):
        run(opt, x, steps)
        assert constraint.violation(x.detach()).max() == 0
        assert constraint.violation(opt.state[x]["z"]).max() == 0
        opt.eval()
        assert constraint.violation(x.detach()).max() == 0
        point = x.detach().clone()
        opt.train()
        assert constraint.violation(x.detach()).max() == 0
    torch.testing.assert_close(point, constraint.project(TARGET), atol=1e-2, rtol=0)


def test_schedule_free_in_a_chain():
    x = start()
    opt = ChainedParamTransformingOptimizer(
        ClampedParameterOptimizer,
        params=[x],
        InnerOpt=ScheduleFree,
        defaults={"clamp_max": 0.5},
    )
    opt.train()
    run(opt, x, 20)
    assert x.max() <= 0.5 and opt.state[x]["z"].max() <= 0.5
    opt.eval()
    assert x.max() <= 0.5


def test_only_inner_optimizers_with_two_modes_have_them():
    x = start()
    for opt in (
        ClampedParameterOptimizer([x], InnerOpt, clamp_max=0.5) for InnerOpt in (SGD, Adam)
    ):
        for name in ("train", "eval"):
            assert not hasattr(opt, name)
            with pytest.raises(AttributeError, match=name):
                getattr(opt, name)
    opt = ClampedParameterOptimizer([x], ScheduleFree, clamp_max=0.4)
    opt.train()
    opt.eval()
    assert x.max() == 0.5  # parameters are not changed before the first step
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        copied.train()
        assert copied.param_groups[0]["train_mode"] and not opt.param_groups[0]["train_mode"]


@pytest.mark.parametrize("constraint", [Box(-1.0, 1.0), Simplex(), L2Ball(1.0)])
def test_slow_weights_are_in_the_set(constraint):
    x = start()
    inner = Lookahead(SGD([x], lr=0.2))
    opt = ProjectedOptimizer(InnerOpt=inner, constraint=constraint)
    for _ in range(20):
        run(opt, x, 3)
        assert torch.equal(inner.state[x]["slow_params"], x)
        assert constraint.violation(x.detach()).max() == 0
    torch.testing.assert_close(x.detach(), constraint.project(TARGET), atol=1e-3, rtol=0)


def test_momentum_is_no_iterate():
    x, y = start(), start()
    opt = ClampedParameterOptimizer([x], SGD, lr=0.1, momentum=0.9, clamp_max=0.5)
    bare = SGD([y], lr=0.1, momentum=0.9)
    for each, param in ((opt, x), (bare, y)):
        run(each, param, 1)
    assert torch.equal(opt.state[x]["momentum_buffer"], bare.state[y]["momentum_buffer"])


@pytest.mark.parametrize("backend", slow_but([lambda module, inputs: lambda *inputs: (), "eager"]))
def test_a_compiled_step_that_is_undone_is_undone_in_the_optimizer_within(backend):
    ends = []
    for compile_it in (False, True):
        x = torch.tensor([[0.5, -0.8, 0.9]], requires_grad=True)
        opt = ClampedParameterOptimizer(InnerOpt=Lookahead(Adam([x], lr=0.3)), clamp_max=0.6)
        step = compiled(opt, backend=backend) if compile_it else opt.step
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*stays eager")
            for k in range(7):
                x.grad = torch.sin(3 * x.detach() + k)
                step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_with_the_groups_in_that_of_another_optimizer():
    def make(x):
        inner = Lookahead(Adam([x], lr=0.1))
        return ProjectedOptimizer(InnerOpt=inner, constraint=L2Ball(1.0))

    x = start()
    opt = make(x)
    run(opt, x, 4)
    saved = through_a_file(opt.state_dict())
    y = x.detach().clone().requires_grad_()
    other = ProjectedOptimizer(InnerOpt=Lookahead(Adam([y], lr=0.5)), constraint=None)
    other.load_state_dict(saved)
    assert other.param_groups[0]["constraint"] == L2Ball(1.0)
    for each, param in ((opt, x), (other, y)):
        run(each, param, 5)
    assert torch.equal(x, y)
    with pytest.raises(ValueError, match="`state_dict` must have `state`"):
        other.load_state_dict({"fast": {"param_groups": saved["fast"]["param_groups"]}})
