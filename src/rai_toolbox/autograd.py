"""Keeping in-place operators differentiable, for differentiable steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy of it if autograd will keep what is computed from `x` before a write to it."""
    return x.clone() if torch.is_grad_enabled() and x.requires_grad else x


def below_autograd() -> AbstractContextManager[object]:
    """A context in which in-place writes skip the dispatch to autograd, if grad mode is off.

    The dispatch costs a third of an operator on a small tensor, also under `no_grad`. Tensors
    written to stay normal tensors, and their version counters still count.
    """
    return nullcontext() if torch.is_grad_enabled() else torch.inference_mode()


def with_value(value: Tensor, derived: Tensor) -> Tensor:
    """The bits of `value`, with the derivative of `derived`."""
    if not torch.is_grad_enabled():
        return value
    return _WithValue.apply(value, derived)  # type: ignore[no-untyped-call]


class _WithValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, derived: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, of_value: Tensor, of_derived: Tensor) -> Tensor:
        return of_derived.clone()
