"""The table of laws, and what makes a function of a trial a law: a name for its failures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

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
