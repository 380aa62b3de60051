"""The optimizer that follows the signs of the largest gradient entries."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Generator, default_generator
from torch.optim import SGD, Optimizer

from rai_toolbox.optim.chain import ChainedParamTransformingOptimizer
from rai_toolbox.optim.normed import L1NormedGradientOptim
from rai_toolbox.optim.settings import REQUIRED, TINY
from rai_toolbox.optim.signed import SignedGradientOptim
from rai_toolbox.optim.top_q import TopQGradientOptimizer
from rai_toolbox.optim.wrapper import Params


class L1qNormedGradientOptim(ChainedParamTransformingOptimizer):
    """Follow the signs of the largest gradient entries, at unit L1 norm per sub-tensor.

    Top-q, then sign, then L1-normalize: the chain of `TopQGradientOptimizer`,
    `SignedGradientOptim` and `L1NormedGradientOptim`. A sparse direction of steepest ascent
    (Tramèr & Boneh, 2019).

    Parameters
    ----------
    q, dq, generator
        See `TopQGradientOptimizer`.
    div_by_zero_eps : float
        See `L1NormedGradientOptim`.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `q` or `dq` is outside [0, 1].
    TypeError
        If `q` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1qNormedGradientOptim
    >>> x = torch.ones(3, requires_grad=True)
    >>> optim = L1qNormedGradientOptim([x], q=0.3, grad_scale=1.8, lr=1.0, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([0.0, 1.0, 2.0]))
    >>> optim.step()
    >>> x.grad
    tensor([0.0000, 0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        q: float | type[REQUIRED] = REQUIRED,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        generator: Generator = default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            partial(TopQGradientOptimizer, q=q, dq=dq, generator=generator),
            SignedGradientOptim,
            partial(L1NormedGradientOptim, div_by_zero_eps=div_by_zero_eps),
            params=params,
            InnerOpt=InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults=defaults,
            **inner_opt_kwargs,
        )
