"""Budgets: sections of boxes by hyperplanes, over weights, scales, dtypes and shapes."""

import math
from fractions import Fraction
from math import inf

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch.autograd import forward_ad

from rai_toolbox.constraints import Constraint
from rai_toolbox.constraints.box_hyperplane import BoxSection
from rai_toolbox.constraints.kernels.box_hyperplane import moved_to_sum, nearest_with_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SUMS_TO_1 = BoxSection(1.0, 1.0, 0.0, None)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def budget(n, seed=0, share=0.3, scale=1.0, ones=False):
    """Weights of both signs and zeros, per-element bounds, and a total that can be met."""
    weight = torch.ones(n).double() if ones else randn(n, seed=seed)
    if not ones and n > 3:
        weight[::4] = 0
    lower = -randn(n, seed=seed + 1).abs() * scale
    upper = randn(n, seed=seed + 2).abs() * scale
    ends = torch.stack([weight * lower, weight * upper])
    total = (1 - share) * ends.amin(0).sum() + share * ends.amax(0).sum()
    return BoxSection(weight, total.item(), lower, upper)


@in_each_dtype
@pytest.mark.parametrize(
    "c, x, expected",
    [
        (BoxSection(torch.tensor([1.0, 2, 3]), 1.0, 0.0, 0.8), [1.2, 3, 0.7], [0, 0.5, 0]),
        (SUMS_TO_1, [0.6, 0.5, 0.3], [7 / 15, 11 / 30, 1 / 6]),
        (SUMS_TO_1, [0.5, 2.1, -3.5], [0, 1, 0]),
        (SUMS_TO_1, [8e4, 8e4, 1], [0.5, 0.5, 0]),
        (SUMS_TO_1, [-3.0], [1.0]),
        (BoxSection(torch.tensor([3.0, 4.0]), 5.0, None, None), [1.0, 2.0], [7 / 25, 26 / 25]),
        (BoxSection(torch.tensor([1.0, -1.0, 0.0]), 0.0, 0.0, 1.0), [2, -1, 3], [0.5, 0.5, 1]),
        (BoxSection(1.0, 2.4, 0.0, 0.8), [9.0, 0, -9], [0.8, 0.8, 0.8]),
    ],
)
def test_reference_values(dtype, c, x, expected):
    if dtype == torch.float16:
        x = [min(v, 6e4) for v in x]
    x = torch.tensor([x], dtype=torch.float64).to(dtype)
    tolerance = (8 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
    y = c.project(x)
    wanted = torch.tensor([expected], dtype=dtype)
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    assert c.violation(y).item() == 0


def test_far_entries_leave_the_sum_precise():
    for dtype in (torch.float64, torch.float32):
        y = SUMS_TO_1.project(torch.tensor([[1e8, 1e8, 1.0], [1e20, 1e20, -1e20]], dtype=dtype))
        assert torch.equal(y, torch.tensor([[0.5, 0.5, 0.0]] * 2, dtype=dtype))
        x = 1e6 + randn(4, 5000, dtype=dtype)
        y = SUMS_TO_1.project(x)
        assert (y.double().sum(1) - 1).abs().max() < 10 * torch.finfo(dtype).eps
    y = SUMS_TO_1.project(torch.ones(1, 10**6))
    assert abs(y.double().sum().item() - 1) < 1e-7
    assert SUMS_TO_1.violation(y).item() == 0


@in_each_dtype
@pytest.mark.parametrize("n", [1, 2, 7, 3000])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 10.0, 1e20])
def test_feasible_and_idempotent_after_rounding(dtype, n, scale):
    if dtype == torch.float16 and not 1e-4 < scale < 1e2:
        return
    for share in (0.0, 0.1, 0.5, 1.0):
        for ones in (False, True):
            c = budget(n, seed=n, share=share, scale=scale, ones=ones)
            x = randn(6, n, seed=3) * torch.tensor([1e-3, 1, 1, 10, 100, 1e3])[:, None] * scale
            x[1] = x[1, 0]
            x[2] = 0
            x = x.to(dtype).clamp(*(torch.finfo(dtype).min, torch.finfo(dtype).max))
            for point in (c.project(x), c.lmo(x), c.sample_(x.clone())):
                assert (c.violation(point) == 0).all(), (share, ones)
                assert torch.equal(c.project(point), point)
                lower, upper = c.lower.to(dtype), c.upper.to(dtype)
                assert ((lower <= point) & (point <= upper)).all()


