"""Norm balls around the origin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.constraints.norms import norm, scale_dtype


def project_l2_ball_(x: Tensor, epsilon: float, ndim: int) -> Tensor:
    """Project each sub-tensor (the last `ndim` dims) onto the L2 ball of radius `epsilon`.

    ``P(x) = x * min(1, epsilon / |x|_2)``, in place; bitwise the identity inside the ball.
    The result is in the ball after rounding to the dtype too: the radius aimed at is smaller by
    what rounding the factor and the products can add. A sub-tensor with a NaN becomes NaN.
    Whether x is inside is told by its norm in float64, to within the rounding of that.
    """
    if ndim == 0:
        project_l2_ball_(x.unsqueeze(-1), epsilon, 1)
        return x
    length = norm(readable(x), 2, ndim)
    inside = length <= epsilon
    outer = torch.where(inside, 1.0, length)  # no division by 0, for the derivative's sake too
    factor = _inward(epsilon, x, x.shape[x.ndim - ndim :].numel()) / outer
    return x.mul_(torch.where(inside, 1.0, _rounded_down(factor, scale_dtype(x))))


def _inward(epsilon: float, x: Tensor, size: int) -> float:
    """Largest radius at which `size` rounded products cannot leave the ball of `epsilon`."""
    info = torch.finfo(x.dtype)
    terms = max(2 + math.sqrt(size), size / 8)  # the norm is summed in eight lanes or more
    of_norm = torch.finfo(torch.float64).eps * terms
    spacing = info.smallest_normal * info.eps  # of subnormal numbers
    return max(epsilon * (1.0 - info.eps / 2 - of_norm) - spacing * math.sqrt(size), 0.0)


def _rounded_down(factor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = factor.to(dtype)
    return torch.where(rounded > factor, rounded.nextafter(torch.zeros_like(rounded)), rounded)
