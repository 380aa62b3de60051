"""The command `rai-toolbox evaluate`: robust accuracy of the user's model on the user's data."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rai_toolbox.cli.command import Refused, count, positive, radius, seed
from rai_toolbox.constraints.balls import BALLS, Ball
from rai_toolbox.extras import MissingExtra, require
from rai_toolbox.perturbations import (
    RobustnessWarning,
    attack,
    evaluate_robustness,
    short_ensemble,
    standard,
)
from rai_toolbox.perturbations.evaluation.state_file import write_whole

NORMS = {ball.norm_name.lower(): ball for ball in BALLS.values()}


def evaluate(arguments: Namespace) -> int:
    """Evaluate, print the table, write report.json, report.csv and report.png to the folder.

    Without matplotlib there is no report.png.

    1 if what the solver returned was not always finite, in its ball and in the data range. If
    `torchrun` started several processes, they share the work, and the first one writes.
    """
    norms, epsilons = arguments.norm, arguments.epsilon
    if len(norms) != len(epsilons):
        got = f"{len(norms)} and {len(epsilons)}"
        raise Refused(f"each --norm must be followed by its --epsilon, got {got}")
    lower, upper = arguments.range
    if not lower < upper:
        raise Refused(f"--range must be LOWER < UPPER, got {lower:g} {upper:g}")
    balls = [NORMS[norm](r) for norm, radii in zip(norms, epsilons, strict=True) for r in radii]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _evaluate(arguments, balls, None)
    # Messages are small and not on a GPU. A rank that ends is noticed at once; a slow one may take
    # as long as a batch takes.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        status = _evaluate(arguments, balls, dist.group.WORLD)
        dist.barrier()  # a rank that ends with an error makes torchrun stop the others
        return status
    finally:
        dist.destroy_process_group()


def _evaluate(arguments: Namespace, balls: list[Ball], group: dist.ProcessGroup | None) -> int:
    device = _device(arguments.device)
    model = load_model(arguments.model, arguments.weights, device)
    loader = load_data(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    state = arguments.out / "state.json"
    if state.exists() and not arguments.resume:
        rule = "go on with it by --resume, or remove it"
        raise Refused(f"{state} is of a run that did not end: {rule}")
    if group is not None:
        dist.barrier(group)  # so that no rank sees a file of this run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)  # printed below
        try:
            report = evaluate_robustness(
                model,
                loader,
                balls=balls,
                data_range=tuple(arguments.range),
                solver=_solver(arguments),
                steps=arguments.steps,
                seed=arguments.seed,
                device=device,
                state_file=state,
                group=group,
            )
        except (TypeError, ValueError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__", "").startswith("rai_toolbox.perturbations."):
                raise Refused(str(error)) from error
            raise  # from the model or the loader: the traceback helps
    if group is None or dist.get_rank(group) == 0:
        files = [arguments.out / name for name in ("report.json", "report.csv", "report.png")]
        write_whole(files[0], report.to_json())
        write_whole(files[1], report.to_csv())
        print(report)
        if arguments.standard:
            print("", report.by_attack(), sep="\n")
        for line in report.warnings():
            print(f"warning: {line}", file=sys.stderr)
        try:
            title = f"model {arguments.model}, data {arguments.data}"
            report.plot(title).savefig(files[2])
        except MissingExtra as missing:
            print(f"warning: there is no {files.pop()}: {missing}", file=sys.stderr)
        print("", *files, sep="\n")
        state.unlink(missing_ok=True)
    return 0 if report.feasible else 1


def _solver(arguments: Namespace) -> Callable[..., Any]:
    """The attacks that the flags ask for: the standard ones, one of the user's, or a few."""
    own = {"restarts": arguments.restarts, "rivals": arguments.rivals}
    given = {name: number for name, number in own.items() if number is not None}
    if arguments.standard and (given or arguments.steps is not None):
        rule = "not be given with --steps, --restarts or --rivals, which it fixes"
        raise Refused(f"--standard must {rule}")
    if arguments.standard:
        return standard()
    return partial(attack, **given) if given else short_ensemble


