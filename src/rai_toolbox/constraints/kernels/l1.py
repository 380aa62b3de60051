"""Projection of rows onto L1 balls around 0."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import (
    MANY,
    Workspace,
    is_eager,
    joined,
    needs_grad,
    wide_dtype,
)
from rai_toolbox.constraints.kernels.norms import least_and_most
from rai_toolbox.constraints.kernels.rounding import noise, round_down
from rai_toolbox.constraints.kernels.threshold import (
    in_one_memory,
    lower_,
    lowered,
    positive_sum,
)

FAR = 2.0**100
"""Radii from 1 / FAR to FAR are well within the range of float32."""


def project_l1_rows(x: Tensor, epsilon: float | Tensor) -> Tensor:
    """``sign(x) max(|x| - t, 0)`` with the t that makes the rows of (N, n) as long as epsilon.

    Rows that are inside stay as they are, bit for bit; the others are inside after rounding, in
    exact arithmetic. Rows that are not finite become NaN.
    """
    if is_eager(x) and not needs_grad(x, epsilon):
        y = x.clone()
        project_l1_each_([y], epsilon)
        return y
    values = x.abs().to(_working_dtype(x, epsilon))
    length = values.detach().sum(1, keepdim=True, dtype=wide_dtype(x))
    nearest = lowered(values, _goal(values, epsilon))
    nearest = nearest if x.dtype == nearest.dtype else round_down(nearest, x.dtype)
    nearest = torch.where(length.isfinite(), torch.copysign(nearest, x), torch.nan)
    return torch.where(length <= epsilon, x, nearest)


def project_l1_each_(batches: list[Tensor], epsilon: float | Tensor) -> None:
    """`project_l1_rows`, in place, of plain batches (N, ...) on the CPU."""
    workspace = Workspace()
    for piece in [batches] if isinstance(epsilon, Tensor) else joined(batches, MANY):
        dtype = _working_dtype(piece[0], epsilon)
        parts, values, buffer = in_one_memory(piece, dtype, workspace)
        for x, part in zip(piece, parts, strict=True):
            if x.dtype == dtype:
                torch.abs(x, out=part.view(x.shape))
            else:
                part.view(x.shape).copy_(x).abs_()
        if _lower_to_ball_(values, epsilon, buffer):
            for x, part in zip(piece, parts, strict=True):
                nearest = part.view(x.shape)
                nearest = nearest if x.dtype == dtype else round_down(nearest, x.dtype)
                torch.copysign(nearest, x, out=x)


def _lower_to_ball_(values: Tensor, epsilon: float | Tensor, buffer: Tensor) -> bool:
    """Lower the magnitudes in rows that are outside; returns False if there are none."""
    rough, error = values.sum(1, keepdim=True), values.shape[1] * torch.finfo(values.dtype).eps
    shortest, longest = least_and_most(rough / epsilon)
    if longest * (1 + error) < 1:
        return False
    if shortest * (1 - error) > 1 and longest < inf:
        lower_(values, _goal(values, epsilon), buffer)
        return True
    length = positive_sum(values, buffer)
    at = (~(length <= epsilon)).view(-1).nonzero().view(-1)
    if len(at) > 0:
        if isinstance(epsilon, Tensor) and len(epsilon) > 1:
            epsilon = epsilon[at]
        some, finite = values[at], length[at].isfinite()
        lower_(some.masked_fill_(~finite, 0.0), _goal(some, epsilon), buffer[: len(at)])
        values[at] = some.masked_fill_(~finite, torch.nan)
    return len(at) > 0


def _goal(values: Tensor, epsilon: float | Tensor) -> float | Tensor:
    """What rows are to sum to: rounding of the last factor, of its products, and errors of sums."""
    return epsilon * (1 - 2 * torch.finfo(values.dtype).eps - 4 * noise(values.shape[1]))


def _working_dtype(x: Tensor, epsilon: float | Tensor) -> torch.dtype:
    if isinstance(epsilon, Tensor):
        fits = is_eager(x) and bool(((epsilon > 1 / FAR) & (epsilon < FAR)).all())
    else:
        fits = 1 / FAR < epsilon < FAR
    return torch.promote_types(x.dtype, torch.float32) if fits else wide_dtype(x)
