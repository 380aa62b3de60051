"""Several batches at once: as one by one, whatever is inside and of whatever size."""

import pytest
import torch

from rai_toolbox.constraints import L2Ball, UnitNorm

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
    constraint.project_each_(together)
    for x in alone:
        constraint.project_(x)
    for ours, theirs in zip(together, alone, strict=True):
        rounding = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=0, equal_nan=True)


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
