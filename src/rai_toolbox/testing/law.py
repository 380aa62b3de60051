"""What makes a function of a trial a law: a name, under which its failures are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from rai_toolbox.testing.trial import Trial

Law = Callable[[Trial], None]


def law(check: Law) -> Law:
    """A law from a function that raises where a set breaks it, whatever it raises."""

    @wraps(check)
    def named(trial: Trial) -> None:
        try:
            check(trial)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error} ({trial})") from None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{check.__name__}: {kind}: {error} ({trial})") from error

    return named
