"""Numbers at the ends of what a dtype holds."""

import math
from fractions import Fraction

import pytest
import torch

from rai_toolbox.constraints import (
    Box,
    L1Ball,
    L2Ball,
    LinfBall,
    MaxNorm,
    MinMaxNorm,
    Simplex,
    UnitNorm,
)
from rai_toolbox.constraints.kernels import threshold


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_loop_ends_where_rounding_hides_the_rest(monkeypatch):
    """Nearly equal entries: the grain of the threshold keeps the sum from getting any better."""
    calls = []

    def counting(*args, newton=threshold._newton):
        calls.append(args)
        return newton(*args)

    monkeypatch.setattr(threshold, "_newton", counting)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x = -0.99 + 1e-9 * torch.rand(1, 1000, dtype=torch.float64, generator=generator)
        x[0, 0] = 0
        calls.clear()
        with torch.no_grad():
            y = Simplex().project(x)
        assert len(calls) <= 15
        assert Simplex().violation(y) == 0


@pytest.mark.parametrize("total", [1.2e307, 1e308])
@pytest.mark.parametrize("n", [15, 32, 64])
def test_a_simplex_near_the_largest_number(n, total):
    y = Simplex(total).project(torch.zeros(1, n, dtype=torch.float64))
    assert (y / (total / n) - 1).abs().max() <= 1e-15


@pytest.mark.parametrize("ball", [L2Ball, MaxNorm], ids=lambda c: c.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [1e-20, 1e-22, 1e-25, 1e-30])
def test_radii_far_below_the_entries(ball, dtype, radius):
    """The factor is no number of float32."""
    x = torch.tensor([[3.0, 4.0, -5.0], [0.0, 3.0, 4.0]]).to(dtype) * 1e20
    y = ball(radius).project(x).double()
    exact = x.double() / x.double().norm(dim=1, keepdim=True) * radius
    assert (y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * radius
    for row in y.tolist():
        assert sum(Fraction(v) ** 2 for v in row) <= Fraction(radius) ** 2


def test_a_row_whose_factor_is_tiny_does_not_change_the_others():
    x = torch.tensor([[3e20, 4e20], [0.3, 0.7], [1e-21, 0.0]])
    constraint = L2Ball(torch.tensor([[1e-20], [0.5], [1.0]]))
    y = constraint.project(x)
    assert torch.equal(y[1:], L2Ball(constraint.epsilon[1:]).project(x[1:]))


@pytest.mark.parametrize(
    ("dtype", "epsilon", "center"),
    [
        (torch.float16, 100.0, 65504.0),
        (torch.float32, 1e38, 3e38),
        (torch.bfloat16, 1e38, 3e38),
        (torch.float64, 1e308, 1.5e308),
    ],
)
def test_bounds_beyond_the_largest_number(dtype, epsilon, center):
    x = torch.tensor([[1.0, center]], dtype=torch.float64).to(dtype)
    ball = LinfBall(epsilon, center=center)
    y = ball.project(x)
    assert y.isfinite().all()
    assert (ball.violation(y) == 0).all()
    assert y[0, 1] == x[0, 1]
    for other in (LinfBall, L2Ball, L1Ball):
        answer = other(epsilon, center=center).lmo(torch.tensor([[-1.0, 0.5]]).to(dtype))
        assert answer.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_centered_balls_hold_in_exact_arithmetic(dtype):
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(60, 17, generator=generator, dtype=torch.float64).to(dtype)
    x = (4 * torch.randn(60, 17, generator=generator, dtype=torch.float64)).to(dtype)
    epsilon = torch.rand(60, 1, generator=generator, dtype=torch.float64) + 0.1

    def distances(y):
        return [
            [abs(Fraction(a) - Fraction(b)) for a, b in zip(row, at, strict=True)]
            for row, at in zip(y.tolist(), center.tolist(), strict=True)
        ]

    radii = [Fraction(r) for (r,) in epsilon.tolist()]
    for y in (LinfBall(epsilon, center=center).project(x), LinfBall(epsilon, center=center).lmo(x)):
        assert all(max(d) <= r for d, r in zip(distances(y), radii, strict=True))
    for y in (L1Ball(epsilon, center=center).project(x), L1Ball(epsilon, center=center).lmo(x)):
        assert all(sum(d) <= r for d, r in zip(distances(y), radii, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_center_too_small_to_be_seen_beside_the_radius(dtype):
    y = LinfBall(1.0, center=-1e-20).project(torch.tensor([[5.0]], dtype=dtype))
    assert 0.9 < y.item() < 1.0


@pytest.mark.parametrize(
    "row",
    [[3e-310, 4e-310], [1.7e308, -1.7e308], [5e-324, 0.0], [5e-324, 5e-324], [1e-200, 1e-200]],
    ids=str,
)
@pytest.mark.parametrize(
    "constraint",
    [
        UnitNorm(),
        MinMaxNorm(0.5, 1.0),
        MinMaxNorm(1e200, 2e200),
        MinMaxNorm(1e-30, 1.1e-30),
    ],
    ids=str,
)
def test_norms_at_both_ends_of_float64(constraint, row):
    y = constraint.project(double(row))
    assert y.isfinite().all()
    assert (constraint.violation(y) == 0).all()
    assert torch.equal(constraint.project(y), y)


def test_factors_below_the_normal_numbers_of_float64():
    x = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for radius in (1e-3, 1e-8, 1.0):
        y = L2Ball(radius).project(x * 1e307)
        torch.testing.assert_close(
            y.norm(dim=1), torch.full_like(y[:, 0], radius), rtol=1e-6, atol=0
        )
        for row in y.tolist():
            assert sum(Fraction(v) ** 2 for v in row) <= Fraction(radius) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "constraint", [UnitNorm(), MinMaxNorm(0.003, 0.003), MinMaxNorm(1e3, 2e3)], ids=str
)
@pytest.mark.parametrize("others", [0, 1, 7000])
def test_norms_at_both_ends_of_any_range(constraint, dtype, others):
    """Rows whose factors are below the normal numbers, or above all of them."""
    x = torch.randn(others + 2, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] *= torch.finfo(dtype).max / 4
    x[1] *= torch.finfo(dtype).smallest_normal
    y = constraint.project(x)
    assert (constraint.violation(y) == 0).all()
    assert torch.equal(constraint.project(y), y)


@pytest.mark.parametrize(
    "epsilon", [math.inf, torch.tensor([[math.inf]])], ids=["number", "tensor"]
)
@pytest.mark.parametrize("center", [None, 0.1], ids=["around 0", "centered"])
def test_the_derivative_within_an_infinite_ball(epsilon, center):
    x = double([3.0, 4.0]).requires_grad_()
    L2Ball(epsilon, center=center).project(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_sets_on_different_devices_are_not_equal():
    here = Box(torch.zeros(1), None)
    assert here != here.to("meta")
    assert here == Box(torch.zeros(1), None)
