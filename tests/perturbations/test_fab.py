"""The attack along the decision boundary: nearest points, within a radius or of any."""

from functools import partial

import pytest
import torch
from test_attack import check_inside
from test_linear_models import exact_gain
from test_square import BALLS, N, a_problem, seeded

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.fab import fab_attack
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.minimum_norm import minimum_norm_attack
from rai_toolbox.perturbations.solvers import ZeroGradientWarning

OPTIONS = {"untargeted": {}, "targeted": {"rivals": 3}}


def exact_radius(weight, bias, x, y, kind):
    """The radius at which a linear classifier is fooled within [0, 1], by bisection."""
    logits = weight @ x + bias
    low, high = 0.0, 20.0
    for _ in range(60):
        epsilon = (low + high) / 2
        margins = [
            logits[j] - logits[y] + exact_gain(weight[j] - weight[y], x, kind, epsilon)
            for j in range(len(bias))
            if j != y
        ]
        low, high = (low, epsilon) if max(margins) > 0 else (epsilon, high)
    return high


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [LinfBall, L2Ball, L1Ball])
def test_norms_are_smallest_for_a_linear_model(kind, options):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(12, 4).double(), torch.rand(N, 12).double().round(decimals=1)
    y = model(x).argmax(1)
    solver = partial(fab_attack, **options)
    found = minimum_norm_attack(model, x, y, ball=kind, steps=20, solver=solver)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    exact = [
        exact_radius(weight, bias, *pair, kind) for pair in zip(x.numpy(), y.tolist(), strict=True)
    ]
    assert found.fooled.all()
    assert (found.radius <= 1.001 * torch.tensor(exact)).all()
    assert (found.radius >= (1 - 1e-6) * torch.tensor(exact)).all()
    check_inside(found.data, x, kind, 1.001 * torch.tensor(exact))


@pytest.mark.parametrize("kind", [LinfBall, L2Ball, L1Ball])
def test_norms_are_about_those_of_the_bisection_in_one_call(kind):
    net, x, y = a_problem()
    searched = minimum_norm_attack(net, x, y, ball=kind)
    calls = []

    def counted(data):
        calls.append(len(data))
        return net(data)

    found = minimum_norm_attack(counted, x, y, ball=kind, steps=60, solver=fab_attack)
    assert found.fooled.all() and (found.radius.mean() < 1.03 * searched.radius.mean())
    assert (net(found.data).argmax(1) != y).all()
    check_inside(found.data, x, kind, found.radius * (1 + 1e-12))
    assert len(calls) < 2 * 60 + 20


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
def test_within_a_radius(ball, options):
    net, x, y = a_problem((3, 6, 5))
    found = fab_attack(net, x, y, ball=ball, steps=30, stop_once_fooled=True, **options)
    check_inside(found.data, x, type(ball), ball.epsilon)
    assert torch.equal(found.fooled, net(found.data).argmax(1) != y)
    assert torch.equal(found.losses, margin_loss(net(found.data), y))
    best = attack(net, x, y, ball=ball, steps=30, rivals=3).fooled
    assert 0 < found.fooled.sum() >= best.sum() - 1
    assert not found.zero_gradient.any()


def test_fooled_at_once_and_radii_that_differ():
    net, x, y = a_problem()
    y[0] = (y[0] + 1) % 4
    radii = torch.linspace(0.0, 0.6, N)
    found = fab_attack(net, x, y, ball=L2Ball(radii), steps=15)
    check_inside(found.data, x, L2Ball, radii)
    assert torch.equal(found.data[0], x[0]) and found.fooled[0]
    column = fab_attack(net, x, y, ball=L2Ball(radii.view(N, 1)), steps=15)
    assert torch.equal(column.data, found.data)


def test_targets_masks_grids_and_restarts():
    net, x, y = a_problem()
    x = (x * 255).round() / 255
    goal, mask = (y + 1) % 4, torch.arange(20) > 4
    settings = {"ball": L2Ball(2.0), "steps": 30, "mask": mask, "levels": 256}
    found = fab_attack(net, x, goal, targeted=True, restarts=2, generator=seeded(), **settings)
    assert torch.equal(found.fooled, net(found.data).argmax(1) == goal)
    assert found.fooled.sum() > N / 2
    assert torch.equal(found.data[:, ~mask], x[:, ~mask])
    assert torch.equal((found.data * 255).round() / 255, found.data)
    for kind, radius in ((L2Ball, 2.0), (L2Ball, 0.2), (L1Ball, 0.3), (LinfBall, 0.05)):
        settings["ball"] = kind(radius)  # also where what is found is beyond
        found = fab_attack(net, x, y, **settings)
        check_inside(found.data, x, kind, radius)
        assert torch.equal((found.data * 255).round() / 255, found.data)


def test_gradients_of_0_are_reported():
    net, x, y = a_problem()

    def rounded(x):
        return net((x * 8).round() / 8)

    y = rounded(x).argmax(1)
    with pytest.warns(ZeroGradientWarning, match=f"of {N} of {N} examples is 0"):
        found = fab_attack(rounded, x, y, ball=LinfBall(0.1), steps=99, rivals=2)
    assert found.zero_gradient.all() and torch.equal(found.data, x)
    assert found.model_calls == 6  # one step of each run, as none moves


BAD = {
    "steps": ({"steps": 0}, "`steps` must be >= 1, got 0"),
    "rivals": ({"rivals": 4}, "`rivals` must be from 1 to 3, .* classes, got 4"),
    "both": ({"rivals": 1, "targeted": True}, "`rivals` must be None with `targeted`"),
    "one class": ({"model": lambda x: x[:, :1]}, "of two classes at least, got Tensor of shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    settings = dict(zip(("model", "data", "target"), a_problem(), strict=True))
    change, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        fab_attack(**{**settings, "ball": LinfBall(0.1), **change})


def test_two_classes():
    net, x, _ = a_problem()
    y = net(x)[:, :2].argmax(1)
    assert fab_attack(lambda x: net(x)[:, :2], x, y, ball=L2Ball(2.0), rivals=1).fooled.any()
