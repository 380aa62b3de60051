"""Settings of a parameter group, and how errors call its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints.constraint import Constraint

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


def as_saved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A group as a checkpoint holds it: each constraint as plain data."""
    return {
        name: value.to_plain() if isinstance(value, Constraint) else value
        for name, value in settings.items()
    }


def as_loaded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a checkpoint as it is used: the constraint that each plain one was."""
    return {
        name: Constraint.from_plain(value)
        if isinstance(value, Mapping) and "set" in value
        else value
        for name, value in settings.items()
    }


def check_constraint(constraint: object) -> None:
    """Raise unless it is a constraint, or None, which is none."""
    if constraint is not None and not isinstance(constraint, Constraint):
        raise TypeError(
            f"`constraint` must be a set of rai_toolbox.constraints or None, got {constraint!r}"
        )
