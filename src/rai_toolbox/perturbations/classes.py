"""Checks of the classes that data have, and of the logits that a model gives for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_classes", "check_logits", "check_target", "extent", "is_no_index"]


def as_classes(target: Any, data: Tensor) -> Tensor:
    """A copy of the class of each datum, in the dtype that indices have."""
    classes: Tensor = torch.as_tensor(target, device=data.device)
    check_target(classes, data)
    return classes.detach().clone().long()


def check_target(target: Tensor, data: Tensor) -> None:
    """Raise unless there is an integer for each datum."""
    if is_no_index(target):
        raise TypeError(f"`target` must hold classes, which are integers, got {target.dtype}")
    if target.shape != data.shape[:1]:
        raise ValueError(
            f"`target` must have one class for each datum, shape {tuple(data.shape[:1])}, got "
            f"shape {tuple(target.shape)}"
        )


def is_no_index(classes: Tensor) -> bool:
    """Whether a tensor holds something else than integers."""
    return classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool


def extent(target: Tensor) -> tuple[int, int]:
    """The lowest and the highest class; waits for the device."""
    wide = target.long()  # torch has no minimum of uint16
    return (int(wide.min()), int(wide.max())) if wide.numel() else (0, 0)


def check_logits(logits: object, number: int, classes: tuple[int, int], of: str = "target") -> None:
    """Raise unless these are the logits of so many data, with all classes of this extent."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != number:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"`model` must give logits of shape ({number}, K), a row for each datum, got {found}"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            "`model` must give logits of two classes at least (of two, also where one number "
            f"would do), got shape {tuple(logits.shape)}"
        )
    lowest, highest = classes
    if lowest < 0 or highest >= logits.shape[1]:
        raise ValueError(
            f"`{of}` must hold classes from 0 to {logits.shape[1] - 1}, got "
            f"{lowest if lowest < 0 else highest}"
        )
