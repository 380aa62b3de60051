"""Step sizes of Frank-Wolfe from the smoothness of the loss: short step and line search."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim.own_step import evaluated
from rai_toolbox.optim.settings import TINY, batch_shape_in
from rai_toolbox.optim.wrapper import Group

# The factors by which the line search lowers and raises the smoothness (Pedregosa et al., 2020).
_DECREASE, _INCREASE = 0.9, 2.0
_MOST_TRIALS = 40


class Segment(NamedTuple):
    """The segment from a parameter to the oracle's answer, as batches of sub-tensors."""

    param: Tensor
    group: Group
    start: Tensor
    end: Tensor
    gap: Tensor  # <gradient, start - end>, of each sub-tensor or element that the set bounds alone
    square: Tensor  # |start - end|^2, likewise

    def short_step(self, smoothness: float) -> Tensor:
        """The fraction of the segment at which the upper bound of the loss is lowest."""
        # (two divisions, because the product of the divisors may underflow to 0)
        length = (self.gap.clamp(min=0) / self.square / smoothness).clamp(max=1)
        return torch.where(self.square == 0, 0.0, length)

    def bound(self, a: Tensor, smoothness: float) -> float:
        """The upper bound of the change of the loss at a fraction `a`."""
        return float(complete((a * (a * self.square * (smoothness / 2) - self.gap)).sum()))

    def change_by_gradients(self, a: Tensor) -> float:
        """The change of a quadratic loss, from the gradients at both ends of a step."""
        constraint, _, gradient = as_batches(self.param, self.group)
        slope = _inner(gradient, widened(self.end) - widened(self.start), constraint)
        return float(complete((a * (slope - self.gap)).sum())) / 2

    def go_(self, a: float | Tensor) -> None:
        """Put the parameter at a fraction `a` of the segment."""
        interpolate_(self.param, self.start, self.end, a)


def segment_of(param: Tensor, group: Group) -> Segment:
    """The segment along which a Frank-Wolfe step moves a parameter."""
    constraint, x, gradient = as_batches(param, group)
    end = constraint.lmo(gradient).to(x.dtype)
    offset = widened(x) - widened(end)
    # (a line search writes to the parameter at each trial)
    start = x.clone() if group["line_search"] else x
    gap, square = (_inner(other, offset, constraint) for other in (gradient, offset))
    return Segment(param, group, start, end, gap, square)


def as_batches(param: Tensor, group: Group) -> tuple[Constraint, Tensor, Tensor]:
    """The set, and a parameter and its gradient as batches of sub-tensors."""
    constraint, x, gradient = group["constraint"], param.detach(), param.grad
    gradient = torch.zeros_like(x) if gradient is None else gradient.detach()
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    shape = batch_shape_in(x, group)
    return constraint, x.reshape(shape), gradient.reshape(shape)


def _inner(a: Tensor, b: Tensor, constraint: Constraint) -> Tensor:
    """Inner products of sub-tensors, or products of elements that the set bounds alone."""
    products = widened(a) * widened(b)
    if constraint.elementwise:
        return products
    return products.sum(tuple(range(1, a.ndim)), keepdim=True)


def interpolate_(param: Tensor, start: Tensor, end: Tensor, a: float | Tensor) -> None:
    """Put a parameter at a fraction `a` of the segment from `start` to `end`."""
    # Unlike (1 - a) start + a end, this never rounds to a point outside a box, and is `end` at 1.
    weight = a.to(start) if isinstance(a, Tensor) else a
    param.copy_(torch.lerp(start, end, weight).reshape(param.shape))


def line_search_(segments: list[Segment], loss: Any, closure: Callable[[], Any]) -> bool:
    """Take the short step with the first smoothness whose bound holds; whether anything moved."""
    value = _as_number(loss)
    gap = sum(float(complete(segment.gap.sum())) for segment in segments)
    if gap <= 0:  # there is nothing to gain, or no gradient
        return False
    square = sum(float(complete(segment.square.sum())) for segment in segments)
    full_step = gap / max(square, TINY)  # the smoothness with which the step is the whole segment
    last = [segment.group["smoothness"] for segment in segments]
    smoothness = [
        full_step if known is None else max(_DECREASE * known, full_step / 1024) for known in last
    ]
    rounding = 8 * _precision(loss, segments) * abs(value)
    for _ in range(_MOST_TRIALS):
        trials = [
            (segment, segment.short_step(L), L)
            for segment, L in zip(segments, smoothness, strict=True)
        ]
        for segment, a, _ in trials:
            segment.go_(a)
        change = _as_number(evaluated(closure)) - value
        if abs(change) <= rounding:
            change = sum(segment.change_by_gradients(a) for segment, a, _ in trials)
        bound = sum(segment.bound(a, L) for segment, a, L in trials)
        if not isfinite(value + gap):  # nothing can be compared, and NaN is not to be hidden
            return True
        if change <= bound:
            for segment, _, L in trials:
                segment.group["smoothness"] = L
            return True
        smoothness = [_INCREASE * L for L in smoothness]
    for segment in segments:
        segment.param.copy_(segment.start.reshape(segment.param.shape))
    evaluated(closure)  # for the gradients there
    return False


def _as_number(loss: Any) -> float:
    if loss is None:
        raise TypeError("`closure` must return the loss with `line_search=True`, got None")
    return float(complete(loss.detach()) if isinstance(loss, Tensor) else loss)


def _precision(loss: Any, segments: list[Segment]) -> float:
    if isinstance(loss, Tensor) and loss.is_floating_point():
        return torch.finfo(loss.dtype).eps
    return max(torch.finfo(segment.param.dtype).eps for segment in segments)
