"""Projection of rows onto L1 balls around 0."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import in_blocks, wide_dtype
from rai_toolbox.constraints.kernels.rounding import noise, round_down
from rai_toolbox.constraints.kernels.threshold import lowered

_FAR = 2.0**100  # radii from 1 / _FAR to _FAR are well within the range of float32


def project_l1_rows(x: Tensor, epsilon: float | Tensor) -> Tensor:
    """``sign(x) max(|x| - t, 0)`` with the t that makes the rows of (N, n) as long as epsilon.

    Rows that are inside stay as they are, bit for bit; the others are inside after rounding, in
    exact arithmetic. Rows that are not finite become NaN.
    """
    size = x.abs()
    length = size.detach().sum(1, keepdim=True, dtype=wide_dtype(x))
    inside = length <= epsilon
    if in_blocks(x) and bool(inside.all()):
        return x
    values = size.to(_working_dtype(x, epsilon))
    # Rounding of the factor that sums end with, and of its products; errors of sums.
    margin = 2 * torch.finfo(values.dtype).eps + 4 * noise(x.shape[1])
    nearest = round_down(lowered(values, epsilon * (1 - margin)), x.dtype)
    nearest = torch.where(length.isfinite(), nearest, torch.nan)
    return torch.where(inside, x, torch.copysign(nearest, x))


def _working_dtype(x: Tensor, epsilon: float | Tensor) -> torch.dtype:
    if isinstance(epsilon, Tensor):
        fits = in_blocks(x) and bool(((epsilon > 1 / _FAR) & (epsilon < _FAR)).all())
    else:
        fits = 1 / _FAR < epsilon < _FAR
    return torch.promote_types(x.dtype, torch.float32) if fits else wide_dtype(x)
