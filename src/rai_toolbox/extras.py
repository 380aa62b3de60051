"""Packages that make some things possible or pleasant, and that not every user has installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

__all__ = ["Bar", "MissingExtra", "progress", "require"]


class MissingExtra(Exception):
    """A package is needed that comes with an extra of this one; the message names both."""


def require(module: str, extra: str) -> Any:
    """Import `module`, or say which `extra` brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module.partition('.')[0]} cannot be imported ({error}): "
            f'pip install "rai-toolbox[{extra}]"'
        ) from error


class Bar(Protocol):
    """What the work reports to."""

    def update(self, n: float = 1) -> object:
        """`n` more units are done."""


class _Silent:
    def update(self, n: float = 1) -> None:
        pass


@contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Bar]:
    """A progress bar on stderr if tqdm is there, else one line that says what is being done.

    A total of 0 stands for one that is not known.
    """
    if not shown:
        yield _Silent()
        return
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stderr.write(f"{title} ...\n")
        yield _Silent()
        return
    # in a log, where a bar cannot move, a line now and then is enough
    often = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=total or None, desc=title, mininterval=often, file=sys.stderr) as bar:
        yield bar
