"""Projected gradient descent as attacks do it: steepest steps in the norm of a ball."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite
from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox._torch import plain_step
from rai_toolbox.checks import check_fraction
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall, norm_ball_of, zero_outward_
from rai_toolbox.constraints.kernels import directions
from rai_toolbox.constraints.kernels.blocks import BLOCK, is_eager
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.settings import REQUIRED, batch_shape_in, constructor_arguments
from rai_toolbox.optim.short_step import short_step, unchanged
from rai_toolbox.optim.transforms import Key, OfSet, Projection, Sign, normalize_, top_q_each_
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper, Params

_SIGN = Sign()


class SteepestStep(OfSet):
    """The steepest direction in the norm of the ball; a sparse one in an L1 ball."""

    divides_by_norms = True

    q: Key = "q"
    grad_scale: Key = "grad_scale"

    def check(self, group: Group) -> None:  # noqa: D102
        norm_ball_of(group[self.constraint])
        check_fraction(self.q, group[self.q])

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        p, k = _order(group[self.constraint]), group[self.param_ndim]
        if p == 1:
            for param, grad in zip(params, tensors, strict=True):
                self._sparsify_(param, grad, group)
        if p != 2:
            _SIGN.change_(tensors, group)
        if p != inf:
            normalize_(tensors, p, k, 0.0)

    def _sparsify_(self, param: Tensor, grad: Tensor, group: Group) -> None:
        """Keep the largest entries, of those that the step does not follow out of a bound."""
        shape = batch_shape_in(param, group, self.param_ndim)
        sign = 1 if (group[self.grad_scale] > 0) != group.get("maximize", False) else -1
        x, down = param.reshape(shape), grad.reshape(shape) * sign
        kept = zero_outward_(down, x, group[self.constraint]) * sign
        grad.copy_(kept.reshape(grad.shape))
        # At least one entry: else small sub-tensors would never move.
        size = max(1, grad.numel() // max(1, shape[0]))
        top_q_each_([grad], min(group[self.q], 1 - 1 / size), group[self.param_ndim])


class PGD(Constrained, ParamTransformingOptimizer):
    r"""Step in the steepest direction of the norm of a ball, and project onto the ball.

    .. math::
        g \leftarrow \arg\max_{\|d\| = 1} \langle g, d \rangle, \quad
        p \leftarrow \text{inner step}(p, g), \quad p \leftarrow P(p)

    for each sub-tensor: in an Linf ball the sign of g, in an L2 ball ``g / |g|_2``, and in an L1
    ball, where the steepest direction would be one entry, the signs of its largest entries, divided
    by their number (Madry et al., 2018; Tramèr & Boneh, 2019). So `lr` is how far a step goes, in
    the norm of the ball. The projection is the exact one, onto ball and bounds together. A
    sub-tensor whose gradient is 0 stays where it is.

    Parameters
    ----------
    constraint : LinfBall, L2Ball, L1Ball, or BoundedBall of one
        The ball that each sub-tensor is kept in, alone or within bounds. To be given here or in
        every parameter group.
    lr : float or Tensor
        The length of a step, in the norm of the ball and the unit of the parameter; a tensor has
        the shape (). Required, here, in every parameter group, or in a partial as `InnerOpt`: the
        default of an inner optimizer does not fit the radius.
    q : float
        The fraction of the entries that a step in an L1 ball does not change, in [0, 1]. It has no
        effect in other balls.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    TypeError
        If `constraint` or `lr` is missing, or `constraint` is another set.
    ValueError
        If its radius is infinite, it does not fit a parameter, or `q` is outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import BoundedBall, LinfBall
    >>> from rai_toolbox.optim import PGD
    >>> delta = torch.zeros(1, 3, requires_grad=True)
    >>> optim = PGD([delta], constraint=BoundedBall(LinfBall(0.3), -0.1, 0.9), lr=0.2)
    >>> delta.backward(gradient=torch.tensor([[5.0, -0.1, 0.0]]))
    >>> optim.step()
    >>> delta
    tensor([[-0.1000,  0.2000,  0.0000]], requires_grad=True)
    """

    _before = (SteepestStep(),)
    _after = (Projection(),)

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        constraint: Constraint | type[REQUIRED] = REQUIRED,
        lr: float | Tensor | type[REQUIRED] = REQUIRED,
        q: float = 0.95,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        if lr is REQUIRED and isinstance(InnerOpt, partial):
            lr = InnerOpt.keywords.get("lr", lr)
        super().__init__(**constructor_arguments(locals()))

    def _make_short_step(self) -> Callable[[Any], bool] | None:
        gradient = unchanged(self)
        move_ = gradient and self._short_move()
        if gradient is None or move_ is None:
            return short_step(self)
        (param,) = self.inner_opt.param_groups[0]["params"]

        def step(optimizer: Any) -> bool:
            grad = gradient(optimizer)
            if grad is None or grad.shape != param.shape or not _is_plain_batch(param):
                return False
            # (NaN makes NaN of the product)
            if not isfinite(torch.dot(param.view(-1), grad.view(-1)).item()):
                return False
            move_(grad)
            return True

        return step

    def _prepared_step(self) -> Callable[[], object] | None:
        gradient = unchanged(self)
        move_ = gradient and self._short_move()
        if gradient is None or move_ is None:
            return None
        (param,) = self.inner_opt.param_groups[0]["params"]
        if not isfinite(param.sum().item()):
            return None

        def step() -> None:
            grad = gradient(self, could_replace=False)
            if grad is None:  # (a model may have a scheduler)
                _STEP(self)
            else:
                move_(grad)

        return step

    def _short_move(self) -> Callable[[Tensor], object] | None:
        """What moves one plain batch by its finite gradient, with the bits of the step, or None."""
        (group,) = self.inner_opt.param_groups
        (param,) = group["params"]
        is_known = type(self) is PGD and plain_step(PGD.step) is _STEP
        if not (is_known and _is_plain_batch(param) and _is_simple(group)):
            return None
        constraint, p = group["constraint"], _order(group["constraint"])
        is_bounded = isinstance(constraint, BoundedBall)
        is_short = len(param) == 1 and param.numel() <= BLOCK // 2
        project_ = constraint.projection_like(param) if is_bounded else constraint.project_
        direction, weak = self._before[0], proxy(self)

        def move_(grad: Tensor) -> None:
            if p == inf:
                grad.sign_()
            elif p == 1 or not (is_short and directions.normalize_row_(grad, p)):
                direction.apply_([grad], [param], group, weak)
            project_(param.add_(grad, alpha=-group["lr"]))

        return move_


_STEP = plain_step(PGD.step)


def _order(constraint: Any) -> float:
    """The order of the norm of the ball that a group has by now."""
    ball = getattr(constraint, "ball", constraint)
    return (ball if isinstance(ball, Ball) else norm_ball_of(ball)).p


def _is_simple(group: Group) -> bool:
    """Whether settings of SGD and of the wrapper have no effect, but for a positive `lr`."""
    return all(group.get(name) == value for name, value in _WITHOUT_EFFECT.items())


def _is_plain_batch(param: Tensor) -> bool:
    """Whether it is a batch that one call of each operator may change."""
    return (
        is_eager(param)
        and param.ndim > 1
        and param.numel() > 0
        and param.dtype in _DTYPES
        and param.is_contiguous()
    )


_WITHOUT_EFFECT = {
    **{"momentum": 0, "weight_decay": 0, "nesterov": False, "maximize": False},
    **{"foreach": None, "differentiable": False, "fused": None},
    **{"grad_scale": 1, "grad_bias": 0, "param_ndim": -1},
}
_DTYPES = (torch.float32, torch.float64)