def load_model(path: str, weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model at an import path, with weights from a file that contains only tensors."""
    model: Callable[[Tensor], Tensor] = _imported("--model", path)
    if not callable(model):
        raise Refused(f"--model must give a model, got {type(model).__name__} from {path!r}")
    if not isinstance(model, nn.Module):
        if weights is not None:
            raise Refused(f"--weights needs a torch.nn.Module, got {type(model).__name__}")
        return model
    model.to(device)
    try:
        if weights is not None:
            found = torch.load(weights, map_location=device, weights_only=True)
            model.load_state_dict(_state_dict(found, model))
    except OSError:
        raise  # of a file that is not there
    except Exception as error:  # whatever torch makes of other bytes
        got = f"{weights}: {shorten(str(error), 300)}"
        rule = "be a state_dict of the model, saved by torch.save"
        raise Refused(f"--weights must {rule}, got {got}") from error
    return model


def _state_dict(found: Any, model: nn.Module) -> Any:
    """The state_dict in a checkpoint, without the prefix of a wrapper, such as ``module.``."""
    for name in ("state_dict", "model_state_dict", "model"):
        found = found.get(name, found)
    first = next(iter(model.state_dict()), "")
    ends = [key.removesuffix(first) for key in found if f".{key}".endswith(f".{first}")]
    consume_prefix_in_state_dict_if_present(found, min(ends, key=len, default=""))
    return found


def load_data(arguments: Namespace) -> Iterable[Any]:
    """Batches from an `.npz` file or an import path."""
    is_file = arguments.data.endswith(".npz")
    found: Any = _arrays(arguments.data) if is_file else _imported("--data", arguments.data)
    got = f"{type(found).__name__} from {arguments.data!r}"
    if isinstance(found, (tuple, list)) and len(found) == 2 and isinstance(found[0], Tensor):
        data, target = found
        if len(data) != len(target):
            got = f"{len(data)} examples and {len(target)} targets"
            raise Refused(f"--data must have one target per example, got {got}")
        if not data.is_floating_point() and arguments.divide_by == 1:
            raise Refused(f"--data of {data.dtype} need --divide-by: 255 for images of bytes")
        if arguments.divide_by != 1:
            data = data.to(torch.get_default_dtype()) / arguments.divide_by
        found = TensorDataset(data[: arguments.limit], target[: arguments.limit])
    elif arguments.limit is not None or arguments.divide_by != 1:
        raise Refused(f"--limit and --divide-by need tensors (data, target), got {got}")
    if isinstance(found, Dataset):
        return DataLoader(found, batch_size=arguments.batch_size)
    if not isinstance(found, Iterable):
        raise Refused(f"--data must give (data, target), a Dataset or batches, got {got}")
    return found


def _arrays(path: str) -> tuple[Tensor, Tensor]:
    numpy = require("numpy", extra="plots")  # a dependency of matplotlib
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            if not {"data", "target"} <= set(arrays):
                got = f"{sorted(arrays)} in {path}"
                raise Refused(f"--data must hold the arrays `data` and `target`, got {got}")
            data, target = (torch.from_numpy(arrays[name]) for name in ("data", "target"))
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(
            f"--data must be an .npz file of numbers, without pickled objects, got {path}: {error}"
        ) from error
    # numpy's default is float64, which few models accept
    return (data.to(torch.get_default_dtype()) if data.is_floating_point() else data), target


def _imported(flag: str, path: str) -> Any:
    """The model or data at `module:name`, or what another callable there returns.

    The working directory is searched, too.
    """
    module, _, name = path.partition(":")
    if not (module and name):
        wanted = "module:name" if flag == "--model" else "an .npz file or module:name"
        raise Refused(f"{flag} must be {wanted}, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # of a module that this one imports
        raise Refused(f"{flag}: there is no module {error.name!r}, got {path!r}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise Refused(f"{flag}: {module!r} has no {name!r}, got {path!r}")
        found = getattr(found, part)
    return found() if callable(found) and not isinstance(found, (nn.Module, Dataset)) else found


def _device(name: str) -> torch.device:
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason, *_ = str(error).strip().splitlines()
        raise Refused(f"--device must be one that is there, got {name!r}: {reason}") from error
    return torch.device(name)


def add_to(commands: Any) -> None:
    """Add the command to those of the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="measure how robust your model is",
        description="Clean and robust accuracy of a model within norm balls around data, verified "
        "independently of the solver. Writes report.json, report.csv and report.png (the last with "
        '"rai-constrained[plots]"). Import paths are looked up in the working directory, too.',
        epilog="example: rai-toolbox evaluate --model nets:small --weights small.pt "
        "--data digits.npz --norm linf --epsilon 0.05 0.1 --norm l2 --epsilon 0.5 1",
    )
    parser.set_defaults(run=evaluate, range=(0.0, 1.0))
    add = parser.add_argument
    add("--model", required=True, metavar="MODULE:NAME", help="a model, or a callable returning it")
    add("--weights", metavar="FILE", help="a state_dict for it, saved by torch.save")
    data_help = "arrays `data` and `target`; or (data, target), a Dataset, batches, or their maker"
    add("--data", required=True, metavar="FILE.npz|MODULE:NAME", help=data_help)
    repeated = {"required": True, "action": "append"}
    add("--norm", **repeated, type=str.lower, choices=NORMS, help="of balls, each before --epsilon")
    add("--epsilon", **repeated, type=radius, nargs="+", help="radii for that norm, such as 8/255")
    add("--range", type=float, nargs=2, metavar=("LOWER", "UPPER"), help="of data (default: 0 1)")
    add("--divide-by", type=positive, default=1.0, help="255 for integer images (default: 1)")
    standard_help = "what is published (AutoAttack): APGD-CE, APGD-T, FAB-T and Square; slow"
    add("--standard", action="store_true", help=standard_help)
    add("--steps", type=count, help="of each attack (default: 100)")
    add("--restarts", type=count, help="by one attack alone, with so many runs")
    add("--rivals", type=count, help="by one attack alone, toward this many other classes")
    add("--batch-size", type=count, default=100, help="of arrays (default: %(default)s)")
    add("--limit", type=count, help="evaluate only this many examples of arrays")
    add("--seed", type=seed, default=0, help="of all random numbers (default: %(default)s)")
    add("--device", default="cpu", help="such as cuda (default: %(default)s)")
    add("--out", type=Path, default="out", help="folder of the results (default: %(default)s)")
    add("--resume", action="store_true", help="continue an interrupted run in --out")
