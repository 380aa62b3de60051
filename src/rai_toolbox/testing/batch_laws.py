"""Laws about batches: single rows, strides, empty and non-finite ones, autograd, compilation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rai_toolbox.constraints import Constraint
from rai_toolbox.constraints.masked import Masked
from rai_toolbox.testing.check import law
from rai_toolbox.testing.points_laws import check_like, has_lmo
from rai_toolbox.testing.trial import Trial, same_bits


@law
def batched(trial: Trial) -> None:
    """A row has the same answers in any batch, to within rounding."""
    for x, _ in trial.pairs:
        whole = _answers(trial.constraint, x.clone())
        step = max(1, len(x) // 8)
        single = (slice(i, i + 1) for i in range(0, len(x), step))
        for rows in (*single, slice(len(x) // 3, len(x))):
            alone = _answers(_of_rows(trial.constraint, x, rows), x[rows].clone())
            _check_alike(trial, x[rows], alone, {k: y[rows] for k, y in whole.items()}, "alone")


@law
def strides(trial: Trial) -> None:
    """Any strides, in place or not, give the same to within rounding; only `project_` writes."""
    for x, y in trial.pairs:
        expected = {**_answers(trial.constraint, x.clone()), "project": y}
        for name, other in _laid_out(x).items():
            _check_alike(trial, x, _answers(trial.constraint, other), expected, name)
            trial.require(same_bits(other, x), trial.length(x), "x must be left alone", x)
            where = other.data_ptr()
            if trial.constraint.project_(other) is not other or other.data_ptr() != where:
                raise AssertionError("`project_` must return the tensor that it was given")
            _check_alike(trial, x, {"project": other}, expected, name)


@law
def non_finite(trial: Trial) -> None:
    """A NaN stays, an infinity is a large number or NaN, and other sub-tensors are unchanged."""
    x = trial.pairs[0][0]
    one = torch.nn.functional.one_hot(torch.arange(len(x)) % x[0].numel(), x[0].numel()).bool()
    odd = torch.arange(len(x)) % 2 == 0
    at = (one & odd[:, None]).view(x.shape)
    for poison in (torch.nan, torch.inf, -torch.inf):
        _check_poison(trial, at, poison)


def _check_poison(trial: Trial, at: Tensor, poison: float) -> None:
    constraint, x = trial.constraint, trial.pairs[0][0]
    unmasked = ~constraint.mask.expand(x.shape) if isinstance(constraint, Masked) else at & ~at
    hit = at & ~unmasked
    rows = hit.flatten(1).any(1)
    lost = hit if constraint.elementwise else trial.column(rows) & ~unmasked
    large = constraint.elementwise and poison == poison
    given = torch.where(at, poison, x)
    rule = "what is not finite must show, and only in its sub-tensor"
    for name in ["project"] + ["lmo"] * has_lmo(constraint):
        answer = getattr(constraint, name)
        found = answer(given.clone())
        clean = torch.where(at & unmasked, poison, answer(x.clone()))
        of_lost: Tensor | float = torch.nan
        if large:
            of_lost = torch.where(found.isinf(), found, answer(given.nan_to_num()))
        expected = torch.where(lost, of_lost, clean)
        trial.require(same_bits(found, expected), rows, f"`{name}`: {rule}", given)
    distance = constraint.violation(given)
    shown = distance >= 0 if large else same_bits(distance, torch.full_like(distance, abs(poison)))
    right = torch.where(rows, shown, distance == constraint.violation(x))
    trial.require(right, distance, f"`violation`: {rule}", given)


@law
def empty(trial: Trial) -> None:
    """No rows, and rows without elements, are fine; unless the set has no such point."""
    none = torch.empty((0, *trial.shape[1:]), dtype=trial.dtype)
    flat = torch.empty((trial.shape[0], *(0,) * (len(trial.shape) - 1)), dtype=trial.dtype)
    _check_empty(_of_rows(trial.constraint, trial.batches[0], slice(0, 0)), none)
    try:
        trial.constraint.project_(flat)
    except ValueError:
        return  # it has no point without elements, or settings of each element
    _check_empty(trial.constraint, flat)


@law
def gradient(trial: Trial) -> None:
    """Autograd gives the derivative of `project`, tested in float64, and never a NaN."""
    trial = replace(trial, dtype=torch.float64)
    for index, size in enumerate((0.5, 1.0, 3.0)):
        x = trial.normal(500 + index, size)
        smooth = _check_derivative(trial, x, index)
        if int(smooth.sum()) < len(smooth) / 2:
            raise AssertionError("must be differentiable at most points")
        _check_derivative(trial, trial.projected(x), index)  # is smooth for equations
    for index, x in enumerate(trial.batches):
        here = x.clone().requires_grad_()
        y = trial.constraint.project(here)
        (found,) = torch.autograd.grad(y, here, trial.normal(600 + index))
        right = found.isfinite().flatten(1).all(1)
        trial.require(right, trial.length(x), "a derivative must be finite", x)


@law
def compiled(trial: Trial) -> None:
    """`torch.compile` captures a projection as one graph, which gives the same."""
    torch.compiler.reset()  # its limit of recompilations counts all sets together
    step = torch.compile(
        lambda x: trial.constraint.project_(x), backend="aot_eager", fullgraph=True, dynamic=False
    )
    try:
        for x, y in trial.pairs:
            result = step(x.clone())
            error = trial.length(result.double() - y.double())
            trial.require(error <= trial.slack(y), error, "must be as in eager mode", x)
    finally:
        torch.compiler.reset()


# Parts of laws


def _laid_out(x: Tensor) -> dict[str, Tensor]:
    """Copies of a batch in other strides, each in a storage of its own."""
    dims = list(range(x.ndim))[::-1]
    backward = x.permute(dims).clone(memory_format=torch.contiguous_format).permute(dims)
    wider = x.new_full([2 * size for size in x.shape], -7)
    sliced = wider[(slice(None, None, 2),) * x.ndim].copy_(x)
    return {"reversed": backward, "sliced": sliced}


def _of_rows(constraint: Constraint, x: Tensor, rows: slice) -> Constraint:
    """The set that some rows of the batch x are in, as a new object."""
    return Constraint.from_plain(constraint._at_rows(x, rows).to_plain())


def _answers(constraint: Constraint, x: Tensor) -> dict[str, Tensor]:
    """What the methods return that do not write to x."""
    names = ["project", "violation"] + ["lmo"] * has_lmo(constraint)
    return {name: getattr(constraint, name)(x) for name in names}


def _check_alike(
    trial: Trial, x: Tensor, found: dict[str, Tensor], expected: dict[str, Tensor], how: str
) -> None:
    """Answers must be the same to within rounding; points that are equally good may differ."""
    for name, answer in found.items():
        other = expected[name]
        error, allowed = (answer - other).abs(), 2 * trial.slack(x) + trial.coarse(x)
        if name == "lmo":
            error = (trial.wide(x) * (trial.wide(answer) - trial.wide(other))).sum(1).abs()
            allowed = 2 * trial.slack(answer, other) * trial.length(x)
        elif name == "project" and trial.constraint.convex:
            error = trial.length(answer.double() - other.double())
            allowed = 2 * trial.slack(answer, other) + trial.coarse(x)
        elif name == "project":
            near, nearer = (trial.length(x.double() - y.double()) for y in (answer, other))
            error = (near - nearer).abs()
        trial.require(error <= allowed, error, f"`{name}` must be as before, {how}", x)


def _check_empty(constraint: Constraint, x: Tensor) -> None:
    for result in (constraint.project(x), *([constraint.sample_(x)] if constraint.bounded else [])):
        check_like(result, x)
    if (found := constraint.violation(x)).shape != x.shape[:1] or bool((found != 0).any()):
        raise AssertionError(f"`violation` must be 0 for no elements, got {found}")


def _check_derivative(trial: Trial, x: Tensor, salt: int) -> Tensor:
    """Compare with differences of each row along a direction; return which rows are smooth."""
    v, direction = (trial.wide(trial.normal(700 + salt + i)) / trial.scale for i in (0, 30))
    step = 1e-6 * trial.scale
    here = x.clone().requires_grad_()
    y = trial.constraint.project(here)
    (found,) = torch.autograd.grad(y, here, v.view(x.shape))
    product = (trial.wide(found) * direction).sum(1)
    shift = step * direction.view(x.shape)
    after = trial.wide(trial.constraint.project(x + shift) - y) / step
    before = trial.wide(y - trial.constraint.project(x - shift)) / step
    length = trial.length(direction)
    smooth = trial.length(after - before) <= 1e-4 * length  # no kink nearby
    error = (product - ((after + before) / 2 * v).sum(1)).abs()
    allowed = 1e-4 * length * trial.length(v)
    rule = "must be the derivative of `project` (is the set an equation? see `_is_equation`)"
    trial.require(~smooth | (error <= allowed), error, rule, x)
    return smooth
