"""Which cases of a parametrized test only `make test-all` runs: they are marked slow."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values as parameters, all slow but the given ones; by default but the first."""
    values = list(values)
    fast = fast or (values[0],)
    assert all(any(_same(value, other) for value in values) for other in fast), fast
    return [_slow(v) if not any(_same(v, f) for f in fast) else v for v in values]


def first_of_each(values: Iterable[Any], kind: Callable[[Any], Any]) -> list[Any]:
    """The values as parameters, all slow but the first one of each kind."""
    kinds = set()
    found = []
    for value in values:
        found.append(_slow(value) if kind(value) in kinds else value)
        kinds.add(kind(value))
    return found


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _slow(value: Any) -> Any:
    if isinstance(value, type(pytest.param())):
        return pytest.param(*value.values, id=value.id, marks=(*value.marks, pytest.mark.slow))
    values = value if isinstance(value, tuple) and type(value) is tuple else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
