"""Diagnosis of constrained parameters: how far from stationary they are; of batches (N, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim.gradient_mapping import step_size
from rai_toolbox.optim.own_step import as_batches, device_of
from rai_toolbox.optim.wrapper import Group

UNCONSTRAINED = Box(-inf, inf)
"""What None as a constraint stands for."""


@torch.no_grad()
def totals(
    groups: Iterable[Group],
    of: Callable[[Tensor, Tensor, Constraint], Tensor],
    total: Callable[[Tensor], Tensor],
    gradients: bool = True,
) -> list[Tensor]:
    """The total of what `of` finds for each parameter of a group, in float64.

    With `gradients` only parameters that have one count, and it is that which the optimizer
    descends.
    """
    found = []
    for group in groups:
        constraint = UNCONSTRAINED if group["constraint"] is None else group["constraint"]
        device = device_of(group)
        values = []
        for param in group["params"]:
            if param.numel() > 0 and (param.grad is not None or not gradients):
                x, gradient = as_batches(param, group)
                downhill = -gradient if group.get("maximize", False) else gradient
                value = complete(of(x, downhill, constraint))
                values.append(value.to(device, torch.float64).flatten())
        found.append(total(torch.cat(values or [torch.zeros(1, device=device).double()])))
    return found


def kkt_residual(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """``|x - P(x - gradient)|``, which is 0 just at the stationary points of the constraint."""
    step = widened(x) - widened(gradient)
    residual: Tensor = torch.linalg.vector_norm(widened(x) - constraint.project(step))
    return residual


def active_mask(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """Which sub-tensors, or elements in an elementwise set, a small step down takes out of the set.

    The step has the length ``sqrt(eps) |x|``, with the eps of the dtype of x.
    """
    reach = torch.finfo(x.dtype).eps ** 0.5
    x, gradient = widened(x), widened(gradient)
    y = x - step_size(x, gradient, constraint, reach=reach, lr=reach) * gradient
    moved = complete(constraint.project(y) != y)
    return moved if constraint.elementwise else moved.flatten(1).any(1)


def frank_wolfe_gap(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """``<gradient, x - lmo(gradient)>``, an upper bound on f(x) - min f if f is convex."""
    if constraint is UNCONSTRAINED:
        return x.new_tensor(inf)
    gradient = widened(gradient)
    return (gradient * (widened(x) - constraint.lmo(gradient))).sum()
