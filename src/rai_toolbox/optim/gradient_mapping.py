"""The gradient mapping: the part of a gradient along which a constrained parameter can move."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.constraints.blocks import wide_dtype
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.norms import scale_dtype


def map_gradient_(
    grad: Tensor,
    x: Tensor,
    constraint: Constraint,
    *,
    reach: float,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """Replace the gradient g by ``(x - P(x - e g)) / e``, in place.

    It is 0 just where x is a stationary point of the constrained problem, whatever e > 0 is, and
    where ``x - e g`` is in the set it is g, bit for bit. Both are batches of shape (N, ...). The
    step e is such that it reaches as far as `reach` times the length of x; see `step_size`.

    Where the inner optimizer goes up (`maximize`), or adds ``weight_decay * x`` to what it is
    given, that is allowed for: it then descends on the mapping of the sum.
    """
    dtype = torch.promote_types(scale_dtype(x), grad.dtype)
    x = x.to(dtype)
    down = grad.to(dtype).neg() if maximize else grad.to(dtype)
    if weight_decay != 0.0:
        down = down + weight_decay * x
    e = step_size(x, down, constraint, reach=reach, lr=lr)
    y = x - e * down
    pushed_back = (y - constraint.project(y)) / e  # exactly 0 where y is in the set
    return grad.sub_(pushed_back) if maximize else grad.add_(pushed_back)


def step_size(
    x: Tensor, gradient: Tensor, constraint: Constraint, *, reach: float, lr: float | Tensor
) -> Tensor:
    """``e = reach * |x| / |gradient|``, one for all elements that the constraint couples.

    Neither the units of the gradient nor those of x matter, and a gradient that is mostly noise
    is not followed far. Where x is 0, which says nothing of a scale, e is `lr`.
    """
    dims = constraint.coupled_dims(x.ndim)
    length, slope = (
        torch.linalg.vector_norm(t, 2, dims, keepdim=True, dtype=wide_dtype(t))
        for t in (x.detach(), gradient.detach())
    )
    e = torch.where(length > 0, reach * length / torch.where(slope > 0, slope, 1.0), lr)
    largest = torch.finfo(x.dtype).max ** 0.5  # e and 1 / e times anything stay finite
    return e.clamp(1 / largest, largest).to(x.dtype)
