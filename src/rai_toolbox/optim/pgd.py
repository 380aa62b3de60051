"""Projected gradient descent as attacks do it: steepest steps in the norm of a ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.batch import view_or_copy
from rai_toolbox.checks import check_fraction
from rai_toolbox.constraints.balls import L1Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.ball_projection import ball_of, free_, nearest_
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.settings import REQUIRED, batch_shape_in, constructor_arguments
from rai_toolbox.optim.transforms import Key, Projection, Transform, normalize_, sign_, top_q_
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper, Params


@dataclass(frozen=True)
class SteepestStep(Transform):
    """The steepest direction in the norm of the ball; a sparse one in an L1 ball."""

    divides_by_norms = True

    constraint: Key = "constraint"
    q: Key = "q"
    grad_scale: Key = "grad_scale"

    def check(self, group: Group) -> None:  # noqa: D102
        ball_of(group[self.constraint])
        check_fraction(self.q, group[self.q])

    def is_elementwise(self, group: Group) -> bool:  # noqa: D102
        return bool(getattr(group[self.constraint], "elementwise", True))

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        ball, k = ball_of(group[self.constraint]), group[self.param_ndim]
        if isinstance(ball, LinfBall):
            sign_(tensors)
        elif isinstance(ball, L1Ball):
            for param, grad in zip(params, tensors, strict=True):
                shape = batch_shape_in(param, group, self.param_ndim)
                self._free_(param, grad, group, shape)
                top_q_(grad, _within_one(group[self.q], grad, shape), k)
            sign_(tensors)
            normalize_(tensors, 1, k, 0.0)
        else:
            normalize_(tensors, 2, k, 0.0)

    def _free_(self, param: Tensor, grad: Tensor, group: Group, shape: tuple[int, ...]) -> None:
        down = group[self.grad_scale] > 0
        if group.get("maximize", False):
            down = not down
        view, copied = view_or_copy(grad, shape)
        free_(view if down else view.neg_(), view_or_copy(param, shape)[0], group[self.constraint])
        if not down:
            view.neg_()
        if copied:
            grad.copy_(view.view(grad.shape))


@dataclass(frozen=True)
class BallProjection(Projection):
    """The projection onto ball and bounds."""

    def change_(self, tensors: list[Tensor], group: Group) -> None:  # noqa: D102
        for param in tensors:
            view, copied = view_or_copy(param, batch_shape_in(param, group, self.param_ndim))
            nearest_(view, group[self.constraint])
            if copied:
                param.copy_(view.view(param.shape))


class PGD(ParamTransformingOptimizer):
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
    q : float
        The share of the gradient's entries that a step in an L1 ball leaves alone, in [0, 1]; of
        other balls it says nothing.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    TypeError
        If `constraint` is missing, or another set.
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

    _after = (BallProjection(),)
    _before = (SteepestStep(),)

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        constraint: Constraint | type[REQUIRED] = REQUIRED,
        q: float = 0.95,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(**constructor_arguments(locals()))


def _within_one(q: float, grad: Tensor, shape: tuple[int, ...]) -> float:
    """`q`, or the largest share that leaves one entry: else small sub-tensors would never move."""
    size = max(1, grad.numel() // max(1, shape[0]))
    return min(q, 1 - 1 / size)
