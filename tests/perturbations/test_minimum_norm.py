"""Least radii against closed forms and the exact worst case in a box, on linear classifiers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tiers import slow_but
from torch import nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall, Simplex
from rai_toolbox.optim import FrankWolfe
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.minimum_norm import minimum_norm_attack
from rai_toolbox.perturbations.rivals import nearest_rivals

BALLS = [LinfBall, L2Ball, L1Ball]
ORDERS = {LinfBall: math.inf, L2Ball: 2, L1Ball: 1}
DUALS = {LinfBall: 1, L2Ball: 2, L1Ball: math.inf}
N, SIZE, CLASSES = 8, 6, 4

# One step of it is exact where the loss is linear: that of each rival of a linear classifier.
exact = partial(attack, optimizer=FrankWolfe, rivals=CLASSES - 1)
search = partial(minimum_norm_attack, steps=1, search_steps=25, solver=exact)

in_each_norm = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.__name__)


def problem(seed=0, dtype=torch.float64, shape=(SIZE,)):
    """A linear classifier, data in the unit box, and the classes that it gives them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), CLASSES)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    data = torch.rand(N, *shape, dtype=dtype, generator=generator)
    return model, data, model(data).argmax(1)


def rivals(model, data, target):
    """Rows c and margins m of each example and rival: fooled where ``m + c . delta > 0``."""
    weight, logits = model[1].weight.detach(), model(data).detach()
    for row in range(len(data)):
        others = [j for j in range(CLASSES) if j != target[row]]
        yield (
            weight[others] - weight[target[row]],
            logits[row, others] - logits[row, target[row]],
        )


def least_in_box(ball, c, m, x):
    """The least norm of a delta with ``m + c . delta >= 0`` and ``x + delta`` in the unit box."""
    n = len(c)
    bounds = [(-v, 1 - v) for v in x]
    if ball is L2Ball:
        start = [b[1] if v > 0 else b[0] for v, b in zip(c, bounds, strict=True)]
        if c @ start + m < 0:
            return math.inf
        found = minimize(
            lambda d: d @ d,
            start,
            jac=lambda d: 2 * d,
            bounds=bounds,
            constraints={"type": "ineq", "fun": lambda d: m + c @ d, "jac": lambda d: c},
            options={"ftol": 1e-15, "maxiter": 500},
            method="SLSQP",
        )
        return math.sqrt(found.fun)
    eye, r = np.eye(n), 1 if ball is LinfBall else n  # |delta_i| <= t, or t_i
    t = np.ones((n, 1)) if ball is LinfBall else eye
    rows = np.block([[eye, -t], [-eye, -t], [-c[None], np.zeros((1, r))]])
    right = np.concatenate([np.zeros(2 * n), [m]])
    cost = np.concatenate([np.zeros(n), np.ones(r)])
    found = linprog(cost, rows, right, bounds=[*bounds, *[(0, None)] * r])
    return found.fun if found.success else math.inf


@in_each_norm
@pytest.mark.parametrize("seed", range(3))
def test_without_a_box_it_is_the_distance_from_the_boundary(ball, seed):
    model, data, target = problem(seed)
    found = search(model, data, target, ball=ball, data_range=None, largest=1e3)
    for radius, (c, m) in zip(found.radius, rivals(model, data, target), strict=True):
        least = (-m / torch.linalg.vector_norm(c, DUALS[ball], dim=1)).min()
        assert least <= radius <= least * (1 + 1e-3)
    assert found.fooled.all()


def least_radii(ball, model, data, target):
    """The exact ones in the unit box, inf where nothing fools."""
    cases = zip(data.numpy(), rivals(model, data, target), strict=True)
    return [
        min(
            least_in_box(ball, of_rival, margin, x)
            for of_rival, margin in zip(c.numpy(), m.tolist(), strict=True)
        )
        for x, (c, m) in cases
    ]


@in_each_norm
@pytest.mark.parametrize("seed", slow_but(range(3)))
@pytest.mark.parametrize("of", [CLASSES - 1, nearest_rivals], ids=["all", "nearest"])
def test_in_a_box_it_is_that_of_an_exact_solver(ball, seed, of):
    model, data, target = problem(seed)
    solver = partial(attack, optimizer=FrankWolfe, rivals=of)
    found = search(model, data, target, ball=ball, solver=solver)
    for radius, least in zip(found.radius, least_radii(ball, model, data, target), strict=True):
        if math.isinf(least):
            assert math.isinf(radius)
        else:
            assert least * (1 - 1e-6) <= radius <= least * (1 + 1e-3)


