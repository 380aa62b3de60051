"""The search without gradients: where it stays, what it finds, and what it costs."""

from functools import partial

import pytest
import torch
from test_attack import check_inside
from torch import nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.square import square_attack
from rai_toolbox.perturbations.windows import Windows, window_share

N = 16
SHAPES = {"table": (20,), "series": (2, 10), "image": (3, 6, 5), "video": (2, 3, 4, 4)}
BALLS = [LinfBall(0.07), L2Ball(0.4), L1Ball(1.3)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_problem(shape=(20,), seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    x = (1.4 * torch.rand(N, *shape) - 0.2).clamp(0, 1).to(dtype)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 30), nn.Tanh(), nn.Linear(30, 4))
    with torch.no_grad():
        net[1].weight.mul_(2)
    net = net.to(dtype)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_fools_inside_the_set_and_reports_what_it_returns(ball, shape):
    net, x, y = a_problem(shape)
    found = square_attack(net, x, y, ball=ball, queries=60, generator=seeded())
    check_inside(found.data, x, type(ball), ball.epsilon)
    logits = net(found.data)
    assert torch.equal(found.fooled, logits.argmax(1) != y) and found.fooled.any()
    assert torch.equal(found.losses, margin_loss(logits, y))
    assert not found.zero_gradient.any()
    again = square_attack(net, x, y, ball=ball, queries=60, generator=seeded())
    assert torch.equal(again.data, found.data)


