"""What rounding to a dtype does to a point, and how to round without leaving a set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import wide_dtype


def as_rounded(bound: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A bound of elements as it counts: rounded to the dtype of what it bounds; beside `like`."""
    return bound.to(dtype) if isinstance(bound, Tensor) else as_wide(bound, like).to(dtype)


def as_wide(setting: float | Tensor | None, like: Tensor) -> Tensor:
    """A setting as a wide tensor beside `like`; None, which is no bound, as NaN."""
    if isinstance(setting, Tensor):
        return setting.to(wide_dtype(like))
    number = math.nan if setting is None else setting
    # (created on the device: a copy would synchronize with it)
    return torch.full((), number, dtype=wide_dtype(like), device=like.device)


def spacing(dtype: torch.dtype) -> float:
    """Distance between the subnormal numbers of a dtype: the smallest that is not 0."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def noise(size: int) -> float:
    """Relative error of a sum of `size` terms of one sign in float64."""
    terms = max(2 + math.sqrt(size), size / 8)  # torch sums in eight lanes or more
    return torch.finfo(torch.float64).eps * terms


def resolution(terms: Tensor, weights: float | Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """How far a weighted sum may be off when each of its `size` entries is a number of `dtype`.

    `terms` is the sum of the magnitudes ``|w_i x_i|``, and `weights` that of the ``|w_i|``. It is
    twice what rounding to nearest can do, so that a rounded point counts as one of the set.
    """
    return (torch.finfo(dtype).eps + 4 * noise(size)) * terms + spacing(dtype) * weights


def is_farther(point: Tensor, anchor: float | Tensor, distance: Tensor) -> Tensor:
    """Whether ``|point - anchor| > distance`` exactly: what rounding takes off counts (Knuth)."""
    gap = point - anchor
    part = gap - point
    lost = (point - (gap - part)) - (anchor + part)
    return (gap.abs() > distance) | ((gap.abs() == distance) & (gap.sign() * lost > 0))


def offset_from(anchor: float | Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """``anchor + offset`` in `dtype`: rounded to nearest, but never farther than the offset.

    Float64 comes in. An anchor that is a number of `dtype` is never passed, so that whatever ball
    around it the offset is in, and whatever box both ends are in, holds the result too.
    """
    rounded = (anchor + offset).to(dtype)
    seen, distance = rounded.detach(), offset.detach().abs()
    away = is_farther(seen.to(offset.dtype), anchor, distance)
    target = torch.as_tensor(anchor, dtype=dtype, device=offset.device).expand_as(rounded)
    nearer = seen.nextafter(target)
    moved = rounded + torch.where(away, nearer - seen, 0.0)
    return torch.where(away & seen.isinf(), nearer, moved)  # (inf - inf would be NaN)


def round_down(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 ``y >= 0`` to a number of `dtype` that is not above it: to the next, mostly."""
    rounded = y.to(dtype)
    above = rounded.detach().to(y.dtype) > y.detach()
    lower = rounded * (1 - torch.finfo(dtype).eps / 2) - spacing(dtype)
    return torch.where(above, lower, rounded)


def round_up(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 `y` to the next number of `dtype` that is not below it."""
    rounded = y.to(dtype)
    above = torch.full_like(rounded, math.inf)
    return torch.where(rounded.to(y.dtype) < y, rounded.nextafter(above), rounded)
