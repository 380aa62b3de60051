"""Rows scaled to a given Euclidean norm: projection onto L2 balls, spheres and shells."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.constraints.kernels.blocks import BLOCK, can_read, is_eager, needs_grad, widened
from rai_toolbox.constraints.kernels.norms import (
    EXACT_CHUNK,
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
    if ndim == x.ndim - 1 and can_read(x, epsilon):
        epsilon = float(epsilon)
        is_row = x.shape[0] == 1 and x.numel() <= BLOCK // 2
        if not (is_row and _project_row_(x, epsilon)):
            project_l2_each_([x], epsilon)
        return x
    length = norm(readable(x), 2, ndim)
    size = x.shape[x.ndim - ndim :].numel()
    return scale_(x, _factor(length, epsilon, _inner_radius(epsilon, size, x.dtype)))


def _project_row_(x: Tensor, epsilon: Any) -> bool:
    """Project a batch of one short row in few calls, if its dtype holds the factor."""
    length = row_norm(x, 2)
    if length <= epsilon:
        return True
    # (a number divided by a tensor is multiplied by the reciprocal: rows in a stack get these bits)
    factor = 1 / length * _radius_of_number(epsilon, x.numel(), x.dtype)
    is_held = length < math.inf and torch.finfo(scale_dtype(x)).smallest_normal <= factor <= 1
    if is_held:
        x.mul_(factor)
    return bool(is_held)


def project_l2_each_(batches: list[Tensor], epsilon: Any) -> None:
    """`project_l2_ball_` for the rows of plain batches on the CPU, of one length and dtype.

    Each is scaled while it is in cache. Of large ones, norms in float32 tell which rows are
    outside; those close to the radius are left until all have been seen, and then judged exactly.
    """
    x, epsilon = batches[0], float(epsilon)  # (of another library it may be of few digits)
    size = x.shape[1:].numel()
    levels = _levels(epsilon, size, x.dtype)
    if levels is None or not sums_fast(batches, EXACT_CHUNK):
        radius = _radius_of_number(epsilon, size, x.dtype)
        for x in batches:
            _shrink_(x, epsilon, radius)
        return
    inside, outside, doubt, radius = levels
    seen, lengths = [], []
    for x in batches:
        length = fast_norm(x, 2, EXACT_CHUNK)
        shortest, longest = least_and_most(length)
        if longest <= inside:
            continue
        if not longest < math.inf:  # (with NaN, too)
            _shrink_(x, epsilon, radius)
        elif shortest > outside:
            x.mul_(_as_tensor(radius) / length)
        else:
            held = torch.threshold(length, outside, radius)  # its factor is 1, if not outside
            x.mul_(_as_tensor(radius) / held)
            seen.append(x)
            lengths.append(length.view(-1))
    if not lengths:
        return
    # (rows close to the radius, but for some that have been scaled, which stay as they are)
    distance = (torch.cat(lengths) - epsilon).abs_()
    if distance.amin().item() > doubt:
        return
    for x, off in zip(seen, distance.split([len(x) for x in seen]), strict=True):
        at = (off <= doubt).nonzero().view(-1)
        if len(at) > 0:
            some = x[at]
            _shrink_(some, epsilon, radius)
            x.index_copy_(0, at, some)


@lru_cache
def _levels(
    epsilon: float, size: int, dtype: torch.dtype
) -> tuple[float, float, float, float] | None:
    """What norms in float32 tell of rows of some size; None if they do not fit the radius.

    Norms up to the first number are surely inside, those beyond the second one outside, and those
    farther from the radius than the third are one of both. The last is the radius to aim at.
    """
    error = sum_error(min(size, EXACT_CHUNK))
    # (the error is allowed for twice, so that the next time the result is surely inside)
    radius: Any = _inner_radius(epsilon, size, dtype, 2 * error)
    least, most = LEAST[torch.float32], torch.finfo(torch.float32).max / 2
    if dtype == torch.float64 or not least < radius < most:
        return None
    inside, outside, doubt = 1 - error, 1 + 1.25 * error, 1.6 * error
    return inside * epsilon, outside * epsilon, doubt * epsilon, radius


@lru_cache
def _as_tensor(radius: float) -> Tensor:
    """A radius as a number by which a tensor of norms in float32 can be divided in one call."""
    return torch.full((), radius, dtype=torch.float32, device="cpu")


def _shrink_(x: Tensor, epsilon: Any, radius: Any) -> None:
    """Scale the rows that are outside to a radius, by norms in float64."""
    length = norm(x, 2, x.ndim - 1)
    if not length.amax().item() <= epsilon:
        scale_(x, _factor(length, epsilon, radius))


def shrinking(length: Tensor, epsilon: Any) -> Tensor | None:
    """Factors for the L2 ball of rows of some norms; None if all are 1."""
    if length.amax().item() <= epsilon:
        return None
    return torch.where(length > epsilon, epsilon / length, 1.0)


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
    if factor.numel() > 0 and is_eager(x) and not needs_grad(factor) and _are_normal(factor, dtype):
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


def _inner_radius(
    epsilon: float | Tensor, size: int, dtype: torch.dtype, error: float = 0.0
) -> float | Tensor:
    """The radius from which neither rounding nor norms that are off by `error` lead outside."""
    of_factor = 0.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2
    margin = torch.finfo(dtype).eps / 2 + of_factor + noise(size) + error
    radius = epsilon * (1.0 - margin) - spacing(dtype) * math.sqrt(size)
    return radius.clamp(min=0) if isinstance(radius, Tensor) else max(radius, 0.0)


_radius_of_number = lru_cache(_inner_radius)
