"""Auto-PGD: projected gradient descent that finds its step sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from rai_toolbox._torch import not_compiled, use_grad_for_differentiable
from rai_toolbox.batch import check_param_ndim
from rai_toolbox.checks import check_fraction
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import norm_ball_of
from rai_toolbox.optim.apgd_steps import (
    check_,
    empty_state,
    moved,
    note_,
    period_ending_at,
    put_,
)
from rai_toolbox.optim.own_step import CheckedOptimizer
from rai_toolbox.optim.settings import (
    batch_shape_in,
    check_fits,
    labels,
    with_names_apart,
)
from rai_toolbox.optim.wrapper import Group, Params


class APGD(CheckedOptimizer):
    r"""Steepest steps in a norm ball, of a size that each sub-tensor finds for itself (Auto-PGD).

    .. math::
        z = P(p - \eta d), \quad
        p \leftarrow P(p + \alpha (z - p) + (1 - \alpha) (p - p_\text{before}))

    with the steepest direction d in the norm of the ball, and the exact projection P onto ball and
    bounds together. The step size begins with the diameter of the ball. At checkpoints, which come
    ever closer as the `steps` run out, it is halved where fewer than a share `rho` of the steps
    since the last one have lowered the loss, or neither the best loss nor the step size has changed
    since; such a sub-tensor goes on from its best point (Croce & Hein, 2020).

    In an L1 ball d has the signs of the largest entries of the gradient, as many as two thirds of
    those by which the best point differs from the center. At each checkpoint the step size, first
    the radius, falls by a factor of 1.5, to a tenth at least; where the best point has become
    sparser by 5 %, it begins anew, from there (Croce & Hein, 2021). There is no inertia.

    The optimizer has to know the loss of each sub-tensor: call `observe_` before each step.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    constraint : LinfBall, L2Ball, L1Ball, or BoundedBall of one
        The ball that each sub-tensor is kept in, alone or within bounds.
    steps : int
        The number of steps that there will be, >= 1, by which the checkpoints are set.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`.
    momentum : float
        The share alpha of the new step in a move, in [0, 1]; the rest is that of the last move, so
        that 1 means no inertia. Not for L1.
    rho : float
        The share of steps that must lower the loss, in [0, 1]. Not for L1.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, or does not fit a parameter.

    Notes
    -----
    Start inside. A start that is not in the set is moved there by the first step, and is no point
    to go back to. A sub-tensor whose gradient is 0 moves by inertia only; one whose loss is NaN or
    infinite has no best point there.

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
        defaults = {
            "constraint": constraint,
            "steps": steps,
            "param_ndim": param_ndim,
            "momentum": momentum,
            "rho": rho,
            "differentiable": False,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        _check(group)

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
            got = losses.dtype if isinstance(losses, Tensor) else repr(losses)
            raise TypeError(f"`losses` must be a tensor of real numbers, got {got}")
        for group in self.param_groups:
            for param, label in zip(group["params"], labels(group), strict=True):
                rows = batch_shape_in(param, group)[0]
                if param.grad is not None and losses.numel() != rows:
                    raise ValueError(
                        f"`losses` must have one value per sub-tensor, shape ({rows},) for "
                        f"{label} of shape {tuple(param.shape)}, got shape {tuple(losses.shape)}"
                    )
        self._losses = losses.detach().clone()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @not_compiled  # what it does depends on the number of the step: each would be compiled anew
    @use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model, calls `observe_`, and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.

        Raises
        ------
        RuntimeError
            If `observe_` was not called since the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._losses is None:
            raise RuntimeError("`observe_` must be called with the losses before each `step`")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    _step_(param, param.grad, self._losses, self.state[param], group)
        self._losses = None
        return loss


def _step_(
    param: Tensor, grad: Tensor, losses: Tensor, state: dict[str, Any], group: Group
) -> None:
    constraint, shape = group["constraint"], batch_shape_in(param, group)
    ball = norm_ball_of(constraint)
    x = param.detach().reshape(shape)
    seen = (grad if grad.layout is torch.strided else grad.to_dense()).detach().reshape(shape)
    column = (-1, *(1,) * (len(shape) - 1))
    if not state:
        state.update(empty_state(x, seen, ball))
    # A start outside the set would be the best point of all, to go back to.
    valid = None if state["step"] else (constraint.violation(x) <= 0).view(column)
    note_(state, x, seen, losses.to(state["best_loss"]).view(column), valid)
    period = period_ending_at(state["step"], group["steps"], ball)
    if period:
        back = check_(state, period, group["rho"], ball)
        x = put_(back, state["best"], x.clone())
        seen = put_(back, state["best_gradient"], seen.clone())
    new = moved(x, seen, state, constraint, group["momentum"])
    if "previous" in state:
        state["previous"].copy_(x)
    param.copy_(new.view(param.shape))
    state["step"] += 1


def _check(group: Group) -> None:
    norm_ball_of(group["constraint"])
    steps = group["steps"]
    if type(steps) is not int:
        raise TypeError(f"`steps` must be an int, got {steps!r}")
    if steps < 1:
        raise ValueError(f"`steps` must be >= 1, got {steps!r}")
    for name in ("momentum", "rho"):
        check_fraction(name, group[name])
    check_param_ndim(group["param_ndim"])
    check_fits(group["constraint"], with_names_apart(group))
