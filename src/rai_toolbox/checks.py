"""Checks of settings. Each error names the argument, the rule and the value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import inf, isinf, isnan
from numbers import Integral, Real
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


def wrong(name: str, rule: str, got: object, kind: type[Exception] = ValueError) -> Exception:
    """The error of an argument that breaks a rule: "`name` must rule, got ...".

    A text in `got` is no value, and goes without quotes.
    """
    return kind(f"`{name}` must {rule}, got {got if isinstance(got, str) else repr(got)}")


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


def check_number(
    name: str, value: object, least: float = -inf, finite: bool = False, kind: str = "a number"
) -> float:
    """Return `value` if it is a real number, not NaN, >= `least`, and finite if asked."""
    if type(value) is float and least <= value < inf:  # the usual case, fast
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be {kind}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"`{name}` must not exceed the range of a float, got {value!r}") from None
    if isnan(number):
        raise ValueError(f"`{name}` must not be NaN, got {value!r}")
    if number < least:
        raise ValueError(f"`{name}` must be >= {least:g}, got {value!r}")
    if finite and isinf(number):
        raise ValueError(f"`{name}` must be finite, got {value!r}")
    return number


def check_finite(name: str, value: object) -> float:
    """Return `value` if it is a finite number >= 0."""
    return check_number(name, value, 0, finite=True)


def check_non_negative(name: str, value: object) -> float:
    """Return `value` if it is a number >= 0."""
    return check_number(name, value, 0)


def check_positive(name: str, value: object) -> float:
    """Return `value` if it is a finite number > 0."""
    number = check_finite(name, value)
    if number == 0:
        raise ValueError(f"`{name}` must be > 0, got {value!r}")
    return number


def check_type(name: str, value: object, kind: Any, rule: str) -> None:
    """Raise that `name` must `rule` unless `value` is an instance of `kind`, a type or several."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must {rule}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    check_type(name, value, bool, "be True or False")


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


def check_setting(name: str, value: object, least: float = -inf, finite: bool = True) -> None:
    """Raise unless `value` is a number or a real tensor, not NaN, >= `least`, and finite if asked.

    Reads the values of a tensor, which synchronizes with the host; settings are checked once, when
    they are created.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, least, finite, "a number or a tensor")
        return
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold real numbers, got a tensor of {value.dtype}")
    for valid, rule in (
        (~value.isnan(), "not be NaN"),
        (value >= least, f"be >= {least:g}"),
        (value.isfinite() | (not finite), "be finite"),
    ):
        if not bool(valid.all()):
            at = _first_invalid(valid)
            raise wrong(name, rule, f"{value[at].item()!r} at {at}")


def check_order(lower_name: str, lower: Any, upper_name: str, upper: Any) -> None:
    """Raise unless lower <= upper, elementwise; each a number, a tensor, or None for no bound."""
    if lower is None or upper is None:
        return
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and lower <= upper:
        return
    try:
        valid = torch.as_tensor(lower <= upper)
    except RuntimeError:
        shapes = " and ".join(str(tuple(torch.as_tensor(x).shape)) for x in (lower, upper))
        names = f"{lower_name}` and `{upper_name}"
        raise wrong(names, "broadcast against each other", f"shapes {shapes}") from None
    if not bool(valid.all()):
        at = _first_invalid(valid)
        low, high = (
            bound.expand(valid.shape)[at].item() if isinstance(bound, Tensor) else bound
            for bound in (lower, upper)
        )
        where = f" at {at}" if at else ""
        got = f"{lower_name}={low!r} and {upper_name}={high!r}{where}"
        raise wrong(lower_name, f"be <= `{upper_name}`", got)


def _first_invalid(valid: Tensor) -> tuple[int, ...]:
    return tuple((~valid).nonzero()[0].tolist())


def parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable, by name.

    Those of classes and functions are kept: to read them takes as long as an attack's step.
    """
    if not isinstance(call, (type, FunctionType)):  # others may change, or have no hash
        return inspect.signature(call).parameters
    parameters = _PARAMETERS.get(call)
    if parameters is None:
        parameters = _PARAMETERS[call] = inspect.signature(call).parameters
    return parameters


_PARAMETERS: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()
