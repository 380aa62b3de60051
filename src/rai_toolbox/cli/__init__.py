"""The command `rai-toolbox`: what the library does, on real data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rai_toolbox.extras import MissingExtra

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit status.

    0: all went well; 1: a check of the run failed; 2: the run could not start; 130: interrupted.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return _demo(arguments)
    except (MissingExtra, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rai-toolbox",
        description="Constrained optimizers for PyTorch, shown on real data.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a bounded and a free CNN on MNIST digits, then perturb the digits",
        description=(
            "Train the same CNN with bounded weights and free on 5,000 MNIST digits, perturb test "
            "digits within L-inf and L2 balls, fit a linear reader with weights in L1 balls, and "
            "write demo.png, sparse.png and demo.json. "
            'Needs: pip install "rai-toolbox[demo]".'
        ),
    )
    demo.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of the results (default: %(default)s)"
    )
    demo.add_argument(
        "--epochs", type=_epochs, help="passes over the training digits (default: 12, quick: 2)"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of weights and batches (default: %(default)s)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="less of everything: seconds, and a rougher picture"
    )
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from rai_toolbox.cli.demo import Settings, demo  # loads what only this command needs

    settings = Settings.quick() if arguments.quick else Settings()
    if arguments.epochs is not None:
        settings = settings._replace(epochs=arguments.epochs)
    return demo(settings._replace(seed=arguments.seed), arguments.out)


def _version() -> str:
    try:
        return version("rai-toolbox")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"


def _epochs(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {number}")
    return number
