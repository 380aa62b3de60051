"""Plain SGD, stepped in fewer passes to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.sgd import sgd

from rai_toolbox import foreach
from rai_toolbox._torch import foreach_add_

_LANES = 8  # numbers that the fused kernel updates at once; it rounds those left over otherwise
_SMALL = 2**15  # elements of a tensor up to which a call costs more than its arithmetic
_EXACT = ({torch.float32}, {torch.float64})  # in which operators on lists round as single ones


def step_sgd(inner: SGD, step: Callable[[SGD], object]) -> None:
    """What ``step(inner)`` does, with the same bits and no temporaries, but faster on CPU.

    Torch's own choice is a loop in Python of up to five operators per tensor. It leaves
    `fused=True`, a single pass over the memory, to the user, because that may round otherwise.
    """
    groups = inner.param_groups
    try:
        inner.param_groups = []  # what is left to `step`
        for group in groups:
            inner.param_groups += _left_over(group, inner.state)
        if inner.param_groups:
            step(inner)
    finally:
        inner.param_groups = groups


def _left_over(group: dict[str, Any], state: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """What is left of a group after its quick steps, with its fastest implementation."""
    lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
    is_chosen = group["foreach"] is not None or group["fused"] is not None
    if is_chosen or group["differentiable"] or isinstance(lr, Tensor) or isinstance(decay, Tensor):
        return [group]
    params = [param for param in group["params"] if param.grad is not None]
    grads: list[Any] = [param.grad for param in params]
    if not foreach.are_plain([*params, *grads]):
        return [group]
    is_short = not (decay or group["maximize"] or group["nesterov"])
    if is_short and not momentum:
        _add_(params, grads, -lr)
        return []
    averages: list[Any] = []
    if momentum:
        averages = [state.get(param, {}).get("momentum_buffer") for param in params]
    changed = [*params, *grads, *averages]
    if not foreach.are_plain(changed) or {each.dtype for each in changed} not in _EXACT:
        return [group]
    if is_short and max(map(Tensor.numel, params)) <= _SMALL:
        # (on CPU each tensor is to be in cache for the next operator)
        for part in foreach.cache_sized(params) if params[0].is_cpu else [slice(None)]:
            foreach.mul_(averages[part], momentum)
            _add_(averages[part], grads[part], 1 - group["dampening"])
            _add_(params[part], averages[part], -lr)
        return []
    fused = [
        param
        for param, *others in zip(params, grads, *([averages] if momentum else []), strict=True)
        if _can_be_fused(param, *others)
    ]
    if not fused:
        return [group]
    ids = set(map(id, fused))
    others = [param for param in params if id(param) not in ids]
    return [{**group, "params": fused, "fused": True}, {**group, "params": others}]


def _add_(tensors: list[Tensor], others: list[Tensor], factor: float) -> None:
    """Add multiples of other tensors."""
    if len(tensors) == 1:
        tensors[0].add_(others[0], alpha=factor)
    elif tensors:
        foreach_add_(tensors, others, alpha=factor)


def _can_be_fused(param: Tensor, *others: Tensor) -> bool:
    """Whether the fused kernel takes a parameter, its gradient and average, and rounds alike."""
    return (
        param.numel() % _LANES == 0
        and all(tensor.is_cpu and tensor.is_contiguous() for tensor in (param, *others))
        and _rounds_alike(param.dtype)
    )


@cache
def _rounds_alike(dtype: torch.dtype) -> bool:
    """Whether the fused kernel has the bits of the loop here: that depends on the compiler."""
    x = torch.arange(1, 32 * _LANES + 1, dtype=dtype, device="cpu").view(32, _LANES)
    for dampening, nesterov in ((0.0, True), (0.3, False)):
        settings: dict[str, Any] = {"dampening": dampening, "nesterov": nesterov, "maximize": False}
        settings |= {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": False}
        ends = []
        for fused in (False, True):
            params, grads, averages = (
                list(numbers.unbind()) for numbers in (x.sin(), x.cos(), x.sqrt().sin())
            )
            sgd(params, grads, averages, fused=fused, **settings)  # type: ignore[arg-type]
            ends.append(torch.cat([*params, *averages]))
        if not torch.equal(*ends):
            return False
    return True
