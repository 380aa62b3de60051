"""The command line `rai-toolbox`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rai_toolbox import __version__
from rai_toolbox.cli import demo, evaluate
from rai_toolbox.cli.command import Refused
from rai_toolbox.extras import MissingExtra


def run() -> NoReturn:
    """Run `main` and end the process with its exit status."""
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads that torch.distributed leaves behind can abort the interpreter's own shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit status.

    0: success; 1: a check of the run failed; 2: the run could not start; 130: interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="rai-toolbox",
        description="Constrained optimizers for PyTorch, shown on real data, and robustness.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo.add_to(commands)
    evaluate.add_to(commands)
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    try:
        status: int = arguments.run(arguments)
    except (MissingExtra, OSError, Refused) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return status
