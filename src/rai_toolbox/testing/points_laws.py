"""Laws about points: which are in the set, nearest to a point, or lowest for a gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rai_toolbox.constraints import Constraint
from rai_toolbox.testing.check import law
from rai_toolbox.testing.trial import Trial, same_bits


@law
def feasible(trial: Trial) -> None:
    """What is projected is in the set, after rounding."""
    for x, y in trial.pairs:
        check_like(y, x)
        violation = trial.constraint.violation(y)
        trial.require(violation == 0, violation, "`violation` of a projection must be 0", x)


@law
def identity_inside(trial: Trial) -> None:
    """What is in the set stays as it is, bit for bit."""
    for x in _inside(trial):
        y = trial.projected(x)
        outside = trial.constraint.violation(x) != 0
        trial.require(outside | same_bits(x, y), trial.length(y - x), "must not be moved", x)


@law
def idempotent(trial: Trial) -> None:
    """A second projection changes nothing, bit for bit."""
    for x, y in trial.pairs:
        again = trial.projected(y)
        trial.require(same_bits(again, y), trial.length(again - y), "must not move twice", x)


@law
def optimal(trial: Trial) -> None:
    """No point of the set is nearer.

    Of a convex one: ``<x - Px, z - Px> <= 0`` for all z of it. The minimizer of a linear function
    is the z for which that is hardest, so that for bounded sets one call proves the whole.
    """
    for index, (x, y) in enumerate(trial.pairs):
        wide_x, wide_y = trial.wide(x), trial.wide(y)
        for z in _candidates(trial, index):
            wide_z, slack = trial.wide(z), trial.slack(y, z)
            moved = trial.length(wide_x - wide_y)
            if trial.constraint.convex:
                gain = ((wide_x - wide_y) * (wide_z - wide_y)).sum(1)
                allowed = slack * (moved + trial.length(wide_z - wide_y) + slack)
                rule = "<x - Px, z - Px> must be <= 0"
            else:
                gain = moved - trial.length(wide_x - wide_z)
                # Distances to a far point are as coarse as that point is.
                allowed = slack + 4 * torch.finfo(torch.float64).eps * trial.length(x)
                rule = "|x - Px| - |x - z| must be <= 0"
            trial.require(gain <= allowed, gain, rule, x)


@law
def accurate(trial: Trial) -> None:
    """The projection in a narrow dtype is that in float64, to within rounding."""
    for x, y in trial.pairs:
        exact = trial.constraint.project(x.double())
        error = trial.length(y.double() - exact)
        trial.require(error <= trial.slack(y, exact), error, "must be as in float64", x)


@law
def non_expansive(trial: Trial) -> None:
    """Projections onto a convex set are not farther apart than their points were."""
    if not trial.constraint.convex:
        return
    for (x, y), neighbors in zip(trial.pairs, trial.neighbors, strict=True):
        for other, y_other in neighbors:
            before = trial.length(trial.wide(x) - trial.wide(other))
            after = trial.length(trial.wide(y) - trial.wide(y_other))
            allowed = 2 * trial.slack(y, y_other)
            allowed = allowed + 4 * torch.finfo(torch.float64).eps * (trial.length(x) + before)
            trial.require(after <= before + allowed, after - before, "must not be farther", x)


@law
def violation(trial: Trial) -> None:
    """It is about the distance to the set; `feasible` checks what rounding can hide."""
    many = 4.0 * max(1, trial.batches[0][0].numel()) ** 2  # norms and directions differ by less
    for x, y in trial.pairs:
        found, moved = trial.constraint.violation(x), trial.length(x.double() - y.double())
        check_like(found, moved)
        trial.require(found >= 0, found, "must be >= 0", x)
        slack, rule = trial.slack(y), "must be about the distance to the set"
        trial.require(found <= many * moved + slack, found, rule, x)
        trial.require(found * many >= moved - slack, -found, rule, x)


@law
def lmo(trial: Trial) -> None:
    """Its answer is in the set, and no other point has a lower product with the gradient."""
    if not has_lmo(trial.constraint):
        _must_refuse(trial, "lmo")
        return
    for gradient in trial.batches:
        s = trial.constraint.lmo(gradient)
        check_like(s, gradient)
        outside = trial.constraint.violation(s)
        trial.require(outside == 0, outside, "must be in the set", gradient)
        largest = gradient.double().flatten(1).abs().amax(1)
        unit = gradient.double() / trial.column(torch.where(largest > 0, largest, 1.0))
        steep = unit * 1e6 * trial.scale  # the projection of -steep all but minimizes
        for z in [trial.projected(-steep), *trial.members]:
            gain = (trial.wide(unit) * (trial.wide(s) - trial.wide(z))).sum(1)
            allowed = trial.slack(s, z) * trial.length(trial.wide(unit))
            trial.require(gain <= allowed, gain, "<g, s> must be least", gradient)


@law
def samples(trial: Trial) -> None:
    """Random points are in the set, follow from the generator, and differ."""
    constraint = trial.constraint
    if not constraint.bounded:
        _must_refuse(trial, "sample_")
        return
    blank = torch.full(trial.shape, torch.nan, dtype=trial.dtype)  # is not read
    first, same = (constraint.sample_(blank.clone(), trial.generator(5)) for _ in range(2))
    other = constraint.sample_(blank.clone(), trial.generator(6))
    outside = constraint.violation(first)
    trial.require(outside == 0, outside, "must be in the set", first)
    trial.require(same_bits(first, same), first.flatten(1)[:, 0], "must follow the generator")
    spread = trial.length(trial.projected(trial.normal(7)) - trial.projected(trial.normal(8)))
    if bool((spread > 0).any()) and bool(same_bits(first, other).all()):
        raise AssertionError("must differ from draw to draw")


# Parts of laws


def check_like(found: Tensor, expected: Tensor) -> None:
    """Raise unless shape and dtype are as expected."""
    got, wanted = (f"{tuple(x.shape)} in {x.dtype}" for x in (found, expected))
    if got != wanted:
        raise AssertionError(f"must be {wanted}, got {got}")


def has_lmo(constraint: Constraint) -> bool:
    """Whether the set has minimizers of linear functions."""
    return constraint.bounded and type(constraint)._minimizer is not Constraint._minimizer


def _must_refuse(trial: Trial, method: str) -> None:
    try:
        getattr(trial.constraint, method)(trial.batches[0].clone())
    except ValueError:
        return
    raise AssertionError(f"`{method}` must raise ValueError, for it is not defined")


def _candidates(trial: Trial, index: int) -> Iterator[Tensor]:
    """Points of the set that might be nearer to x than y is."""
    x, y = trial.pairs[index]
    if has_lmo(trial.constraint):
        yield trial.constraint.lmo(trial.held(y.double() - x.double()))
    yield from trial.members
    yield trial.projected(-x)
    yield trial.projected(2 * x.double() - y.double())
    yield from (projected for _, projected in trial.neighbors[index])
    yield trial.projected(y.double() + trial.normal(290 + index, 1e-2).double())


def _inside(trial: Trial) -> Iterator[Tensor]:
    """Points most of which are in the set: the batches, members, and mixtures of two members."""
    for index, (x, y) in enumerate(trial.pairs):
        yield x
        share = trial.column(torch.rand(len(x), generator=trial.generator(400 + index))).double()
        for z in trial.members:
            mixed = (1 - share) * y.double() + share * z.double()
            yield mixed.to(trial.dtype) if trial.constraint.convex else z
