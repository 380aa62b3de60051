"""Optional packages: import errors that name the extra to install, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class MissingExtra(Exception):
    """A package is missing; the message names it and the extra that installs it."""


def require(module: str, extra: str) -> Any:
    """Import `module`, or raise an error that names the `extra` that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module.partition('.')[0]} cannot be imported ({error}): "
            f'pip install "rai-constrained[{extra}]"'
        ) from error


class Bar:
    """A progress bar; this one shows nothing. The bars of tqdm have the same methods."""

    def update(self, n: float = 1) -> object:
        """Count `n` more units as done."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> object:
        """Show a text behind the bar, at once or with the next update."""


@contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Bar]:
    """A progress bar on stderr if tqdm is installed, else one line with the title.

    A total of 0 means that it is not known.
    """
    if not shown:
        yield Bar()
        return
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stderr.write(f"{title} ...\n")
        yield Bar()
        return
    # (in a log file each update is a new line)
    interval = 0.1 if sys.stderr.isatty() else 5.0
    with tqdm(total=total or None, desc=title, mininterval=interval, file=sys.stderr) as bar:
        yield bar
