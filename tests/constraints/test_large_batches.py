"""Batches large enough for sums in float32: as in float64, also rows that float32 cannot sum."""

import pytest
import torch

from rai_toolbox.constraints import L2Ball, MaxNorm, Simplex, UnitNorm
from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.constraints.kernels.directions import normalize_, sign_
from rai_toolbox.optim import ProjectedOptimizer

SHAPE = (400, 300)
assert SHAPE[0] * SHAPE[1] > BLOCK

in_each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def rows(dtype=torch.float32):
    """Rows of ordinary numbers, and some at both ends of the range."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x[7], x[8, 3], x[9, 4] = 0.0, torch.nan, torch.inf
    if dtype != torch.float16:
        x[10] *= 1e-30
        x[11] *= 1e30
        x[12] *= 1e-42
    return x.to(dtype)


@in_each_dtype
@pytest.mark.parametrize("p", [1, 2])
def test_directions(dtype, p):
    x = rows(dtype)
    found = normalize_(x.clone(), p, 1)
    wide = x.double()
    wide[8:10] = torch.nan  # a direction that nobody knows
    wide[7] = 0.0
    expected = wide / torch.where(wide == 0, 1.0, wide.norm(p, 1, keepdim=True))
    rounding = max(torch.finfo(dtype).eps, 1e-6)
    small = torch.finfo(dtype).smallest_normal  # below it numbers have few digits
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=small, equal_nan=True)


@in_each_dtype
def test_signs_of_any_list(dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    ordinary, with_nan = torch.randn(3, 4).to(dtype), torch.tensor([[torch.nan, -0.0, -tiny]])
    tensors = [rows(dtype), ordinary, ordinary.clone(), with_nan.to(dtype), rows(dtype).t()]
    tensors.append(tensors[3].clone())
    expected = [torch.where(x.isnan(), x, (x > 0).to(dtype) - (x < 0).to(dtype)) for x in tensors]
    sign_(tensors)
    for found, signs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(found, signs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", ["by row", "by column"])
def test_small_squares_that_a_sum_in_float32_loses(stored):
    """Without lanes their sum is off by more than is allowed for."""
    x = torch.full((300, 256), 0.999 * 2**-12.5)
    x[:, 0] = 1.0
    if stored == "by column":
        x = x.t().contiguous().t()
    longest = x.double().norm(dim=1).max().item()
    for epsilon in torch.linspace(1.0, longest - 1e-8, 30, dtype=torch.float64).tolist():
        for constraint in (L2Ball(epsilon), MaxNorm(epsilon)):
            found = constraint.project(x)
            assert found.double().norm(dim=1).max() <= epsilon
            assert torch.equal(constraint.project(found), found)


@pytest.mark.parametrize("total", [1.0, 1e-3, 250.0])
@pytest.mark.parametrize("all_outside", [True, False])
def test_simplex(total, all_outside):
    constraint = Simplex(total)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x[3] *= 1e20
    x[4] = -1.0
    x[5, 1:] = 0.0
    x[5, 0] = -1.0
    if not all_outside:
        x[6], x[7, 0] = constraint.project(x[6:7])[0], torch.nan
    found = constraint.project(x)
    assert (constraint.violation(found).nan_to_num(0.0) == 0).all()
    torch.testing.assert_close(
        found.double(), constraint.project(x.double()), rtol=1e-5, atol=1e-6 * total, equal_nan=True
    )
    torch.testing.assert_close(constraint.project(found), found, rtol=0, atol=0, equal_nan=True)
    if not all_outside:
        assert torch.equal(found[6], x[6])
        assert found[7].isnan().all()


def without_scaling(constraint):
    """The same set, whose projection is not known to scale rows."""

    class Same(type(constraint)):
        def _scaling(self, length, x):
            return NotImplemented

    return Same._from_settings(
        {name: value for name, value in constraint.to_plain().items() if name != "set"}
    )


@pytest.mark.parametrize("constraint", [UnitNorm(), L2Ball(17.4), MaxNorm(17.4)], ids=repr)
@pytest.mark.parametrize("gradient_size", [1.0, 1e-8, 1e8])
def test_gradient_mapping(constraint, gradient_size):
    mapped = []
    for each, dtype in ((constraint, torch.float32), (without_scaling(constraint), torch.float64)):
        x = rows()[13:].to(dtype).requires_grad_()
        x.grad = (rows()[13:].flip(0) * gradient_size).to(dtype)
        start = x.grad.clone()
        length = x.detach().norm(dim=1)
        # (with averaging=0, m is g; the step of Adam leaves the gradient alone)
        adam = {"lr": 1e-3, "averaging": 0.0}
        ProjectedOptimizer([x], torch.optim.Adam, constraint=each, **adam).step()
        mapped.append(x.grad.float())
    torch.testing.assert_close(mapped[0], mapped[1], rtol=1e-4, atol=2e-5 * gradient_size)
    assert (mapped[0] != start).any()
    if not isinstance(constraint, UnitNorm):
        inside = length * 1.101 < 17.4
        assert inside.any()
        assert torch.equal(mapped[0][inside], start[inside].float())
