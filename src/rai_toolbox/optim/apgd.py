"""Auto-PGD: projected gradient descent that finds its step sizes.

What its state tells of sub-tensors is a column: of shape (N, 1, ...), in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from rai_toolbox._torch import not_compiled
from rai_toolbox.checks import check_count, check_fraction, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall, norm_ball_of, zero_outward_
from rai_toolbox.constraints.kernels.blocks import is_eager, wide_dtype
from rai_toolbox.constraints.kernels.directions import normalize_, sign_
from rai_toolbox.constraints.kernels.rounding import as_rounded
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.own_step import OwnStepOptimizer, as_batches, evaluated
from rai_toolbox.optim.settings import batch_shape_in, labels
from rai_toolbox.optim.wrapper import Group, Params

State = dict[str, Any]

# The figures of the papers.
_FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06  # periods, as shares of all steps
_L1_PERIOD, _L1_SHRINK, _L1_LEAST = 0.04, 1.5, 0.1
_DENSITY, _SPARSER = 0.2, 0.95


class APGD(Constrained, OwnStepOptimizer):
    r"""Steepest steps in a norm ball, with a step size per sub-tensor that adapts (Auto-PGD).

    .. math::
        z = P(p - \eta d), \quad
        p \leftarrow P(p + \alpha (z - p) + (1 - \alpha) (p - p_\text{before}))

    with the steepest direction d in the norm of the ball, and the exact projection P onto ball and
    bounds together. The first step size is the diameter of the ball. It is tested at checkpoints,
    whose distances decrease toward the end of the `steps`. It is halved if fewer than the fraction
    `rho` of the steps since the last checkpoint have lowered the loss, or if neither the best loss
    nor the step size has changed since; the sub-tensor then continues from its best point (Croce &
    Hein, 2020).

    In an L1 ball d has the signs of the largest entries of the gradient, as many as two thirds of
    those by which the best point differs from the center. The first step size is the radius. At
    each checkpoint it is divided by 1.5, down to a tenth of the radius; where the best point has
    become sparser by 5 %, it is reset, and the search continues from that point (Croce & Hein,
    2021). There is no momentum.

    The last step goes to the minimizer over the set of the loss linearized at the best point: for a
    linear loss this is the exact minimum, in every norm.

    The optimizer has to know the loss of each sub-tensor: call `observe_` before each step, or in
    the closure that `step` is given.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    constraint : LinfBall, L2Ball, L1Ball, or BoundedBall of one
        The ball that each sub-tensor is kept in, alone or within bounds.
    steps : int
        The planned number of steps, >= 1, which determines the checkpoints.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`.
    momentum : float
        The weight alpha of the new step, in [0, 1]; the last move has the weight 1 - alpha, so that
        1 means no momentum. Not for L1.
    rho : float
        The share of steps that must lower the loss, in [0, 1]. Not for L1.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, or does not fit a parameter.
    RuntimeError
        From `step`, if `observe_` was not called since the last step.

    Notes
    -----
    Start inside the set. A start outside is projected by the first step, and never counts as the
    best point. A sub-tensor whose gradient is 0 moves by momentum only. A point whose loss is NaN
    or infinite never counts as the best one.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import BoundedBall, L2Ball
    >>> from rai_toolbox.optim import APGD
    >>> delta = torch.zeros(1, 2, requires_grad=True)
    >>> optim = APGD([delta], constraint=BoundedBall(L2Ball(1.0), -0.6, 0.6), steps=10)
    >>> for _ in range(10):
    ...     losses = delta @ torch.tensor([4.0, 3.0])
    ...     delta.grad, = torch.autograd.grad(losses.sum(), delta)
    ...     optim.observe_(losses)
    ...     optim.step()
    >>> delta
    tensor([[-0.6000, -0.6000]], requires_grad=True)
    """

    _checks = {
        "constraint": lambda _, value: norm_ball_of(value),
        "steps": lambda name, value: check_count(name, value, 1),
        "momentum": check_fraction,
        "rho": check_fraction,
    }

    _losses: Tensor | None = None
    """What was observed since the last step."""

    def __init__(
        self,
        params: Params,
        *,
        constraint: Constraint,
        steps: int,
        param_ndim: int | None = -1,
        momentum: float = 0.75,
        rho: float = 0.75,
    ) -> None:
        super().__init__(params, locals())

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Parameters
        ----------
        state_dict : dict
            It is not modified.

        Raises
        ------
        ValueError, TypeError
            If its groups do not fit or hold bad settings, before anything is changed.
        """
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, number in zip(params, numbers, strict=True):  # torch took the dtype of param
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.to(param.device, copy=True)
        self._losses = None

    def observe_(self, losses: Tensor) -> None:
        """Tell the optimizer the loss of each sub-tensor, at the present parameters.

        Parameters
        ----------
        losses : Tensor, shape (N,)
            One number for each sub-tensor of each parameter that has a gradient: what is to fall.

        Raises
        ------
        TypeError, ValueError
            If it holds no real numbers, or not one for each sub-tensor.
        """
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            got = getattr(losses, "dtype", losses)
            raise wrong("losses", "be a tensor of real numbers", got, TypeError)
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                state = self.state.get(param)
                rows = len(state["best"]) if state else batch_shape_in(param, group)[0]
                if param.grad is not None and losses.numel() != rows:
                    label = f"{labels(group)[i]} of shape {tuple(param.shape)}"
                    rule = f"have one value per sub-tensor, shape ({rows},) for {label}"
                    raise wrong("losses", rule, f"shape {tuple(losses.shape)}")
        self._losses = losses.detach().clone()

    @not_compiled  # what it does depends on the number of the step: each would be compiled anew
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else evaluated(closure)
        if self._losses is None:
            raise RuntimeError("`observe_` must be called with the losses before each `step`")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    _move_(param, self._losses, self.state[param], group)
        self._losses = None
        return loss


def _move_(param: Tensor, losses: Tensor, state: State, group: Group) -> None:
    constraint = group["constraint"]
    ball = constraint.ball if isinstance(constraint, BoundedBall) else constraint
    x, gradient = as_batches(param, group, state["best"].shape if state else None)
    gradient = _copy(gradient)
    if not state:
        state.update(_first_state(x, gradient, ball))
    _note_(state, x, gradient, losses, group)
    period = period_ending_at(state["step"], group["steps"], ball)
    if period:
        back = _check_support_(state, ball) if ball.p == 1 else _check_(state, period, group["rho"])
        x = x.clone()
        _put_(back, [state["best"], state["best_gradient"]], [x, gradient])
    new = _moved(x, gradient, state, ball, group)
    if ball.p != 1:
        state["previous"].copy_(x)
    param.copy_(new.view(param.shape))
    state["step"] += 1


# Checkpoints


def period_ending_at(step: int, steps: int, ball: Any) -> int:
    """The number of steps since the checkpoint before, if this step is one; else 0."""
    points, period = _checkpoints(steps), ceil(_SHORTEST * steps)
    if ball.p == 1:
        points, period = points[:1], max(int(_L1_PERIOD * steps), 1)
    if step in points[1:]:
        return step - points[points.index(step) - 1]
    beyond = step - points[-1]
    return period if beyond > 0 and beyond % period == 0 else 0


@lru_cache
def _checkpoints(steps: int) -> tuple[int, ...]:
    """0, ``ceil(p_j steps)`` up to all: ``p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)``."""
    before, share, points = 0.0, _FIRST, {0}
    while share <= 1:
        points.add(ceil(round(share * steps, 9)))
        before, share = share, share + max(share - before - _SHORTER, _SHORTEST)
    return tuple(sorted(points))


def _check_(state: State, period: int, rho: float) -> Tensor:
    """Adapt the step sizes at a checkpoint; which sub-tensors go back to their best point."""
    stuck = (state["halved"] == 0) & (state["checked_loss"] <= state["best_loss"])
    back: Tensor = (state["falls"] < rho * period) | stuck
    state["rate"] = torch.where(back, state["rate"] / 2, state["rate"])
    state["halved"] = back.to(state["rate"])
    state["checked_loss"] = state["best_loss"]
    state["falls"] = torch.zeros_like(state["falls"])
    return back


def _check_support_(state: State, ball: Any) -> Tensor:
    """`_check_` in an L1 ball, where it is the best points that have to become sparser."""
    support, density = _support(state["best"], ball, state["density"])
    back: Tensor = support < _SPARSER * state["support"]
    smaller = (state["rate"] / _L1_SHRINK).clamp(min=_L1_LEAST)
    state["rate"] = torch.where(back, 1.0, smaller)
    state |= {"support": support, "density": density}
    return back


# The state: the best points, and what the checkpoints go by


def _first_state(x: Tensor, gradient: Tensor, ball: Any) -> State:
    """The state before the first step, from a start that is the best point, but of no value yet."""
    rate = torch.ones((len(x), *(1,) * (x.ndim - 1)), dtype=wide_dtype(x), device=x.device)
    worst = torch.full_like(rate, inf)
    kept = {"best": _copy(x), "best_gradient": _copy(gradient)}
    state = {"step": 0, **kept, "best_loss": worst, "rate": rate}
    if ball.p == 1:
        # A start that is sparse tells how sparse to go on; one at the center or of noise does not.
        density = _support(x, ball, _DENSITY)[1].clamp(max=_DENSITY)
        return {**state, "density": density, "support": rate * x[0].numel()}
    losses = {"last_loss": -worst, "checked_loss": worst}
    return {**state, **losses, "previous": _copy(x), "falls": 0 * rate, "halved": rate}


def _note_(state: State, x: Tensor, gradient: Tensor, losses: Tensor, group: Group) -> None:
    """Count whether losses fall, and keep the best valid point so far, with its gradient."""
    losses = losses.to(state["best_loss"]).view_as(state["best_loss"])
    if "falls" in state:
        state["falls"] = state["falls"] + (losses < state["last_loss"])
        state["last_loss"] = losses
    better = losses < state["best_loss"]
    if state["step"] == 0:  # a start outside the set would be the best point of all, to go back to
        better &= (group["constraint"].violation(x) <= 0).view_as(better)
    state["best_loss"] = torch.where(better, losses, state["best_loss"])
    _put_(better, [x, gradient], [state["best"], state["best_gradient"]])


_copy = partial(torch.clone, memory_format=torch.contiguous_format)


def _put_(rows: Tensor, sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy the chosen sub-tensors of some batches into others."""
    for source, target in zip(sources, targets, strict=True):
        torch.where(rows, source, target, out=target)


def _support(x: Tensor, ball: Any, otherwise: Any) -> tuple[Tensor, Tensor]:
    """How many entries are not those of the center, and the share of them in the next direction.

    A point that is the center does not tell the latter.
    """
    offset = x if ball.center is None else x - as_rounded(ball.center, x.dtype, x)
    support = (offset != 0).sum(tuple(range(1, x.ndim)), keepdim=True).to(wide_dtype(x))
    return support, torch.where(support > 0, support / (_L1_SHRINK * x[0].numel()), otherwise)


# The move


def _moved(x: Tensor, gradient: Tensor, state: State, ball: Any, group: Group) -> Tensor:
    """The next point: a steepest step, projected, and some of the last move with it.

    Changes `gradient`.
    """
    constraint: Constraint = group["constraint"]
    rate, last = state["rate"], state["step"] == group["steps"] - 1
    if last:  # in an Linf ball a step of two diameters ends in a corner
        x, gradient, rate = state["best"], _copy(state["best_gradient"]), 0 * rate + 2
    if last and ball.p != inf:
        flat = (gradient != 0).sum(tuple(range(1, x.ndim)), keepdim=True) == 0
        return torch.where(flat, x, constraint.lmo(gradient))
    if ball.p == 1:
        direction = _sparse_(zero_outward_(gradient, x, constraint), state["density"])
        size = rate * ball.epsilon
    else:
        direction, size = gradient, rate * 2 * ball.epsilon
        sign_([direction]) if ball.p == inf else normalize_(direction, 2, x.ndim - 1)
    z: Tensor = constraint.project_(x - direction.to(x.dtype).mul_(size.to(x.dtype)))
    if ball.p == 1 or last or state["step"] == 0:
        return z
    inertia = (x - state["previous"]).mul_(1 - group["momentum"])
    z = constraint.project_(inertia.add_(torch.lerp(x, z, group["momentum"])))
    return z


def _sparse_(gradient: Tensor, share: Tensor) -> Tensor:
    """A direction of L1 norm 1: the signs of the largest entries, as many as that share of all."""
    rows = gradient.view(len(gradient), -1)
    size = rows.abs()
    rank = (share.view(-1, 1) * rows.shape[1]).long().clamp(1, rows.shape[1])
    if is_eager(rows):
        largest = size.topk(int(rank.max()), dim=1).values  # which is quicker
    else:
        largest = size.sort(dim=1, descending=True).values
    rows.masked_fill_(size < largest.gather(1, rank - 1), 0.0)
    sign_([rows])
    norm = rows.abs().sum(1, keepdim=True, dtype=torch.float32)  # exact, of entries 0 and 1
    return rows.div_(norm.clamp(min=1)).view(gradient.shape)