@pytest.mark.parametrize("ball", slow_but(BALLS, L1Ball), ids=lambda ball: ball.__name__)
def test_by_default_it_is_exact_where_the_likeliest_rival_is_not_the_nearest(ball):
    model, data, target = problem(5)
    least = torch.tensor(least_radii(ball, model, data, target))
    some = least.isfinite()
    settings = {"ball": ball, "steps": 40, "search_steps": 25}
    found = minimum_norm_attack(model, data, target, **settings)
    assert torch.equal(found.fooled, some)
    ratio = found.radius[some] / least[some]
    assert (1 - 1e-6 <= ratio).all() and (ratio <= 1.002).all()
    one = minimum_norm_attack(model, data, target, solver=partial(attack, rivals=1), **settings)
    assert (one.radius[some] > 1.05 * least[some]).any()


@in_each_norm
@pytest.mark.parametrize("tolerance", [0.1, 1e-5])
def test_the_tolerance_is_kept(ball, tolerance):
    model, data, target = problem(3)
    settings = {"ball": ball, "data_range": None, "largest": 1e3, "tolerance": tolerance}
    found = search(model, data, target, **settings, search_steps=40)
    for radius, (c, m) in zip(found.radius, rivals(model, data, target), strict=True):
        least = (-m / torch.linalg.vector_norm(c, DUALS[ball], dim=1)).min()
        assert least <= radius <= least * (1 + tolerance)


@in_each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_returned_fools_at_its_radius_and_stays_in_the_box(ball, dtype):
    model, data, target = problem(1, dtype, shape=(1, 3, 4))
    found = search(model, data, target, ball=ball)
    assert torch.equal(model(found.data).argmax(1) != target, found.fooled)
    assert found.data.dtype == dtype and 0 <= found.data.min() and found.data.max() <= 1
    delta = (found.data.double() - data.double()).flatten(1)
    distance = torch.linalg.vector_norm(delta, ORDERS[ball], dim=1)
    torch.testing.assert_close(found.radius[found.fooled], distance[found.fooled])
    assert found.fooled.any()


@in_each_norm
def test_what_cannot_be_fooled_is_inf_and_stays_as_it_is(ball):
    model, data, target = problem(2)
    found = search(model, data, target, ball=ball, largest=1e-6)
    assert found.radius.isinf().all() and not found.fooled.any()
    assert torch.equal(found.data, data)


@in_each_norm
def test_what_is_misread_has_radius_0_and_stays_as_it_is(ball):
    model, data, target = problem(4)
    wrong = torch.arange(N) % 2 == 0
    target = torch.where(wrong, (target + 1) % CLASSES, target)
    found = search(model, data, target, ball=ball)
    assert not found.radius[wrong].any() and torch.equal(found.data[wrong], data[wrong])
    assert found.fooled[wrong].all() and (found.radius[~wrong] > 0).all()


@in_each_norm
def test_rows_do_not_know_of_each_other(ball):
    model, data, target = problem(5)
    together = search(model, data, target, ball=ball)
    apart = [search(model, data[i : i + 1], target[i : i + 1], ball=ball) for i in range(3)]
    torch.testing.assert_close(together.radius[:3], torch.cat([one.radius for one in apart]))


@in_each_norm
def test_targeted_it_is_where_the_wanted_class_wins(ball):
    model, data, target = problem(6)
    weight = model[1].weight.detach()
    wanted = (target + 1) % CLASSES
    found = minimum_norm_attack(
        model,
        data,
        wanted,
        ball=ball,
        data_range=None,
        largest=1e3,
        targeted=True,
        steps=40,
        search_steps=8,
    )
    assert torch.equal(model(found.data).argmax(1), wanted) and found.fooled.all()
    logits = model(data).detach()
    for row in range(N):
        y = wanted[row]
        others = [j for j in range(CLASSES) if j != y]
        c, m = weight[y] - weight[others], logits[row, y] - logits[row, others]
        # it has to win against each of them: no less than the farthest of the boundaries
        least = (-m / torch.linalg.vector_norm(c, DUALS[ball], dim=1)).max()
        assert found.radius[row] >= least * (1 - 1e-9)


