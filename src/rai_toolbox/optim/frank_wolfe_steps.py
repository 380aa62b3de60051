"""Steps towards the answer of an oracle, as long as the smoothness of the loss allows."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim.settings import TINY, batch_shape_in
from rai_toolbox.optim.wrapper import Group

_SHRINK, _GROW, _TRIALS = 0.9, 2.0, 40  # of the line search; the factors of Pedregosa et al.


class Move(NamedTuple):
    """From where a parameter is to the oracle's answer; seen as batches of sub-tensors."""

    param: Tensor
    group: Group
    start: Tensor
    end: Tensor
    gap: Tensor  # <g, start - end> of each, see `_inner`; so is |start - end|^2
    square: Tensor

    def short_step(self, smoothness: float) -> Tensor:
        """The share of the way at which the bound on the loss is least."""
        # (not by their product, which may become 0 by underflow where neither is)
        length = (self.gap.clamp(min=0) / self.square / smoothness).clamp(max=1)
        return torch.where(self.square == 0, 0.0, length)

    def bound(self, a: Tensor, smoothness: float) -> float:
        """What the loss changes by at most, if `smoothness` is right."""
        return float(complete((a * (a * self.square * (smoothness / 2) - self.gap)).sum()))

    def mean_slope(self, a: Tensor) -> float:
        """The change of a quadratic loss, from the gradients at both ends of the step."""
        constraint, _, grad = seen(self.param, self.group)
        ahead = _inner(grad, widened(self.end) - widened(self.start), constraint)
        return float(complete((a * (ahead - self.gap)).sum())) / 2


def move_of(param: Tensor, group: Group) -> Move:
    """The way of a parameter to the oracle's answer for its gradient."""
    constraint, x, grad = seen(param, group)
    s = constraint.lmo(grad).to(x.dtype)
    way = widened(x) - widened(s)
    # (a search writes to the parameter before it knows where it ends)
    start = x.clone() if group.get("line_search") else x
    return Move(param, group, start, s, *(_inner(v, way, constraint) for v in (grad, way)))


def seen(param: Tensor, group: Group) -> tuple[Constraint, Tensor, Tensor]:
    """The set, and a parameter and its gradient as batches of sub-tensors."""
    constraint, x, grad = group["constraint"], param.detach(), param.grad
    grad = torch.zeros_like(x) if grad is None else grad.detach()
    shape = batch_shape_in(x, group)
    dense = grad if grad.layout is torch.strided else grad.to_dense()
    return constraint, x.reshape(shape), dense.reshape(shape)


def _inner(a: Tensor, b: Tensor, constraint: Constraint) -> Tensor:
    """Inner products of what the set bounds for itself, sub-tensors or elements."""
    products = widened(a) * widened(b)
    if constraint.elementwise:
        return products
    return products.sum(tuple(range(1, a.ndim)), keepdim=True)


def go_(param: Tensor, start: Tensor, end: Tensor, a: float | Tensor) -> None:
    """Put a parameter at a share `a` of the way from start to end."""
    # Other than (1 - a) start + a end, this does not leave a box by rounding, and is `end` for 1.
    weight = a.to(start) if isinstance(a, Tensor) else a
    param.copy_(torch.lerp(start, end, weight).reshape(param.shape))


def search_(moves: list[Move], loss: Any, closure: Callable[[], Any]) -> list[Move]:
    """Go as far as the short step with the first smoothness that explains what the loss does.

    Returns those that have moved: all, or none where no trial lowers the loss.
    """
    value = _number(loss)
    gap = sum(float(complete(move.gap.sum())) for move in moves)
    if gap <= 0:  # there is nothing to gain, or no gradient
        return []
    whole = gap / max(sum(float(complete(move.square.sum())) for move in moves), TINY)
    last = [move.group.get("smoothness") for move in moves]
    least = [whole if L is None else max(_SHRINK * L, whole / 1024) for L in last]
    hidden = 8 * _precision(loss, moves) * abs(value)
    for trial in range(_TRIALS):
        tried = [(move, L * _GROW**trial) for move, L in zip(moves, least, strict=True)]
        steps = [(move, move.short_step(L)) for move, L in tried]
        for move, a in steps:
            go_(move.param, move.start, move.end, a)
        with torch.enable_grad():
            change = _number(closure()) - value
        if abs(change) <= hidden:
            change = sum(move.mean_slope(a) for move, a in steps)
        bound = sum(move.bound(a, L) for (move, a), (_, L) in zip(steps, tried, strict=True))
        if not isfinite(value + gap):  # nothing can be compared, nor is it to be hidden
            return moves
        if change <= bound:
            for move, L in tried:
                move.group["smoothness"] = L
            return moves
    for move in moves:
        move.param.copy_(move.start.reshape(move.param.shape))
    with torch.enable_grad():
        closure()  # for the gradients there
    return []


def _number(loss: Any) -> float:
    if loss is None:
        raise TypeError("`closure` must return the loss with `line_search=True`, got None")
    return float(complete(loss.detach()) if isinstance(loss, Tensor) else loss)


def _precision(loss: Any, moves: list[Move]) -> float:
    if isinstance(loss, Tensor) and loss.is_floating_point():
        return torch.finfo(loss.dtype).eps
    return max(torch.finfo(move.param.dtype).eps for move in moves)
