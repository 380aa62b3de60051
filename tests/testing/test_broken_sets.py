"""Each law finds the set that breaks it, and no other law blames that set."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch_versions import compiles

from rai_toolbox.constraints import Constraint
from rai_toolbox.testing import LAWS, Trial, check_constraint

# A ball and a box as a user would write them


@dataclass(frozen=True, eq=False)
class ToyBall(Constraint):
    """The Euclidean ball, by the formula, aimed inward by what rounding can do."""

    _for_each: ClassVar[tuple[str, ...]] = ("radius",)

    radius: float | torch.Tensor

    @property
    def bounded(self):
        return True

    def _excess(self, x, dtype):
        return (torch.linalg.vector_norm(x, dim=1) - self.radius_of_each(x)).clamp(min=0)

    def _nearest(self, x, dtype):
        return self.at_radius(x, dtype, torch.linalg.vector_norm(x, dim=1, keepdim=True))

    def _minimizer(self, gradient, dtype):
        return self._nearest(-1e100 * gradient, dtype)

    def _sampled(self, like, generator):
        direction = torch.randn(like.shape, dtype=torch.float64, generator=generator)
        length = torch.rand(len(like), 1, dtype=torch.float64, generator=generator)
        return self._nearest(direction * length * 0.7 * self.radius, like.dtype)

    def at_radius(self, x, dtype, length):
        info = torch.finfo(dtype)
        lost = 2 * info.smallest_normal * info.eps * x.shape[1] ** 0.5
        inner = (self.radius * (1 - info.eps) * (1 - 1e-15 * x.shape[1]) - lost) + 0 * length
        return x * torch.where(length > inner, inner / torch.where(length > 0, length, 1.0), 1.0)

    def radius_of_each(self, x):
        return (self.radius + 0 * x[:, :1]).squeeze(1)


@dataclass(frozen=True, eq=False)
class ToyBox(Constraint):
    """Elements from -1 to 1."""

    elementwise: ClassVar[bool] = True

    @property
    def bounded(self):
        return True

    def _excess(self, x, dtype):
        return torch.where(x == x.clamp(-1, 1), 0.0, (x - x.clamp(-1, 1)).abs()).amax(1)

    def _nearest(self, x, dtype):
        return x.clamp(-1, 1)

    def _minimizer(self, gradient, dtype):
        return torch.where(gradient.isnan(), gradient, 1.0 - 2.0 * (gradient > 0))

    def _sampled(self, like, generator):
        return 2 * torch.rand(like.shape, dtype=torch.float64, generator=generator) - 1


# ... and what can go wrong


class OutwardBall(ToyBall):
    """Lets a rounding error stand that leads outside."""

    def project_(self, x):
        last = torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.detach().double(), dim=1, keepdim=True)
        y = super().project_(x.clone()) * (1 + 3 * last)
        return x.copy_(torch.where(size <= 1 + 4 * last, x, y))


class UnsignedBox(ToyBox):
    """Rewrites points of the set: its zeros lose their sign."""

    def project_(self, x):
        return super().project_(x).add_(0.0)


class RestlessBall(ToyBall):
    """Scales what is on its sphere over and over."""

    def project_(self, x):
        last = 4 * torch.finfo(x.dtype).eps
        size = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
        near = (size > 1 - last) & (size <= 1)
        return super().project_(x).copy_(torch.where(near, x * (1 - last / 4), x))


class FoldedBox(ToyBox):
    """Never expands, but reflects at the bounds."""

    def _nearest(self, x, dtype):
        folded = ((x - 1) % 4 - 2).abs() - 1
        return torch.where((x.abs() > 1) & (x.abs() < 1e9), folded, x.clamp(-1, 1))


class TiltedBall(ToyBall):
    """Turns narrow points along the sphere by an angle that the law `optimal` is cannot see."""

    def _nearest(self, x, dtype):
        angle = 0.0 if dtype == torch.float64 else 5e-6
        tilted = math.cos(angle) * x + math.sin(angle) * x.roll(1, 1) * x.sign().roll(2, 1)
        return super()._nearest(torch.where(x.norm(dim=1, keepdim=True) > 10, tilted, x), dtype)


class Ring(ToyBall):
    """A ball with a hole, that calls itself convex."""

    def _excess(self, x, dtype):
        hole = 0.5 - torch.linalg.vector_norm(x, dim=1)
        return torch.maximum(super()._excess(x, dtype), hole.clamp(min=0))

    def _nearest(self, x, dtype):
        size = x.abs().amax(1, keepdim=True)
        x = torch.where(size > 0, x, 1e-3)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        inner = 0.5 + 4 * torch.finfo(dtype).eps
        far = super()._nearest(x, dtype)
        return torch.where(length < 0.5, x / length * inner, far)

    def _sampled(self, like, generator):
        return self._nearest(super()._sampled(like, generator), like.dtype)


class BlindBall(ToyBall):
    """Tells a distance in another unit."""

    def violation(self, x):
        return 1e-6 * super().violation(x)


class GreedyBall(ToyBall):
    """Answers with a minimizer of another function."""

    def _minimizer(self, gradient, dtype):
        return super()._minimizer(gradient.roll(1, 1), dtype)


class SingleBall(ToyBall):
    """Draws one point."""

    def _sampled(self, like, generator):
        return torch.zeros(like.shape, dtype=like.dtype)


class LavishBall(ToyBall):
    """Draws from a ball that is larger."""

    def _sampled(self, like, generator):
        drawn = self._nearest(100 * super()._sampled(like, generator), like.dtype)
        return drawn * (1 + 3 * torch.finfo(like.dtype).eps)


class SociableBox(ToyBox):
    """The bounds tell how many rows there are."""

    def _nearest(self, x, dtype):
        return super()._nearest(x, dtype) * (0.9 if len(x) == 1 else 1.0)


class DenseBox(ToyBox):
    """The bounds tell the strides."""

    def project_(self, x):
        y = super().project_(x)
        return y if y.is_contiguous() else y.mul_(0.9)


class SpoiltBall(ToyBall):
    """Writes to what it is given."""

    def project(self, x):
        return super().project(x) if x.requires_grad else self.project_(x)


class HidingBall(ToyBall):
    """Makes a number of a NaN."""

    def project_(self, x):
        return super().project_(x).nan_to_num_(0.0)


class BlindLmoBall(ToyBall):
    """Makes a number of a NaN, in its oracle only."""

    def lmo(self, gradient):
        return super().lmo(gradient).nan_to_num_(0.0)


class CrowdedBall(ToyBall):
    """Needs a row."""

    def project_(self, x):
        x.detach().max()
        return super().project_(x)


class StraightBall(ToyBall):
    """Tells autograd that it changes nothing."""

    def project(self, x):
        return (
            x + (self.project_(x.detach().clone()) - x).detach()
            if x.requires_grad
            else super().project(x)
        )


class UndefinedBall(ToyBall):
    """Has no derivative at 0."""

    def _nearest(self, x, dtype):
        return self.at_radius(x, dtype, (x**2).sum(1, keepdim=True).sqrt())


class LookingBall(ToyBall):
    """Reads a value on the host."""

    def project_(self, x):
        return super().project_(x) if x.sum().item() < 1e300 else super().project_(x)


# Laws and the set that only they blame. Two laws follow from others: what is projected is in the
# set, so that what moves twice is not left alone; and taking the nearest point of a convex set
# never expands, so that what expands is not the nearest.
BROKEN = [
    ({"feasible"}, OutwardBall),
    ({"identity_inside"}, UnsignedBox),
    ({"idempotent", "identity_inside"}, RestlessBall),
    ({"optimal"}, FoldedBox),
    ({"accurate"}, TiltedBall),
    ({"non_expansive", "optimal"}, Ring),
    ({"violation"}, BlindBall),
    ({"lmo"}, GreedyBall),
    ({"samples"}, SingleBall),
    ({"samples"}, LavishBall),
    ({"batched"}, SociableBox),
    ({"strides"}, DenseBox),
    ({"strides"}, SpoiltBall),
    ({"non_finite"}, HidingBall),
    ({"non_finite"}, BlindLmoBall),
    ({"empty"}, CrowdedBall),
    ({"gradient"}, StraightBall),
    ({"gradient"}, UndefinedBall),
    ({"compiled"}, LookingBall),
]


def made(kind):
    return kind() if issubclass(kind, ToyBox) else kind(1.0)


def broken_laws(constraint):
    found = {}
    for name, law in LAWS.items():
        if name == "compiled" and not isinstance(constraint, LookingBall):
            continue  # which takes a second, and has its own right sets above
        try:
            law(Trial(constraint, (32, 6), reach=1e20))
        except AssertionError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize(
    "constraint", [ToyBall(1.0), ToyBox(), ToyBall(torch.rand(32, 1))], ids=["ball", "box", "balls"]
)
def test_right_sets_keep_all_laws(constraint):
    check_constraint(constraint, scales=[1.0])


def test_a_right_set_compiles():
    check_constraint(ToyBox(), dtypes=[torch.float32], laws=["compiled"])


@pytest.mark.parametrize(
    ("laws", "kind"),
    [pytest.param(*pair, marks=compiles if pair[0] == {"compiled"} else ()) for pair in BROKEN],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_set_is_caught_by_its_law(laws, kind):
    found = broken_laws(made(kind))
    assert found.keys() == laws, found
    for name, message in found.items():
        assert message.startswith(f"{name}: ")
        assert kind.__name__ in message and "torch.float32" in message and "scale 1" in message


def test_each_law_can_fail():
    assert set.union(*(laws for laws, _ in BROKEN)) == set(LAWS)


def test_the_worst_row_is_named():
    with pytest.raises(
        AssertionError, match=r"feasible: .* row \d+ is worst, of \d+ of 32: .* at \["
    ):
        check_constraint(OutwardBall(1.0), dtypes=[torch.float32], laws=["feasible"])


@dataclass(frozen=True, eq=False)
class ToyBand(Constraint):
    """An inequality, aimed inward by rounding, whose sums lose digits to points that are far."""

    width: float

    def _excess(self, x, dtype):
        return (x.mean(1).abs() - self.width).clamp(min=0)

    def _nearest(self, x, dtype):
        mean = x.mean(1, keepdim=True)
        rounding = torch.finfo(dtype).eps * x.abs().amax(1, keepdim=True)
        most = (self.width - rounding).clamp(min=0)
        return x - mean + mean.clamp(-most, most)


def test_an_honest_set_keeps_the_laws_where_users_meet_it():
    for width in (0.1, 1.0):
        check_constraint(ToyBand(width), dtypes=[torch.float64, torch.bfloat16])
    with pytest.raises(AssertionError, match=r"reach=1e\+20, tolerance=0\)"):
        check_constraint(ToyBand(0.5), dtypes=[torch.float64], reach=1e20)


def test_laws_are_known():
    with pytest.raises(ValueError, match="`laws` must be names of .* got 'feasibel'"):
        check_constraint(ToyBox(), laws=["feasibel"])
