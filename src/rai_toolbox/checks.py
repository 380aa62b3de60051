"""Checks of settings. Each error names the argument, the rule and the value."""

from __future__ import annotations

from math import inf, isinf, isnan
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def as_plain(value: Any) -> Any:
    """Convert a number of another library to Python's own: checkpoints hold only plain data."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    if isinstance(value, Integral) and abs(int(value)) < 2**63:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return value  # for its check to refuse


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


def check_non_negative(name: str, value: object) -> None:
    """Raise unless `value` is a number >= 0."""
    if check_number(name, value) < 0:
        raise ValueError(f"`{name}` must be >= 0, got {value!r}")


def check_positive(name: str, value: object) -> float:
    """Return `value` if it is a finite number > 0."""
    number = check_finite(name, value)
    if number == 0:
        raise ValueError(f"`{name}` must be > 0, got {value!r}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be >= {least}, got {value}")


def check_bounds(lower_name: str, lower: object, upper_name: str, upper: object) -> None:
    """Raise unless at least one bound is given, and the lower one is <= the upper one."""
    if lower is None and upper is None:
        raise ValueError(
            f"`{lower_name}` or `{upper_name}` must be given, got {lower_name}=None and "
            f"{upper_name}=None"
        )
    low = -inf if lower is None else check_number(lower_name, lower)
    high = inf if upper is None else check_number(upper_name, upper)
    if low > high:
        raise ValueError(
            f"`{lower_name}` must be <= `{upper_name}`, got {lower_name}={lower!r} and "
            f"{upper_name}={upper!r}"
        )


def check_setting(name: str, value: object, least: float = -inf, finite: bool = True) -> None:
    """Raise unless `value` is a number or a real tensor, not NaN, >= `least`, and finite if asked.

    Reads the values of a tensor, which synchronizes with the host; settings are checked once, when
    they are created.
    """
    if not isinstance(value, Tensor):
        number = check_number(name, value)
        if number < least:
            raise ValueError(f"`{name}` must be >= {least:g}, got {value!r}")
        if finite and isinf(number):
            raise ValueError(f"`{name}` must be finite, got {value!r}")
        return
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold real numbers, got a tensor of {value.dtype}")
    _check_all(name, value, ~value.isnan(), "not be NaN")
    _check_all(name, value, value >= least, f"be >= {least:g}")
    if finite:
        _check_all(name, value, value.isfinite(), "be finite")


def check_order(lower_name: str, lower: object, upper_name: str, upper: object) -> None:
    """Raise unless lower <= upper, elementwise; each a number, a tensor, or None for no bound."""
    if lower is None or upper is None:
        return
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor):
        check_bounds(lower_name, lower, upper_name, upper)
        return
    low, high = torch.as_tensor(lower), torch.as_tensor(upper)
    try:
        valid = low <= high
    except RuntimeError:
        raise ValueError(
            f"`{lower_name}` and `{upper_name}` must broadcast against each other, got shapes "
            f"{tuple(low.shape)} and {tuple(high.shape)}"
        ) from None
    if not bool(valid.all()):
        at = _first_invalid(valid)
        found = [bound.expand(valid.shape)[at].item() for bound in (low, high)]
        raise ValueError(
            f"`{lower_name}` must be <= `{upper_name}`, got {lower_name}={found[0]!r} and "
            f"{upper_name}={found[1]!r} at {at}"
        )


def _check_all(name: str, value: Tensor, valid: Tensor, rule: str) -> None:
    if not bool(valid.all()):
        at = _first_invalid(valid)
        raise ValueError(f"`{name}` must {rule}, got {value[at].item()!r} at {at}")


def _first_invalid(valid: Tensor) -> tuple[int, ...]:
    return tuple((~valid).nonzero()[0].tolist())
