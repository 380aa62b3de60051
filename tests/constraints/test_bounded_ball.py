"""Balls within bounds: references, exact feasibility, optimality, and the linear classifier."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from rai_toolbox.constraints import Constraint
from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.bounded_ball import BoundedBall, norm_ball_of
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels.ball_in_box import nearest_in_ball_and_box

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BALLS = {LinfBall: math.inf, L2Ball: 2, L1Ball: 1}
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_each_ball = pytest.mark.parametrize("ball", BALLS)
CENTERS = [None, "within", "beyond"]


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bounded(ball, n, where=None, seed=0, scale=1.0, share=0.3, dtype=torch.float64):
    """Bounds around 0, a center within them or in part beyond, and a radius that matters."""
    lower = -(randn(n, seed=seed + 1).abs() * scale).to(dtype)
    upper = (randn(n, seed=seed + 2).abs() * scale).to(dtype)
    center = None
    if where is not None:
        center = (randn(n, seed=seed + 3) * scale).to(dtype).clamp(lower, upper)
    if where == "beyond":
        center = (center + 0.1 * scale * randn(n, seed=seed + 4)).to(dtype)
    corners = torch.maximum(upper - lower, torch.zeros_like(upper)).double()
    gap = 0 if center is None else torch.maximum(lower - center, center - upper).clamp(min=0)
    order = BALLS[ball]
    nearest = 0.0 if center is None else torch.linalg.vector_norm(gap.double(), order).item()
    epsilon = 1.001 * nearest + share * torch.linalg.vector_norm(corners, order).item()
    return BoundedBall(ball(epsilon, center=center), lower, upper)


def length(row, center, order):
    """Exactly; squared for L2."""
    gaps = [abs(Fraction(a) - Fraction(b)) for a, b in zip(row, center, strict=True)]
    return max(gaps) if order == math.inf else sum(g**order for g in gaps)


@in_each_dtype
@pytest.mark.parametrize(
    "c, x, expected",
    [
        (BoundedBall(L1Ball(1.0), 0.0, 0.4), [0.9, 0.5, 0.3], [0.4, 0.4, 0.2]),
        (BoundedBall(L2Ball(1.0), 0.0, 1.0), [2, 0.5, -0.4], [4 / 17**0.5, 1 / 17**0.5, 0]),
        (BoundedBall(LinfBall(0.25, center=0.5), 0.5, 1.0), [0.9, 0.5, 0.3], [0.75, 0.5, 0.5]),
        (BoundedBall(L1Ball(2.0), -9.0, 9.0), [1, -2, 0.5], [0.5, -1.5, 0]),
        (BoundedBall(L1Ball(1.0), None, 9.0), [3.0, -4.0], [0.0, -1.0]),
        (BoundedBall(L2Ball(1.0), -9.0, None), [3.0, -4.0], [0.6, -0.8]),
        (BoundedBall(L2Ball(5.0), 3.0, None), [9.0, 0.0], [4.0, 3.0]),
        (BoundedBall(L2Ball(5.0), 4.0, 9.0), [9.0], [5.0]),
        (BoundedBall(L1Ball(0.0, center=1.0), 0.0, 2.0), [9.0, 1.5], [1.0, 1.0]),
        (BoundedBall(L2Ball(0.0, center=1.0), 0.0, 2.0), [9.0, 1.5], [1.0, 1.0]),
        (BoundedBall(LinfBall(0.0, center=1.0), 0.0, 2.0), [9.0, 1.5], [1.0, 1.0]),
    ],
)
def test_reference_values(dtype, c, x, expected):
    y = c.project(torch.tensor([x], dtype=torch.float64).to(dtype))
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-13)  # radii are shrunk by the noise of sums
    wanted = torch.tensor([expected], dtype=dtype)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    assert c.violation(y).item() == 0


@with_each_ball
@in_each_dtype
@pytest.mark.parametrize("scale", [1e-20, 1e-2, 1.0, 1e20])
def test_feasible_exactly_and_idempotent(ball, dtype, scale):
    if dtype == torch.float16 and not 1e-4 < scale < 1e2:
        return
    for n in (1, 2, 9, 100):
        for where in CENTERS:
            c = bounded(ball, n, where, seed=n, scale=scale, dtype=dtype)
            x = randn(6, n) * torch.tensor([1e-3, 1, 1, 10, 100, 1e3])[:, None] * scale
            x[1], x[2] = x[1, 0], 0
            x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
            order, radius = BALLS[ball], Fraction(c.ball.epsilon)
            if order == math.inf and where is None:  # then the ball is a box: bounds are rounded
                radius = Fraction(torch.tensor(c.ball.epsilon, dtype=dtype).item())
            center = [0.0] * n if where is None else c.ball.center.tolist()
            for point in (c.project(x), c.lmo(x), c.lmo(torch.zeros_like(x)), c.sample_(x + 0)):
                for row in point:
                    assert length(row.tolist(), center, order) <= radius ** (2 if order == 2 else 1)
                assert ((c.lower <= point) & (point <= c.upper)).all()
                assert (c.violation(point) == 0).all()
                assert torch.equal(c.project(point), point)


@with_each_ball
@pytest.mark.parametrize("where", CENTERS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_optimal(ball, where, scale):
    for n in (1, 2, 7, 200):
        c = bounded(ball, n, where, seed=n, scale=scale)
        x = randn(20, n, seed=5) * scale * torch.linspace(0.1, 20, 20)[:, None]
        x[0] = x[0, 0]
        y = c.project(x)
        z = c.lmo(y - x)
        assert (((x - y) * (z - y)).sum(1) / scale**2).max() <= 1e-12 * n
        moved, apart = (c.project(x.flip(0)) - y).norm(dim=1), (x.flip(0) - x).norm(dim=1)
        assert (moved <= apart * (1 + 1e-12) + 1e-14 * scale).all()
        single = c.to(torch.float32).project(x.float()).double()
        assert (single - y).abs().max() <= 1e-5 * scale  # bounds are rounded, too


def solved(target, start, sides, epsilon, order):
    """The nearest offset, by SLSQP; for the L1 norm in z = p - q with p, q >= 0, to be smooth."""
    options = {"method": "SLSQP", "options": {"ftol": 1e-15, "maxiter": 2000}}
    if order != 1:
        reach = epsilon if order == math.inf else math.inf
        round_ball = {"type": "ineq", "fun": lambda z: epsilon**2 - (z**2).sum()}
        found = minimize(
            lambda z: ((z - target) ** 2).sum(),
            start,
            bounds=list(zip(sides[0].clip(-reach), sides[1].clip(max=reach), strict=True)),
            constraints=[round_ball] if order == 2 else [],
            **options,
        )
        return found.x
    found = minimize(
        lambda v: ((v[:4] - v[4:] - target) ** 2).sum(),
        np.concatenate([start.clip(0), (-start).clip(0)]),
        bounds=[(0, None)] * 8,
        constraints=[
            {"type": "ineq", "fun": lambda v: epsilon - v.sum()},
            {"type": "ineq", "fun": lambda v: v[:4] - v[4:] - sides[0]},
            {"type": "ineq", "fun": lambda v: sides[1] - v[:4] + v[4:]},
        ],
        **options,
    )
    return found.x[:4] - found.x[4:]


@with_each_ball
@pytest.mark.parametrize("where", CENTERS)
def test_as_another_solver(ball, where):
    for seed in range(4):
        c = bounded(ball, 4, where, seed=7 * seed, share=0.2)
        x = randn(1, 4, seed=seed) * 2
        center = np.zeros(4) if where is None else c.ball.center.numpy()
        target, start = x[0].numpy() - center, c.project(torch.zeros_like(x))[0].numpy() - center
        sides = np.stack([c.lower.numpy() - center, c.upper.numpy() - center])
        found = solved(target, start, sides, c.ball.epsilon, BALLS[ball])
        expected = torch.tensor(found + center)
        torch.testing.assert_close(c.project(x)[0], expected, rtol=1e-5, atol=1e-5)


@with_each_ball
def test_wide_bounds_leave_the_ball_and_a_wide_ball_the_bounds(ball):
    x = randn(5, 30) * 3
    for center in (None, randn(30)):
        plain = ball(2.0, center=center)
        wide = BoundedBall(plain, -1e6, 1e6)
        torch.testing.assert_close(wide.project(x), plain.project(x), rtol=1e-12, atol=1e-12)
        worth = (wide.lmo(x) * x).sum(1)
        torch.testing.assert_close(worth, (plain.lmo(x) * x).sum(1), rtol=1e-12, atol=1e-12)
        half_open = BoundedBall(plain, None, 1e6)
        torch.testing.assert_close(half_open.project(x), wide.project(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(half_open.lmo(x), wide.lmo(x), rtol=1e-12, atol=1e-12)
        box = BoundedBall(ball(1e6, center=center), -0.5, torch.full((30,), 0.25))
        assert torch.equal(box.project(x), Box(-0.5, 0.25).project(x))
        torch.testing.assert_close(box.lmo(x), Box(-0.5, 0.25).lmo(x))


@with_each_ball
def test_worst_case_of_a_linear_classifier(ball):
    """The largest ``cost . d`` with ``|d| <= epsilon`` and ``0 <= x + d <= 1``."""
    x, cost = randn(8, 50).sigmoid(), randn(8, 50, seed=1)
    epsilon = {LinfBall: 0.3, L2Ball: 1.0, L1Ball: 3.0}[ball]
    attack = BoundedBall(ball(epsilon, center=x), 0.0, 1.0).lmo(-cost) - x
    room = torch.where(cost > 0, 1 - x, x)
    if ball is LinfBall:
        best = (cost.abs() * room.clamp(max=epsilon)).sum(1)
    elif ball is L2Ball:
        low, high = torch.zeros(8, 1).double(), torch.full((8, 1), 1e6).double()
        for _ in range(200):
            t = (low + high) / 2
            over = torch.minimum(t * cost.abs(), room).norm(dim=1, keepdim=True) > epsilon
            low, high = torch.where(over, low, t), torch.where(over, t, high)
        best = (cost.abs() * torch.minimum(low * cost.abs(), room)).sum(1)
    else:
        best = torch.zeros(8).double()
        for i in range(8):
            left = epsilon
            for j in cost[i].abs().argsort(descending=True).tolist():
                used = min(left, room[i, j].item())
                best[i] += cost[i, j].abs() * used
                left -= used
    torch.testing.assert_close((cost * attack).sum(1), best, rtol=1e-12, atol=1e-12)


@with_each_ball
def test_inside_stays_bitwise(ball):
    c = BoundedBall(ball(0.5, center=0.25), 0.0, 1.0)
    x = torch.tensor([[0.25, 0.25, 0.25], [0.3, 0.25, 0.2], [-0.0, 0.25, 0.3]])
    assert torch.equal(c.project(x).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@with_each_ball
def test_rows_inside_beside_rows_slightly_and_far_outside(ball, dtype):
    n, eps = 200, torch.finfo(dtype).eps
    c = bounded(ball, n, dtype=dtype)
    boundary = c.project(randn(1, n, seed=5).to(dtype) * 5)
    inside = boundary / 2
    inside[0, ::2] = -0.0
    far = 100 * randn(1, n, seed=6).to(dtype)  # all or most entries are cut off by the bounds,
    mixed = far.clone()  # so that a tangent there leads beyond 0
    mixed[0, ::2] /= 1e5
    x = torch.cat([inside, boundary, boundary * (1 + 4 * eps), boundary * 1.05, far, mixed])
    assert (c.violation(x[3:]) > 0).all()
    found = c.project(x)
    assert torch.equal(found[:2].view(torch.uint8), x[:2].view(torch.uint8))
    assert (c.violation(found) == 0).all()
    reference = Constraint.project_(c, x.clone())  # in float64
    torch.testing.assert_close(found, reference, rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_far_outside_where_values_are_not_read(dtype):
    n, eps = 200, torch.finfo(dtype).eps
    sizes = 10.0 ** torch.arange(9, dtype=dtype).unsqueeze(1)
    x = torch.nn.functional.normalize(randn(9, n, seed=7).to(dtype)) * sizes
    c = BoundedBall(L2Ball(1.0), None, 0.02)  # (what is below 0 is as long as it was)
    radius = torch.ones((), dtype=torch.float64), True
    found, _ = nearest_in_ball_and_box(x, 2, radius, -math.inf, 0.02, False)
    reference = Constraint.project_(c, x.clone())  # in float64
    torch.testing.assert_close(found, reference, rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("scale", [1e-25, 1e19, 1e25])
def test_norms_beyond_the_dtype_where_values_are_not_read(scale):
    x = (randn(20, 8, seed=8) * 5 * scale).float()
    radius = torch.full((), 7 * scale, dtype=torch.float64), False
    found, _ = nearest_in_ball_and_box(x, 2, radius, -2 * scale, 5 * scale, False)
    c = BoundedBall(L2Ball(7 * scale), -2 * scale, 5 * scale)
    assert (c.violation(found) == 0).all()


@with_each_ball
@pytest.mark.parametrize("where", CENTERS)
def test_batched_as_one_by_one_in_any_layout(ball, where):
    c = bounded(ball, 600, where).to(torch.float32)
    x = randn(150, 600).float() * 2
    for word in (c.project, c.lmo, c.violation):
        whole = word(x)
        alone = torch.cat([word(row[None]) for row in x[::15]])
        torch.testing.assert_close(whole[::15], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole, word(x.t().contiguous().t()), rtol=1e-5, atol=1e-6)


@with_each_ball
def test_settings_per_sub_tensor(ball):
    x, center = randn(4, 3, 2) * 3, randn(4, 3, 2).sigmoid()
    epsilon = torch.tensor([0.0, 0.1, 0.5, 2.0]).double().reshape(4, 1, 1)
    c = BoundedBall(ball(epsilon, center=center), torch.zeros(2), 1.0)
    y = c.project(x)
    for i in range(4):
        alone = BoundedBall(ball(epsilon[i].item(), center=center[i]), 0.0, 1.0)
        assert torch.equal(alone.project(x[i : i + 1])[0], y[i])
    each = BoundedBall(ball(torch.ones(2)), 0.0, 1.0)
    if ball is LinfBall:  # a radius of each element
        assert (each.violation(each.project(x)) == 0).all()
        return
    with pytest.raises(ValueError, match="`epsilon` must have one value per sub-tensor"):
        each.project(x)


@with_each_ball
def test_a_radius_of_0_leaves_one_point(ball):
    c = BoundedBall(ball(0.0), torch.tensor([[0.0, -0.001]]).double(), 1.0)
    assert (c.project(torch.tensor([[-2e-4, 6e-5]]).double()) == 0).all()


@torch.no_grad()
@with_each_ball
def test_a_radius_that_is_trained_is_read_each_time(ball):
    epsilon = torch.nn.Parameter(torch.ones(()))
    c, x = BoundedBall(ball(epsilon), -0.8, 0.8), torch.full((2, 4), 3.0)
    c.project(x)
    epsilon.mul_(0.5)
    assert (BoundedBall(ball(0.5), -0.8, 0.8).violation(c.project(x)) == 0).all()


@with_each_ball
def test_what_is_kept_of_one_device_does_not_serve_another(ball):
    c, x = BoundedBall(ball(torch.full((2, 1), 0.5)), -torch.ones(4), 1.0), torch.ones(2, 4)
    y = c.project(x)
    elsewhere = c.to("meta")
    with pytest.raises(ValueError, match="must be on the device of the batch"):
        elsewhere.project(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        BoundedBall(ball(0.5), -1.0, 1.0).project(fake.from_tensor(x))
        c.project(fake.from_tensor(x))
    assert torch.equal(c.project(x), y)


@with_each_ball
def test_settings_are_prepared_once_on_each_kind_of_device(ball):
    c, x = BoundedBall(ball(0.5), -torch.ones(4), 1.0), torch.ones(2, 4)
    for eager in (True, False):  # on a CPU, and where reading values would synchronize
        assert c._settings_in(x, eager) is c._settings_in(x, eager)


@with_each_ball
@pytest.mark.parametrize("where", CENTERS)
def test_differentiable(ball, where):
    c = bounded(ball, 6, where, seed=3)
    x = (randn(4, 6, seed=8) * torch.tensor([0.1, 1, 2, 5])[:, None]).requires_grad_()
    assert torch.autograd.gradcheck(c.project, x)


# torch 2.13 says it of its own decompositions, the first time that a forward derivative needs one
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@with_each_ball
def test_differentiable_in_forward_mode(ball):
    c = bounded(ball, 5, "within", seed=3)
    x, v = (2 * randn(2, 5, seed=8)).requires_grad_(), randn(2, 5, seed=9)
    (product,) = torch.autograd.grad(c.project(x), x, v)
    with forward_ad.dual_level():  # the derivative is symmetric
        y = c.project(forward_ad.make_dual(x.detach(), v))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, product)
    none = BoundedBall(ball(0.0), -1.0, 1.0)
    (gradient,) = torch.autograd.grad(none.project(x).sum(), x)
    assert gradient.isfinite().all()  # of a root at 0


@with_each_ball
def test_large_rows(ball):
    n = 10**5
    x = randn(1, n).float()
    c = BoundedBall(ball({LinfBall: 0.1, L2Ball: 9.0, L1Ball: 50.0}[ball]), -0.5, 0.4)
    y = c.project(x)
    assert c.violation(y).item() == 0
    z = c.lmo(y - x).double()
    gap = ((x - y).double() * (z - y.double())).sum() / (x - y).double().norm()
    assert gap <= 1e-5


@with_each_ball
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(ball, bad):
    x = torch.zeros(2, 3)
    x[0, 1] = bad
    y = BoundedBall(ball(1.0), 0.0, 1.0).project(x)
    assert y[0].isnan().all()
    assert (y[1] == 0).all()


def test_balls_within_bounds_are_of_whole_sub_tensors():
    with pytest.raises(ValueError, match="`ball` must be a ball of whole sub-tensors"):
        BoundedBall(L2Ball(1.0, dim=0), 0.0, 1.0)
    with pytest.raises(ValueError, match="`constraint` must be a ball of whole sub-tensors"):
        norm_ball_of(L2Ball(1.0, dim=0))


@with_each_ball
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches(ball, shape):
    c = BoundedBall(ball(0.5, center=2.0), 0.0, 1.75)
    for word in (c.project, c.lmo, c.sample_):
        assert word(torch.ones(shape)).shape == shape


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: BoundedBall(Box(0.0, 1.0), 0.0, 1.0), TypeError, "`ball` must be a LinfBall"),
        (lambda: BoundedBall(L2Ball(math.inf), 0.0, 1.0), ValueError, "`epsilon` .* finite"),
        (lambda: BoundedBall(L2Ball(1.0), None, None), ValueError, "`lower` or `upper` must be"),
        (lambda: BoundedBall(L2Ball(1.0), 1.0, 0.0), ValueError, "`lower` must be <= `upper`"),
        (lambda: BoundedBall(L2Ball(1.0), math.nan, 0.0), ValueError, "`lower` must not be NaN"),
        (
            lambda: BoundedBall(LinfBall(1.0), 2.0, 3.0),
            ValueError,
            "`epsilon` must be at least .*2",
        ),
        (lambda: BoundedBall(L1Ball(1.0, center=5.0), 2.0, 3.0), ValueError, "got 1.0"),
        (
            lambda: BoundedBall(L2Ball(torch.tensor([[9.0], [0.5]])), torch.ones(2, 3), None),
            ValueError,
            "got 0.5",
        ),
        (
            lambda: BoundedBall(L2Ball(1.0, center=torch.ones(3)), torch.zeros(2), None),
            ValueError,
            "broadcast against each other",
        ),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("ball, n", [(L1Ball, 3), (L2Ball, 5)])
def test_empty_sets_are_refused_before_anything_is_written(ball, n):
    for center in (3.0, torch.full((n,), 3.0)):
        c = BoundedBall(ball(2.0, center=center), 0.0, 2.0)
        x = torch.full((2, n), 7.0)
        for _ in range(2):
            with pytest.raises(ValueError, match="`epsilon` must be at least the distance"):
                c.project_(x)
        assert (x == 7).all()
    few = BoundedBall(ball(2.0, center=3.0), 0.0, 2.0)
    assert (few.project(torch.full((1, n - 1), 7.0)) <= 2).all()


@with_each_ball
def test_plain_data(ball):
    c = bounded(ball, 5, "beyond")
    other = Constraint.from_plain(c.to_plain())
    assert c == other
    assert torch.equal(c.project(randn(2, 5)), other.project(randn(2, 5)))
