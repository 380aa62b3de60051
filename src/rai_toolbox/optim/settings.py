"""Settings of a parameter group, and how errors call its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""Default of every `div_by_zero_eps`."""


class REQUIRED:
    """Default of a setting that has none: the constructor or each group must give it.

    The class itself is the marker: it stays one object through pickle and deepcopy.
    """


def labels(group: Mapping[str, Any]) -> list[str]:
    """How errors call the parameters of a group: by their names, where they have any."""
    return [
        f"parameter '{name}'" if name is not None else f"parameter {i} of its group"
        for i, name in enumerate(group.get("param_names") or [None] * len(group["params"]))
    ]


def is_zero_on_host(value: object) -> bool:
    """Whether a setting is 0, as far as that can be told without waiting for a device."""
    if isinstance(value, Tensor):
        return value.device.type == "cpu" and value.item() == 0
    return value is not None and value == 0


def refuse_complex(group: Mapping[str, Any], names: str) -> None:
    """Raise if a group for whose settings `names` order matters has a complex parameter."""
    for param, label in zip(group["params"], labels(group), strict=True):
        if param.is_complex():
            raise TypeError(f"{names} must bound real numbers, got {param.dtype} for {label}")
