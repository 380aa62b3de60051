"""Projection of rows onto L1 balls around 0."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import in_blocks, needs_grad, wide_dtype
from rai_toolbox.constraints.kernels.rounding import noise, round_down
from rai_toolbox.constraints.kernels.threshold import lower_, lowered, wide_sum

_FAR = 2.0**100  # radii from 1 / _FAR to _FAR are well within the range of float32


def project_l1_rows(x: Tensor, epsilon: float | Tensor) -> Tensor:
    """``sign(x) max(|x| - t, 0)`` with the t that makes the rows of (N, n) as long as epsilon.

    Rows that are inside stay as they are, bit for bit; the others are inside after rounding, in
    exact arithmetic. Rows that are not finite become NaN.
    """
    if in_blocks(x) and not needs_grad(x, epsilon):
        return project_l1_rows_(x.clone(), epsilon)
    values = x.abs().to(_working_dtype(x, epsilon))
    length = wide_sum(values.detach())
    nearest = _rounded_down(lowered(values, _goal(values, epsilon)), x.dtype)
    nearest = torch.where(length.isfinite(), torch.copysign(nearest, x), torch.nan)
    return torch.where(length <= epsilon, x, nearest)


def project_l1_rows_(x: Tensor, epsilon: float | Tensor, memory: Tensor | None = None) -> Tensor:
    """`project_l1_rows`, in place, of a plain tensor on the CPU.

    `memory`, of float32 and twice the size of x, spares new memory, which is slow to touch.
    """
    dtype = _working_dtype(x, epsilon)
    if memory is None or dtype != memory.dtype or len(memory) < 2 * x.numel():
        # (one piece: the allocator keeps that, but gives two back to the system)
        memory = x.new_empty(2 * x.numel(), dtype=dtype)
    values, buffer = memory[: 2 * x.numel()].view(2, *x.shape)
    values.copy_(x).abs_() if x.dtype != dtype else torch.abs(x, out=values)
    rough, error = values.sum(1, keepdim=True), x.shape[1] * torch.finfo(dtype).eps
    if bool((rough * (1 + error) < epsilon).all()):
        return x
    part, at, finite = x, None, None
    if not bool(((rough * (1 - error) > epsilon) & (rough < inf)).all()):
        length = wide_sum(values)
        finite = length.isfinite()
        at = (~finite | (length > epsilon)).view(-1).nonzero().view(-1)
        if len(at) == 0:
            return x
        part, values, buffer, finite = x[at], values[at], buffer[: len(at)], finite[at]
        if isinstance(epsilon, Tensor) and len(epsilon) > 1:
            epsilon = epsilon[at]
    nearest = _rounded_down(lower_(values, _goal(values, epsilon), buffer), x.dtype)
    torch.copysign(nearest, part, out=part)
    if at is None or finite is None:
        return x
    return x.index_copy_(0, at, part.masked_fill_(~finite, torch.nan))


def _goal(values: Tensor, epsilon: float | Tensor) -> float | Tensor:
    """What rows are to sum to: rounding of the last factor, of its products, and errors of sums."""
    return epsilon * (1 - 2 * torch.finfo(values.dtype).eps - 4 * noise(values.shape[1]))


def _rounded_down(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y if y.dtype == dtype else round_down(y, dtype)


def _working_dtype(x: Tensor, epsilon: float | Tensor) -> torch.dtype:
    if isinstance(epsilon, Tensor):
        fits = in_blocks(x) and bool(((epsilon > 1 / _FAR) & (epsilon < _FAR)).all())
    else:
        fits = 1 / _FAR < epsilon < _FAR
    return torch.promote_types(x.dtype, torch.float32) if fits else wide_dtype(x)
