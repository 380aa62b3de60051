"""Projection of batches onto balls around 0 within bounds, in few passes and without wide copies.

The nearest point has the signs of x, and magnitudes between 0 and those of x within the bounds,
`most`. For the L2 ball they are ``min(t |x|, most)``, for the L1 ball ``min(max(|x| - t, 0),
most)``, with the t that makes them as long as epsilon; inside, these forms are x itself. What is
told of sub-tensors is a column: of shape (N, 1, ...), in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import in_blocks
from rai_toolbox.constraints.kernels.norms import norm
from rai_toolbox.constraints.kernels.rounding import noise

Bound = float | Tensor | None

# Passes at most. Where reading a value is free they end as soon as all rows have settled.
_FROM_ONE_SIDE, _IN_BRACKETS = 17, 56

# Radii whose squares, and those of numbers that matter beside them, float32 holds.
_RADII = (2.0**-40, 2.0**40)


def clamp_between_(x: Tensor, lower: Any, upper: Any) -> Tensor:
    """Clamp to bounds, of which each may be a number, a tensor or None."""
    if lower is None or upper is None or isinstance(lower, Tensor) == isinstance(upper, Tensor):
        return x.clamp_(lower, upper)
    return x.clamp_min_(lower).clamp_max_(upper)


def nearest_in_ball_and_box(
    x: Tensor, p: float, epsilon: Tensor, lower: Bound, upper: Bound
) -> tuple[Tensor, Tensor | None]:
    """Project float32 or float64 sub-tensors; also returns which of them are not settled.

    None stands for no sub-tensor. The bounds are of the dtype of x, and hold 0. Results that are
    not settled are in the set, but not nearest: where numbers are not finite, or too large or too
    small beside epsilon.
    """
    eager, eps = in_blocks(x), torch.finfo(x.dtype).eps
    safe = epsilon * (1 - 8 * noise(x[0].numel())) if x.dtype == torch.float64 else epsilon
    within = clamp_between_(x.clone(), lower, upper)
    most = within.abs()
    inside = norm(most, p, x.ndim - 1) <= epsilon
    if eager and bool(inside.all()):
        return torch.copysign(most, x, out=most), None  # a zero keeps its sign
    aim = safe * (1 - 2 * eps)
    search = _scaled if p == 2 else _lowered
    found = search(x.abs(), most, torch.where(inside, torch.inf, aim), within, eager)
    length = norm(found, p, x.ndim - 1)
    exact = (length - aim).abs() <= 32 * eps * aim
    fits = (epsilon == 0) | ((epsilon > _RADII[0]) & (epsilon < _RADII[1]))
    settled = inside | (exact & fits)
    longer = ~inside & ~(length <= safe)
    if not eager or bool(longer.any()):
        found.mul_(torch.where(longer, aim / length, 1.0).to(x.dtype))
    all_settled = eager and bool(settled.all())
    return torch.copysign(found, x, out=found), None if all_settled else ~settled


def _scaled(size: Tensor, most: Tensor, epsilon: Tensor, buffer: Tensor, eager: bool) -> Tensor:
    """``min(t size, most)`` of L2 norm epsilon, or with t = 1 where epsilon is infinite.

    The square of the norm is a concave function of t^2: Newton's method stays on the near side of
    the root where it starts there, and may end at any time.
    """
    dims, dtype = tuple(range(1, size.ndim)), size.dtype
    norm_of, close = torch.linalg.vector_norm, 4 * torch.finfo(dtype).eps  # (in that dtype)
    t = epsilon / norm_of(size, 2, dims, keepdim=True).double()
    t = torch.where(epsilon == torch.inf, 1.0, t).clamp(max=1)
    mask = torch.empty_like(size)
    for _ in range(_FROM_ONE_SIDE):
        moved = torch.mul(size, t.to(dtype), out=buffer)
        torch.lt(moved, most, out=mask)
        found = torch.minimum(moved, most, out=buffer)
        short = epsilon - norm_of(found, 2, dims, keepdim=True).double()
        going = (short > close * epsilon) & (t < 1)
        if eager and not bool(going.any()):
            break
        slope = norm_of(mask.mul_(size), 2, dims, keepdim=True).double()
        gain = (short / slope) * ((2 * epsilon - short) / slope)
        farther = torch.where(slope > 0, (t.square() + gain).sqrt(), 1.0).clamp(max=1)
        t = torch.where(going, farther, t)
    return found


def _lowered(size: Tensor, most: Tensor, epsilon: Tensor, buffer: Tensor, eager: bool) -> Tensor:
    """``min(max(size - t, 0), most)`` whose sum is epsilon, or with t = 0 where that is infinite.

    The sum is a falling function of t: Newton's method in a bracket, with bisection where a step
    would leave it. Of t, a part has the dtype, and the rest is what float64 adds to it.
    """
    dims, dtype = tuple(range(1, size.ndim)), size.dtype
    low, high = torch.zeros_like(epsilon), size.amax(dims, keepdim=True).double()
    t, rest, zero = low.to(dtype), low, size.new_zeros(())
    going = epsilon < torch.inf
    moved = torch.empty_like(size)
    for _ in range(_IN_BRACKETS):
        torch.sub(size, t, out=moved).sub_(rest.to(dtype))
        found = torch.clamp(moved, zero, most, out=buffer)
        excess = found.sum(dims, keepdim=True, dtype=torch.float64) - epsilon
        going = going & (excess.abs() > 8 * torch.finfo(dtype).eps * epsilon)
        if eager and not bool(going.any()):
            break
        whole = t + rest
        low, high = torch.where(excess > 0, whole, low), torch.where(excess > 0, high, whole)
        step = excess / torch.eq(found, moved, out=moved).sum(dims, keepdim=True)
        fits = (whole + step >= low) & (whole + step <= high)
        step = torch.where(fits, step, (low + high) / 2 - whole).where(going, 0.0)
        last, t = t, (whole + step).to(dtype)
        rest = (last.double() - t) + (rest + step)
    return found
