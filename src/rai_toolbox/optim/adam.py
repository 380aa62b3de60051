"""Plain Adam and AdamW, stepped in fewer calls to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from rai_toolbox._torch import foreach_add_, foreach_addcmul_, foreach_lerp_, foreach_mul_
from rai_toolbox.constraints.kernels.blocks import are_apart, one_like
from rai_toolbox.foreach import are_plain, cache_sized, with_gradients
from rai_toolbox.optim.sgd import SMALL

_PART = 2**16  # elements that stay in cache from one operator to the next
_UNUSUAL = ("capturable", "differentiable", "amsgrad", "maximize")


def step_adam(inner: Optimizer, step: Callable[..., object]) -> None:
    """What the `step` of Adam itself does, with the same operators, but on CPU in fewer calls.

    Torch has a loop there, and leaves `foreach=True`, which copies all gradients, to the user.
    """
    for group in inner.param_groups:
        decoupled = group.get("decoupled_weight_decay", type(inner) is AdamW)  # (before torch 2.7)
        has_short_step = not group["weight_decay"] or decoupled
        if not (has_short_step and _step_together_(group, inner.state)):
            stand_in = type(inner).__new__(type(inner))  # others may read the groups meanwhile
            stand_in.__dict__ = {**inner.__dict__, "param_groups": [group]}
            step(stand_in)


def _step_together_(group: dict[str, Any], state: Mapping[Tensor, Any]) -> bool:
    """Step a group, if operators on lists take all its tensors, and round as those on single ones.

    In particular, no update may change what a later one reads.
    """
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    params, grads = with_gradients(group["params"])
    states: list[Any] = [state.get(param) for param in params]
    is_usual = (
        not any(group[name] for name in _UNUSUAL)
        and group["foreach"] is None
        and group["fused"] is None
        and type(lr) is type(beta1) is type(beta2) is float
        and len(params) > 1
        and max(map(Tensor.numel, params)) <= SMALL
        and all(states)
    )
    if not is_usual:
        return False
    steps, averages, squares = (
        list(map(itemgetter(name), states)) for name in ("step", "exp_avg", "exp_avg_sq")
    )
    tensors = [*params, *grads, *averages, *squares]
    can_go_together = (
        are_plain([*tensors, *steps])
        and set(map(attrgetter("layout"), tensors)) == {torch.strided}
        and set(map(attrgetter("dtype"), tensors)) == {torch.float32}
        and len(set(map(attrgetter("dtype"), steps))) == 1
        and all(map(attrgetter("is_cpu"), [*tensors, *steps]))
        and not any(map(Tensor.is_neg, tensors))
        and are_apart([*tensors, *steps])
    )
    if not can_go_together:
        return False
    for part in cache_sized(params, _PART, _PART):
        xs, gs, counts = params[part], grads[part], steps[part]
        foreach_add_(counts, one_like(counts[0]), alpha=1)  # (a number is made a tensor each time)
        if decay != 0:
            foreach_mul_(xs, 1 - lr * decay)
        foreach_lerp_(averages[part], gs, 1 - beta1)
        foreach_mul_(squares[part], beta2)
        foreach_addcmul_(squares[part], gs, gs, value=1 - beta2)
        rows = zip(xs, averages[part], squares[part], map(Tensor.item, counts), strict=True)
        for x, average, square, count in rows:  # (lists of temporaries would take memory)
            # (how torch computes this root depends on its version, in the last digit of float64)
            divisor = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
            x.addcdiv_(average, divisor, value=-lr / (1 - beta1**count))
    return True
