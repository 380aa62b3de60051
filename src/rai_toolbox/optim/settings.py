"""Checks of the settings of a parameter group. Each error names the argument, rule and value."""

from __future__ import annotations

from collections.abc import Mapping
from math import isinf, isnan
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
"""Default of every `div_by_zero_eps`."""


class REQUIRED:
    """Default of a setting that has none: the constructor or each group must give it.

    The class itself is the marker: it stays one object through pickle and deepcopy.
    """


def check_number(name: str, value: object) -> float:
    """Return `value` if it is a real number other than NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"`{name}` must not exceed the range of a float, got {value!r}") from None
    if isnan(number):
        raise ValueError(f"`{name}` must not be NaN, got {value!r}")
    return number


def check_finite(name: str, value: object) -> float:
    """Return `value` if it is a finite number >= 0."""
    check_non_negative(name, value)
    number = check_number(name, value)
    if isinf(number):
        raise ValueError(f"`{name}` must be finite, got {value!r}")
    return number


def as_plain(value: Any) -> Any:
    """A number of another library as Python's own: checkpoints hold plain data and tensors only."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    if isinstance(value, Integral) and abs(int(value)) < 2**63:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return value  # for its check to refuse


def check_non_negative(name: str, value: object) -> None:
    """Raise unless `value` is a number >= 0."""
    if check_number(name, value) < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value!r}")


def check_bounds(lower_name: str, lower: object, upper_name: str, upper: object) -> None:
    """Raise unless at least one bound is given, and the lower one is <= the upper one."""
    if lower is None and upper is None:
        raise ValueError(
            f"`{lower_name}` or `{upper_name}` must be given, got {lower_name}=None and "
            f"{upper_name}=None"
        )
    low = -torch.inf if lower is None else check_number(lower_name, lower)
    high = torch.inf if upper is None else check_number(upper_name, upper)
    if low > high:
        raise ValueError(
            f"`{lower_name}` must be <= `{upper_name}`, got {lower_name}={lower!r} and "
            f"{upper_name}={upper!r}"
        )


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
