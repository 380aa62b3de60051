"""Rows in balls within bounds, in float64 and for any center: the nearest, and the linear minimum.

The functions take float64 tensors with two dims: rows `d` of differences from the center or `g` of
gradients, the bounds of the differences, and the radius epsilon.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.box_hyperplane import fill_cheapest, nearest_with_sum
from rai_toolbox.constraints.kernels.norms import row_scale
from rai_toolbox.constraints.kernels.roots import root
from rai_toolbox.constraints.kernels.rounding import noise

_FAR = 1e290  # a square that float64 holds, and sums of very many of them, too


def nearest_in_linf(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{max |z_i| <= epsilon, lower <= z <= upper}``."""
    return d.clamp(-epsilon, epsilon).clamp(lower, upper)


def nearest_in_l2(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way from 0 to d."""
    nearest = d.clamp(lower, upper)
    unit = row_scale(d)
    shorter = along(d / unit, lower, upper, epsilon, unit)
    return torch.where(_longer(nearest, epsilon), shorter, nearest)


def nearest_in_l1(d: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Project rows onto ``{sum |z_i| <= epsilon, lower <= z <= upper}``.

    Where bounds leave the sign open it is that of d. The magnitudes then have
    bounds of their own, and a given sum: they are in a section of a box.
    """
    nearest = d.clamp(lower, upper)
    sign = torch.where((lower > 0) | ((d > 0) & (upper > 0)), 1.0, -1.0)
    least = torch.maximum(lower, -upper).clamp(min=0)
    most = torch.where(sign > 0, upper, -lower)
    one = torch.ones_like(epsilon[:1])
    outside = nearest.detach().abs().sum(1, keepdim=True) > epsilon
    magnitude = nearest_with_sum(sign * d, one, epsilon, least, most)
    nearest = torch.where(outside, sign * magnitude, nearest)
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
        short = goal - length
        hidden = short.abs() <= noise(direction.shape[1]) * (goal + length)
        return torch.where(hidden, 0.0, short), slope

    with torch.no_grad():
        last = (farthest / unit).square().clamp(max=_FAR)
        t = root(f, torch.zeros_like(last), last, last).sqrt()
    if torch.is_grad_enabled() and direction.requires_grad:
        # Newton's last step: of no size, but with the derivative of the root.
        moved = t * direction
        between = (moved > lower) & (moved < upper)
        push = (torch.where(between, direction, 0.0).square().sum(1, keepdim=True) * 2 * t).detach()
        over = moved.clamp(lower, upper).square().sum(1, keepdim=True) - goal
        t = t - torch.where(push > 0, over / push.where(push > 0, 1.0), 0.0)
    return (t * direction).clamp(lower, upper) * unit


def least_in_linf(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{max |z_i| <= epsilon, lower <= z <= upper}``: a corner."""
    return _corner(g, lower, upper).clamp(-epsilon, epsilon).clamp(lower, upper)


def least_in_l2(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{|z|_2 <= epsilon, lower <= z <= upper}``: on the way along -g."""
    corner = _corner(g, lower, upper)
    way = along(-g / row_scale(g), lower, upper, epsilon, torch.full_like(g[:, :1], inf))
    return torch.where(_longer(corner, epsilon), way, corner)


def least_in_l1(g: Tensor, lower: Tensor, upper: Tensor, epsilon: Tensor) -> Tensor:
    """Minimize ``g . z`` over ``{sum |z_i| <= epsilon, lower <= z <= upper}``: fill by ``|g|``."""
    start, corner = torch.zeros_like(g).clamp(lower, upper), _corner(g, lower, upper)
    room = (corner - start).abs()
    amount = epsilon - start.abs().sum(1, keepdim=True)
    filled, _ = fill_cheapest(-g.abs(), room, amount.clamp(min=0))
    return torch.where(filled < room, start + (corner - start).sign() * filled, corner)


def _corner(g: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The corner of the box that minimizes ``g . z``; where g is 0, what is closest to 0."""
    start = torch.zeros_like(g).clamp(lower, upper)
    return torch.where(g > 0, lower, upper).where(g != 0, start)


def _longer(z: Tensor, epsilon: Tensor) -> Tensor:
    unit = epsilon.where(epsilon > 0, 1.0)
    return (z.detach() / unit).square().sum(1, keepdim=True) > (epsilon > 0).to(epsilon)
