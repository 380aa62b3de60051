"""What Auto-PGD does to a batch: directions, moves, and the rules of its checkpoints.

Whatever is told of sub-tensors is a column: of shape (N, 1, ...), in float64. The objective falls.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall, zero_outward_
from rai_toolbox.constraints.kernels.blocks import in_blocks, wide_dtype
from rai_toolbox.constraints.kernels.directions import normalize_, sign_
from rai_toolbox.constraints.kernels.rounding import as_rounded

State = dict[str, Any]

# The figures of the papers.
_FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06  # periods, as shares of all steps
_L1_PERIOD, _L1_SHRINK, _L1_LEAST = 0.04, 1.5, 0.1
_DENSITY, _SPARSER = 0.2, 0.95


def period_ending_at(step: int, steps: int, ball: Any) -> int:
    """The number of steps since the checkpoint before, if this step is one; else 0."""
    if ball.p == 1:
        period = max(int(_L1_PERIOD * steps), 1)
        return period if step > 0 and step % period == 0 else 0
    points = _checkpoints(steps)
    if step in points:
        at = points.index(step)
        return step - (points[at - 1] if at else 0)
    period = max(ceil(_SHORTEST * steps), 1)  # after the last one
    return period if step > points[-1] and (step - points[-1]) % period == 0 else 0


@lru_cache
def _checkpoints(steps: int) -> tuple[int, ...]:
    """``ceil(p_j steps)`` up to all steps: ``p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)``."""
    before, share, points = 0.0, _FIRST, []
    while share <= 1:
        points.append(ceil(round(share * steps, 9)))
        before, share = share, share + max(share - before - _SHORTER, _SHORTEST)
    return tuple(sorted(set(points)))


def empty_state(x: Tensor, grad: Tensor, ball: Any) -> State:
    """The state before the first step, from a start that is the best point, but of no value yet."""
    column = torch.ones((len(x), *(1,) * (x.ndim - 1)), dtype=wide_dtype(x), device=x.device)
    state: State = {
        "step": 0,
        "best": x.clone(memory_format=torch.contiguous_format),
        "best_gradient": grad.clone(memory_format=torch.contiguous_format),
        "best_loss": torch.full_like(column, inf),
        "rate": column,
    }
    if ball.p == 1:
        support = _support(x, ball)
        share = support / (_L1_SHRINK * max(1, x[0].numel()))
        # A start that is sparse tells how sparse to go on; one at the center or of noise does not.
        state["density"] = torch.where(support > 0, share.clamp(max=_DENSITY), _DENSITY)
        state["support"] = torch.full_like(column, max(1, x[0].numel()))
    else:
        state["previous"] = x.clone(memory_format=torch.contiguous_format)
        state |= {name: torch.full_like(column, inf) for name in ("last_loss", "checked_loss")}
        state |= {"falls": torch.zeros_like(column), "halved": column.clone()}
    return state


def note_(state: State, x: Tensor, grad: Tensor, losses: Tensor, valid: Tensor | None) -> None:
    """Count whether losses fall, and keep the best valid point so far, with its gradient."""
    if "last_loss" in state:
        if state["step"]:
            state["falls"] += losses < state["last_loss"]
        state["last_loss"] = losses
    better = losses < state["best_loss"]
    if valid is not None:
        better &= valid
    state["best_loss"] = torch.where(better, losses, state["best_loss"])
    put_(better, x, state["best"])
    put_(better, grad, state["best_gradient"])


def check_(state: State, period: int, rho: float, ball: Any) -> Tensor:
    """Adapt the step sizes at a checkpoint; which sub-tensors go back to their best point."""
    if ball.p == 1:
        return _check_sparsity_(state, ball)
    stuck = (state["halved"] == 0) & (state["checked_loss"] <= state["best_loss"])
    back: Tensor = (state["falls"] < rho * period) | stuck
    state["rate"] = torch.where(back, state["rate"] / 2, state["rate"])
    state["halved"] = back.to(state["rate"])
    state["checked_loss"] = state["best_loss"]
    state["falls"] = torch.zeros_like(state["falls"])
    return back


def _check_sparsity_(state: State, ball: Any) -> Tensor:
    support = _support(state["best"], ball)
    back: Tensor = support < _SPARSER * state["support"]
    smaller = (state["rate"] / _L1_SHRINK).clamp(min=_L1_LEAST)
    state["rate"] = torch.where(back, 1.0, smaller)
    # (a best point that is the center says nothing about how sparse to be)
    share = support / (_L1_SHRINK * max(1, state["best"][0].numel()))
    state["density"] = torch.where(support > 0, share, state["density"])
    state["support"] = support
    return back


def moved(x: Tensor, grad: Tensor, state: State, constraint: Constraint, momentum: float) -> Tensor:
    """The next point: a steepest step, projected, and some of the last move with it."""
    ball: Any = constraint.ball if isinstance(constraint, BoundedBall) else constraint
    factor = 1.0 if ball.p == 1 else 2.0
    size = (state["rate"] * factor * ball.epsilon).to(x.dtype)
    if ball.p == 1:
        grad = zero_outward_(grad.clone(), x, constraint)
    direction = steepest(grad, ball, state.get("density"))
    z = constraint.project_(x - direction.to(x.dtype).mul_(size))
    if "previous" not in state or state["step"] == 0:
        return z
    inertia = (x - state["previous"]).mul_(1 - momentum)
    return constraint.project_(inertia.add_(torch.lerp(x, z, momentum)))


def steepest(grad: Tensor, ball: Any, density: Tensor | None) -> Tensor:
    """The steepest direction in the norm of the ball, of norm 1; sparse, but not one entry, in L1.

    `density` is the share of entries that it has.
    """
    direction = grad.clone(memory_format=torch.contiguous_format)
    if ball.p == 1 and density is not None:
        rows = _keep_share_(direction.view(len(grad), -1), density.view(-1, 1))
        sign_([rows])
        return normalize_(rows, 1, 1).view(grad.shape)
    if ball.p == inf:
        sign_([direction])
        return direction
    return normalize_(direction, 2, grad.ndim - 1)


def _keep_share_(rows: Tensor, share: Tensor) -> Tensor:
    """Keep the largest entries of each row: those as large as the one of that rank."""
    size, n = rows.abs(), rows.shape[1]
    if n == 0:
        return rows
    rank = (share * n).long().clamp(1, n)
    if in_blocks(rows):
        largest = size.topk(int(rank.max()), dim=1).values  # which is quicker
    else:
        largest = size.sort(dim=1, descending=True).values
    least = largest.gather(1, rank - 1)
    return rows.masked_fill_(size < least, 0.0)


def _support(x: Tensor, ball: Any) -> Tensor:
    """The number of entries that are not those of the center, of each sub-tensor."""
    offset = x if ball.center is None else x - as_rounded(ball.center, x.dtype, x)
    return (offset != 0).flatten(1).sum(1).view(-1, *(1,) * (x.ndim - 1)).to(wide_dtype(x))


def put_(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Copy the chosen sub-tensors of one batch into another."""
    if in_blocks(target):  # where reading is free, and `where` takes as long as ten other passes
        at = rows.flatten().nonzero().squeeze(1)
        return target.index_copy_(0, at, source.index_select(0, at))
    return target.copy_(torch.where(rows, source, target))
