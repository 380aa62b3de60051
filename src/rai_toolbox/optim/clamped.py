"""Optimizers that clamp: the parameters after the step, or the gradients before it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.checks import check_bounds
from rai_toolbox.constraints.box import clamp_
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.settings import refuse_complex
from rai_toolbox.optim.wrapper import Group, Params


class _ClampingOptimizer(ParamTransformingOptimizer):
    """What the two have in common: their bounds."""

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        clamp_min: float | None = None,
        clamp_max: float | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={"clamp_min": clamp_min, "clamp_max": clamp_max, **(defaults or {})},
            **inner_opt_kwargs,
        )

    def _sees_elements(self, group: Group) -> bool:
        return True

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bounds("clamp_min", group["clamp_min"], "clamp_max", group["clamp_max"])
        refuse_complex(group, "`clamp_min` and `clamp_max`")


class ClampedParameterOptimizer(_ClampingOptimizer):
    """Clamp each element of each parameter to [clamp_min, clamp_max] after the inner step.

    ``p <- min(max(p, clamp_min), clamp_max)``, elementwise: the Euclidean projection onto the
    box. Bounds count as rounded to the parameter's dtype. NaN stays NaN.

    Parameters
    ----------
    clamp_min, clamp_max : float or None
        The bounds; at least one of them must be given, to the optimizer or to each group.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If no bound is given, a bound is NaN, or ``clamp_min > clamp_max``.

    Examples
    --------
    A step of SGD with a learning rate of 1, after which the parameter is clamped to [-1, 3]:

    >>> import torch
    >>> from rai_toolbox.optim import ClampedParameterOptimizer
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedParameterOptimizer([x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
    >>> x.backward(gradient=torch.tensor([0.5, -10.0]))
    >>> optim.step()
    >>> x
    tensor([0.5000, 3.0000], requires_grad=True)
    """

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        clamp_(params, optim_group["clamp_min"], optim_group["clamp_max"])


class ClampedGradientOptimizer(_ClampingOptimizer):
    """Clamp each element of each gradient to [clamp_min, clamp_max] before the inner step.

    ``g <- min(max(g, clamp_min), clamp_max)``, elementwise. NaN stays NaN. A sparse gradient is
    clamped by its values, which takes bounds that leave 0 as it is.

    Parameters
    ----------
    clamp_min, clamp_max : float or None
        The bounds; at least one of them must be given, to the optimizer or to each group.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If no bound is given, a bound is NaN, or ``clamp_min > clamp_max``.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedGradientOptimizer
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedGradientOptimizer([x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
    >>> x.backward(gradient=torch.tensor([-0.5, 10.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([-0.5000,  3.0000]), tensor([ 1.5000, -2.0000], requires_grad=True))
    """

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        clamp_(grads, optim_group["clamp_min"], optim_group["clamp_max"])

    def _keeps_zero(self, optim_group: Group) -> bool:
        lower, upper = optim_group["clamp_min"], optim_group["clamp_max"]
        return (lower is None or lower <= 0) and (upper is None or upper >= 0)
