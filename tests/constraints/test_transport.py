"""Doubly stochastic matrices and transport plans, beside independent solvers."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog, minimize

from rai_toolbox.constraints import Birkhoff, Constraint, Transport, transport
from rai_toolbox.constraints.kernels.transport import scaled_plan


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plans(m, k, n=None):
    rows = positive(m) if n is None else positive(n, m, 1)
    columns = positive(k, seed=1) if n is None else positive(n, 1, k, seed=1)
    over = -1 if n is None else (-2, -1)
    total = rows.sum(over, keepdim=True) / columns.sum(over, keepdim=True)
    return Transport(rows, columns * total)


def equations(m, k):
    """The matrix of the sums of rows and columns of a flattened plan."""
    return np.concatenate([np.kron(np.eye(m), np.ones(k)), np.kron(np.ones(m), np.eye(k))])


@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_nearest_plan_is_that_of_a_general_solver(scale):
    m, k = 3, 4
    constraint, y = plans(m, k), scale * normal(5, m, k)
    sums = np.concatenate([constraint.rows[:, 0].numpy(), constraint.columns.numpy()])
    found = constraint.project(y)
    for x, plan in zip(y.flatten(1).numpy(), found.flatten(1).numpy(), strict=True):
        equal = {"type": "eq", "fun": lambda z: (equations(m, k) @ z - sums)[:-1]}
        best = minimize(
            lambda z, x=x: ((z - x) ** 2).sum() / 2,
            np.full(m * k, sums.sum() / 2 / m / k),
            jac=lambda z, x=x: z - x,
            bounds=[(0, None)] * (m * k),
            constraints=equal,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(plan, best.x, atol=1e-5)


@pytest.fixture(params=[True, False], ids=["scipy", "no scipy"])
def solver(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(transport, "_assignment_solver", lambda: None)


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_minimizer_over_permutations_is_that_of_scipy(n):
    cost = torch.cat([normal(6, n, n), normal(6, n, n, seed=1).round()])  # with ties
    found = Birkhoff(2.0).lmo(cost)
    assert ((found == 0) | (found == 2)).all()
    for c, plan in zip(cost.numpy(), found.numpy(), strict=True):
        best = c[linear_sum_assignment(c)].sum()
        assert abs((c * plan).sum() - 2 * best) <= 1e-12 * (1 + abs(best))


def test_cheapest_plan_is_that_of_scipy():
    m, k = 5, 7
    constraint, cost = plans(m, k, n=8), normal(8, m, k)
    found = constraint.lmo(cost)
    for i in range(8):
        sums = np.concatenate([constraint.rows[i, :, 0].numpy(), constraint.columns[i, 0].numpy()])
        best = linprog(cost[i].flatten().numpy(), A_eq=equations(m, k), b_eq=sums, method="highs")
        assert abs((cost[i] * found[i]).sum() - best.fun) < 1e-9
        assert (found[i] > 1e-12).sum() < m + k  # a vertex


@pytest.mark.usefixtures("solver")
def test_a_flow_is_sent_back_where_that_is_cheaper():
    cost = torch.tensor([[[1.0, 2.0, 9.0], [1.0, 9.0, 20.0], [3.0, 1.0, 9.0]]])
    assert Birkhoff().lmo(cost).tolist() == [[[0, 0, 1], [1, 0, 0], [0, 1, 0]]]


def test_results_are_exact_for_large_and_far_matrices():
    for scale in (1e-3, 1.0, 1e3, 1e6):
        x = scale * normal(4, 32, 32, dtype=torch.float32)
        for y in (Birkhoff().project(x), Birkhoff().lmo(x)):
            assert (Birkhoff().violation(y) == 0).all()
            assert (y.double().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("constraint", [Birkhoff(), plans(24, 24)], ids=["Birkhoff", "Transport"])
def test_the_projection_is_the_nearest_plan_however_far(constraint):
    scales = torch.tensor([1.0, 1e3, 1e6, 1e9], dtype=torch.float64).view(4, 1, 1)
    x = scales * normal(4, 24, 24)
    y = constraint.project(x)
    away = y - x
    gap = (away * (y - constraint.lmo(away))).sum((1, 2))
    # (Entries are differences of numbers as large as those of x.)
    assert (gap / scales.flatten() <= 1e-9 + 1e-14 * scales.flatten()).all()


@pytest.mark.parametrize("scale", [1e17, 1e22, 1e36])
def test_the_projection_is_the_cheapest_plan_where_plans_are_smaller_than_rounding(scale):
    for dtype in (torch.float32, torch.float64):
        x = (scale * normal(3, 4, 4)).to(dtype)
        for constraint in (Birkhoff(), plans(4, 4)):
            y = constraint.project(x)
            torch.testing.assert_close(y, constraint.lmo(-x), rtol=0, atol=1e-4)
            assert (constraint.violation(y) == 0).all()
    blocks = torch.eye(2).repeat_interleave(2, 0).repeat_interleave(2, 1)[None]
    torch.testing.assert_close(Birkhoff().project(scale * blocks), blocks / 2)  # not a vertex
    assert Birkhoff().project(torch.full((1, 2, 2), torch.nan)).isnan().all()


def test_reference_values():
    x = torch.tensor([[[0.9, 0.3], [0.2, 0.4]]])
    torch.testing.assert_close(Birkhoff().project(x), torch.tensor([[[0.7, 0.3], [0.3, 0.7]]]))
    constant = Birkhoff(3.0).project(torch.full((1, 3, 3), 7.0))
    torch.testing.assert_close(constant, torch.ones(1, 3, 3))
    zero = Birkhoff(0.0).project(x)
    assert (zero == 0).all()


def test_derivative_with_respect_to_the_sums():
    constraint = plans(3, 4)
    x, rows = normal(2, 3, 4), constraint.rows.clone()

    def project(share):  # moves mass between two rows
        moved = rows + share * torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)
        return constraint._replaced({"rows": moved}).project(x)

    share = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, share)
    assert torch.autograd.gradcheck(constraint.project, x.clone().requires_grad_())


def test_scaled_plan_is_the_fixed_point_of_sinkhorn():
    constraint, logits = plans(4, 5), normal(3, 4, 5)
    rows, columns = constraint.sums(logits)
    plan = scaled_plan(logits, rows, columns, 100)
    assert (constraint.violation(plan) == 0).all()
    ratio = plan.log() - logits  # is a sum of a column and a row
    centered = ratio - ratio.mean(1, keepdim=True) - ratio.mean(2, keepdim=True)
    torch.testing.assert_close(centered, -ratio.mean((1, 2), keepdim=True).expand(3, 4, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Birkhoff(-1.0), "`total` must be >= 0"),
        (lambda: Birkhoff().project(torch.ones(1, 2, 3)), "`x` must have square matrices"),
        (
            lambda: Birkhoff().project(torch.ones(1, 1, 2, 2)),
            r"`x` must have the shape \(N, m, k\)",
        ),
        (lambda: Transport(1.0, torch.ones(1)), "`rows` must be a tensor, got 1.0"),
        (
            lambda: Transport(torch.ones(2), torch.ones(3)),
            "`columns` must have the total of `rows`",
        ),
        (lambda: Transport(torch.ones(2, 2), torch.ones(4)), r"`rows` must have the shape \(m,\)"),
        (lambda: Transport(torch.ones(2), -torch.ones(2)), "`columns` must be >= 0"),
        (
            lambda: Transport(torch.ones(2), torch.ones(2)).project(torch.ones(1, 2, 3)),
            r"`columns` must broadcast against the batch",
        ),
        (
            lambda: Transport(torch.ones(1), torch.ones(1)).project(torch.ones(1, 1, 3)),
            r"`x` must have matrices of shape \(1, 1\)",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_plain_data():
    constraint = plans(2, 3)
    assert Constraint.from_plain(constraint.to_plain()) == constraint
    assert constraint.to(torch.float32).rows.dtype == torch.float32
