"""Projection of rows onto L1 balls around 0."""

from __future__ import annotations

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import BLOCK, MANY, in_blocks, needs_grad, wide_dtype
from rai_toolbox.constraints.kernels.rounding import noise, round_down
from rai_toolbox.constraints.kernels.threshold import lowered

_FAR = 2.0**100  # radii from 1 / _FAR to _FAR are well within the range of float32


def project_l1_rows(x: Tensor, epsilon: float | Tensor, memory: Tensor | None = None) -> Tensor:
    """``sign(x) max(|x| - t, 0)`` with the t that makes the rows of (N, n) as long as epsilon.

    Rows that are inside stay as they are, bit for bit; the others are inside after rounding, in
    exact arithmetic. Rows that are not finite become NaN. `memory`, of twice the size of x and its
    dtype, float32, spares new memory; the result is in it.
    """
    size, buffer = (None, None) if memory is None else memory[: 2 * x.numel()].view(2, *x.shape)
    size = torch.abs(x, out=size)
    values = size.to(_working_dtype(x, epsilon))
    # Rounding of the factor that sums end with, and of its products; errors of sums.
    eps = torch.finfo(values.dtype).eps
    margin = 2 * eps + 4 * noise(x.shape[1])
    if in_blocks(x):
        rough, error = values.detach().sum(1, keepdim=True), x.shape[1] * eps
        if bool((rough * (1 + error) < epsilon).all()):
            return x
        if bool(((rough * (1 - error) > epsilon) & rough.isfinite()).all()):
            out = None if needs_grad(x) else values
            nearest = _rounded_down(lowered(values, epsilon * (1 - margin), out, buffer), x.dtype)
            return torch.copysign(nearest, x, out=None if memory is None else nearest)
    length = size.detach().sum(1, keepdim=True, dtype=wide_dtype(x))
    nearest = _rounded_down(lowered(values, epsilon * (1 - margin)), x.dtype)
    nearest = torch.where(length.isfinite(), torch.copysign(nearest, x), torch.nan)
    return torch.where(length <= epsilon, x, nearest)


def _rounded_down(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y if y.dtype == dtype else round_down(y, dtype)


def _working_dtype(x: Tensor, epsilon: float | Tensor) -> torch.dtype:
    if isinstance(epsilon, Tensor):
        fits = in_blocks(x) and bool(((epsilon > 1 / _FAR) & (epsilon < _FAR)).all())
    else:
        fits = 1 / _FAR < epsilon < _FAR
    return torch.promote_types(x.dtype, torch.float32) if fits else wide_dtype(x)


def memory_for(batches: list[Tensor]) -> Tensor | None:
    """Memory for `project_l1_rows` on each of the batches in turn, where it can do with any."""
    size = max(map(Tensor.numel, batches), default=0)
    if size <= BLOCK or any(x.dtype != torch.float32 or not in_blocks(x) for x in batches):
        return None
    size = max(min(x.numel(), max(MANY, x[:1].numel())) for x in batches)
    return torch.empty(2 * size, dtype=torch.float32, device="cpu")
