"""Rows scaled to a given Euclidean norm: projection onto L2 balls, spheres and shells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.constraints.kernels.blocks import (
    BLOCK,
    can_judge,
    in_blocks,
    needs_grad,
    widened,
)
from rai_toolbox.constraints.kernels.norms import (
    LEAST,
    fast_norm,
    least_and_most,
    norm,
    row_norm,
    scale_dtype,
    sum_error,
    sums_fast,
)
from rai_toolbox.constraints.kernels.rounding import noise, spacing
from rai_toolbox.constraints.sharding import is_sharded, local_of, local_part

_CHUNK = 256  # entries whose squares are summed in float32


def project_l2_ball_(x: Tensor, epsilon: float | Tensor, ndim: int) -> Tensor:
    """Project each sub-tensor (the last `ndim` dims) onto the L2 ball of radius `epsilon`.

    ``P(x) = x * min(1, epsilon / |x|_2)``, in place; bitwise the identity inside the ball.
    The result is in the ball after rounding to the dtype too: the radius aimed at is smaller by
    what rounding and the norm's error can add. A sub-tensor with a NaN becomes NaN.
    """
    if ndim == 0:
        project_l2_ball_(x.unsqueeze(-1), epsilon, 1)
        return x
    if isinstance(epsilon, Tensor):
        epsilon = widened(epsilon)
    if ndim == x.ndim - 1 and can_judge(x, epsilon):
        is_row = x.shape[0] == 1 and x.numel() <= BLOCK // 2
        if is_row and _project_row_(x, epsilon):
            return x
        factor = l2_ball_factor(x, epsilon)
        return x if factor is None else scale_(x, factor)
    length = norm(readable(x), 2, ndim)
    size = x.shape[x.ndim - ndim :].numel()
    radius = _inner_radius(epsilon, x, size, noise(size))
    return scale_(x, _factor(length, epsilon, radius))


def _project_row_(x: Tensor, epsilon: Any) -> bool:
    """Project a batch of one short row in few calls, if its dtype holds the factor."""
    length = row_norm(x, 2)
    if length <= epsilon:
        return True
    factor = _inner_radius(epsilon, x, x.numel(), noise(x.numel())) / length
    is_held = length < math.inf and factor >= torch.finfo(scale_dtype(x)).smallest_normal
    if is_held:
        x.mul_(factor)
    return bool(is_held)


def l2_ball_factor(x: Tensor, epsilon: Any) -> Tensor | None:
    """What the projection multiplies each sub-tensor of a batch by; None if all are inside.

    Norms of a large batch are in float32, and in float64 where these leave it in doubt.
    """
    ndim, size, error = x.ndim - 1, x.shape[1:].numel(), 0.0
    is_large = x.numel() > BLOCK and x.dtype != torch.float64
    if is_large and epsilon > 2 * LEAST[torch.float32] and sums_fast(x, _CHUNK):
        length, error = fast_norm(x, 2, _CHUNK), sum_error(min(size, _CHUNK))
    else:
        length = norm(x, 2, ndim)
    shortest, longest = least_and_most(length)
    if longest <= epsilon * (1 - error):
        return None
    # (the error is allowed for twice, so that the next time the result is surely inside)
    radius = _inner_radius(epsilon, x, size, noise(size) + 2 * error)
    if epsilon * (1 + error) < shortest and longest < math.inf:
        return radius / length
    gap = (length - epsilon).abs_()
    if error and not (longest < math.inf and gap.amin().item() > 2 * error * epsilon):
        doubtful = (gap <= 2 * error * epsilon) | ~(length < math.inf)
        at = doubtful.view(-1).nonzero().view(-1)
        length = length.double().index_copy_(0, at, norm(x[at], 2, ndim))
        longest = length.amax().item()
    if longest < math.inf:
        return (radius / length).masked_fill_(length <= epsilon, 1.0)
    return _factor(length, epsilon, radius)


def _factor(length: Tensor, epsilon: float | Tensor, radius: float | Tensor) -> Tensor:
    inside = length <= epsilon
    outer = torch.where(inside, 1.0, length)  # no division by 0, for the derivative's sake too
    factor = (radius / outer).masked_fill(length.isinf(), torch.nan)  # of unknown direction
    return factor.masked_fill(inside, 1.0)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `x` by a float64 factor for each sub-tensor, in place."""
    part = x
    if is_sharded(x) and not torch.is_grad_enabled():
        part, factor = local_of(x), local_part(factor, x)
    if part.device.type != "cpu":
        part.mul_(factor)  # in wide arithmetic, in one pass
        return x
    dtype = scale_dtype(x)  # a wide factor would take a wide copy of x
    info = torch.finfo(dtype)
    if factor.numel() > 0 and in_blocks(x) and not needs_grad(factor):
        least, most = least_and_most(factor)
        if info.smallest_normal <= least and most <= info.max:
            part.mul_(factor.to(dtype))
            return x
    # A factor below the normal numbers has few digits, so that the rest is rounded again, and down.
    first = factor.clamp(info.smallest_normal, info.max)
    below = (factor - spacing(factor.dtype)).clamp(min=0)
    rest = below / first * (1 - 2 * torch.finfo(x.dtype).eps)
    part.mul_(first.to(dtype)).mul_(torch.where(first == factor, 1.0, rest).to(dtype))
    return x


def _inner_radius(epsilon: float | Tensor, x: Tensor, size: int, error: float) -> float | Tensor:
    """The radius from which neither rounding nor norms that are off by `error` lead outside."""
    dtype = scale_dtype(x)
    of_factor = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    margin = torch.finfo(x.dtype).eps / 2 + of_factor + error
    radius = epsilon * (1.0 - margin) - spacing(x.dtype) * math.sqrt(size)
    return radius.clamp(min=0) if isinstance(radius, Tensor) else max(radius, 0.0)
