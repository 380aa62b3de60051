"""Norm balls around the origin."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.constraints.norms import norm


def project_l2_ball_(x: Tensor, epsilon: float, ndim: int) -> Tensor:
    """Project each sub-tensor (the last `ndim` dims) onto the L2 ball of radius `epsilon`.

    ``P(x) = x * min(1, epsilon / |x|_2)``, in place; bitwise the identity inside the ball.
    The result is in the ball after rounding to the dtype too: the radius aimed at is smaller by
    what rounding the factor and the products can add. A sub-tensor with a NaN becomes NaN.
    """
    if ndim == 0:
        project_l2_ball_(x.unsqueeze(-1), epsilon, 1)
        return x
    # Autograd keeps what a norm was taken of, so that x itself may not be written then.
    length = norm(x.clone() if torch.is_grad_enabled() else x, 2, ndim)
    size = x.shape[x.ndim - ndim :].numel()
    factor = _inward(epsilon, x.dtype, size) / length
    return x.mul_(torch.where(length <= epsilon, 1.0, factor).to(_factor_dtype(x.dtype)))


def _inward(epsilon: float, dtype: torch.dtype, size: int) -> float:
    """Largest radius at which `size` rounded products cannot leave the ball of `epsilon`."""
    info = torch.finfo(dtype)
    of_product, of_factor = info.eps / 2, torch.finfo(_factor_dtype(dtype)).eps
    relative = of_product + of_factor + torch.finfo(torch.float64).eps * size**0.5  # of the norm
    absolute = 0.5 * size**0.5 * info.smallest_normal * info.eps  # halves of the subnormal spacing
    return max(epsilon * (1.0 - relative) - absolute, 0.0)


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    # A factor rounded to 8 or 11 bits would miss the radius; torch multiplies in float32 then.
    real = dtype.to_real()
    return torch.float32 if real in (torch.float16, torch.bfloat16) else real
