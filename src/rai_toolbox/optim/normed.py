"""Optimizers that normalize the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.checks import check_non_negative
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.settings import TINY
from rai_toolbox.optim.transforms import normalize_
from rai_toolbox.optim.wrapper import Group, Params


class _NormedGradientOptim(ParamTransformingOptimizer):
    """What the two have in common; they name their order `p`."""

    p: ClassVar[float]

    _divides_by_norms = True

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        param_ndim: int | None = -1,
        defaults: Mapping[str, Any] | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            defaults={"div_by_zero_eps": div_by_zero_eps, **(defaults or {})},
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            **inner_opt_kwargs,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_non_negative("div_by_zero_eps", group["div_by_zero_eps"])

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        # `p` is read from the class: dynamo does not trace an optimizer's own attribute `p`.
        normalize_(grads, type(self).p, optim_group["param_ndim"], optim_group["div_by_zero_eps"])


class L1NormedGradientOptim(_NormedGradientOptim):
    """Divide each sub-tensor of each gradient by its L1 norm before the inner step.

    ``g <- g / max(|g|_1, div_by_zero_eps)``; a sub-tensor of zeros stays zero.

    Parameters
    ----------
    div_by_zero_eps : float
        Smallest divisor, >= 0. The norm neither overflows nor underflows in any dtype.
    params, InnerOpt, param_ndim, defaults, grad_scale, grad_bias, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `div_by_zero_eps` is negative or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1NormedGradientOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L1NormedGradientOptim([x], param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([0.5000, 0.5000]), tensor([-1.5000,  0.5000], requires_grad=True))
    """

    p = 1


class L2NormedGradientOptim(_NormedGradientOptim):
    """Divide each sub-tensor of each gradient by its L2 norm before the inner step.

    ``g <- g / max(|g|_2, div_by_zero_eps)``: the steepest direction in the L2 norm; a sub-tensor
    of zeros stays zero.

    Parameters
    ----------
    div_by_zero_eps : float
        Smallest divisor, >= 0. The norm neither overflows nor underflows in any dtype.
    params, InnerOpt, param_ndim, defaults, grad_scale, grad_bias, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `div_by_zero_eps` is negative or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2NormedGradientOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L2NormedGradientOptim([x], param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([0.7071, 0.7071]), tensor([-1.7071,  0.2929], requires_grad=True))
    """

    p = 2