def check_random_problem(seed):
    draw = seeded(seed)
    kind = (LinfBall, L2Ball, L1Ball)[seed % 3]
    shape = list(SHAPES.values())[seed // 3 % 4]
    levels = (None, 256, 5)[seed // 12 % 3]
    dtype = (torch.float32, torch.float64, torch.bfloat16)[seed // 36 % 3]
    if levels == 256 and dtype == torch.bfloat16:
        dtype = torch.float32
    net, x, y = a_problem(shape, seed, dtype)
    mask = torch.rand(shape, generator=draw) < 0.7 if seed % 2 else None
    if levels is not None:
        x = (x * (levels - 1)).round() / (levels - 1)
    epsilon = torch.rand(N, generator=draw).double() * {LinfBall: 0.6, L2Ball: 1, L1Ball: 4}[kind]
    settings = {"queries": 9, "generator": draw, "mask": mask, "levels": levels}
    found = square_attack(net, x, y, ball=kind(epsilon), **settings).data
    check_inside(found, x, kind, epsilon)
    if mask is not None:
        assert torch.equal(found[:, ~mask], x[:, ~mask])
    if levels is not None:
        assert torch.equal((found * (levels - 1)).round() / (levels - 1), found)


def test_it_stays_in_ball_range_mask_and_grid():
    for seed in range(0, 108, 5):
        check_random_problem(seed)


@pytest.mark.slow
def test_it_stays_in_the_sets_of_a_thousand_problems():
    for seed in range(1000):
        check_random_problem(seed)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
def test_it_comes_near_an_attack_with_gradients(ball):
    net, x, y = a_problem((20,), seed=1)
    best = attack(net, x, y, ball=ball, steps=40).losses
    start = margin_loss(net(x), y)
    far = square_attack(net, x, y, ball=ball, queries=300, generator=seeded()).losses
    # (once fooled, it does not go on)
    share = (far.clamp(max=0) - start) / (best.clamp(max=0) - start)
    assert share.median() > 0.75


def test_gradients_are_not_needed_and_those_of_0_do_not_matter():
    net, x, y = a_problem()
    weight = [p.detach().numpy() for p in net.parameters()]

    def predict(x):
        import numpy as np

        x = (8 * x.numpy()).round() / 8
        hidden = np.tanh(x @ weight[0].T + weight[1])
        return torch.from_numpy(hidden @ weight[2].T + weight[3])

    y = predict(x).argmax(1)
    found = square_attack(predict, x, y, ball=LinfBall(0.07), queries=100, generator=seeded())
    assert found.fooled.float().mean() > 0.3
    assert torch.equal(predict(found.data).argmax(1) != y, found.fooled)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_losses_may_be_whole_numbers(dtype):
    net, x, y = a_problem()

    def criterion(output, target):
        return (output.argmax(1) != target).to(dtype)

    search = partial(square_attack, net, x, y, ball=L2Ball(0.4), queries=9)
    found = search(criterion=criterion, generator=seeded())
    same = search(criterion=lambda *args: criterion(*args).float(), generator=seeded())
    assert torch.equal(found.data, same.data)
    assert torch.equal(found.losses, same.losses)


def test_it_wanders_where_the_output_is_constant():
    net, x, y = a_problem()

    def verdict(x):
        return nn.functional.one_hot(net(x).argmax(1), 4).float()

    ball = LinfBall(0.1)
    best = square_attack(net, x, y, ball=ball, queries=200, generator=seeded()).fooled
    blind = square_attack(verdict, x, y, ball=ball, queries=200, generator=seeded()).fooled
    stuck = square_attack(verdict, x, y, ball=ball, queries=1, generator=seeded()).fooled
    assert stuck.sum() + 3 < blind.sum() >= best.sum() - 4


def test_it_does_not_wander_once_a_loss_has_changed():
    _, x, y = a_problem((3, 6, 5))

    def two_values(points):  # such as of rounded data
        changed = (points != x).flatten(1).any(1)
        return torch.stack([torch.ones(N), 0.5 * changed], 1)

    run = partial(square_attack, two_values, x, 0 * y, ball=L1Ball(1.3))
    once, often = (run(queries=n, generator=seeded()).data for n in (1, 20))
    assert torch.equal(once, often) and (once != x).flatten(1).any(1).all()


def test_only_survivors_are_queried():
    net, x, y = a_problem()
    y[:5] = (y[:5] + 1) % 4  # wrong at once
    sizes = []

    def counted(data):
        sizes.append(len(data))
        return net(data)

    found = square_attack(counted, x, y, ball=LinfBall(0.07), queries=50, generator=seeded())
    assert torch.equal(found.data[:5], x[:5])
    assert sizes[0] == sizes[-1] == N and len(sizes) == found.model_calls == 52
    assert sizes[1] == N - 5 and sizes[-2] == int((~found.fooled).sum()) < N - 5
    assert sizes[1:-1] == sorted(sizes[1:-1], reverse=True)


def test_targeted_with_two_classes_and_a_rule_of_its_own():
    net, x, _ = a_problem()
    goal = torch.arange(N) % 4
    run = partial(square_attack, data=x, ball=L2Ball(1.5), queries=100, generator=seeded())
    found = run(net, target=goal, targeted=True)
    assert torch.equal(found.fooled, net(found.data).argmax(1) == goal)
    assert found.fooled.sum() > (net(x).argmax(1) == goal).sum()
    two = run(lambda x: net(x)[:, :2], target=goal % 2)
    assert two.fooled.any()
    values = net(x).detach()[:, 0]
    by_rule = run(
        net,
        target=values,
        criterion=lambda logits, value: (logits[:, 0] - value).abs(),
        fooled=lambda logits, value: (logits[:, 0] - value).abs() > 0.3,
    )
    assert torch.equal(by_rule.fooled, (net(by_rule.data)[:, 0] - values).abs() > 0.3)
    assert by_rule.fooled.any()


BAD = {
    "queries": ({"queries": -1}, "`queries` must be >= 0, got -1"),
    "one class": ({"model": lambda x: x[:, :1]}, "of two classes at least, got Tensor of shape"),
    "class": ({"target": torch.full((N,), 4)}, "`target` must hold classes from 0 to 3, got 4"),
    "data": ({"data": torch.full((N, 20), 2.0)}, "`data` must be within `data_range`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    settings = dict(zip(("model", "data", "target"), a_problem(), strict=True))
    change, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        square_attack(**{**settings, "ball": LinfBall(0.1), "queries": 3, **change})


def test_no_examples_and_a_radius_of_0():
    net, x, y = a_problem()
    assert len(square_attack(net, x[:0], y[:0], ball=L2Ball(1.0), queries=3).data) == 0
    assert torch.equal(square_attack(net, x, y, ball=L1Ball(0.0), queries=9).data, x)


def test_windows_shrink_as_published():
    shares = [window_share(query, 10_000) for query in (0, 10, 11, 50, 51, 1000, 1001, 8001)]
    assert shares == [0.8, 0.8, 0.4, 0.4, 0.2, 0.05, 0.025, 0.8 / 512]
    assert window_share(99, 100) == 0.8 / 512


def test_what_windows_change():
    image = Windows(torch.Size((3, 8, 8)), float("inf"), seeded())
    start, radius = torch.zeros(40, 3, 8, 8), torch.ones(1, 1, 1)
    stripes = image.first(start, radius)
    assert (stripes.abs() == 1).all() and (stripes == stripes[:, :, :1]).all()
    changed = image.next(start, radius, 0.25) != 0  # a square of 4 x 4
    assert (changed.sum((1, 2, 3)) == 48).all() and (changed == changed[:, :1]).all()
    assert (changed.any(3).sum(2) == 4).all() and (changed.any(2).sum(2) == 4).all()
    assert len(changed[:, 0].flatten(1).unique(dim=0)) > 10  # each example has its own
    table = Windows(torch.Size((8,)), float("inf"), seeded())
    changed = table.next(torch.zeros(40, 8), radius, 0.25)
    assert ((changed != 0).sum(1) == 2).all() and (changed.sum(1) == 0).any()


def test_in_l2_the_norm_of_the_ball_is_moved_not_changed():
    windows = Windows(torch.Size((2, 9, 7)), 2.0, seeded())
    radius = torch.full((5, 1, 1), 0.5)
    change = windows.first(torch.zeros(5, 2, 9, 7), radius)
    for _ in range(20):
        torch.testing.assert_close(change.flatten(1).norm(dim=1), radius.view(-1))
        change = windows.next(change, radius, 0.2)


def test_in_l1_few_entries_have_most_of_the_norm():
    windows = Windows(torch.Size((1, 28, 28)), 1.0, seeded())
    radius = torch.full((5, 1, 1), 5.0)
    start = windows.first(torch.zeros(5, 1, 28, 28), radius)
    assert ((L1Ball(5.0).project(start) != 0).flatten(1).sum(1) <= 50).all()
    window = windows.next(torch.zeros(5, 1, 28, 28), radius, 0.1)  # 9 x 9
    most = window.abs().flatten(1).topk(2).values.sum(1)
    assert (most > 2.5).all() and (window.abs().flatten(1).sum(1) > 4.99).all()
    table = Windows(torch.Size((64,)), 1.0, seeded())
    change = table.next(torch.zeros(5, 64), radius, 0.8).abs()
    assert (change.amax(1) > 4).all() and (change.sum(1) > 4.99).all()


def test_each_channel_keeps_the_norm_of_its_windows():
    windows = Windows(torch.Size((2, 9, 7)), 2.0, seeded())
    change, radius = torch.zeros(5, 2, 9, 7), torch.full((5, 1, 1), 0.5)
    change[:, 0] = 0.5 / 63**0.5
    for _ in range(5):
        change = windows.next(change, radius, 0.5)
        assert change[:, 1].abs().max() < 1e-3
