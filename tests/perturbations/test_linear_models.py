"""A linear classifier, whose worst case is known exactly: an attack has to reach it."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from tiers import slow_but
from torch.nn.functional import cross_entropy

from rai_toolbox.cli.digits import load_digits
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import FrankWolfe, ProjectedOptimizer
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.rivals import nearest_rivals

IMAGES, RIVALS = 100, 9
CASES = [(LinfBall, 0.05), (L2Ball, 0.75), (L1Ball, 4.0)]
ONE_STEP = {
    "oracle": partial(FrankWolfe, lr=1.0, use_default_lr_schedule=False),
    "projection": partial(ProjectedOptimizer, lr=1e9),
}


def exact_gain(c, x, kind, epsilon):
    """The maximum of c . d over the ball and 0 <= x + d <= 1, by a closed form or a root."""
    size, room = np.abs(c), np.where(c > 0, 1 - x, x)
    if kind is LinfBall:
        return float(size @ np.minimum(epsilon, room))
    if kind is L1Ball:
        order = np.argsort(-size)
        before = np.concatenate([[0.0], np.cumsum(room[order])[:-1]])
        return float(size[order] @ np.clip(epsilon - before, 0, room[order]))

    def excess(t):
        return np.linalg.norm(np.minimum(t * size, room)) - epsilon

    if np.linalg.norm(np.where(size > 0, room, 0)) <= epsilon:
        return float(size @ room)
    high = 1.0
    while excess(high) < 0:
        high *= 2
    t = brentq(excess, 0.0, high, xtol=1e-16, rtol=1e-15)
    return float(size @ np.minimum(t * size, room))


@pytest.fixture(scope="module")
def problem():
    """Softmax regression, fitted in float64, and test images with labels."""
    train, test = load_digits()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)
    images = train.images.double()

    def closure():
        optimizer.zero_grad()
        weight = model[1].weight
        loss = cross_entropy(model(images), train.labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, test.first(IMAGES)


@pytest.fixture(scope="module")
def worst_margins(problem):
    """The exact worst margin of each image, for each kind of ball."""
    model, test = problem
    weight, bias = (p.detach().numpy() for p in model[1].parameters())
    rows = test.images.double().flatten(1).numpy()

    def worst(x, y, kind, epsilon):
        others = [j for j in range(10) if j != y]
        c = weight[others] - weight[y]
        at_x = c @ x + bias[others] - bias[y]
        gains = [exact_gain(row, x, kind, epsilon) for row in c]
        return (at_x + gains).max()

    return {
        kind: torch.tensor(
            [worst(x, y, kind, epsilon) for x, y in zip(rows, test.labels.tolist(), strict=True)],
            dtype=torch.float64,
        )
        for kind, epsilon in CASES
    }


def check_inside(found, images, kind, epsilon):
    """In ball and box, by the arithmetic of float64 over the values as they are."""
    data, images = found.double().flatten(1).numpy(), images.double().flatten(1).numpy()
    assert data.min() >= 0 and data.max() <= 1
    order = {LinfBall: np.inf, L2Ball: 2, L1Ball: 1}[kind]
    # (numpy's own sums of float64 may be off by some 1e-16 of them)
    assert np.linalg.norm(data - images, order, axis=1).max() <= epsilon * (1 + 1e-14)


@pytest.mark.parametrize("optimizer", ONE_STEP.values(), ids=ONE_STEP.keys())
@pytest.mark.parametrize(("kind", "epsilon"), CASES)
@pytest.mark.parametrize("dtype", slow_but([torch.float64, torch.float32]))
@pytest.mark.parametrize("rivals", slow_but([RIVALS, nearest_rivals]), ids=["all", "nearest"])
def test_one_step_for_each_rival_is_exact(
    problem, worst_margins, kind, epsilon, optimizer, dtype, rivals
):
    wide, test = problem
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).to(dtype)
    model.load_state_dict(wide.state_dict())
    images, exact = test.images.to(dtype), worst_margins[kind]
    found = attack(
        model, images, test.labels, ball=kind(epsilon), optimizer=optimizer, steps=1, rivals=rivals
    )
    assert torch.equal(found.fooled, exact > 0)
    losses = found.losses.double()
    # float32 rounds logits to some 1e-6, whatever the margin that is left of their difference
    gap = (exact - losses) / (exact.abs() if dtype == torch.float64 else 1.0)
    assert gap.abs().max() <= {torch.float64: 1e-6, torch.float32: 1e-5}[dtype]
    check_inside(found.data, images, kind, epsilon)


@pytest.mark.parametrize(("kind", "epsilon"), CASES)
@pytest.mark.parametrize("rivals", slow_but([nearest_rivals, RIVALS]), ids=["nearest", "all"])
@pytest.mark.parametrize("steps", slow_but([8, 40, 1]))
def test_the_default_optimizer_is_exact(problem, worst_margins, kind, epsilon, rivals, steps):
    model, test = problem
    images, exact = test.images.double(), worst_margins[kind]
    found = attack(model, images, test.labels, ball=kind(epsilon), rivals=rivals, steps=steps)
    assert torch.equal(found.fooled, exact > 0)
    assert ((exact - found.losses) / exact.abs()).abs().max() <= 1e-6
    check_inside(found.data, images, kind, epsilon)


def test_pixels_at_their_bounds_leave_the_small_slopes():
    # the slopes that matter are a thousandth of those that lead out of the range
    c = np.array([1.0, 3.0, -2e-3, 1e-3, -2.0])
    weight = torch.tensor(np.stack([0 * c, c]))
    x = torch.tensor([[1.0, 1.0, 0.3, 0.5, 0.0]], dtype=torch.float64)
    y, at_x = torch.tensor([0]), c @ x[0].numpy()
    for kind, epsilon in ((LinfBall, 0.2), (L2Ball, 0.6), (L1Ball, 0.9)):
        found = attack(lambda data: data @ weight.T, x, y, ball=kind(epsilon), steps=20)
        gain = exact_gain(c, x[0].numpy(), kind, epsilon)
        assert found.losses.item() - at_x == pytest.approx(gain, rel=1e-9)


def test_success_never_exceeds_the_exact_one(problem, worst_margins):
    # what any other way of attacking finds is in the same set: it cannot be worse than the worst
    model, test = problem
    images = test.images.double()
    for kind, epsilon in CASES:
        step = partial(ProjectedOptimizer, lr=0.3)
        found = attack(model, images, test.labels, ball=kind(epsilon), optimizer=step, steps=10)
        assert (found.losses <= worst_margins[kind] + 1e-9).all()
        assert not (found.fooled & (worst_margins[kind] < 0)).any()


def test_the_number_of_rivals_matters(problem, worst_margins):
    # so that the exact answer above is not one that any attack would find, or any one rival
    model, test = problem
    found = [
        attack(
            model,
            test.images.double(),
            test.labels,
            ball=L1Ball(4.0),
            optimizer=ONE_STEP["oracle"],
            steps=1,
            rivals=m,
        ).losses
        for m in (1, 3, RIVALS)
    ]
    assert (found[0] <= found[1] + 1e-12).all() and (found[1] <= found[2] + 1e-12).all()
    assert (found[0] < worst_margins[L1Ball] - 1e-3).any()
