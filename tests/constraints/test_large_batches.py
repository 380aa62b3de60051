"""Batches large enough for sums in float32: as in float64, also rows that float32 cannot sum."""

import math

import pytest
import torch

from rai_toolbox.constraints import L2Ball, MaxNorm, MinMaxNorm, Simplex, UnitNorm
from rai_toolbox.constraints.kernels.blocks import BLOCK, Workspace
from rai_toolbox.constraints.kernels.directions import largest_sign_, normalize_, sign_
from rai_toolbox.optim import ProjectedOptimizer
from rai_toolbox.optim.gradient_mapping import GradientMapping

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


def test_directions_need_no_subnormal_reciprocals():
    x = rows()[20:].abs()
    x[3] *= 3e38 / x[3].norm()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        length = normalize_(x, 2, 1).norm(dim=1)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("epsilon", [3.4e38, 1e39])
def test_l2_balls_of_radii_at_the_end_of_float32(epsilon, size):
    x = torch.randn(40_000, size, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = torch.finfo(torch.float32).max, math.inf
    y = L2Ball(epsilon).project(x)
    expected = L2Ball(epsilon).project(x[:1].double())
    torch.testing.assert_close(y[:1].double(), expected, rtol=1e-6, atol=0)
    assert y[1].isnan().all()
    assert torch.equal(y[2:], x[2:])


@pytest.mark.parametrize("epsilon", [1e38, 1e300, math.inf])
@pytest.mark.parametrize("height", [2, 700])
def test_norms_beyond_which_no_division_by_0_counts(epsilon, height):
    x = torch.randn(height, 100, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e36
    expected = x.double() / epsilon
    y = normalize_(x, 2, 1, epsilon)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-44)


@in_each_dtype
def test_one_largest_sign_of_each_row(dtype):
    x = rows()[20:]
    x[3] = x[3].clamp(-0.5, 0.5)  # ties
    x[5] *= 1e-3
    x = x.to(dtype)
    x[4, 5], x[4, 6] = 4.75, 4.75 * (1 + torch.finfo(dtype).eps)
    at = x.abs().argmax(1, keepdim=True)
    expected = torch.zeros_like(x).scatter_(1, at, x.gather(1, at).sign())
    assert torch.equal(largest_sign_(x.clone()), expected)
    for other in (0.0, torch.finfo(dtype).smallest_normal / 4, math.inf):
        x[7] = 0.0
        x[7, 2] = other
        expected[7] = 0.0
        expected[7, 2] = x[7, 2].sign()
        assert torch.equal(largest_sign_(x.clone()), expected)
    x[7, 2] = math.nan
    found = largest_sign_(x.clone())
    assert found[7, 2].isnan()
    found[7, 2] = expected[7, 2]
    assert torch.equal(found, expected)


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
@pytest.mark.parametrize(("size", "lanes"), [(256, 1), (576, 8), (768, 8), (1024, 16)])
def test_small_squares_that_a_sum_in_float32_loses(stored, size, lanes):
    """Their sum is off by more than is allowed for, if there are fewer lanes than supposed."""
    x = torch.full((300, size), 0.999 * 2**-12)
    x[:, :lanes] = 1.0
    if stored == "by column":
        x = x.t().contiguous().t()
    longest, least = x.double().norm(dim=1).max().item(), lanes**0.5
    for epsilon in torch.linspace(least, longest - 1e-8, 30, dtype=torch.float64).tolist():
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


def close_to(radius, dtype):
    """Large batches with rows on both sides of a radius, at it, and at both ends of the range."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    made = []
    for shape in [(400, 300), (250, 3, 10, 10), (300, 1700), (260, 300)]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).flatten(1)
        x *= radius / x.norm(dim=1, keepdim=True)
        near = 1 + 1e-6 * torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
        x *= torch.where(torch.arange(len(x)).unsqueeze(1) % 3 > 0, near, near * 3)
        made.append(x.to(dtype).view(shape))
    ends = [0.0, info.smallest_normal * info.eps, info.tiny, info.max, torch.nan, torch.inf]
    for i, value in enumerate(ends):
        made[0][5 + i, 7] = value
    made[3][1], made[3][2] = 0.0, info.max / 32  # whose norm float64 holds
    return made


@in_each_dtype
@pytest.mark.parametrize("kind", [L2Ball, MaxNorm])
def test_large_batches_together_with_rows_close_to_the_radius(kind, dtype):
    constraint = kind(3.0)
    start, together = close_to(3.0, dtype), close_to(3.0, dtype)
    with torch.no_grad():  # as in a step; else they are not joined
        constraint.project_each_(together)
    for x, y in zip(start, together, strict=True):
        rounding = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, constraint.project(x), rtol=rounding, atol=0, equal_nan=True)
        assert torch.equal(constraint.project(y).nan_to_num(), y.nan_to_num())
        length, after = x.double().flatten(1).norm(dim=1), y.double().flatten(1).norm(dim=1)
        finite = x.isfinite().flatten(1).all(1)
        assert (after[finite] <= 3.0 * (1 + 1e-15)).all()
        assert torch.equal(y[length < 3.0], x[length < 3.0])
        assert y[~finite].isnan().all()


@pytest.mark.parametrize("kind", [L2Ball, MaxNorm])
@pytest.mark.parametrize("others", [5.0, 0.2, torch.nan])
def test_rows_close_to_the_radius_do_not_depend_on_other_rows(kind, others):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    epsilon = x[0].double().norm().item() * (1 + 1e-9)
    for near, inside in ((1 - 2e-7, True), (1.0, True), (1 + 2e-7, False), (1 + 1e-5, False)):
        rows = x[:1] * near
        alone = kind(epsilon).project(rows.expand(SHAPE))[0]
        found = kind(epsilon).project(torch.cat([rows, x[1:] * others]))[0]
        torch.testing.assert_close(found, alone, rtol=3e-7, atol=0)
        assert torch.equal(found, rows[0]) == (rows.double().norm().item() <= epsilon) == inside


@in_each_dtype
def test_large_batches_together_on_spheres(dtype):
    together = close_to(1.0, dtype)
    with torch.no_grad():
        UnitNorm().project_each_(together)
    for x, y in zip(close_to(1.0, dtype), together, strict=True):
        assert (UnitNorm().violation(y).nan_to_num(0.0) == 0).all()
        assert torch.equal(UnitNorm().project(y).nan_to_num(), y.nan_to_num())
        finite = x.isfinite().flatten(1).all(1)
        assert torch.equal(y.isnan().flatten(1).any(1), ~finite)


@pytest.mark.parametrize(("least", "most"), [(2.0, 3.0), (1e-12, 1e-3), (1.0, 1e30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_batches_between_two_norms(dtype, least, most):
    """Also rows whose factor the dtype does not hold, which are scaled twice."""
    constraint = MinMaxNorm(least, most)
    together = [rows(dtype), rows(dtype).flip(0)]
    start = together[0].clone()
    with torch.no_grad():
        constraint.project_each_(together)
    found = together[0]
    assert torch.equal(found.nan_to_num(), together[1].flip(0).nan_to_num())
    assert (constraint.violation(found).nan_to_num(0.0) == 0).all()
    assert torch.equal(constraint.project(found).nan_to_num(), found.nan_to_num())
    inside = constraint.violation(start) == 0
    assert torch.equal(found[inside], start[inside])
    rounding = 4 * torch.finfo(dtype).eps
    exact = constraint.project(start.double()).float()
    small = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(found.float(), exact, rtol=rounding, atol=small, equal_nan=True)


@pytest.mark.parametrize("settings", [{}, {"averaging": 0.5}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("constraint", [UnitNorm(), L2Ball(17.4)], ids=repr)
def test_gradient_mapping_of_several_parameters(constraint, settings):
    """As one by one in float64; a row of zeros, which has no scale, goes the other way."""
    found = []
    for each, dtype in ((constraint, torch.float32), (without_scaling(constraint), torch.float64)):
        params = []
        for i, height in enumerate((300, 150, 400)):
            x = rows()[13:].repeat(2, 1)[i : i + height].to(dtype)
            x[3] = 1.0 if i < 2 else 0.0
            params.append(x.requires_grad_())
            params[-1].grad = rows()[13:].repeat(2, 1)[i + 1 : i + 1 + height].to(dtype)
        opt = ProjectedOptimizer(params, torch.optim.Adam, constraint=each, lr=1e-6, **settings)
        opt.step()
        found.append([param.grad.float() for param in params])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("constraint", [UnitNorm(), L2Ball(17.4)], ids=repr)
def test_gradient_mapping_by_an_average(constraint, maximize):
    """The norm of ``x - e m`` follows from those of x and m, and their product."""
    mapping = GradientMapping(torch.optim.Adam)
    x, group = rows()[13:], {"constraint": constraint, "maximize": maximize}
    grad, average = x.flip(0), x.roll(5, 0) + 0.3 * x
    wide = grad.double()
    mapping.map_(
        wide, x.double(), average.double(), {**group, "constraint": without_scaling(constraint)}
    )
    assert mapping._map_rows_([grad], [x], [average], group=group, workspace=Workspace())
    torch.testing.assert_close(grad, wide.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_gradient_mapping_of_channels_last(averaging):
    generator = torch.Generator().manual_seed(0)
    x, *grads = (torch.randn(128, 32, 3, 3, generator=generator) for _ in range(3))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = x.to(memory_format=layout, copy=True).requires_grad_()
        settings = {"constraint": L2Ball(17.0), "averaging": averaging}
        opt = ProjectedOptimizer([param], torch.optim.Adam, lr=1e-2, **settings)
        for grad in grads:
            param.grad = grad.to(memory_format=layout, copy=True)
            opt.step()
        found.append(param.grad)
    torch.testing.assert_close(*found)
    assert not torch.equal(param.grad, grads[-1])


def test_a_mapping_leaves_gradients_alone_where_it_stays_just_inside():
    """The norm of y, by products in float32, is off by more than what these rows are inside by."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(512, 256, generator=generator).double() for _ in range(2))
    x, down = (each / each.norm(dim=1, keepdim=True) for each in (x, -grad))
    y = x + 0.1 * down  # with the reach of 0.1; it grows as x does
    x = (x / y.norm(dim=1, keepdim=True) * (1 - 3e-8)).float().requires_grad_()
    y = x.detach().double() + 0.1 * x.detach().double().norm(dim=1, keepdim=True) * down
    assert 1 - 1e-7 < y.norm(dim=1).min() and y.norm(dim=1).max() <= 1
    x.grad = grad.float()
    ball = L2Ball(1.0)
    ProjectedOptimizer([x], torch.optim.Adam, constraint=ball, lr=1e-3, averaging=0.0).step()
    assert torch.equal(x.grad, grad.float())
