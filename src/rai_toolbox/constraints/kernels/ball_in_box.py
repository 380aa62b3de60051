"""Projection of batches onto balls around 0 within bounds, in few passes.

The nearest point has the signs of x, and magnitudes between 0 and those of x within the bounds,
`most`. For the L2 ball it is ``clamp(t x, lower, upper)``, for the L1 ball the magnitudes are
``min(max(|x| - t, 0), most)``, with the t that makes them as long as epsilon; inside, these forms
are x itself. What is told of sub-tensors is a column: of shape (N, 1, ...), in float64.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from rai_toolbox.constraints.kernels.norms import least_and_most, row_norm, wide_norm
from rai_toolbox.constraints.kernels.rounding import noise

# Passes at most. Where reading a value is free they end as soon as all rows have settled.
_FROM_ONE_SIDE, _IN_BRACKETS = 17, 56

_RADII = (2.0**-40, 2.0**40)
_LEAST_AIM = 1e-300  # not 0, to divide


def nearest_in_ball_and_box(
    x: Tensor, p: float, radius: tuple[Tensor, bool], lower: Any, upper: Any, eager: bool
) -> tuple[Tensor, Tensor | None]:
    """Project float32 or float64 sub-tensors; also returns which of them are not settled.

    The signs, also of zeros, are to be copied from x. None stands for no sub-tensor, or for none
    that is known without reading values. The bounds are two numbers or two tensors of the dtype of
    x, and hold 0. Results that are not settled are in the set, but not nearest: where numbers are
    too large or too small beside epsilon. `radius` is that and its `all_fit`; `eager` means that
    values may be read.
    """
    (epsilon, fits), eps, dims = radius, torch.finfo(x.dtype).eps, tuple(range(1, x.ndim))
    safe = epsilon * (1 - 8 * noise(x[0].numel())) if x.dtype == torch.float64 else epsilon
    within = x.clamp(lower, upper)
    length = wide_norm(within, p, dims)
    inside = length <= epsilon
    if eager and bool(inside.all()):
        return within, None
    aim = (safe * (1 - 2 * eps)).clamp(min=_LEAST_AIM)
    if p == 2:
        found = _scaled(x, within, length, lower, upper, aim, inside, eager)
    else:
        found = _lowered(x.abs(), within.abs_(), aim, inside, eager)
    ratio = torch.where(inside, 1.0, aim / wide_norm(found, p, dims))
    least, most = least_and_most(ratio) if eager else (0.0, 1.0)
    if not least >= 1 - 2 * eps:  # some are too long, by rounding
        found.mul_(torch.where(ratio >= 1 - 2 * eps, 1.0, ratio).to(x.dtype))
    if not eager or (fits and least >= 1 - 32 * eps and most <= 1 + 32 * eps):
        return found, None
    fit = (epsilon > _RADII[0]) & (epsilon < _RADII[1])
    return found, ~(inside | (((ratio - 1).abs() <= 32 * eps) & fit))


def nearest_row_in_l2_and_box(x: Tensor, epsilon: float, lower: Any, upper: Any) -> Tensor | None:
    """`nearest_in_ball_and_box` of one short row in an L2 ball, by numbers in place of columns.

    Newton's method starts at t = 1: its step from beyond the root ends before it. None if the
    result is not settled.
    """
    eps, t, found = torch.finfo(x.dtype).eps, 1.0, x.clamp(lower, upper)
    length = row_norm(found, 2)
    if length <= epsilon:
        return torch.copysign(found, x, out=found)  # a zero keeps its sign
    safe = epsilon * (1 - 8 * noise(x.numel())) if x.dtype == torch.float64 else epsilon
    aim, moved = safe * (1 - 2 * eps), x
    for _ in range(_FROM_ONE_SIDE):
        slope = row_norm(torch.eq(found, moved).mul(x), 2)
        gain = (aim - length) / slope * ((aim + length) / slope) if slope > 0 else -t * t
        t = (t * t + gain) ** 0.5 if t * t + gain > 0 else aim / row_norm(x, 2)
        moved = x * t
        found = moved.clamp(lower, upper)
        length = row_norm(found, 2)
        if not length < aim * (1 - 4 * eps):
            break
    if not aim * (1 - 32 * eps) <= length <= aim * (1 + 32 * eps):
        return None
    return found.mul_(aim / length) if length > aim * (1 + 2 * eps) else found


def all_fit(epsilon: Tensor) -> bool:
    """Whether float32 holds the squares of all radii, and of numbers that matter beside them."""
    return bool(((epsilon > _RADII[0]) & (epsilon < _RADII[1])).all())


def _scaled(
    x: Tensor,
    found: Tensor,
    length: Tensor,
    lower: Any,
    upper: Any,
    aim: Tensor,
    inside: Tensor,
    eager: bool,
) -> Tensor:
    """``clamp(t x, lower, upper)`` of L2 norm `aim`; of rows that are inside, it is `found`.

    The square of the norm is a concave function of t^2: the step of Newton's method from t = 1,
    where it is `found` and has that `length`, ends on the near side of the root, or is cut at 0.
    There the method stays, and may end at any time. Where t is small beside 1, rounding may leave
    that first step beyond the root: then the next one is taken from there.
    """
    dims, info = tuple(range(1, x.ndim)), torch.finfo(x.dtype)
    norm_of = partial(vector_norm, dim=dims, keepdim=True)  # (in that dtype)
    aim, length = aim.to(x.dtype), length.to(x.dtype).clamp_(max=info.max / 4)
    middle, slack = aim * (1 + 6 * info.eps), torch.where(inside, inf, aim * (10 * info.eps))
    t, going, moved, buffer = torch.ones_like(aim), ~inside, x, torch.empty_like(x)
    for _ in range(_FROM_ONE_SIDE):
        slope = norm_of(torch.eq(found, moved, out=buffer).mul_(x))
        gain = (aim - length).div_(slope) * (aim + length).div_(slope)
        t = torch.where(going, gain.addcmul_(t, t).clamp_(0, 1).sqrt_(), t)
        moved = torch.mul(x, t, out=buffer)
        torch.clamp(moved, lower, upper, out=found)
        length = norm_of(found)
        going = ((length - middle).abs_() > slack) & (length < inf)  # (else it is beyond the dtype)
        if eager and not bool(going.any()):
            break
    return found


def _lowered(size: Tensor, most: Tensor, aim: Tensor, inside: Tensor, eager: bool) -> Tensor:
    """``min(max(size - t, 0), most)`` whose sum is `aim`, or with t = 0 where it is inside.

    The sum is a falling function of t: Newton's method in a bracket, with bisection where a step
    would leave it. Of t, a part has the dtype, and the rest is what float64 adds to it.
    """
    dims, dtype = tuple(range(1, size.ndim)), size.dtype
    low, high = torch.zeros_like(aim), size.amax(dims, keepdim=True).double()
    t, rest, zero = low.to(dtype), low, size.new_zeros(())
    going, close = ~inside, 8 * torch.finfo(dtype).eps * aim
    moved, buffer = torch.empty_like(size), torch.empty_like(size)
    for _ in range(_IN_BRACKETS):
        torch.sub(size, t, out=moved).sub_(rest.to(dtype))
        found = torch.clamp(moved, zero, most, out=buffer)
        excess = found.sum(dims, keepdim=True, dtype=torch.float64) - aim
        going = going & (excess.abs() > close)
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
