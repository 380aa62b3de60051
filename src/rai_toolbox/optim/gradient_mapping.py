"""The gradient mapping: the part of a gradient along which a constrained parameter can move."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import wide_dtype
from rai_toolbox.constraints.kernels.norms import scale_dtype


def map_gradient_(
    grad: Tensor,
    x: Tensor,
    constraint: Constraint,
    *,
    average: Tensor | None = None,
    reach: float,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """Replace the gradient g by ``g + (y - P(y)) / e`` with ``y = x - e m``, in place.

    Here m is `average`, of recent gradients, or g itself. Where m is g, that is the gradient
    mapping ``(x - P(x - e g)) / e``: it is 0 just where x is a stationary point of the constrained
    problem, whatever e > 0 is. Where y is in the set it is g, bit for bit. All are batches of shape
    (N, ...). The step e is such that it reaches as far as `reach` times the length of x; see
    `step_size`.

    Where the inner optimizer goes up (`maximize`), or adds ``weight_decay * x`` to what it is
    given, that is allowed for: it then descends on the mapping of the sum.
    """
    dtype = torch.promote_types(scale_dtype(x), grad.dtype)
    x = x.to(dtype)

    def downhill(gradient: Tensor) -> Tensor:
        down = gradient.to(dtype).neg() if maximize else gradient.to(dtype)
        return down + weight_decay * x if weight_decay != 0.0 else down

    down = downhill(readable(grad))
    e = step_size(x, down, constraint, reach=reach, lr=lr)
    y = x - e * (down if average is None else downhill(average))
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
    if torch.is_grad_enabled():  # both are changed in place before this is differentiated
        x, gradient = x.clone(), gradient.clone()
    length, slope = (
        torch.linalg.vector_norm(t, 2, dims, keepdim=True, dtype=wide_dtype(t))
        for t in (x, gradient)
    )
    e = torch.where(length > 0, reach * length / torch.where(slope > 0, slope, 1.0), lr)
    largest = torch.finfo(x.dtype).max ** 0.5  # e and 1 / e times anything stay finite
    return e.clamp(1 / largest, largest).to(x.dtype)
