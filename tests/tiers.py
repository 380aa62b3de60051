"""Which cases of a parametrized test only `make test-all` runs: they are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *fast: Any, single: bool = False) -> list[Any]:
    """The values as parameters, all slow but the given ones; by default but the first.

    A tuple holds the values of several arguments, unless `single` says that it is one value.
    """
    values = list(values)
    fast = fast or (values[0],)
    assert all(any(_same(value, other) for value in values) for other in fast), fast
    return [v if any(_same(v, f) for f in fast) else _slow(v, single) for v in values]


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def _slow(value: Any, single: bool) -> Any:
    if isinstance(value, type(pytest.param())):
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.slow])
    values = value if type(value) is tuple and not single else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