@pytest.mark.parametrize("n", [1, 2, 5, 50])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_optimal(n, scale):
    for seed in range(5):
        c = budget(n, seed=seed, share=0.2 * seed + 0.1, scale=scale)
        x = randn(20, n, seed=seed) * scale * 2
        y = c.project(x)
        z = c.lmo(y - x)
        gap = ((x - y) * (z - y)).sum(1) / scale**2
        assert gap.max() <= 1e-13 * n
        moved = (c.project(x.flip(0)) - y).norm(dim=1)
        assert (moved <= (x.flip(0) - x).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("seed", range(6))
def test_as_other_solvers(seed):
    n = 2 + seed
    c, x = budget(n, seed=seed, share=0.15 * seed + 0.1), randn(1, n, seed=seed + 9)
    sides = list(zip(c.lower.tolist(), c.upper.tolist(), strict=True))
    found = minimize(
        lambda y: ((y - x[0].numpy()) ** 2).sum() / 2,
        c.project(x)[0].numpy() * 0.9,
        jac=lambda y: y - x[0].numpy(),
        bounds=sides,
        constraints={"type": "eq", "fun": lambda y: c.weight.numpy() @ y - c.total},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    torch.testing.assert_close(c.project(x)[0], torch.tensor(found.x), rtol=1e-6, atol=1e-6)
    least = linprog(x[0].numpy(), A_eq=c.weight[None].numpy(), b_eq=[c.total], bounds=sides)
    assert abs((c.lmo(x) * x).sum().item() - least.fun) < 1e-9


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1.0, 1e5, 1e20])
def test_as_bisection_in_fractions(scale):
    n = 6
    c, x = budget(n, seed=4, share=0.4), randn(1, n, seed=5) * scale
    w, lower, upper = ([Fraction(v) for v in t.tolist()] for t in (c.weight, c.lower, c.upper))
    v = [Fraction(e) for e in x[0].tolist()]

    def clamped(t):
        return [min(max(a - t * b, p), q) for a, b, p, q in zip(v, w, lower, upper, strict=True)]

    low, high = Fraction(-(10**24)), Fraction(10**24)
    for _ in range(180):
        t = (low + high) / 2
        over = sum(b * e for b, e in zip(w, clamped(t), strict=True)) > Fraction(c.total)
        low, high = (t, high) if over else (low, t)
    exact = torch.tensor([[float(e) for e in clamped(low)]], dtype=torch.float64)
    torch.testing.assert_close(c.project(x), exact, rtol=1e-10, atol=1e-12 + 4e-16 * scale)
    single = BoxSection(c.weight, c.total, c.lower.float(), c.upper.float()).project(x.float())
    if scale <= 1:
        torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6)


