"""Data of few levels: what is found is on the grid, exactly in the ball, and judged there."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from host_reads import HostReads
from torch import nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import FrankWolfe
from rai_toolbox.perturbations import (
    attack,
    evaluate_robustness,
    is_fooled,
    margin_loss,
    minimum_norm_attack,
    nearest_rivals,
)
from rai_toolbox.perturbations.feasible_set import FeasibleSet

N, SIZE, CLASSES = 16, (3, 4, 4), 4
BALLS = [LinfBall(8 / 255), LinfBall(8.5 / 255), L2Ball(0.15), L1Ball(0.6)]
of_each_ball = pytest.mark.parametrize("ball", BALLS, ids=repr)


def bytes_of(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    x = bytes_of(N, *SIZE).float() / 255
    return net, x, net(x).argmax(1)


def check_inside(found, x, ball, radii=None):
    """In exact arithmetic: the root of a sum of squares is not taken."""
    for i, (one, other) in enumerate(zip(found.flatten(1), x.flatten(1), strict=True)):
        radius = Fraction(float(ball.epsilon if radii is None else radii[i]))
        change = [
            abs(Fraction(a) - Fraction(b))
            for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ]
        if isinstance(ball, LinfBall):
            assert max(change) <= radius
        else:
            assert sum(c**ball.p for c in change) <= radius**ball.p


def check_on_grid(data):
    assert torch.equal((data.double() * 255).round().to(data.dtype) / 255, data)


@of_each_ball
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_is_returned_is_on_the_grid_and_in_the_ball(problem, ball, dtype):
    net, x, y = problem
    net, x = net.to(dtype), bytes_of(N, *SIZE).to(dtype) / 255
    found = attack(net, x, y, ball=ball, steps=15, levels=256)
    check_on_grid(found.data)
    check_inside(found.data, x, ball)
    with torch.no_grad():  # the verdict is that of the rounded point
        assert torch.equal(found.losses, margin_loss(net(found.data), y))
        assert torch.equal(found.fooled, is_fooled(net(found.data), y))
        # which is nearly as bad as one that is on no grid
        gain = margin_loss(net(found.data), y) - margin_loss(net(x), y)
        between = attack(net, x, y, ball=ball, steps=15).losses - margin_loss(net(x), y)
    assert gain.sum() > 0.85 * between.sum() > 0


OPTIONS = {
    "stop": {"stop_once_fooled": True, "restarts": 2},
    "random": {"random_start": True},
    "rivals": {"rivals": 2},
    "nearest": {"rivals": nearest_rivals},
    "oracle": {"optimizer": FrankWolfe},
    "no steps": {"steps": 0, "random_start": True},
    "targeted": {"targeted": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ball", [BALLS[0], BALLS[2]], ids=repr)
def test_all_settings_keep_to_the_grid(problem, name, ball):
    net, x, y = problem
    found = attack(net, x, y, ball=ball, levels=256, **{"steps": 6, **OPTIONS[name]})
    check_on_grid(found.data)
    check_inside(found.data, x, ball)
    assert not torch.equal(found.data, x)


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_radii_of_the_examples_and_a_mask(problem, ball):
    net, x, y = problem
    mask = torch.arange(48).view(SIZE) < 24
    x[:, ~mask] = (x[:, ~mask] * 255).round() / 255
    radii = torch.linspace(0, 0.2, N)
    found = attack(net, x, y, ball=ball(radii), mask=mask, levels=256, steps=6)
    check_on_grid(found.data)
    check_inside(found.data, x, ball(0.0), radii)
    changed = found.data != x
    assert changed[:, mask].any() and not changed[:, ~mask].any() and not changed[0].any()


def test_levels_of_a_radius(problem):
    net, x, y = problem

    def moved(epsilon):
        found = attack(net, x, y, ball=LinfBall(epsilon), levels=256, steps=9).data
        return set(((found.double() - x.double()).abs() * 255).round().flatten().tolist())

    assert max(moved(8.5 / 255)) == 8
    assert max(moved(7.99 / 255)) == 7
    assert {7, 8} <= moved(8 / 255) <= set(range(9))  # as k/255 is rounded
    assert moved(0.9 / 255) == {0}


@pytest.mark.parametrize(
    "data_range",
    [
        (-1.0, 1.0),
        (0.0, 255.0),
        (
            torch.tensor([-2.1, -2.0, -1.8]).view(3, 1, 1),
            torch.tensor([2.2, 2.4, 2.6]).view(3, 1, 1),
        ),
        (0.0, torch.arange(16.0).view(4, 4)),  # the first pixel has one level
    ],
)
@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.5)], ids=repr)
def test_any_range(problem, data_range, ball):
    net, k, y = problem[0][:2], bytes_of(N, *SIZE), problem[2]
    lower, upper = map(torch.as_tensor, data_range)
    for x in (
        k / 255 * (upper - lower) + lower,
        (k / 255 * (upper - lower) + lower).nextafter(upper),
    ):
        x = x.clamp(lower, upper)
        found = attack(net, x, y, ball=ball, data_range=data_range, levels=256, steps=5).data
        level = (found - lower) / (upper - lower).clamp(min=1e-9) * 255
        assert (level - level.round()).abs().max() < 1e-3
        assert (found >= lower).all() and (found <= upper).all()
        check_inside(found, x, ball)
        # what did not change is what it was, bit for bit
        assert torch.equal(found[level.round() == k], x[level.round() == k])


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_the_nearest_points(ball):
    x = bytes_of(40, 9).float() / 255
    allowed = FeasibleSet.around(x, ball(0.1), (0.0, 1.0), None, levels=256)
    draw = torch.Generator().manual_seed(2)
    for scale in (0.02, 0.1, 1.0):
        change = scale * torch.randn(40, 9, generator=draw)
        change = allowed.of_perturbations().project(change)
        found = allowed.on_grid(change)
        check_on_grid(found)
        check_inside(found, x, ball(0.1))
        levels = change.double() * 255
        moved = ((found.double() - x.double()) * 255).round()
        most = levels.round()
        assert (moved == most).float().mean() > 0.5
        assert ((moved == most) | (moved == most - most.sign())).all()
        nearest = ((x.double() * 255 + most).round() / 255).float() - x  # in the ball with ease
        fits = torch.linalg.vector_norm(nearest.double(), ball(1).p, dim=1) < 0.1 - 1e-6
        assert (moved == most)[fits].all() and (fits.any() or scale > 0.02)


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_the_smallest_perturbations(problem, ball):
    net, x, y = problem
    run = partial(minimum_norm_attack, net, x, y, ball=ball, steps=10)
    found, between = run(levels=256), run()
    check_on_grid(found.data)
    assert torch.equal(found.fooled, is_fooled(net(found.data), y)) and found.fooled.all()
    change = (found.data.double() - x.double()).flatten(1)
    torch.testing.assert_close(found.radius, torch.linalg.vector_norm(change, ball(1).p, dim=1))
    ratio = found.radius / between.radius
    assert ratio.median() < 1.1 and ratio.min() > 0.99
    none = run(levels=256, largest=0.9 / 255)
    missed = ~none.fooled
    assert missed.any() and none.radius[missed].isinf().all()
    assert torch.equal(none.data[missed], x[missed])


def test_on_a_linear_model_the_least_number_of_levels():
    torch.manual_seed(0)
    net, x = nn.Linear(20, 2).double(), 0.3 + 0.4 * torch.rand(30, 20).double()
    x = (x * 255).round() / 255
    y = net(x).argmax(1)
    found = minimum_norm_attack(net, x, y, ball=LinfBall, levels=256, search_steps=20, steps=5)
    slope = (net.weight[0] - net.weight[1]).abs().sum()
    least = (-margin_loss(net(x), y) / slope * 255).ceil().detach()
    torch.testing.assert_close(found.radius * 255, least, rtol=1e-6, atol=0)


def test_an_evaluation_on_the_grid(problem):
    net, x, y = problem
    report = evaluate_robustness(
        net, [(x, y)], balls=[LinfBall(4.5 / 255)], progress=False, steps=9,
        solver=partial(attack, levels=256),
    )  # fmt: skip
    check_on_grid(report.examples[0].perturbed)
    assert report.settings["solver"]["levels"] == 256


def test_no_step_reads_a_value(problem, as_on_a_device):
    net, x, y = problem

    def reads(steps):
        with HostReads() as mode:
            attack(net, x, y, ball=L2Ball(0.2), steps=steps, levels=256)
        return mode.count

    assert reads(3) == reads(30)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"data_range": None}, ValueError, "`data_range` must be finite where there are `levels`"),
        ({"data_range": (0.0, torch.inf)}, ValueError, "`data_range` must be finite where there"),
        ({"levels": 1}, ValueError, "`levels` must be >= 2, got 1"),
        ({"levels": 256.0}, TypeError, "`levels` must be an int, got 256.0"),
        ({"levels": 2**23}, ValueError, "`levels` must be few enough for data of torch.float32"),
        (
            {"levels": 255},
            ValueError,
            r"`data` must be on the grid of 255 levels of `data_range` \(",
        ),
        (
            {"data": lambda x: x.bfloat16()},
            ValueError,
            "`levels` must be few enough for data of torch.bfloat16, got 256",
        ),
        (
            {"data": lambda x: x * 0.9},
            ValueError,
            r"\(data \* 255\).round\(\) / 255`\), got 0.\d+ a",
        ),
    ],
)
def test_bad_input(problem, options, error, said):
    net, x, y = problem
    options = {"levels": 256, **options}
    x = options.pop("data", lambda x: x)(x)
    with pytest.raises(error, match=said):
        attack(net, x, y, ball=L2Ball(0.1), **options)
    with pytest.raises(error, match=said):
        minimum_norm_attack(net, x, y, ball=L2Ball, largest=1.0, **options)
