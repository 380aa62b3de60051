"""Gradients through roundings: outputs stay, derivatives are those of the staircase."""

import copy
import warnings

import pytest
import torch
from test_ensemble import in_numpy
from test_square import a_problem, seeded
from torch import nn
from torch.nn.utils import parametrize

from rai_toolbox.constraints import L2Ball
from rai_toolbox.perturbations import attack
from rai_toolbox.perturbations.ensemble import short_ensemble
from rai_toolbox.perturbations.straight_through import StraightThrough, rounds, through_attack


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


def without_grad(x):
    with torch.no_grad():
        assert not torch.is_grad_enabled()
        x = (8 * x).round()
    return x / 8


def in_place(x):
    x = 8 * x
    return x.round_() / 8


def in_place_without_grad(x):
    with torch.no_grad():
        x = 8 * x
        x.round_().mul_(0.125)
        x[x < 0] = 0
    return x


def read(x):
    """What else is done with constants does not fail."""
    assert x.type() == "torch.FloatTensor"
    constant = x.detach().cpu()
    assert not any(each.requires_grad for each in (constant, *constant.max(1), constant + 1))
    constant.numpy().sum()
    copy.deepcopy(constant)
    with torch.enable_grad():
        inner = constant.clone().requires_grad_()
        assert inner.requires_grad and torch.autograd.grad((inner**2).sum(), inner)
    return x.round(decimals=1)


SEEN = {
    "function": lambda x: torch.round(8 * x) / 8,
    "method": lambda x: (8 * x).floor() / 8,
    "in place": in_place,
    "decimals": lambda x: x.round(decimals=1),
    "bytes": lambda x: (8 * x).to(torch.uint8).float() / 8,
    "integers": lambda x: (8 * x).long().to(x.dtype) / 8,
    "signs": lambda x: (x - 0.5).sign(),
    "steps": lambda x: torch.heaviside(x - 0.5, torch.ones(())),
    "parts": lambda x: torch.cat([(8 * x[:, :2]).ceil(), (8 * x[:, 2:]).trunc()], 1) / 8,
    "straight-through function": Passed.apply,
    "detached": lambda x: x + ((8 * x).round() / 8 - x).detach(),
    "detached, in place": lambda x: (8 * x).detach().clone().round_() / 8,
    "without grad": without_grad,
    "without grad, in place": in_place_without_grad,
    "read": read,
}
UNSEEN = {
    "smooth": lambda x: x,
    "of constants": lambda x: x * torch.ones(()).round(),
    "compared": lambda x: (x > 0.5).float(),
    "divided": lambda x: (x // 0.125) * 0.125,
    "fails": lambda x: x.round().missing,
}


def linear(width=20):
    return torch.nn.Linear(width, 3).requires_grad_(False)


@pytest.mark.parametrize("name", SEEN)
def test_outputs_stay_and_gradients_come_through(name):
    net, x = linear(), torch.rand(5, 20, generator=seeded())

    def model(x):
        return net(SEEN[name](x))

    through = StraightThrough(model)
    first = x.clone().requires_grad_()
    output = through(first.clone())
    assert torch.equal(output, model(x)) and rounds(model, x)
    (gradient,) = torch.autograd.grad(output[:, 0].sum(), first)
    assert torch.allclose(gradient, net.weight[0].expand(5, -1))  # in the first call
    for _ in range(5):
        assert torch.equal(through(x.clone().requires_grad_()), output)
    with torch.no_grad():
        assert torch.equal(through(x), output)


def test_the_derivative_is_half_the_slope_and_half_that_of_the_steps_in_reach():
    x = torch.tensor([0.0, 0.3, 0.45, 0.49, 0.51, 0.6]).requires_grad_()
    through = StraightThrough(torch.round)
    reach = [torch.autograd.grad(through(x).sum(), x)[0] for _ in range(6)]
    distance = (x.detach() - 0.5).abs()
    assert torch.equal(reach[0], torch.ones(6))
    for found, width in zip(reach[1:], (0.5, 0.25, 0.12, 0.06, 0.03), strict=True):
        is_near = distance < width
        assert torch.allclose(found[1:], (0.5 + is_near / (4 * width))[1:])


@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen(name):
    assert not rounds(lambda x: linear()(UNSEEN[name](x)), torch.rand(5, 20))


def test_models_of_numpy_and_of_torchscript_are_not_seen():
    net, x, _ = a_problem((20,))
    assert not rounds(in_numpy(net), x)
    weight = torch.rand(20, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(lambda x: x.round() @ weight, x)
    assert not rounds(script, x)


class Counting(nn.Module):
    """Keeps a mean of its inputs in a buffer."""

    def __init__(self, detached):
        super().__init__()
        self.register_buffer("mean", torch.zeros(20))
        self.net, self.detached = linear(), detached

    def forward(self, x):
        if self.detached:
            least, greatest = (x.detach() + 1).aminmax(dim=0)
            self.mean.mul_(0.9).add_(greatest + least)
        else:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0))
        return self.net((8 * x).round() / 8)