def test_inside_stays_bitwise():
    c = BoxSection(torch.tensor([1.0, 1.0, -1.0]), 0.0, -1.0, None)
    x = torch.tensor([[0.3, -0.0, 0.3], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    y = c.project(x)
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_lmo_with_ties_zeros_and_free_entries():
    c = BoxSection(torch.tensor([1.0, -2.0, 0.0, 4.0]), 1.0, -1.0, 1.0)
    for g in ([0.0, 0, 0, 0], [1.0, -2, 3, 4], [1.0, 2, -3, 4], [-1.0, 0, 0, -4], [5.0, 1, 0, 1]):
        s = c.lmo(torch.tensor([g]))
        assert c.violation(s).item() == 0
        least = linprog(g, A_eq=[[1.0, -2, 0, 4]], b_eq=[1.0], bounds=[(-1, 1)] * 4).fun
        assert (s[0] * torch.tensor(g)).sum().item() == pytest.approx(least, abs=1e-6)
        assert (s.abs() != 1).sum() <= 2  # a vertex, and a free entry where nothing pulls it
    one = BoxSection(3.0, 1.0, -1e6, 1e6)
    torch.testing.assert_close(one.lmo(torch.ones(1, 1)), torch.tensor([[1 / 3]]))


def test_batched_as_one_by_one_in_any_layout():
    c = budget(600, share=0.4)
    x = randn(150, 600, dtype=torch.float32) * 2
    for word in (c.project, c.lmo, c.violation):
        whole = word(x)
        alone = torch.cat([word(row[None]) for row in x[::10]])
        assert torch.equal(whole[::10], alone)
        assert torch.equal(whole, word(x.t().contiguous().t()))
    image = torch.randn(5, 4, 6, 6)
    c = BoxSection(1.0, 3.0, 0.0, torch.rand(6, 6) + 0.1)
    y = c.project(image.contiguous(memory_format=torch.channels_last))
    assert torch.equal(y, c.project(image))


def test_settings_per_sub_tensor():
    x = randn(4, 3, 2)
    totals = torch.tensor([0.5, 1.0, 2.0, 0.0]).double().reshape(4, 1, 1)
    weight = randn(4, 3, 2, seed=1).abs() + 0.1
    c = BoxSection(weight, totals, None, torch.rand(2).double() + 1)
    y = c.project(x)
    torch.testing.assert_close((weight * y).sum((1, 2)), totals.flatten())
    for i in range(4):
        alone = BoxSection(weight[i], totals[i].item(), None, c.upper)
        torch.testing.assert_close(alone.project(x[i : i + 1])[0], y[i], rtol=0, atol=1e-15)


def test_large_rows():
    x = randn(1, 10**5, dtype=torch.float32)
    c = BoxSection(1.0, 100.0, 0.0, 0.5)
    y = c.project(x)
    assert c.violation(y).item() == 0
    ordered = x.double().sort().values
    low, high = ordered[0, 0] - 1, ordered[0, -1]
    for _ in range(80):
        t = (low + high) / 2
        low, high = (t, high) if (x.double() - t).clamp(0, 0.5).sum() > 100 else (low, t)
    exact = (x.double() - low).clamp(0, 0.5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-9)


def test_differentiable():
    c = budget(7, share=0.4)
    x = (randn(3, 7, seed=8) * 1.5).requires_grad_()
    assert torch.autograd.gradcheck(c.project, x)
    assert torch.autograd.gradcheck(SUMS_TO_1.project, x)
    assert torch.autograd.gradcheck(BoxSection(randn(7), 1.0, None, None).project, x)
    corner = BoxSection(1.0, 7.0, 0.0, 1.0).project(x)
    (gradient,) = torch.autograd.grad(corner.sum(), x)
    assert (gradient == 0).all()


# torch 2.13 says it of its own decompositions, the first time that a forward derivative needs one
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_differentiable_in_forward_mode_and_in_the_total():
    x, total = randn(1, 3, seed=8).requires_grad_(), torch.tensor([[0.1]]).double()
    weight, lower, upper = randn(3, seed=1), -torch.ones(3).double(), torch.ones(3).double()
    c = BoxSection(weight, total, lower, upper)
    v = randn(1, 3, seed=2)
    (product,) = torch.autograd.grad(c.project(x), x, v)
    with forward_ad.dual_level():  # the derivative is symmetric
        y = c.project(forward_ad.make_dual(x.detach(), v))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, product)
    of_total = total.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: BoxSection(weight, t, lower, upper).project(x.detach()), of_total
    )
    with torch.no_grad():
        expected = c.project(x)
    assert torch.equal(c.project(x), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad):
    x = torch.zeros(2, 3)
    x[0, 1] = bad
    y = SUMS_TO_1.project(x)
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches(shape):
    c = BoxSection(1.0, 1.0, 0.0, 1.0)
    assert c.project(torch.ones(shape)).shape == shape
    assert c.lmo(torch.ones(shape)).shape == shape
    assert (c.violation(torch.ones(shape)) == 0).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ((math.nan, 1.0, 0.0, 1.0), "`weight` must not be NaN"),
        ((math.inf, 1.0, 0.0, 1.0), "`weight` must be finite"),
        ((1.0, math.inf, 0.0, 1.0), "`total` must be finite"),
        ((1.0, 1.0, math.nan, 1.0), "`lower` must not be NaN"),
        ((1.0, 1.0, 1.0, 0.0), "`lower` must be <= `upper`"),
        ((1.0, -1.0, 0.0, 1.0), "`total` must be between .* got -1.0"),
        ((1.0, 1.0, 2.0, 3.0), "`total` must be between"),  # however many entries there are
        ((1.0, 1.0, math.inf, math.inf), "`total` must be between"),
        ((torch.ones(3), 1.0, torch.zeros(2), 1.0), "must broadcast .* \\(3,\\), \\(2,\\)"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BoxSection(*settings)


@pytest.mark.parametrize(
    "c",
    [
        BoxSection(1.0, 5.0, 0.0, 1.0),
        BoxSection(torch.ones(3), 5.0, 0.0, 1.0),
        BoxSection(1.0, torch.tensor([[1.0], [5.0]]), 0.0, 1.0),
        BoxSection(1.0, 2.5, torch.ones(2, 3), None),
    ],
    ids=["numbers", "weights", "totals", "bounds"],
)
def test_empty_sets_are_refused_before_anything_is_written(c):
    x = torch.full((2, 3), 7.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="`total` must be between"):
            c.project_(x)
    assert (x == 7).all()
    with pytest.raises(ValueError, match="one value per sub-tensor"):
        BoxSection(1.0, torch.ones(3), 0.0, 1.0).project_(x)
    with pytest.raises(ValueError, match="needs a bounded set"):
        SUMS_TO_1.lmo(x)


def test_a_full_budget_is_not_empty():
    for n in (1, 3, 10, 3000):
        c = BoxSection(0.1, 0.7 * 0.1 * n, 0.0, 0.7)
        for dtype in DTYPES:
            y = c.project(torch.zeros(1, n, dtype=dtype))
            wanted = torch.full_like(y, 0.7)
            torch.testing.assert_close(y, wanted, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_plain_data():
    c = budget(5)
    other = Constraint.from_plain(c.to_plain())
    assert c == other
    assert torch.equal(c.project(randn(2, 5)), other.project(randn(2, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_box_of_one_point_is_judged_after_rounding(dtype):
    """A sum that is rounded to the dtype is that of the entries, as it is for `violation`."""
    generator = torch.Generator().manual_seed(0)
    for size in (3, 10, 100):
        point = torch.randn(4, size, generator=generator).to(dtype)
        total = point.double().sum(1, keepdim=True).to(dtype)
        for only in (
            BoxSection(1.0, total, point, point),
            BoxSection(1.0, total[0].item(), point[0], point[0]),
        ):
            x = torch.randn(4, size, generator=generator).to(dtype)
            y = only.project(x)
            assert torch.equal(y, only.lower.expand(4, size))
            assert (only.violation(y) == 0).all()


def test_what_no_rounding_explains_is_refused_for_each_dtype():
    budget = BoxSection(1.0, 1.001, 0.0, 0.25)
    assert (budget.violation(budget.project(torch.ones(2, 4, dtype=torch.bfloat16))) == 0).all()
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="`total` must be between"):
            budget.project_(torch.ones(2, 4, dtype=dtype))


@pytest.mark.parametrize("p", [1, 2, inf])
def test_moved_to_sum_is_the_nearest_of_its_norm(p):
    draw = np.random.default_rng(0)
    for _ in range(10):
        weight, x = draw.normal(size=6).round(1), draw.random(6).round(1)
        weight[0] = 0.0
        total = weight @ draw.random(6)
        rows = [torch.tensor(v).double().view(1, -1) for v in (x, weight, [total], [0.0], [1.0])]
        found = moved_to_sum(*rows, p)[0].numpy()
        assert found.min() >= -1e-15 and found.max() <= 1 + 1e-15
        assert weight @ found == pytest.approx(total, abs=1e-13)
        at_most = smallest_distance(x, weight, total, p)
        assert np.linalg.norm(found - x, p) == pytest.approx(at_most, abs=1e-7)


def smallest_distance(x, weight, total, p):
    """The smallest distance, by a linear program or, in L2, the projection."""
    if p == 2:
        rows = [torch.tensor(v).double().view(1, -1) for v in (x, weight, [total], [0.0], [1.0])]
        return np.linalg.norm(nearest_with_sum(*rows)[0].numpy() - x)
    n = len(x)  # of z and what bounds |z - x|: one number, or one for each entry
    bound = np.ones((n, 1)) if p == inf else np.eye(n)
    above = np.block([[np.eye(n), -bound], [-np.eye(n), -bound]])
    cost = np.r_[np.zeros(n), np.ones(bound.shape[1])]
    sums = np.r_[weight, np.zeros(bound.shape[1])][None]
    limits = [(0, 1)] * n + [(0, None)] * bound.shape[1]
    return linprog(cost, above, np.r_[x, -x], sums, [total], limits).fun


@pytest.mark.parametrize("p", [1, 2, inf])
def test_moved_to_sum_where_there_is_no_such_point_or_no_bound(p):
    x, weight = (
        torch.tensor([[0.5, 0.25, 0.75]]).double(),
        torch.tensor([[2.0, -1.0, 0.0]]).double(),
    )
    total = torch.full((1, 1), 9.0).double()
    zero, one, free = (torch.full((1, 1), v).double() for v in (0.0, 1.0, inf))
    assert moved_to_sum(x, weight, total, zero, one, p).tolist() == [[1.0, 0.0, 0.75]]
    found = moved_to_sum(x, weight, total, -free, free, p)
    assert (weight * found).sum().item() == pytest.approx(9) and found[0, 2] == 0.75
    assert torch.equal(moved_to_sum(x, 0 * weight, total, zero, one, p), x)
