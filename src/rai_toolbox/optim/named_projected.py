"""Optimizers that take steepest steps in a norm and project onto its ball."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.batch import sub_ndim
from rai_toolbox.checks import check_non_negative
from rai_toolbox.constraints.box import clamp_
from rai_toolbox.constraints.kernels.l2 import project_l2_ball_
from rai_toolbox.optim.normed import L2NormedGradientOptim
from rai_toolbox.optim.settings import REQUIRED, TINY, refuse_complex
from rai_toolbox.optim.signed import SignedGradientOptim
from rai_toolbox.optim.wrapper import Group, Params


class L2ProjectedOptim(L2NormedGradientOptim):
    """L2-normalize each gradient, step, and project each parameter onto an L2 ball.

    ``g <- g / |g|_2``, inner step, ``p <- p * min(1, epsilon / |p|_2)``, for each sub-tensor.
    The result is in the ball after rounding to the parameter's dtype too.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0. To be given here or in every parameter group.
    div_by_zero_eps : float
        See `L2NormedGradientOptim`.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2ProjectedOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L2ProjectedOptim([x], param_ndim=None, lr=1.0, epsilon=0.8)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([-0.7885,  0.1353], requires_grad=True)
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={"epsilon": epsilon, **(defaults or {})},
            div_by_zero_eps=div_by_zero_eps,
            **inner_opt_kwargs,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_non_negative("epsilon", group["epsilon"])

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        for param in params:
            ndim = sub_ndim(param.ndim, optim_group["param_ndim"])
            project_l2_ball_(param, optim_group["epsilon"], ndim)


class LinfProjectedOptim(SignedGradientOptim):
    """Take the sign of each gradient, step, and clamp each parameter to [-epsilon, epsilon].

    ``g <- sign(g)``, inner step, ``p <- min(max(p, -epsilon), epsilon)``, elementwise.

    Parameters
    ----------
    epsilon : float
        Radius of the Linf ball, >= 0. To be given here or in every parameter group.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfProjectedOptim
    >>> x = torch.tensor([-1.0, 0.5], requires_grad=True)
    >>> optim = LinfProjectedOptim([x], epsilon=1.8, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, -2.0]))
    >>> optim.step()
    >>> x
    tensor([-1.8000,  1.5000], requires_grad=True)
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={"epsilon": epsilon, **(defaults or {})},
            **inner_opt_kwargs,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_non_negative("epsilon", group["epsilon"])
        refuse_complex(group, "`epsilon`")

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        clamp_(params, -optim_group["epsilon"], optim_group["epsilon"])
