"""Projected gradient descent as attacks do it: steepest steps in the norm of a ball."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox._torch import has_step_hooks, plain_step
from rai_toolbox.checks import check_fraction
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall, norm_ball_of, zero_outward_
from rai_toolbox.constraints.kernels import directions
from rai_toolbox.constraints.kernels.blocks import BLOCK, in_blocks, is_plain
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.hooks import GRADIENT_HOOK, PARAMETER_HOOK
from rai_toolbox.optim.settings import REQUIRED, batch_shape_in, constructor_arguments
from rai_toolbox.optim.sgd import can_step
from rai_toolbox.optim.transforms import Key, OfSet, Projection, Sign, normalize_, top_q_
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
        top_q_(grad, min(group[self.q], 1 - 1 / size), group[self.param_ndim])


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

    def _step_alone_(self) -> bool:
        step = self._short_step()
        if step is None:
            return False
        param = self.inner_opt.param_groups[0]["params"][0]
        if not _fits(param.grad, param):
            return False
        # (NaN makes NaN of the product)
        if not isfinite(torch.dot(param.view(-1), param.grad.view(-1)).item()):
            return False
        step()
        return True

    def _prepared_step(self) -> Callable[[], object] | None:
        step = self._short_step()
        if step is None or isfinite(self.inner_opt.param_groups[0]["params"][0].sum().item()):
            return step
        return None

    def _short_step(self) -> Callable[[], object] | None:
        """The step of one plain batch by bare SGD in few calls, with the same bits, or None.

        It may be called as long as batch and gradients are finite.
        """
        inner, groups = self.inner_opt, self.inner_opt.param_groups
        if len(groups) != 1 or len(groups[0]["params"]) != 1:
            return None
        group = groups[0]
        if (
            type(self) is not PGD
            or plain_step(PGD.step) is not _STEP
            or not (isinstance(inner, SGD) and can_step(inner, plain_step(type(inner).step)))
            or "step" in inner.__dict__
            or has_step_hooks(inner)
            or not _HOOKS.isdisjoint(self.__dict__)
            or not _is_plain_batch(group["params"][0])
            or not _is_simple(group)
        ):
            return None
        param, constraint, settings = group["params"][0], group["constraint"], list(group.values())
        p, rate = _order(constraint), -group["lr"]
        is_bounded = isinstance(constraint, BoundedBall)
        is_short = len(param) == 1 and param.numel() <= BLOCK // 2
        project_ = constraint.projection_like(param) if is_bounded else constraint.project_

        def step() -> None:
            grad = param.grad
            is_same = all(map(is_, group.values(), settings))  # (a model may have a scheduler)
            if not (is_same and _fits(grad, param)):
                _STEP(self)
                return
            if p == inf:
                grad.sign_()
            elif p == 1 or not (is_short and directions.normalize_row_(grad, p)):
                self._before[0].apply_([grad], [param], group, self)
            project_(param.add_(grad, alpha=rate))

        return step


_STEP = plain_step(PGD.step)


def _order(constraint: Any) -> float:
    """The order of the norm of the ball that a group has by now."""
    ball = getattr(constraint, "ball", constraint)
    return (ball if isinstance(ball, Ball) else norm_ball_of(ball)).p


def _is_simple(group: Group) -> bool:
    """Whether settings of SGD and of the wrapper have no effect, but for a positive `lr`."""
    lr = group["lr"]
    return (
        type(lr) is float
        and 0.0 < lr <= _LONGEST
        and all(group.get(name) == value for name, value in _WITHOUT_EFFECT.items())
    )


def _is_plain_batch(param: Tensor) -> bool:
    """Whether it is a batch that one call of each operator may change."""
    return (
        in_blocks(param)
        and param.ndim > 1
        and param.numel() > 0
        and param.dtype in _DTYPES
        and param.is_contiguous()
    )


def _fits(grad: Tensor | None, param: Tensor) -> bool:
    """Whether there is a gradient that operators may change as they change such a parameter."""
    return (
        grad is not None
        and is_plain(grad)
        and grad.dtype == param.dtype
        and grad.layout is torch.strided
        and grad.is_contiguous()
    )


_LONGEST = 1e30  # what is less than a rounding of the largest numbers, so that no step is infinite
_HOOKS = {GRADIENT_HOOK, PARAMETER_HOOK}
_WITHOUT_EFFECT = {
    **{"momentum": 0, "weight_decay": 0, "nesterov": False, "maximize": False},
    **{"foreach": None, "differentiable": False, "fused": None},
    **{"grad_scale": 1, "grad_bias": 0, "param_ndim": -1},
}
_DTYPES = (torch.float32, torch.float64)
