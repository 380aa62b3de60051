"""Exponentiated gradient: mirror descent on the simplex."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.batch import sub_ndim
from rai_toolbox.checks import check_flag, check_positive
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.sharding import is_sharded, local_of, on_shards_
from rai_toolbox.constraints.simplex import Simplex
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.own_step import OwnStepOptimizer, check_lr_value
from rai_toolbox.optim.settings import batch_shape_in, is_zero_on_host
from rai_toolbox.optim.wrapper import Group, Params


class ExponentiatedGradient(Constrained, OwnStepOptimizer):
    r"""Keep each sub-tensor on the simplex by multiplicative steps.

    .. math::
        p \leftarrow \text{total} \cdot \frac{w}{\sum w}, \quad w = p \, e^{-\text{lr} \, g}

    This is mirror descent with the entropy as its distance. If the entries of the gradients are
    bounded, its error grows with the number n of entries as ``sqrt(log n)``, and that of projected
    gradient descent as ``sqrt(n)`` (Kivinen & Warmuth, 1997; Beck & Teboulle, 2003).

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    lr : float
        The step size, >= 0; with 0 nothing moves.
    total : float
        The sum of each sub-tensor, > 0.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`. A vector takes
        None or 1.
    maximize : bool
        Ascend instead of descending.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, or does not fit a parameter.

    Notes
    -----
    Start with entries >= 0 of a positive sum, such as equal ones; the first step makes the sum
    `total`. An entry that is 0, or becomes 0 by underflow (in float16 below 6e-8), stays 0
    whatever its gradient is.
    A sub-tensor with a negative or infinite entry, without a positive entry, or with a gradient
    that is not finite, becomes NaN; nothing else does, however large ``lr * g`` is. Parameters
    without a gradient do not change.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ExponentiatedGradient
    >>> shares = torch.full((4,), 0.25, requires_grad=True)
    >>> optim = ExponentiatedGradient([shares], lr=1.0, param_ndim=None)
    >>> shares.backward(gradient=torch.tensor([1.0, 1.0, 2.0, 4.0]).log())
    >>> optim.step()  # by factors of 1, 1, 1/2 and 1/4
    >>> shares
    tensor([0.3636, 0.3636, 0.1818, 0.0909], requires_grad=True)
    """

    _checks = {
        "lr": check_lr_value,
        "total": check_positive,
        "maximize": check_flag,
    }

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        total: float = 1.0,
        param_ndim: int | None = -1,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def _constraint(self, group: Group) -> Simplex:
        return Simplex(group["total"])

    def _step_group_(self, group: Group) -> None:
        if is_zero_on_host(group["lr"]):
            return
        for param in group["params"]:
            if is_sharded(param) and param.grad is not None:
                first = param.ndim - sub_ndim(param.ndim, group["param_ndim"])
                step = partial(_stepped_shard, param.grad, group)
                on_shards_(param, range(first, param.ndim), step)
            elif param.grad is not None:
                _step_(param, param.grad, group)


def _stepped_shard(grad: Any, group: Group, whole: Any) -> Tensor:
    local = local_of(whole)
    _step_(local, grad.redistribute(placements=whole.placements).to_local(), group)
    return local


def _step_(param: Tensor, grad: Tensor, group: Group) -> None:
    """The step as ``softmax(log p - lr g)``, where the logarithm of a negative entry is NaN."""
    shape = batch_shape_in(param, group)
    grad = grad if grad.layout is torch.strided else grad.to_dense()
    x, grad = (widened(tensor).view(shape).flatten(1) for tensor in (param, grad))
    rate = group["lr"] if group["maximize"] else -group["lr"]
    # Products beyond float64 count as the largest number; an infinite gradient gives NaN.
    largest = torch.finfo(grad.dtype).max
    exponent = (grad * rate).clamp(-largest, largest) + (grad - grad)
    share = torch.softmax(x.log() + exponent, 1)
    param.copy_((share * group["total"]).view(param.shape))
