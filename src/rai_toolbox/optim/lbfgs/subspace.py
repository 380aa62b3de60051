"""Subspace minimization: the minimum of a model over the elements that no bound holds."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.optim.lbfgs.cauchy import CauchyPoint
from rai_toolbox.optim.lbfgs.memory import Memory, dot, solved


def subspace_minimum(
    x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor, cauchy: CauchyPoint, memory: Memory
) -> Tensor:
    """The point of a box to search towards, from the Cauchy point on.

    The minimum over the free elements, projected onto the box (Morales & Nocedal, 2011); where that
    does not lead downhill, the last point of the box on the way to it. The free elements of the
    inverse of B are those of the inverse of a small matrix (Byrd, Lu, Nocedal & Zhu, 1995), and all
    products of W with them are known.
    """
    theta, middle = memory.theta, memory.middle()
    left = 1 - theta * cauchy.time
    gram = memory.restrict(cauchy.free)
    pulled = solved(middle, cauchy.moved)
    weights = solved(middle - gram / theta, left * cauchy.products + gram @ pulled)
    step = memory.combined((pulled + weights / theta) / theta)
    step.add_(cauchy.direction, alpha=left / theta).mul_(cauchy.free)
    target = torch.add(cauchy.point, step).clamp_(lower, upper)
    if dot(gradient, target - x) < 0:
        return target
    share = min(1.0, longest_step(cauchy.point, step, lower, upper))
    return torch.add(cauchy.point, step, alpha=share).clamp_(lower, upper)


def longest_step(x: Tensor, direction: Tensor, lower: Tensor, upper: Tensor) -> float:
    """The largest t for which ``x + t d`` is in the box."""
    times = torch.sub(lower, x).div_(direction)
    torch.maximum(times, torch.sub(upper, x).div_(direction), out=times)
    times.nan_to_num_(nan=inf, posinf=inf)  # (0 / 0 at a bound, if it does not move)
    return float(times.min())
