"""What the commands share: the types of their options, and how they refuse."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf
from typing import Any


class Refused(Exception):
    """The command cannot do what was asked for; the message says why."""


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
