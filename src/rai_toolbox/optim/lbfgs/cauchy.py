"""The generalized Cauchy point: the first minimum of a model along the projected gradient path."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.optim.lbfgs.memory import Memory, dot, solved

_STEP = 2**12  # breakpoints at once


@dataclass(eq=False, repr=False)
class CauchyPoint:
    """Where the path ``P(x - t g)`` first has a minimum of the model."""

    point: Tensor
    time: float
    """The t of the point."""

    direction: Tensor
    """-g, but 0 where an element may not move."""

    free: Tensor
    """Which elements have not come to a bound."""

    products: Tensor
    """W times the direction of elements that still move."""

    moved: Tensor
    """W times the way from x to the point."""


def cauchy_point(
    x: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor, memory: Memory
) -> CauchyPoint:
    """The generalized Cauchy point of the model with the matrix B of the memory in a box."""
    # The later one is ahead. Both are NaN for an element that is at a bound and does not move.
    times = torch.sub(x, lower).div_(gradient)
    torch.maximum(times, torch.sub(x, upper).div_(gradient), out=times)
    direction = gradient.neg().mul_(times > 0)
    time, products, moved = _first_minimum(times, direction, memory)
    # (a little farther, so that what has come to a bound is there in spite of rounding)
    far = time * (1 + 8 * torch.finfo(x.dtype).eps)
    point = torch.add(x, direction, alpha=far).clamp_(lower, upper)
    return CauchyPoint(point, time, direction, times > time, products, moved)


def _first_minimum(
    times: Tensor, direction: Tensor, memory: Memory
) -> tuple[float, Tensor, Tensor]:
    """The time of the first minimum, and the products of W there.

    Between two breakpoints the model is a quadratic of t. With the direction d of the elements that
    still move, p = W d, and q = W z for the elements that have stopped, after moving by z, its
    slope is ``-dd - p M q + t (theta dd - p M p)``.
    """
    theta, middle = memory.theta, memory.middle()
    inverse = solved(middle, torch.eye(len(middle), dtype=middle.dtype, device="cpu"))
    square, products = dot(direction, direction), memory.times(direction)
    stopped = torch.zeros_like(products)
    first_square = square

    def minimum(squares: Tensor, products: Tensor, stopped: Tensor) -> Tensor:
        at_products, at_stopped = products @ inverse, stopped @ inverse
        curvature = theta * squares - (products * at_products).sum(1)
        least = torch.finfo(squares.dtype).eps * theta * first_square
        moving = squares > torch.finfo(squares.dtype).eps * first_square
        time = (squares + (products * at_stopped).sum(1)) / curvature.clamp(min=least)
        return torch.where(moving, time, -inf)

    def state() -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor([square], device="cpu").double(), products[None], stopped[None]

    time, reached, most = 0.0, 0.0, BLOCK
    end = float(minimum(*state()))
    while True:
        index = ((times > reached) & (times <= end)).nonzero().squeeze(1)
        if len(index) == 0:
            time = max(time, end)
            return time, products, stopped + time * products
        ahead = times[index]
        reached = end
        if len(index) > most:  # sorts not many more than it needs
            reached = float(ahead.kthvalue(most).values)
            index, ahead = index[ahead <= reached], ahead[ahead <= reached]
            most *= 4
        ahead, order = ahead.sort()
        after = torch.cat([ahead[1:], ahead.new_full((1,), -inf)])
        parts = (vector.split(_STEP) for vector in (index[order], ahead, after))
        for some, each, later in zip(*parts, strict=True):
            stops, limits = each.to("cpu", products.dtype), later.to("cpu", products.dtype)
            moves = direction[some].to("cpu", products.dtype).unsqueeze(1)
            columns = memory.rows[:, some].T.to("cpu", products.dtype)
            squares = (square - moves.square().cumsum(0).squeeze(1)).clamp(min=0)
            all_products = products - (moves * columns).cumsum(0)
            all_stopped = stopped + (stops.unsqueeze(1) * moves * columns).cumsum(0)
            minima = minimum(squares, all_products, all_stopped)
            found = ((minima <= limits) & (stops < limits)).nonzero()
            at = int(found[0]) if len(found) else len(stops) - 1
            square, time, end = float(squares[at]), float(stops[at]), float(minima[at])
            products, stopped = all_products[at], all_stopped[at]
            if len(found):
                time = max(time, end)
                return time, products, stopped + time * products