@in_each_norm
def test_entries_outside_the_mask_do_not_change(ball):
    model, data, target = problem(7)
    mask = torch.tensor([True, True, True, True, False, False])
    masked = search(model, data, target, ball=ball, mask=mask)
    free = search(model, data, target, ball=ball)
    assert torch.equal(masked.data[:, 4:], data[:, 4:])
    assert (masked.radius >= free.radius * (1 - 2e-3)).all()
    cut = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES).double())
    with torch.no_grad():
        cut[1].weight.copy_(model[1].weight[:, :4])
    for row in range(3):
        with torch.no_grad():
            cut[1].bias.copy_(model[1].bias + model[1].weight[:, 4:] @ data[row, 4:])
        one = search(cut, data[row : row + 1, :4], target[row : row + 1], ball=ball)
        torch.testing.assert_close(masked.radius[row], one.radius[0], rtol=2e-3, atol=0)


def test_bounds_of_each_element_are_kept():
    model, data, target = problem(8)
    lower, upper = (data - 0.3).clamp(min=0), (data + torch.rand(SIZE)).clamp(max=1)
    found = search(model, data, target, ball=L2Ball, data_range=(lower, upper))
    assert (lower <= found.data).all() and (found.data <= upper).all() and found.fooled.any()


def test_a_module_is_as_before_and_grad_mode_does_not_matter():
    model, data, target = problem(9)
    model.append(nn.Dropout(0.5)).train()
    with torch.inference_mode():
        found = search(model, data, target, ball=L2Ball)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    torch.testing.assert_close(found.radius, search(model.eval(), data, target, ball=L2Ball).radius)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_claimed_holds_for_the_batch_that_is_returned(seed):
    # the examples depend on each other, and each was found in another batch
    torch.manual_seed(seed)
    layer, data = nn.Linear(4, 3), torch.rand(40, 4)

    def model(x):
        return layer(x - x.mean(0))

    target = model(data).argmax(1)
    found = minimum_norm_attack(model, data, target, ball=L2Ball, steps=4, search_steps=4)
    assert torch.equal(found.fooled, model(found.data).argmax(1) != target)
    distance = (found.data.double() - data.double()).norm(dim=1)
    torch.testing.assert_close(found.radius[found.fooled], distance[found.fooled])
    assert found.radius[~found.fooled].isinf().all()


def test_on_a_boundary_the_radius_is_next_to_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    data = torch.tensor([[0.5, 0.5]])  # a draw, in which class 0 is named
    solver = partial(attack, optimizer=FrankWolfe)
    found = search(model, data, torch.tensor([0]), ball=LinfBall, solver=solver)
    assert 0 < found.radius.item() < 1e-4


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (TypeError, "`ball` must be the class LinfBall, L2Ball or L1Ball", {"ball": L2Ball(1.0)}),
        (TypeError, "`ball` must be the class LinfBall, L2Ball or L1Ball", {"ball": Simplex}),
        (ValueError, "`steps` must be >= 1, got 0", {"steps": 0}),
        (TypeError, "`search_steps` must be an int, got 2.0", {"search_steps": 2.0}),
        (ValueError, "`tolerance` must be > 0 and < 1, got 0", {"tolerance": 0}),
        (ValueError, "`largest` must be given if `data_range`", {"data_range": None}),
        (ValueError, "`largest` must be >= 0, got -1", {"largest": -1}),
        (ValueError, "`data` must be within `data_range`", {"data_range": (0.4, 0.6)}),
    ],
)
def test_wrong_settings_are_refused(error, message, settings):
    model, data, target = problem()
    with pytest.raises(error, match=message):
        search(model, data, target, **{"ball": L2Ball, **settings})


@pytest.mark.parametrize(
    ("error", "message", "target"),
    [
        (ValueError, "`target` must hold classes from 0 to 3, got 4", torch.full((N,), 4)),
        (ValueError, "`target` must hold classes from 0 to 3, got -1", torch.full((N,), -1)),
        (ValueError, r"`target` must give one value for each example", torch.zeros(2).long()),
        (TypeError, "`target` must hold classes, which are integers", torch.zeros(N)),
    ],
)
def test_targets_that_are_no_classes_are_refused(error, message, target):
    model, data, _ = problem()
    with pytest.raises(error, match=message):
        search(model, data, target, ball=L2Ball)


@pytest.mark.parametrize("dtype", slow_but([torch.uint8, torch.int16, torch.int32, torch.uint16]))
def test_classes_are_integers_of_any_dtype(dtype):
    model, data, target = problem()
    one = search(model, data, target, ball=L2Ball, steps=5)
    found = search(model, data, target.to(dtype), ball=L2Ball, steps=5)
    assert torch.equal(found.radius, one.radius)
    found = search(model, data, target.tolist(), ball=L2Ball, steps=5)
    assert torch.equal(found.radius, one.radius)
