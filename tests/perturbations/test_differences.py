"""Gradients that are estimated from differences: exact for linear models, without autograd."""

import sys

import pytest
import torch
from test_attack import check_inside
from test_square import BALLS, N, a_problem, seeded

from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.differences import difference_attack
from rai_toolbox.perturbations.square import square_attack


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
def test_as_many_directions_as_features_give_the_gradient_of_a_linear_model(ball):
    weight = torch.randn(20, 2, generator=seeded())
    x, y = 0.5 + torch.zeros(N, 20), torch.zeros(N).long()
    ball = type(ball)(ball.epsilon / 4)  # so that no direction leaves the range

    def masked(x):
        return x.detach() @ weight

    found = difference_attack(masked, x, y, ball=ball, directions=64, steps=3, generator=seeded())
    best = attack(lambda x: x @ weight, x, y, ball=ball, steps=3)
    assert torch.allclose(found.losses, best.losses, rtol=1e-3)
    few = difference_attack(masked, x, y, ball=ball, directions=1, steps=1, generator=seeded())
    assert (few.losses < 0.9 * best.losses).all()


@pytest.mark.parametrize("most", [2, 16], ids=["large data", "small data"])
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
def test_it_fools_inside_the_set_with_a_few_times_the_data_at_a_time(ball, most, monkeypatch):
    if most == 2:
        monkeypatch.setattr(sys.modules[difference_attack.__module__], "BLOCK", 960)  # numbers
    net, x, y = a_problem((3, 4, 5))
    sizes = []

    def counted(x):
        assert not torch.is_grad_enabled() and x.min() >= 0 and x.max() <= 1
        sizes.append(len(x))
        return net(x)

    radii = torch.linspace(ball.epsilon / 2, ball.epsilon, N).double()
    mask = torch.rand(4, 5, generator=seeded()) < 0.8
    settings = {"ball": type(ball)(radii), "mask": mask, "directions": 32}
    found = difference_attack(counted, x, y, generator=seeded(), **settings)
    check_inside(found.data, x, type(ball), radii)
    assert torch.equal(found.data[..., ~mask], x[..., ~mask])
    assert torch.equal(found.fooled, net(found.data).argmax(1) != y) and found.fooled.any()
    assert max(sizes) == most * N and found.model_calls == len(sizes)
    again = difference_attack(net, x, y, generator=seeded(), **settings)
    assert torch.equal(again.data, found.data)


def test_narrow_differences_see_which_steps_are_near():
    x = torch.full((1, 20), 0.1)
    x[0, :2] = 0.45
    ball, y = L2Ball(0.1), torch.zeros(1).long()

    def staircase(x):
        return torch.stack([torch.full((len(x),), 1.5), (x > 0.5).sum(1).float()], 1)

    wide, narrowing = (
        difference_attack(staircase, x, y, ball=ball, width=20.0, narrowed=end, generator=seeded())
        for end in (1.0, 0.03)
    )
    assert narrowing.fooled and not wide.fooled


def test_any_criterion_and_grids():
    net, x, y = a_problem()
    x = (x * 255).round() / 255
    found = difference_attack(
        lambda x: {"values": net(x)[:, :2]},
        x,
        net(x).detach()[:, :2],
        ball=L2Ball(0.5),
        criterion=lambda output, values: (output["values"] - values).abs().sum(1),
        fooled=lambda output, values: (output["values"] - values).abs().sum(1) > 0.2,
        levels=256,
        generator=seeded(),
    )
    assert found.fooled.any() and torch.equal((found.data * 255).round() / 255, found.data)


def test_a_search_starts_where_it_is_told():
    net, x, y = a_problem()
    ball = LinfBall(0.02)
    start = attack(net, x, y, ball=ball, steps=20).data
    found = square_attack(net, x, y, ball=ball, queries=9, start=start, generator=seeded())
    kept = square_attack(net, x, y, ball=ball, queries=0, start=start + 1).losses
    fresh = square_attack(net, x, y, ball=ball, queries=9, generator=seeded())
    assert (found.losses >= attack(net, x, y, ball=ball, steps=20).losses).all()
    assert (found.losses > fresh.losses).float().mean() > 0.5
    assert torch.equal(kept, square_attack(net, x, y, ball=ball, queries=0, start=x + 0.02).losses)
    with pytest.raises(ValueError, match="`start` must have the shape of the data"):
        square_attack(net, x, y, ball=ball, start=start[:1])
