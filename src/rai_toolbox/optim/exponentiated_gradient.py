"""Exponentiated gradient: mirror descent on the simplex, and on plans of transport."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.batch import sub_ndim
from rai_toolbox.checks import check_flag, check_positive, check_type, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.kernels.transport import scaled_plan
from rai_toolbox.constraints.sharding import is_sharded, local_of, on_shards_
from rai_toolbox.constraints.simplex import Simplex
from rai_toolbox.constraints.transport import Birkhoff, Transport
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.own_step import OwnStepOptimizer, check_lr_value
from rai_toolbox.optim.settings import batch_shape_in, is_zero_on_host
from rai_toolbox.optim.wrapper import Group, Params

_SINKHORN_STEPS = 50


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
        The step size, >= 0, in 1 / the unit of the gradient; with 0 nothing moves.
    total : float
        The sum of each sub-tensor, > 0.
    constraint : Birkhoff or Transport, optional
        In place of the simplex: w is scaled to the sums of rows and columns by 50 steps of
        Sinkhorn's algorithm, the mirror step on plans (Cuturi, 2013), and what is left is repaired.
        `total` must be 1 then; a matrix takes ``param_ndim=2``.
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
    Start with non-negative entries that are not all 0, such as equal ones; the first step makes
    their sum `total`. An entry that is 0, or becomes 0 by underflow (in float16 below 6e-8), stays
    0 whatever its gradient is; in a `constraint`, as far as its sums allow.
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
        "constraint": lambda _, value: _check_plans(value),
    }

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        total: float = 1.0,
        constraint: Birkhoff | Transport | None = None,
        param_ndim: int | None = -1,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def _constraint(self, group: Group) -> Constraint:
        return group["constraint"] or Simplex(group["total"])

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["constraint"] is not None and group["total"] != 1:
            raise wrong("total", "be 1 with a constraint, which has its own", repr(group["total"]))

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
    x, grad = (widened(tensor).view(shape) for tensor in (param, grad))
    rate = group["lr"] if group["maximize"] else -group["lr"]
    # Products beyond float64 count as the largest number; an infinite gradient gives NaN.
    largest = torch.finfo(grad.dtype).max
    exponent = (grad * rate).clamp(-largest, largest) + (grad - grad)
    logits = x.log() + exponent
    if group["constraint"] is None:
        moved = torch.softmax(logits.flatten(1), 1) * group["total"]
    else:
        moved = _plan(logits, group["constraint"])
    param.copy_(moved.view(param.shape))


def _plan(logits: Tensor, constraint: Birkhoff | Transport) -> Tensor:
    """The plans nearest to ``exp(logits)`` in relative entropy; NaN where one is not finite."""
    for block, points, part in constraint._blocks(logits):
        bad = (points.isnan() | (points == torch.inf)).any(-1, True).any(-2, True)
        rest = points - points.amax((-2, -1), keepdim=True)
        plan = scaled_plan(rest, *part.sums(rest), _SINKHORN_STEPS)
        block.copy_(torch.where(bad, torch.nan, plan))
    return logits


def _check_plans(constraint: object) -> None:
    kinds = (Birkhoff, Transport, type(None))
    check_type("constraint", constraint, kinds, "be a Birkhoff or a Transport")
