"""The optimizer that follows the sign of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.constraints.kernels.directions import sign_
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.wrapper import Group, Params


class SignedGradientOptim(ParamTransformingOptimizer):
    """Replace each element of each gradient by its sign before the inner step.

    ``g <- g / |g|``, elementwise, with 0 -> 0: the steepest direction in the Linf norm. NaN
    stays NaN. A complex gradient is turned to unit modulus, a sparse one is signed by its values.

    Parameters
    ----------
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SignedGradientOptim
    >>> x = torch.tensor([-1.5, 1.5], requires_grad=True)
    >>> optim = SignedGradientOptim([x], lr=1.0)
    >>> x.backward(gradient=torch.tensor([-2.0, 20.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([-1.,  1.]), tensor([-0.5000,  0.5000], requires_grad=True))
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            InnerOpt,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults=defaults,
            param_ndim=param_ndim,
            **inner_opt_kwargs,
        )

    def _sees_elements(self, group: Group) -> bool:
        return True

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        sign_(grads)

    def _keeps_zero(self, optim_group: Group) -> bool:
        return True
