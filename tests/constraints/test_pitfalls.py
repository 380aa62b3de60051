"""What libraries of this field usually get wrong, one by one."""

import math
from fractions import Fraction

import pytest
import torch
from constraints.cases import sets
from torch_versions import views_in_vmap

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(row):
    return sum(Fraction(entry) ** 2 for entry in row)


def test_simplex_far_from_the_origin():
    """A sum of large numbers of either sign has no digits left; relative to the maximum it has."""
    x = (1e6 + normal(8, 1000)).float()
    y = sets.Simplex().project(x)
    assert (y.double().sum(1) - 1).abs().max() <= 1e-6
    assert (y.double() - sets.Simplex().project(x.double())).abs().max() <= 1e-7


@in_each_dtype
def test_simplex_of_ties_far_above_the_rest(dtype):
    large = 1e8 if dtype != torch.float16 else 6e4
    y = sets.Simplex().project(torch.tensor([[large, large, 1.0]], dtype=dtype))
    assert y.tolist() == [[0.5, 0.5, 0.0]]


def test_simplex_of_a_million_ties():
    y = sets.Simplex().project(torch.full((1, 10**6), 0.3))
    assert (y == y[0, 0]).all()
    assert abs(10**6 * Fraction(y[0, 0].item()) - 1) <= 2**-23


@pytest.mark.parametrize(
    "kind", ["normal", "far", "heavy", "sparse", "sorted", "ties", "geometric"]
)
@pytest.mark.parametrize("size", [2, 1000, 200_000])
def test_simplex_without_sorting(kind, size):
    """The threshold is that of a sort in float64, for all kinds of rows."""
    z = normal(1, size)
    x = {
        "normal": z,
        "far": 1e3 + z,
        "heavy": z.exp() ** 3,
        "sparse": torch.where(z.abs() > 1.5, z, 0.0),
        "sorted": z.sort().values,
        "ties": z.round(),
        "geometric": 0.9 ** torch.arange(size, dtype=torch.float64)[None],
    }[kind]
    descending = x.sort(descending=True).values - x.amax()
    steps = torch.arange(1, size + 1)
    t = (descending.cumsum(1) - 1) / steps
    count = int((descending > t).sum())
    expected = (x - x.amax() - t[:, count - 1]).clamp(min=0)
    assert (sets.Simplex().project(x) - expected).abs().max() <= 1e-8


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_norms_beyond_the_squares_of_float32(size):
    x = torch.full((1, 3), size)
    for ball in (sets.L2Ball(size), sets.MaxNorm(size)):
        y = ball.project(x)
        assert y.double().norm().item() == pytest.approx(size, rel=1e-6)
    assert torch.equal(sets.L2Ball(2 * size).project(x), x)
    assert sets.UnitNorm().project(x).norm().item() == pytest.approx(1, rel=1e-6)


