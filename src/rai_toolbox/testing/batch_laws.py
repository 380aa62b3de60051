"""Laws about batches: rows on their own, strides, copies, what is empty or not finite, autograd."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints import Constraint
from rai_toolbox.constraints.masked import Masked
from rai_toolbox.testing.law import law
from rai_toolbox.testing.layouts import LAYOUTS, same_bits
from rai_toolbox.testing.points_laws import _has_lmo
from rai_toolbox.testing.trial import Trial


@law
def batched(trial: Trial) -> None:
    """A row has the same answers in any batch, bit for bit."""
    for x, y in trial.pairs:
        for rows in _some_rows(len(x)):
            constraint = _of_rows(trial.constraint, x, rows)
            alone = constraint.project_(x[rows].clone())
            trial.require(same_bits(alone, y[rows]), trial.length(alone - y[rows]), _ALONE, x[rows])
            found = trial.constraint.violation(x)[rows]
            right = found == constraint.violation(x[rows])
            trial.require(right, found, f"`violation` {_ALONE}", x[rows])
            if _has_lmo(constraint):
                s, alone = trial.constraint.lmo(x)[rows], constraint.lmo(x[rows])
                trial.require(same_bits(s, alone), trial.length(s - alone), f"`lmo` {_ALONE}")


_ALONE = "must be as in a batch of its own"


@law
def strides(trial: Trial) -> None:
    """Any strides give what contiguous ones give, bit for bit."""
    constraint = trial.constraint
    for x, y in trial.pairs:
        for name, laid_out in LAYOUTS.items():
            other = laid_out(x)
            rule = f"must be as with contiguous strides, not as {name}"
            right = constraint.violation(other) == constraint.violation(x)
            trial.require(right, constraint.violation(other), f"`violation` {rule}", x)
            if _has_lmo(constraint):
                s, expected = constraint.lmo(other), constraint.lmo(x)
                trial.require(same_bits(s, expected), trial.length(s - expected), f"`lmo` {rule}")
            where = other.data_ptr()
            if constraint.project_(other) is not other or other.data_ptr() != where:
                raise AssertionError("`project_` must return the tensor that it was given")
            trial.require(same_bits(other, y), trial.length(other - y), rule, x)
        if constraint.bounded:
            blank = torch.empty_like(x)
            drawn = constraint.sample_(blank, trial.generator())
            other = constraint.sample_(LAYOUTS["sliced"](blank), trial.generator())
            trial.require(same_bits(drawn, other), trial.length(other), "`sample_` as contiguous")


@law
def out_of_place(trial: Trial) -> None:
    """`project` gives what `project_` gives; it, `lmo` and `violation` leave their input alone."""
    for x, y in trial.pairs:
        given = x.clone()
        result = trial.constraint.project(given)
        trial.constraint.violation(given)
        if _has_lmo(trial.constraint):
            trial.constraint.lmo(given)
        trial.require(same_bits(given, x), trial.length(given - x), "x must be left alone", x)
        trial.require(same_bits(result, y), trial.length(result - y), "must be as `project_`", x)
        if result.data_ptr() == given.data_ptr():
            raise AssertionError("`project` must return a new tensor")


@law
def non_finite(trial: Trial) -> None:
    """A NaN stays, an infinity is a large number or NaN, and other sub-tensors do not notice."""
    x = trial.pairs[0][0]
    one = torch.nn.functional.one_hot(torch.arange(len(x)) % x[0].numel(), x[0].numel()).bool()
    odd = torch.arange(len(x)) % 2 == 0
    at = (one & odd[:, None]).view(x.shape)
    for poison in (torch.nan, torch.inf, -torch.inf):
        _check_poison(trial, at, poison)


def _check_poison(trial: Trial, at: Tensor, poison: float) -> None:
    constraint, (x, y), is_nan = trial.constraint, trial.pairs[0], poison != poison
    free = ~constraint.mask.expand(x.shape) if isinstance(constraint, Masked) else at & ~at
    hit = at & ~free
    lost = trial.column(hit.flatten(1).any(1)) & ~free
    if constraint.elementwise:
        lost = hit
    large = constraint.elementwise and not is_nan

    def spoilt(clean: Tensor, found: Tensor, at_large: Tensor) -> Tensor:
        """What is to become of the clean answer."""
        if not large:
            return torch.where(lost, torch.nan, clean)
        unbounded = lost & (found.abs() == torch.inf)
        return torch.where(unbounded, found, torch.where(lost, at_large, clean))

    given = torch.where(at, poison, x)
    most = torch.where(at, torch.finfo(x.dtype).max * (-1 if poison < 0 else 1), x) if large else x
    rule, rows = "what is not finite must show, and only in its sub-tensor", lost.flatten(1).any(1)
    result = trial.projected(given)
    expected = spoilt(torch.where(at & free, poison, y), result, trial.projected(most))
    trial.require(same_bits(result, expected), rows, rule, given)
    found = constraint.violation(given)
    shown = found >= 0 if large else found.isnan() if is_nan else found == torch.inf
    right = torch.where(rows, shown, found == constraint.violation(x))
    trial.require(right, found, f"`violation`: {rule}", given)
    if _has_lmo(constraint):
        s = constraint.lmo(given)
        expected = spoilt(constraint.lmo(x), s, constraint.lmo(most))
        trial.require(same_bits(s, expected), rows, f"`lmo`: {rule}", given)


@law
def empty(trial: Trial) -> None:
    """No rows, and rows without elements, are fine; unless the set has no such point."""
    none = torch.empty((0, *trial.shape[1:]), dtype=trial.dtype)
    constraint = _of_rows(trial.constraint, trial.batches[0], slice(0, 0))
    _check_words(constraint, none)
    flat = torch.empty((trial.shape[0], *(0,) * (len(trial.shape) - 1)), dtype=trial.dtype)
    try:
        trial.constraint.project_(flat)
    except ValueError:
        return  # it has no point without elements, or settings of each element
    _check_words(trial.constraint, flat)


@law
def plain(trial: Trial) -> None:
    """A set comes back from a checkpoint of plain data, and from a copy, as it was."""
    constraint = trial.constraint
    file = io.BytesIO()
    torch.save(constraint.to_plain(), file)
    file.seek(0)
    loaded = Constraint.from_plain(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(constraint), constraint.to("cpu")):
        if (
            other != constraint
            or hash(other) != hash(constraint)
            or repr(other) != repr(constraint)
        ):
            raise AssertionError(f"must come back as it was, got {other!r}")
        for x, y in trial.pairs:
            result = other.project_(x.clone())
            trial.require(same_bits(result, y), trial.length(result - y), "must act alike", x)


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


def _some_rows(count: int) -> Iterator[slice]:
    yield from (slice(i, i + 1) for i in range(0, count, max(1, count // 8)))
    yield slice(count // 3, count)


def _of_rows(constraint: Constraint, x: Tensor, rows: slice) -> Constraint:
    """The set as some rows of the batch x see it: with those rows of settings that have N."""

    def cut(setting: Any) -> Any:
        if isinstance(setting, dict):
            return {name: cut(value) for name, value in setting.items()}
        if isinstance(setting, (list, tuple)):
            return [cut(value) for value in setting]
        each = isinstance(setting, Tensor) and setting.ndim == x.ndim and len(setting) == len(x)
        return setting[rows] if each and len(x) > 1 else setting

    return Constraint.from_plain(cut(constraint.to_plain()))


def _check_words(constraint: Constraint, x: Tensor) -> None:
    words: list[Callable[[Tensor], Tensor]] = [constraint.project_, constraint.project]
    words += [constraint.lmo] if _has_lmo(constraint) else []
    words += [constraint.sample_] if constraint.bounded else []
    for word in words:
        result = word(x)
        if (result.shape, result.dtype) != (x.shape, x.dtype):
            raise AssertionError(f"must be of shape {tuple(x.shape)}, got {tuple(result.shape)}")
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
    trial.require(~smooth | (error <= allowed), error, "must be the derivative", x)
    return smooth
