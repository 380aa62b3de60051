"""Small functions that make functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["negate"]

_T = TypeVar("_T")


def negate(fn: Callable[..., _T]) -> Callable[..., _T]:
    """Return the function that evaluates `fn` and flips the sign of its result.

    ``negate(f)(x) = -f(x)``: a loss to be minimized becomes an objective to be maximized, and
    the other way round.

    Parameters
    ----------
    fn : Callable[..., T]
        Any callable whose result has a unary minus: a function, a partial, an
        `nn.Module`, ... Its name, docstring and signature are kept.

    Returns
    -------
    Callable[..., T]
        Takes the arguments of `fn`; gives `-fn(*args, **kwargs)`, of the same shape.

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

    # `updated=()`: a copy of a module's `__dict__` (its parameters, its mode) would go stale.
    @functools.wraps(fn, updated=())
    def negated(*args: Any, **kwargs: Any) -> _T:
        return -fn(*args, **kwargs)  # type: ignore[operator, no-any-return]

    return negated
