"""Rows in balls within bounds, in float64 and for any center: the nearest, and the linear minimum.

The functions take float64 tensors with two dims: rows `d` of differences from the center or `g` of
gradients, the bounds of the differences, and the radius epsilon.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.box_hyperplane import corner, fill_cheapest, nearest_with_sum
from rai_toolbox.constraints.kernels.norms import row_scale
from rai_toolbox.constraints.kernels.roots import root, without_noise
from rai_toolbox.constraints.kernels.rounding import noise

_FAR = 1e290  # a square that float64 holds, and sums of very many of them, too


def nearest_in_linf(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{max |z_i| <= epsilon, lower <= z <= upper}``."""
    return d.clamp(-epsilon, epsilon).clamp(lower, upper)


def nearest_in_l2(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way from 0 to d."""
    unit = row_scale(d)
    return along(d / unit, lower, upper, epsilon, unit)


def nearest_in_l1(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows, longer than epsilon within the bounds, onto ``{sum |z_i| <= epsilon, ...}``.

    Where bounds leave the sign open it is that of d. The magnitudes then have
    bounds of their own, and a given sum: they are in a section of a box.
    """
    sign = torch.where((lower > 0) | ((d > 0) & (upper > 0)), 1.0, -1.0)
    least = torch.maximum(lower, -upper).clamp(min=0)
    most = torch.where(sign > 0, upper, -lower)
    one = torch.ones_like(epsilon[:1])
    nearest = sign * nearest_with_sum(sign * d, one, epsilon, least, most)
    forced = least.sum(1, keepdim=True) >= epsilon  # there is nothing to choose
    return torch.where(forced, torch.zeros_like(d).clamp(lower, upper), nearest)


def along(
    direction: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor, farthest: Tensor
) -> Tensor:
    """``clamp(t direction, lower, upper)`` of length epsilon, or with t at `farthest` if shorter.

    The square of the length is a piecewise linear function of t^2; all is in units of epsilon.
    """
    unit = epsilon.where(epsilon > 0, 1.0)
    lower, upper, goal = lower / unit, upper / unit, (epsilon > 0).to(epsilon)

    def f(square: Tensor) -> tuple[Tensor, Tensor]:
        moved = square.sqrt() * direction
        free = (moved > lower) & (moved < upper)
        length = moved.clamp(lower, upper).square().sum(1, keepdim=True)
        slope = -torch.where(free, direction * direction, 0.0).sum(1, keepdim=True)
        return without_noise(goal - length, noise(direction.shape[1]) * (goal + length)), slope

    last = (farthest / unit).square().clamp(max=_FAR)
    square = root(f, torch.zeros_like(last), last, last)
    some = (square > 0) & (goal > 0)  # (at radius 0, where squares underflow there is a root, too)
    t = torch.where(some, square.where(some, 1.0).sqrt(), 0.0)  # for its derivative
    return (t * direction).clamp(lower, upper) * unit


def least_in_linf(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{max |z_i| <= epsilon, lower <= z <= upper}``: a corner."""
    return corner(g, lower, upper).clamp(-epsilon, epsilon).clamp(lower, upper)


def least_in_l2(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way along -g."""
    return along(-g / row_scale(g), lower, upper, epsilon, torch.full_like(g[:, :1], inf))


def least_in_l1(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{sum |z_i| <= epsilon, lower <= z <= upper}``: fill by ``|g|``."""
    start, end = torch.zeros_like(g).clamp(lower, upper), corner(g, lower, upper)
    room = (end - start).abs()
    amount = epsilon - start.abs().sum(1, keepdim=True)
    filled, _ = fill_cheapest(-g.abs(), room, amount.clamp(min=0))
    return torch.where(filled < room, start + (end - start).sign() * filled, end)
