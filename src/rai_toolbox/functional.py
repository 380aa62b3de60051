"""Higher-order functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def negate(fn: Callable[..., _T]) -> Callable[..., _T]:
    """Return the function that evaluates `fn` and flips the sign of its result.

    ``negate(f)(x) = -f(x)``: a loss to minimize becomes an objective to maximize, and vice versa.

    Parameters
    ----------
    fn : Callable[..., T]
        Any callable whose result has a unary minus: a function, a partial, an
        `nn.Module`, ... Its name, docstring and signature are kept.

    Returns
    -------
    Callable[..., T]
        Takes the arguments of `fn` and returns `-fn(*args, **kwargs)`.

    Raises
    ------
    TypeError
        `fn` is not callable.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import negate
    >>> negate(torch.sum)(torch.tensor([1.0, 2.0]))
    tensor(-3.)
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable, got {fn!r}")

    # `updated=()`: no copy of a module's `__dict__`, which would not follow its changes.
    @functools.wraps(fn, updated=())
    def negated(*args: Any, **kwargs: Any) -> _T:
        return -fn(*args, **kwargs)  # type: ignore[operator]

    return negated
