"""Gradients as an optimizer finds them: which may be written to, and which belong together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_own(grad: Tensor) -> bool:
    """Whether each element can be written to: not of a conjugate view, nor of an expanded one."""
    return 0 not in grad.stride() and not (grad.is_complex() and grad.is_conj())


def with_own_gradient(params: list[Tensor], seen: set[int]) -> list[Tensor]:
    """The parameters whose gradients have not been seen: some may share one tensor."""
    own = []
    for param in params:
        if id(param.grad) not in seen:
            seen.add(id(param.grad))
            own.append(param)
    return own


def by_device_and_dtype(
    params: list[Tensor], grads: list[Tensor]
) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of lists whose gradients one foreach operator can take together."""
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param, grad in zip(params, grads, strict=True):
        some_params, some_grads = alike.setdefault((grad.device, grad.dtype), ([], []))
        some_params.append(param)
        some_grads.append(grad)
    return alike.values()
