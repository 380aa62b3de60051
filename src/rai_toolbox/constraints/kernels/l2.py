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
    EXACT_CHUNK,
    LEAST,
    fast_norms,
    for_each,
    least_and_most,
    norm,
    row_norm,
    scale_dtype,
    sum_error,
    sums_fast,
    wide_norms,
)
from rai_toolbox.constraints.kernels.rounding import noise, spacing
from rai_toolbox.constraints.sharding import is_sharded, local_of, local_part


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
        if not (is_row and _project_row_(x, epsilon)):
            project_l2_each_([x], epsilon)
        return x
    length = norm(readable(x), 2, ndim)
    size = x.shape[x.ndim - ndim :].numel()
    radius = _inner_radius(epsilon, x, size, noise(size))
    return scale_(x, _factor(length, epsilon, radius))


def _project_row_(x: Tensor, epsilon: Any) -> bool:
    """Project a batch of one short row in few calls, if its dtype holds the factor."""
    length = row_norm(x, 2)
    if length <= epsilon:
        return True
    # (a number divided by a tensor is multiplied by the reciprocal: rows in a stack get these bits)
    factor = 1 / length * _inner_radius(epsilon, x, x.numel(), noise(x.numel()))
    is_held = length < math.inf and torch.finfo(scale_dtype(x)).smallest_normal <= factor <= 1
    if is_held:
        x.mul_(factor)
    return bool(is_held)


def project_l2_each_(batches: list[Tensor], epsilon: Any) -> None:
    """`project_l2_ball_` for the rows of plain batches on the CPU, of one length and dtype."""
    factor = _ball_factor(batches, epsilon)
    if factor is not None:
        scale_each_(batches, factor)


def _ball_factor(batches: list[Tensor], epsilon: Any) -> Tensor | None:
    """What the projection multiplies each row by, shape (N,); None if all are inside.

    Norms of large batches are in float32, and in float64 where these leave it in doubt.
    """
    x, size = batches[0], batches[0].shape[1:].numel()
    is_narrow = x.dtype != torch.float64 and epsilon > 2 * LEAST[torch.float32]
    if is_narrow and sums_fast(batches, EXACT_CHUNK):
        length, error = fast_norms(batches, 2, EXACT_CHUNK), sum_error(min(size, EXACT_CHUNK))
        shortest, longest = least_and_most(length)
        if longest <= epsilon * (1 - error):
            return None
        # (the error is allowed for twice, so that the next time the result is surely inside)
        radius = _inner_radius(epsilon, x, size, noise(size) + 2 * error)
        doubt = 1.1 * error * epsilon
        far = shortest > epsilon + doubt or (length - epsilon).abs_().amin() > doubt
        if not (far and longest < math.inf):  # (with NaN, too)
            doubtful = ~((length - epsilon).abs_() > doubt) | length.isinf()
            length = length.double().masked_scatter_(doubtful, _some_norms(batches, doubtful))
            return _factor(length, epsilon, radius)
        factor = radius / length  # (which is normal, for finite sums of squares)
        return factor if shortest > epsilon else factor.masked_fill_(length <= epsilon, 1.0)
    length = wide_norms(batches, 2)
    longest = length.amax().item()
    if longest <= epsilon:
        return None
    return _factor(length, epsilon, _inner_radius(epsilon, x, size, noise(size)))


def shrinking(length: Tensor, epsilon: Any) -> Tensor | None:
    """Factors for the L2 ball of rows of some norms; None if all are 1."""
    if length.amax().item() <= epsilon:
        return None
    return torch.where(length > epsilon, epsilon / length, 1.0)


def _some_norms(batches: list[Tensor], chosen: Tensor) -> Tensor:
    """Norms in float64 of the chosen ones of all rows."""
    masks = for_each(chosen, batches)
    return wide_norms([x[mask.view(-1)] for x, mask in zip(batches, masks, strict=True)], 2)


def _factor(length: Tensor, epsilon: float | Tensor, radius: float | Tensor) -> Tensor:
    inside = length <= epsilon
    outer = torch.where(inside, 1.0, length)  # no division by 0, for the derivative's sake too
    factor = (radius / outer).masked_fill(length.isinf(), torch.nan)  # of unknown direction
    return factor.masked_fill(inside, 1.0)


def scale_each_(batches: list[Tensor], factor: Tensor) -> None:
    """Multiply all rows of plain batches on the CPU, in place; factors in float32 are normal."""
    dtype = scale_dtype(batches[0])
    if factor.dtype == torch.float32 or _are_normal(factor, dtype):
        for x, some in zip(batches, for_each(factor.to(dtype), batches), strict=True):
            x.mul_(some)
    else:
        for x, some in zip(batches, for_each(factor, batches), strict=True):
            scale_(x, some)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply `x` by a float64 factor for each sub-tensor, in place."""
    part = x
    if is_sharded(x) and not torch.is_grad_enabled():
        part, factor = local_of(x), local_part(factor, x)
    if part.device.type != "cpu":
        part.mul_(factor)  # in wide arithmetic, in one pass
        return x
    dtype = scale_dtype(x)  # a wide factor would take a wide copy of x
    if (
        factor.numel() > 0
        and in_blocks(x)
        and not needs_grad(factor)
        and _are_normal(factor, dtype)
    ):
        part.mul_(factor.to(dtype))
        return x
    info = torch.finfo(dtype)
    # A factor below the normal numbers has few digits, so that the rest is rounded again, and down.
    first = factor.clamp(info.smallest_normal, info.max)
    below = (factor - spacing(factor.dtype)).clamp(min=0)
    rest = below / first * (1 - 2 * torch.finfo(x.dtype).eps)
    part.mul_(first.to(dtype)).mul_(torch.where(first == factor, 1.0, rest).to(dtype))
    return x


def _are_normal(factor: Tensor, dtype: torch.dtype) -> bool:
    least, most = least_and_most(factor)
    return torch.finfo(dtype).smallest_normal <= least and most <= torch.finfo(dtype).max


def _inner_radius(epsilon: float | Tensor, x: Tensor, size: int, error: float) -> float | Tensor:
    """The radius from which neither rounding nor norms that are off by `error` lead outside."""
    dtype = scale_dtype(x)
    of_factor = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    margin = torch.finfo(x.dtype).eps / 2 + of_factor + error
    radius = epsilon * (1.0 - margin) - spacing(x.dtype) * math.sqrt(size)
    return radius.clamp(min=0) if isinstance(radius, Tensor) else max(radius, 0.0)
