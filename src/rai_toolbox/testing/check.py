"""The table of laws, and one call that checks a set against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import product

import torch

from rai_toolbox.constraints import Constraint
from rai_toolbox.testing.trial import Trial

Law = Callable[[Trial], None]

LAWS: dict[str, Law] = {}
"""Each law by its name; it takes a `Trial`, and raises AssertionError where a set breaks it."""


def law(check: Law) -> Law:
    """Make a law of a function that raises where a set breaks it, whatever it raises."""

    @wraps(check)
    def named(trial: Trial) -> None:
        try:
            check(trial)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error} ({trial})") from None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{check.__name__}: {kind}: {error} ({trial})") from error

    LAWS[check.__name__] = named
    return named


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_constraint(
    constraint: Constraint,
    shape: Sequence[int] = (32, 6),
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    scales: Iterable[float] = (1.0,),
    laws: Iterable[str] | None = None,
    seed: int = 0,
    tolerance: float = 0.0,
    reach: float = 10.0,
) -> None:
    """Check that a set satisfies the laws (`LAWS`), on random points and on special cases.

    Parameters
    ----------
    constraint : Constraint
        The set.
    shape : sequence of int
        A shape ``(N, ...)`` of batches that the set takes.
    dtypes : iterable of torch.dtype
        Of the batches.
    scales : iterable of float
        Magnitudes of the entries of points of the set. Tolerances are relative to them.
    laws : iterable of str, optional
        Names of `LAWS`. By default all but ``"compiled"``, which takes a second per dtype, and
        which fails for a set that reads values on the host.
    seed : int
        Of the random points.
    tolerance : float
        The relative accuracy of a set that iterates; 0 for rounding errors only.
    reach : float
        Points are tried with magnitudes from `1 / reach` to `reach` times those of the set. The
        default covers common data; the sets of this library satisfy the laws with 1e20, too.

    Raises
    ------
    AssertionError
        If a law is broken. It names the law, the worst row, the set, and what it was tried with:
        dtype, scale, shape, `reach` and `tolerance`.
    ValueError
        If a law has no such name.

    Examples
    --------
    >>> from rai_toolbox.constraints import Box
    >>> from rai_toolbox.testing import check_constraint
    >>> check_constraint(Box(-1.0, 1.0), shape=(16, 5))
    """
    names = [name for name in LAWS if name != "compiled"] if laws is None else list(laws)
    for name in names:
        if name not in LAWS:
            raise ValueError(f"`laws` must be names of {sorted(LAWS)}, got {name!r}")
    for dtype, scale in product(dtypes, scales):
        trial = Trial(constraint, tuple(shape), dtype, scale, seed, tolerance, reach)
        for name in names:
            LAWS[name](trial)
