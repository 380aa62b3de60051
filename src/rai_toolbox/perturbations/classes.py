"""Checks of the classes that data have, and of the logits that a model gives for them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_logits", "check_target", "extent"]


def check_target(target: Tensor, data: Tensor) -> None:
    """Raise unless there is an integer for each datum."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"`target` must hold classes, which are integers, got {target.dtype}")
    if target.shape != data.shape[:1]:
        raise ValueError(
            f"`target` must have one class for each datum, shape {tuple(data.shape[:1])}, got "
            f"shape {tuple(target.shape)}"
        )


def extent(target: Tensor) -> tuple[int, int]:
    """The lowest and the highest class; waits for the device."""
    return (int(target.min()), int(target.max())) if len(target) else (0, 0)


def check_logits(logits: object, number: int, classes: tuple[int, int]) -> None:
    """Raise unless these are the logits of so many data, with all classes of this extent."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != number:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` must give logits of shape ({number}, K), a row for each datum, got {found}"
        )
    lowest, highest = classes
    if lowest < 0 or highest >= logits.shape[1]:
        raise ValueError(
            f"`target` must hold classes from 0 to {logits.shape[1] - 1}, got "
            f"{lowest if lowest < 0 else highest}"
        )
