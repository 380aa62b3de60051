"""How operators in place get on with autograd, for which a step may have to be differentiable."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy where autograd will keep what is read of it and `x` is to be written to."""
    return x.clone() if torch.is_grad_enabled() and x.requires_grad else x


def below_autograd() -> AbstractContextManager[object]:
    """Spare writes in place the dispatch to autograd, where nothing is to be differentiated.

    It costs a third of an operator on a small tensor, also under `no_grad`. Tensors written to
    stay normal tensors, and their version counters still count.
    """
    return nullcontext() if torch.is_grad_enabled() else torch.inference_mode()


def with_value(value: Tensor, derived: Tensor) -> Tensor:
    """The bits of `value`, with the derivative of `derived`."""
    if not derived.requires_grad:
        return value
    result = derived.clone()
    with torch.no_grad():
        return result.copy_(value)
