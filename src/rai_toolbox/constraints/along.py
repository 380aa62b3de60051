"""Sets of what lies along any dims of a batch, such as its columns: methods act on rows."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.batch import view_or_copy
from rai_toolbox.checks import wrong


def as_dims(dim: object) -> tuple[int, ...] | None:
    """Return the setting `dim`, an int or a tuple of them, as a tuple; or None."""
    dims = dim if isinstance(dim, tuple) else (dim,)
    if dim is not None and not all(type(d) is int for d in dims):
        raise wrong("dim", "be an int, a tuple of them or None", dim, TypeError)
    return None if dim is None else dims


def dims_in(dims: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The same dims of a batch of `ndim` dims, counted from 0."""
    if any(not -ndim <= dim < ndim for dim in dims):
        raise wrong("dim", f"be in [{-ndim}, {ndim - 1}]", dims)
    positive = tuple(dim % ndim for dim in dims)
    if not dims or len(set(positive)) < len(dims):
        raise wrong("dim", "name one dim or more, each once", dims)
    return positive


def on_rows(method: Any, constraint: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Let a method of a set act on what lies along some dims of x, as rows.

    A set has `_check_batch(x)`, `coupled_dims(ndim)` and `_map(change)`, see `Constraint`.
    """
    constraint._check_batch(x)
    dims, name = constraint.coupled_dims(x.ndim), method.__name__
    end = tuple(range(-len(dims), 0))
    whole = x if name == "project_" else x.detach().clone() if name == "lmo" else x.detach()
    moved = whole.movedim(dims, end)
    kept = moved.shape[: -len(dims)]
    rows, copied = view_or_copy(moved, (prod(kept), prod(moved.shape[-len(dims) :])))
    if torch.is_grad_enabled():
        rows, copied = rows.clone(), True

    def of_rows(_: str, setting: Tensor) -> Tensor:
        aligned = setting.expand(*(1,) * (x.ndim - setting.ndim), *setting.shape).movedim(dims, end)
        size = 1 if prod(aligned.shape[-len(dims) :]) == 1 else rows.shape[1]
        shape = moved.shape if size > 1 else (*kept, *(1,) * len(dims))
        return aligned.expand(shape).reshape(len(rows), size)

    found: Tensor = method(constraint._of_rows(of_rows), rows, *args, **kwargs)
    if name == "violation":
        return found.view(kept)
    if copied or found is not rows:  # (torch refuses to copy between other strides of the same)
        moved.copy_(found.view(moved.shape))
    return whole if name == "lmo" else x
