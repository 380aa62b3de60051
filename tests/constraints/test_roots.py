"""Roots of monotone functions: whatever the range, in a fixed number of passes, read or not."""

from fractions import Fraction

import pytest
import torch

from rai_toolbox.constraints.kernels import roots
from rai_toolbox.constraints.kernels.roots import _middle, _ordinal, root

BRACKETS = [(-1e308, 1e308), (0.0, 1e300), (-5e-324, 5e-324), (1e-320, 1e20), (-7.0, -6.5)]


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.fixture(params=[True, False], ids=["reads", "reads_nothing"])
def reading(request, monkeypatch):
    monkeypatch.setattr(roots, "is_eager", lambda x: request.param)


def test_ordinals_are_in_order_and_back():
    x = torch.randn(2000, dtype=torch.float64) * 10.0 ** (600 * torch.rand(2000).double() - 300)
    for numbers in (x, x.float()):
        numbers = torch.cat([numbers, torch.zeros(1).to(numbers)]).sort().values + 0.0
        ordinals = _ordinal(numbers)
        assert (ordinals[1:] >= ordinals[:-1]).all()
        assert torch.equal(_ordinal(ordinals, numbers.dtype), numbers)
    assert _ordinal(column(1.0).nextafter(column(2.0))) - _ordinal(column(1.0)) == 1


@pytest.mark.parametrize("low, high", BRACKETS)
def test_middles_reach_neighbors_in_64_passes(low, high):
    low, high = column(low), column(high)
    for sought in (low, high, low / 3 + high / 1.5):
        a, b = low, high
        for _ in range(64):
            middle = _middle(a, b)
            assert a <= middle <= b
            a, b = (middle, b) if middle <= sought else (a, middle)
        assert a.nextafter(b) >= b


@pytest.mark.parametrize("low, high", BRACKETS)
def test_without_slopes_to_help(reading, low, high):
    low, high = column(low, low, low), column(high, high, high)
    sought = torch.stack([low[0], high[0], low[0] / 3 + high[0] / 1.5])
    found = root(lambda t: ((t < sought).double() - (t > sought).double(), 0 * t), low, high)
    assert (found.nextafter(sought) == sought).all()


def test_misleading_slopes(reading):
    sought = column(1e-200, 0.3, 1e200, 0.0)
    low, high = torch.full_like(sought, -1e250), torch.full_like(sought, 1e250)
    for slope in (-1e-300, -1e300, 1.0, float("nan"), float("inf")):
        found = root(lambda t, s=slope: ((sought - t).sign(), 0 * t + s), low, high)
        assert (found.nextafter(sought) == sought).all()


@pytest.mark.slow
def test_piecewise_linear_functions_settle_soon(reading):
    kinks = torch.randn(50, 200, dtype=torch.float64)
    calls = []

    def f(t):
        calls.append(t)
        over = (kinks - t).clamp(min=0)
        value = over.sum(1, keepdim=True) - 1
        return value.where(value.abs() > 1e-13, 0.0), -(over > 0).double().sum(1, keepdim=True)

    low, high = kinks.amin(1, keepdim=True) - 1, kinks.amax(1, keepdim=True)
    found = root(f, low, high)
    assert (f(found)[0] == 0).all()
    if roots.is_eager(found):
        assert len(calls) <= 30
    assert torch.equal(found, torch.cat([root_of_one(kinks[i]) for i in range(50)]))


def root_of_one(kinks):
    """By itself, and by another route to check it: bisection in fractions."""

    def f(t):
        over = (kinks - t).clamp(min=0)
        value = over.sum(1, keepdim=True) - 1
        return value.where(value.abs() > 1e-13, 0.0), -(over > 0).double().sum(1, keepdim=True)

    kinks = kinks[None]
    found = root(f, kinks.amin(1, keepdim=True) - 1, kinks.amax(1, keepdim=True))
    exact = [Fraction(k) for k in kinks[0].tolist()]
    low, high = min(exact) - 1, max(exact)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(k - middle, 0) for k in exact) > 1 else (low, middle)
    assert abs(found.item() - float(low)) < 1e-12
    return found


def test_a_start_is_tried_first(reading):
    seen = []
    root(
        lambda t: (seen.append(t), (2 - t, -torch.ones_like(t)))[1],
        column(-9.0),
        column(9.0),
        column(2.0),
    )
    assert seen[0] == 2.0
    assert all(t == 2.0 for t in seen)


def test_brackets_without_a_root_give_the_closest_end(reading):
    for value, end in ((1.0, 3.0), (-1.0, -2.0)):
        found = root(lambda t, v=value: (0 * t + v, 0 * t), column(-2.0), column(3.0))
        assert abs(found.item() - end) < 1e-15


def test_differentiable(reading):
    """With respect to what the function depends on, also where its value is rounded to 0."""
    sought = column(0.5, 2.0).requires_grad_()

    def f(t):
        return roots.without_noise(sought - 2 * t, 1e-15 * t.abs()), torch.full_like(t, -2.0)

    found = root(f, column(-9.0, -9.0), column(9.0, 9.0))
    (gradient,) = torch.autograd.grad(found.sum(), sought)
    assert gradient.tolist() == [[0.5], [0.5]]
    with torch.no_grad():
        assert torch.equal(found, root(f, column(-9.0, -9.0), column(9.0, 9.0)))
