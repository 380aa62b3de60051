"""What the commands share: the types of their options, and how they refuse."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf, nan
from typing import Any


class Refused(Exception):
    """The command cannot do what was asked for; the message says why."""


def fraction(text: str) -> float:
    """A number, or the fraction of two, such as 8/255; NaN if that is of 0."""
    top, slash, bottom = text.partition("/")
    return float(top) / ((float(bottom) or nan) if slash else 1.0)


def _number(kind: Callable[[str], float], rule: str, holds: Callable[[float], bool]) -> Any:
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
radius = _number(fraction, ">= 0 and finite", lambda number: 0 <= number < inf)
positive = _number(fraction, "> 0 and finite", lambda number: 0 < number < inf)