@pytest.mark.parametrize("detached", [True, False])
def test_buffers_get_no_graph(detached):
    model = Counting(detached)
    assert rounds(model, torch.rand(5, 20))
    assert model.mean.any() and not model.mean.requires_grad


class Keeping(nn.Module):
    """Keeps constants, and integers, from one call to the next."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(20))
        self.net, self.whole = linear(), torch.zeros(1, 20).long()

    def forward(self, x):
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        x = self.net((8 * x).round() / 8 - self.mean + 0 * self.whole[:1].float())
        self.whole, self.last = (8 * self.mean[None]).long(), x.detach()
        return x


def test_what_a_model_keeps_has_no_graph():
    model, (x, y) = Keeping(), (torch.rand(5, 20), torch.zeros(5).long())
    assert rounds(model, x)
    through_attack(model, x, y, ball=L2Ball(0.1), steps=3)
    for kept in (model.mean, model.last, model.whole):
        assert kept.any() and not kept.requires_grad and not vars(kept)
    copy.deepcopy(model)


def test_roundings_of_weights_are_none_of_the_model():
    net = nn.Linear(20, 3)
    quantized = parametrize.register_parametrization(net, "weight", Rounded())
    assert quantized.weight.requires_grad and not rounds(quantized, torch.rand(5, 20))
    assert quantized.parametrizations.weight.original.requires_grad


class Rounded(nn.Module):
    def forward(self, weight):
        return (8 * weight).round() / 8


def test_modules_are_in_eval_mode_and_stay_in_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(20), linear())
    before = model[0].running_mean.clone()
    assert not rounds(model, torch.rand(5, 20))
    assert model.training and torch.equal(model[0].running_mean, before)


@pytest.mark.slow  # as the compiler is loaded
def test_compiled_models_run_uncompiled():
    net = linear()
    model = torch.compile(lambda x: net((8 * x).round() / 8), backend="eager")
    x = torch.rand(5, 20)
    model(x)
    assert rounds(model, x)


def test_few_entries_move_by_a_whole_step():
    """Moving all entries by what the radius allows reaches no step; two alone do."""
    x = torch.full((1, 20), 0.1)
    x[0, :2] = 0.45
    ball, y = L2Ball(0.1), torch.zeros(1).long()

    def model(x):
        return torch.stack([torch.full((len(x),), 1.5), x.round().sum(1)], 1)

    assert through_attack(model, x, y, ball=ball, steps=20).fooled
    passed = StraightThrough(model)
    passed.widths = iter([None] * 99)  # the slope of the staircase alone
    assert not attack(passed, x, y, ball=ball, steps=20).fooled
    found = short_ensemble(model, x, y, ball=ball, steps=20, generator=seeded())
    assert found.fooled and found.zero_gradient and found.fooled_by[0].startswith("BPDA")


def test_gradients_that_are_passed_through_are_replaced():
    net, x, _ = a_problem((20,))
    y, settings = net(Passed.apply(x)).argmax(1), {"ball": L2Ball(0.3)}

    def found(run, rounded):
        return run(lambda x: net(rounded(x)), x, y, **settings)

    own, first = (found(run, Passed.apply) for run in (attack, through_attack))
    second = found(through_attack, SEEN["detached"])
    assert torch.equal(first.data, second.data)
    assert first.losses.mean() > own.losses.mean() and first.fooled.sum() >= own.fooled.sum()
