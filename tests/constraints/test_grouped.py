"""Several batches at once: as one by one, whatever is inside and of whatever size."""

import pytest
import torch

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall, NonNegative, Simplex, UnitNorm
from rai_toolbox.constraints.kernels import blocks

MANY = [(3, 20)] * 50 + [(7, 5, 4), (1, 20), (0, 20), (400, 20), (5, 6), (2, 5000)]


def batches(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) * scale for shape in MANY]
    made.append(torch.randn(20, 30, generator=generator).t() * scale)  # of other strides
    made[0][1, 2], made[1][0, 0] = torch.nan, torch.inf
    return [x.to(dtype) for x in made]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
# of lengths around 4.5: all rows are outside, about half of them, a few, none; tiny, and huge
@pytest.mark.parametrize("epsilon", [1.0, 4.5, 6.5, 1000.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("make", [L2Ball, lambda epsilon: UnitNorm()], ids=["L2Ball", "UnitNorm"])
def test_grouped_is_one_by_one(make, dtype, epsilon, scale):
    constraint = make(epsilon * scale)
    together, alone = batches(dtype, scale), batches(dtype, scale)
    with torch.no_grad():  # as in a step; else they are not joined
        constraint.project_each_(together)
    for x in alone:
        constraint.project_(x)
    for ours, theirs in zip(together, alone, strict=True):
        rounding = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
# of sums around 15: all rows are outside, about half of them, none
@pytest.mark.parametrize("epsilon", [1.0, 15.0, 1e4])
def test_joined_rows_of_l1_balls_are_those_of_one_by_one(dtype, epsilon):
    together, alone = batches(dtype, 1.0), batches(dtype, 1.0)
    large = torch.randn(blocks.MANY // 400 + 9, 600, generator=torch.Generator().manual_seed(1))
    large[::3] /= 1e3
    large[5, 7], large[900, 0] = torch.nan, -torch.inf
    for some in (together, alone):
        some.insert(3, large.to(dtype).clone())
        some.append(some[3].clone())
    constraint = L1Ball(epsilon)
    with torch.no_grad():  # as in a step; else they are not joined
        constraint.project_each_(together)
    for ours, theirs in zip(together, alone, strict=True):
        rows = torch.cat([constraint.project(row) for row in theirs.split(1)] or [theirs])
        rounding = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, rows, rtol=rounding, atol=rounding, equal_nan=True)
        sums = theirs.double().flatten(1).abs().sum(1)
        assert torch.equal(ours[sums <= epsilon], theirs[sums <= epsilon])
        assert (constraint.violation(ours).nan_to_num(0) == 0).all()
        assert torch.equal(ours.isnan().flatten(1).any(1), ~sums.isfinite())


@pytest.mark.parametrize("radius", [2.0**-31, 1e-8, 1.0, 1e15])
def test_rows_of_large_tensors_whose_norms_are_close_to_the_radius(radius):
    """Norms in float32 cannot tell on which side of the radius these rows are."""
    x = torch.randn(1200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= radius / x.norm(dim=1, keepdim=True)
    x *= 1 + 10.0 ** -torch.arange(1, 13).repeat(100).unsqueeze(1) * (
        1 - 2 * (torch.arange(1200) % 7 % 2)
    ).unsqueeze(1)
    far, at = x.clone(), torch.arange(0, 1200, 100)
    far[torch.arange(1200) % 100 != 0] *= 3  # few of them are close
    far[at[3], 5], far[at[4], 5] = torch.nan, torch.inf
    for rows in (x.float(), far.float()):
        y = L2Ball(radius).project(rows)
        length, after = rows.double().norm(dim=1), y.double().norm(dim=1)
        assert (after[length.isfinite()] <= radius * (1 + 1e-13)).all()
        assert torch.equal(y[length < radius], rows[length < radius])
        assert y[~length.isfinite()].isnan().all()
        assert torch.equal(L2Ball(radius).project(y).nan_to_num(), y.nan_to_num())
        exact = rows.double() * (radius / length).clamp(max=1).unsqueeze(1)
        off = (y.double() - exact)[length.isfinite()].abs().max()
        assert off <= 5e-6 * radius


def test_what_is_inside_is_not_written_to():
    x = torch.full((4, 30), 0.1)
    before = x._version
    L2Ball(1.0).project_(x)
    assert x._version == before


def test_a_batch_that_does_not_fit_is_refused_before_any_is_changed():
    x = torch.ones(2, 30)
    with pytest.raises(TypeError, match="real floating-point"):
        L2Ball(1.0).project_each_([x, torch.ones(2, 30, dtype=torch.int64)])
    assert torch.equal(x, torch.ones(2, 30))


@pytest.mark.parametrize("height", [20, 400])
@pytest.mark.parametrize("constraint", [UnitNorm(), L2Ball(1.0)], ids=repr)
def test_tensors_that_share_memory_are_projected_one_after_the_other(constraint, height):
    whole = 3 * torch.randn(height, 300, generator=torch.Generator().manual_seed(0))
    expected = constraint.project(whole)
    with torch.no_grad():
        constraint.project_each_([whole, whole[:], whole[height // 2 :]])
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("kind", [Simplex, L1Ball, L2Ball, LinfBall, NonNegative, UnitNorm])
@pytest.mark.parametrize("mixed_in", [False, True])
@torch.no_grad()
def test_a_projection_that_a_subclass_defines_is_that_of_several_batches(kind, mixed_in):
    class Half:
        def project_(self, x):
            return kind.project_(self, x).div_(2)

    class Halved(*((Half, kind) if mixed_in else (kind,))):
        if not mixed_in:
            project_ = Half.project_

    c = Halved() if kind in (NonNegative, UnitNorm) else Halved(1.0)
    for shapes in [[(64, 1000)], [(64, 1000), (3, 20)], [(3, 20), (3, 20)]]:
        batches = [torch.linspace(-3, 5, n * m).reshape(n, m) for n, m in shapes]
        expected = [c.project(x) for x in batches]
        c.project_each_(batches)
        assert all(map(torch.equal, batches, expected))