@in_each_dtype
def test_zero_rows_stay(dtype):
    """No epsilon in a divisor, that float16 would round to 0."""
    x = torch.tensor([[0.0, -0.0, 0.0]], dtype=dtype)
    for c in (sets.L2Ball(1.0), sets.L1Ball(1.0), sets.LinfBall(1.0), sets.MaxNorm(1.0)):
        assert torch.equal(c.project(x).signbit(), x.signbit())
        assert (c.project(x) == 0).all()
        assert (c.lmo(x) == c.lmo(x)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_end_in_the_ball(dtype):
    """To nearest, half of them would end outside."""
    x = (10 * normal(1000, 5)).to(dtype)
    assert max(map(squared, sets.L2Ball(1.0).project(x).tolist())) <= 1
    assert (
        max(sum(map(abs, map(Fraction, row))) for row in sets.L1Ball(1.0).project(x).tolist()) <= 1
    )


def test_a_norm_as_small_as_the_usual_epsilon():
    """`torch.renorm` adds 1e-7 to the norm: what it returns is too short, and changes again."""
    x = normal(4, 5).float()
    y = sets.MaxNorm(1e-7).project(x)
    assert (y.double().norm(dim=1) / 1e-7 - 1).abs().max() <= 1e-6
    assert torch.equal(sets.MaxNorm(1e-7).project(y), y)


@in_each_dtype
def test_feasible_weights_do_not_shrink(dtype):
    x = sets.MaxNorm(1.0).project((3 * normal(20, 5)).to(dtype))
    y = x.clone()
    for _ in range(100):
        sets.MaxNorm(1.0).project_(y)
    assert torch.equal(x, y)


def test_bounds_in_the_wrong_order():
    with pytest.raises(
        ValueError, match=r"`lower` must be <= `upper`, got lower=1.0 and upper=0.0"
    ):
        sets.Box(1.0, 0.0)


@in_each_dtype
def test_nan_has_no_sign(dtype):
    """`sign(NaN)` is 0, which would hide it."""
    x = torch.tensor([[math.nan, 1.0], [1.0, 2.0]], dtype=dtype)
    for c in (sets.LinfBall(0.5), sets.L2Ball(0.5), sets.L1Ball(0.5)):
        assert c.lmo(x)[0, 0].isnan() and c.lmo(x)[1].isfinite().all()
        assert c.project(x)[0, 0].isnan() and c.project(x)[1].isfinite().all()


@in_each_dtype
def test_degenerate_batches(dtype):
    """Radius 0, no rows, no elements, zeros, ties and infinities: an answer, or a clear error."""
    for kind in (sets.LinfBall, sets.L2Ball, sets.L1Ball):
        assert (kind(0.0).project(torch.ones(2, 3, dtype=dtype)) == 0).all()
        for shape in ((0, 3), (3, 0)):
            assert kind(1.0).project(torch.ones(shape, dtype=dtype)).shape == shape
        assert kind(1.0).project(torch.zeros(1, 3, dtype=dtype)).tolist() == [[0.0, 0.0, 0.0]]
        ties = kind(1.0).project(torch.full((1, 4), 8.0, dtype=dtype))
        assert (ties == ties[0, 0]).all() and ties[0, 0] > 0
    for kind in (sets.L2Ball, sets.L1Ball):
        assert kind(1.0).project(torch.tensor([[math.inf, 1.0]], dtype=dtype)).isnan().all()
        with pytest.raises(ValueError, match=r"takes a batch of shape \(N, ...\), got \(\)"):
            kind(1.0).project(torch.tensor(1.0, dtype=dtype))
    assert sets.LinfBall(1.0).project(torch.tensor(-3.0, dtype=dtype)).item() == -1


@in_each_dtype
def test_exactly_one_of_the_ties(dtype):
    ties = torch.tensor([[2.0, -2.0, 2.0, 2.0]], dtype=dtype)
    assert (sets.L1Ball(1.0).lmo(ties) != 0).sum() == 1
    assert (sets.Simplex().lmo(ties.abs()) != 0).sum() == 1
    assert sets.TopK(2).project(ties).tolist() == [[2.0, -2.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_of_half_precision(dtype):
    """Summed in half precision, these are 2 % low."""
    x = (1 + normal(4, 3000).abs()).to(dtype)
    for p in (1, 2):
        y = {1: sets.L1Ball, 2: sets.L2Ball}[p](10.0).project(x).double()
        assert torch.linalg.vector_norm(y, p, dim=1).min() >= 10 * (1 - 2 * torch.finfo(dtype).eps)


VMAPPED = [
    sets.L1Ball(1.0),
    sets.L1Ball(1.0, center=0.1),
    sets.L2Ball(1.0),
    sets.L2Ball(1.0, center=0.1),
    sets.Simplex(),
    sets.UnitNorm(),
    sets.MaxNorm(1.0, p=1),
    sets.BoundedBall(sets.L2Ball(1.0), -0.2, 0.2),
    pytest.param(sets.BoundedBall(sets.L1Ball(1.0), -0.2, 0.2), marks=views_in_vmap),
]


@pytest.mark.parametrize("constraint", VMAPPED, ids=repr)
def test_vmap(constraint):
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    together = torch.func.vmap(constraint.project)(x)
    alone = torch.stack([constraint.project(one) for one in x])
    torch.testing.assert_close(together, alone, rtol=2e-6, atol=2e-7)
    slopes = torch.func.vmap(torch.func.grad(lambda one: constraint.project(one).sum()))(x)
    assert bool(slopes.isfinite().all())
