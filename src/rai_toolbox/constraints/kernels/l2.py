"""Rows scaled to a given Euclidean norm: projection onto L2 balls, spheres and shells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.constraints.kernels.blocks import in_blocks, needs_grad, widened
from rai_toolbox.constraints.kernels.norms import norm_near, scale_dtype
from rai_toolbox.constraints.kernels.rounding import spacing
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
    length, error = norm_near(readable(x), ndim, epsilon)
    if length is None:
        return x
    inside = length <= epsilon
    if in_blocks(x) and not needs_grad(x) and bool(inside.all()):
        return x
    size = x.shape[x.ndim - ndim :].numel()
    outer = torch.where(inside, 1.0, length)  # no division by 0, for the derivative's sake too
    factor = _inner_radius(epsilon, x, size, error) / outer
    factor = factor.masked_fill(length.isinf(), torch.nan)  # its direction is not known
    return scale_(x, factor.masked_fill(inside, 1.0))


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
    if in_blocks(x) and not needs_grad(factor):
        least, most = factor.aminmax()
        if info.smallest_normal <= float(least) and float(most) <= info.max:
            part.mul_(factor.to(dtype))
            return x
    # A factor below the normal numbers has few digits, so that the rest is rounded again.
    first = factor.clamp(info.smallest_normal, info.max)
    rest = factor / first * (1 - 2 * torch.finfo(x.dtype).eps)
    part.mul_(first.to(dtype)).mul_(torch.where(first == factor, 1.0, rest).to(dtype))
    return x


def _inner_radius(epsilon: float | Tensor, x: Tensor, size: int, error: float) -> float | Tensor:
    """The radius from which neither rounding nor norms that are off by `error` lead outside."""
    dtype = scale_dtype(x)
    of_factor = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    # (a norm in float32 is allowed for twice, so that the next time it is surely inside)
    margin = torch.finfo(x.dtype).eps / 2 + of_factor + (error if error < 1e-9 else 2 * error)
    radius = epsilon * (1.0 - margin) - spacing(x.dtype) * math.sqrt(size)
    return radius.clamp(min=0) if isinstance(radius, Tensor) else max(radius, 0.0)
