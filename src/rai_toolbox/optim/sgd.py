"""Plain SGD, stepped in fewer passes to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.sgd import sgd

from rai_toolbox import foreach
from rai_toolbox._torch import (
    dispatch_modes_active,
    forward_ad_level,
    function_transforms_active,
    plain_step,
)
from rai_toolbox.constraints.kernels.blocks import are_apart

_LANES = 8  # numbers that the fused kernel updates at once; it rounds those left over otherwise
SMALL = 2**15  # elements of a tensor up to which a call costs more than its arithmetic
_EXACT = ({torch.float32}, {torch.float64})  # in which operators on lists round as single ones
_SETTINGS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_LARGEST = torch.finfo(torch.float32).max  # torch refuses larger settings, but not the fused kernel
_REAL = {float, int}
_SCALING = {"grad_scale", "found_inf"}  # what a GradScaler sets on optimizers that read it

_STEPS: dict[type, Callable[..., object]] = {
    kind: plain_step(kind.step) for kind in (SGD, Adam, AdamW)
}


def can_step(inner: Optimizer, step: Callable[..., object]) -> bool:
    """Whether another function may replace a step: that of the class itself, of plain values."""
    return (
        not torch.compiler.is_compiling()  # a compiler fuses on its own
        and step is _STEPS.get(type(inner))
        and step.__module__.startswith("torch.optim.")  # else somebody has replaced it
        and not torch.is_grad_enabled()
        and not function_transforms_active()
        and forward_ad_level() < 0
        and _SCALING.isdisjoint(inner.__dict__)
    )


def step_sgd(inner: SGD) -> None:
    """What the step of `inner` does, with the same bits and no temporaries, but faster on CPU.

    Torch's own choice is a loop in Python of up to five operators per tensor. It leaves
    `fused=True`, a single pass over the memory, to the user, because that may round otherwise.
    """
    for group in inner.param_groups:
        rest = _left_over(group, inner.state)
        if rest:
            stand_in = SGD.__new__(SGD)  # others may read the groups of `inner` meanwhile
            stand_in.__dict__ = {**inner.__dict__, "param_groups": rest}
            _STEPS[SGD](stand_in)


def step_of_one(inner: SGD, param: Tensor) -> Callable[[Tensor], object]:
    """`step_sgd` for the only parameter, a plain one on the CPU, by its gradient.

    It serves as long as the settings, except for `lr`, stay what they are, and `can_step`.
    """
    (group,) = inner.param_groups
    momentum, dampening = group["momentum"], group["dampening"]
    is_short = not (group["weight_decay"] or group["nesterov"] or group["maximize"])
    if not (is_short and _is_usual(group)) or (momentum and param.numel() > SMALL):
        return lambda grad: step_sgd(inner)
    share = 1 - dampening

    def step(grad: Tensor) -> None:  # as torch's own loop
        if momentum:
            average = inner.state.get(param, {}).get("momentum_buffer")
            if average is None:
                step_sgd(inner)
                return
            grad = average.mul_(momentum).add_(grad, alpha=share)
        param.add_(grad, alpha=-group["lr"])

    return step


def _is_usual(group: Mapping[str, Any]) -> bool:
    """Whether numbers are numbers, and nobody has chosen how to step."""
    return (
        group["foreach"] is None
        and group["fused"] is None
        and group["differentiable"] is False
        and type(group["lr"]) is float
        and {type(group[name]) for name in ("momentum", "dampening", "weight_decay")} <= _REAL
        and type(group["nesterov"]) is type(group["maximize"]) is bool
    )


def _left_over(group: dict[str, Any], state: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """Step what can be stepped faster; the rest of the group, if any."""
    lr, momentum, dampening = group["lr"], group["momentum"], group["dampening"]
    decay, nesterov, maximize = group["weight_decay"], group["nesterov"], group["maximize"]
    if not _is_usual(group):
        return [group]
    params, grads = foreach.with_gradients(group["params"])
    if not foreach.are_plain([*params, *grads]) or any(map(Tensor.is_neg, [*params, *grads])):
        return [group]
    is_short = not (decay or nesterov or maximize)
    if is_short and not momentum:
        foreach.add_multiples_(params, grads, -lr)
        return []
    averages: list[Any] = []
    if momentum:
        averages = [state.get(param, {}).get("momentum_buffer") for param in params]
    if not _can_go_together(params, grads, averages):
        return [group]
    is_short = is_short and max(map(Tensor.numel, params)) <= SMALL
    several = len(params) > 1
    if (several or not is_short) and not are_apart([*params, *grads, *averages]):
        return [group]
    if is_short:
        # (on CPU each tensor is to be in cache for the next operator)
        for part in foreach.cache_sized(params) if several and params[0].is_cpu else [slice(None)]:
            foreach.mul_(averages[part], momentum)
            foreach.add_multiples_(averages[part], grads[part], 1 - dampening)
            foreach.add_multiples_(params[part], averages[part], -lr)
        return []
    if not all(abs(number) <= _LARGEST for number in (lr, momentum, dampening, decay)):
        return [group]
    rows = list(zip(params, grads, averages or [None] * len(params), strict=True))
    fused = [_can_be_fused(row) for row in rows]
    if any(fused):
        some: Any = [row for row, is_fused in zip(rows, fused, strict=True) if is_fused]
        settings: Any = {name: group[name] for name in _SETTINGS}
        changed, read, kept = map(list, zip(*some, strict=True))
        sgd(changed, read, kept, fused=True, foreach=False, **settings)
        increment_version([*changed, *kept] if momentum else changed)
    rest = [row[0] for row, is_fused in zip(rows, fused, strict=True) if not is_fused]
    return [{**group, "params": rest}] if rest else []


def _can_go_together(params: list[Tensor], grads: list[Any], averages: list[Any]) -> bool:
    """Whether operators on lists take all tensors, and round as those on single ones."""
    if not foreach.are_plain(averages) or any(map(Tensor.is_neg, averages)):
        return False
    tensors, shapes = [*params, *grads, *averages], [x.shape for x in params]
    return (
        {x.dtype for x in tensors} in _EXACT
        and {x.layout for x in grads} == {torch.strided}
        and shapes == [x.shape for x in grads]
        and (not averages or shapes == [x.shape for x in averages])
    )


def _can_be_fused(row: tuple[Any, ...]) -> bool:
    """Whether the fused kernel takes a parameter, its gradient and average, and rounds alike."""
    param = row[0]
    return (
        param.numel() % _LANES == 0
        and all(x is None or (x.is_cpu and x.is_contiguous() and not x.is_inference()) for x in row)
        and _rounds_alike(param.dtype)
    )


_FOUND: dict[torch.dtype, bool] = {}


def _rounds_alike(dtype: torch.dtype) -> bool:
    """Whether the fused kernel has the bits of the loop here: that depends on the compiler."""
    if dtype not in _FOUND:
        if dispatch_modes_active():  # which would see the trial
            return False
        _FOUND[dtype] = _trial(dtype)
    return _FOUND[dtype]


def _trial(dtype: torch.dtype) -> bool:
    x = torch.arange(1, 32 * _LANES + 1, dtype=dtype, device="cpu")
    sizes = [_LANES] * 24 + [8 * _LANES]  # (one that a loop takes in vectors)
    for dampening, nesterov in ((0.0, True), (0.3, False)):
        settings: dict[str, Any] = {"dampening": dampening, "nesterov": nesterov, "maximize": False}
        settings |= {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": False}
        ends = []
        for fused in (False, True):
            numbers = (x.sin(), x.cos(), x.sqrt().sin())
            params, grads, averages = (list(each.split(sizes)) for each in numbers)
            sgd(params, grads, averages, fused=fused, **settings)
            ends.append(torch.cat([*params, *averages]))
        if not torch.equal(*ends):
            return False
    return True
