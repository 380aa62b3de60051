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

COMMANDS = {"demo": demo.COMMAND, "evaluate": evaluate.COMMAND}


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
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name, help=command.help, description=command.description, epilog=command.epilog
        )
        for flag, settings in command.options.items():
            added.add_argument(flag, **settings)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[arguments.command].run(arguments)
    except (MissingExtra, OSError, Refused) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
