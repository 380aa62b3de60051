"""The command `rai-toolbox`: what the library does, on real data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from rai_toolbox.extras import MissingExtra

__all__ = ["Refused", "main", "run"]


class Refused(Exception):
    """What was asked for cannot be done; the message says why."""


def run() -> NoReturn:
    """`main`, and the end of the process, with its exit status."""
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Threads that torch.distributed has left can abort a process that takes itself apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


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
        return _demo(arguments) if arguments.command == "demo" else _evaluate(arguments)
    except (MissingExtra, OSError, Refused) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rai-toolbox",
        description="Constrained optimizers for PyTorch, shown on real data, and robustness.",
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
        "--epochs", type=_count, help="passes over the training digits (default: 12, quick: 2)"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of weights and batches (default: %(default)s)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="less of everything: seconds, and a rougher picture"
    )
    _add_evaluate(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="measure how robust a model of yours is",
        description=(
            "Clean and robust accuracy of a model within norm balls around data, verified apart "
            "from the solver. Writes report.json, report.csv and report.png. Import paths are "
            "looked up in the working directory, too. "
            'Needs: pip install "rai-toolbox[plots]".'
        ),
        epilog="example: rai-toolbox evaluate --model nets:small --weights small.pt "
        "--data digits.npz --norm linf --epsilon 0.05 0.1 --norm l2 --epsilon 0.5 1",
    )
    command.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="a torch.nn.Module, or a callable without arguments that gives the model",
    )
    command.add_argument(
        "--weights", type=Path, metavar="FILE", help="a state_dict for it, saved by torch.save"
    )
    command.add_argument(
        "--data",
        required=True,
        metavar="FILE.npz|MODULE:NAME",
        help="arrays `data` and `target`; or (data, target), a Dataset or batches, or a callable "
        "that gives one of these",
    )
    command.add_argument(
        "--norm",
        required=True,
        action="append",
        choices=("linf", "l2", "l1"),
        help="of the balls; repeat --norm and --epsilon together for several",
    )
    command.add_argument(
        "--epsilon",
        required=True,
        action="append",
        nargs="+",
        type=_radius,
        metavar="EPSILON",
        help="the radii of the norm before it",
    )
    command.add_argument(
        "--range",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOWER", "UPPER"),
        help="bounds that all data keep (default: 0 1)",
    )
    command.add_argument(
        "--divide-by",
        type=_positive,
        default=1.0,
        metavar="NUMBER",
        help="such as 255 for images of integers (default: 1)",
    )
    command.add_argument(
        "--steps", type=_count, default=100, help="of each attack (default: %(default)s)"
    )
    command.add_argument(
        "--restarts", type=_count, default=1, help="of each attack (default: %(default)s)"
    )
    command.add_argument(
        "--rivals",
        type=_count,
        metavar="NUMBER",
        help="attack once towards each of so many of the most likely other classes: stronger, and "
        "as many times the work",
    )
    command.add_argument(
        "--batch-size", type=_count, default=100, help="of arrays (default: %(default)s)"
    )
    command.add_argument("--limit", type=_count, help="evaluate only the first so many of arrays")
    command.add_argument("--seed", type=_seed, default=0, help="of all (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    command.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of the results (default: %(default)s)"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with a run that was stopped, from --out"
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from rai_toolbox.cli.evaluate import Settings, evaluate  # loads what only this command needs

    if len(arguments.norm) != len(arguments.epsilon):
        raise Refused(
            "each --norm must be followed by its --epsilon, got "
            f"{len(arguments.norm)} and {len(arguments.epsilon)}"
        )
    lower, upper = arguments.range
    if not lower < upper:
        raise Refused(f"--range must be LOWER < UPPER, got {lower:g} {upper:g}")
    return evaluate(
        Settings(
            model=arguments.model,
            data=arguments.data,
            epsilons=tuple(zip(arguments.norm, arguments.epsilon, strict=True)),
            out=arguments.out,
            weights=arguments.weights,
            data_range=(lower, upper),
            divide_by=arguments.divide_by,
            steps=arguments.steps,
            restarts=arguments.restarts,
            rivals=arguments.rivals,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            seed=arguments.seed,
            device=arguments.device,
            resume=arguments.resume,
        )
    )


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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def _radius(text: str) -> float:
    number = float(text)
    if not 0 <= number < inf:
        raise argparse.ArgumentTypeError(f"must be >= 0 and finite, got {text}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"must be > 0 and finite, got {text}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {number}")
    return number
