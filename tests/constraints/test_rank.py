"""Matrices of low rank, and sparse points of the simplex."""

from itertools import combinations

import pytest
import torch

from rai_toolbox.constraints import Rank, Simplex, SparseSimplex


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_the_nearest_matrix_of_a_rank_is_the_truncated_decomposition():
    x = normal(4, 6, 5)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    for r in range(6):
        y = Rank(r).project(x)
        torch.testing.assert_close(y, (u[..., :r] * s[:, None, :r]) @ vh[:, :r])
        after = s[:, r] if r < 5 else torch.zeros(4).double()
        torch.testing.assert_close(Rank(r).violation(x), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_thin_factors_is_inside_after_rounding(dtype):
    x = (normal(3, 20, 2) @ normal(3, 2, 15)).to(dtype)
    assert (Rank(2).violation(x) == 0).all()
    assert torch.equal(Rank(2).project(x), x)
    assert (Rank(1).violation(x) > 0.1).all()


def test_kernels_are_matrices():
    x = normal(2, 3, 2, 2, 2)
    y = Rank(1, flatten=1).project(x)
    assert torch.linalg.matrix_rank(y.flatten(2), rtol=1e-10).tolist() == [1, 1]


def test_derivative_of_rank():
    x = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(Rank(1).project, x)
    ties = torch.eye(3).expand(1, 3, 3).double().requires_grad_()
    Rank(1).project(ties).sum().backward()
    assert ties.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_the_nearest_sparse_point_is_the_best_of_all_supports(k):
    x = normal(20, 5)
    y = SparseSimplex(k, 1.5).project(x)
    assert ((y > 0).sum(1) <= k).all()
    best = torch.full((20,), torch.inf).double()
    for support in combinations(range(5), min(k, 5)):
        z = torch.zeros_like(x)
        z[:, support] = Simplex(1.5).project(x[:, support])
        best = torch.minimum(best, (z - x).norm(dim=1))
    torch.testing.assert_close((y - x).norm(dim=1), best)


def test_sparse_simplex_along_columns_and_ties():
    x = torch.tensor([[1.0, 3.0], [1.0, 2.0], [1.0, -1.0]])
    assert SparseSimplex(1, dim=0).project(x).tolist() == [[1, 1], [0, 0], [0, 0]]
    assert SparseSimplex(2).lmo(torch.tensor([[2.0, -1.0, 0.0]])).tolist() == [[0, 1, 0]]
    points = SparseSimplex(2).sample_(torch.empty(500, 4), torch.Generator().manual_seed(0))
    assert ((points > 0).sum(1) == 2).all()
    assert (points.mean(0) - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rank(-1), "`rank` must be >= 0, got -1"),
        (lambda: Rank(1.5), "`rank` must be an int"),
        (lambda: SparseSimplex(0), "`k` must be >= 1, got 0"),
        (lambda: SparseSimplex(1, -1.0), "`total` must be >= 0"),
        (lambda: Rank(1).lmo(torch.ones(1, 2, 2)), "`lmo` needs a bounded set"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
