"""What a command declares: its texts, its options as data, and the function that runs it."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any, NamedTuple


class Refused(Exception):
    """The command cannot do what was asked for; the message says why."""


class Command(NamedTuple):
    """`options` maps each flag to the keyword arguments of `ArgumentParser.add_argument`.

    `run` returns the exit status.
    """

    run: Callable[[Namespace], int]
    help: str
    description: str
    options: dict[str, dict[str, Any]]
    epilog: str | None = None


def _number(kind: type[int] | type[float], rule: str, holds: Callable[[float], bool]) -> Any:
    """A type for argparse: numbers for which `holds` is true."""

    def parse(text: str) -> float:
        value = kind(text)
        if not holds(value):
            raise ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it if `text` is not a number
    return parse


count = _number(int, ">= 1", lambda number: number >= 1)
seed = _number(int, "in [0, 2**63)", lambda number: 0 <= number < 2**63)
radius = _number(float, ">= 0 and finite", lambda number: 0 <= number < inf)
positive = _number(float, "> 0 and finite", lambda number: 0 < number < inf)


def option(text: str, type: Any = str, default: Any = None, **settings: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument`, whose help states the default, if there is one."""
    if default is not None and "(default" not in text:
        text += " (default: %(default)s)"
    return {"help": text, "type": type, "default": default, **settings}


OUT = option("folder of the results", Path, Path("out"))
