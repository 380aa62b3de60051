"""The command `rai-toolbox evaluate`: robust accuracy of a model of yours on data of yours."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rai_toolbox.cli import Refused
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.extras import require
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.evaluation import evaluate_robustness
from rai_toolbox.perturbations.evaluation.report import RobustnessReport, RobustnessWarning
from rai_toolbox.perturbations.evaluation.state_file import write_whole

__all__ = ["Settings", "evaluate"]

BALLS: dict[str, type[LinfBall | L2Ball | L1Ball]] = {"linf": LinfBall, "l2": L2Ball, "l1": L1Ball}


class Settings(NamedTuple):
    """What to evaluate, and how."""

    model: str
    data: str
    epsilons: Sequence[tuple[str, Sequence[float]]]
    out: Path
    weights: Path | None = None
    data_range: tuple[float, float] = (0.0, 1.0)
    divide_by: float = 1.0
    steps: int = 100
    restarts: int = 1
    rivals: int | None = None
    batch_size: int = 100
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    resume: bool = False


def evaluate(settings: Settings) -> int:
    """Evaluate, print the table, write report.json, report.csv and report.png to `settings.out`.

    1 if what the solver returned was not always finite, in its ball and in the data range. Where
    `torchrun` has started several processes, they share the work, and the first one writes.
    """
    with _ranks() as group:
        return _evaluate(settings, group)


def _evaluate(settings: Settings, group: dist.ProcessGroup | None) -> int:
    require("matplotlib.figure", extra="plots")  # better to know before the work than after it
    balls = [BALLS[name](epsilon) for name, epsilons in settings.epsilons for epsilon in epsilons]
    device = _device(settings.device)
    model = load_model(settings.model, settings.weights, device)
    loader = load_data(settings)
    first = group is None or dist.get_rank(group) == 0
    settings.out.mkdir(parents=True, exist_ok=True)
    state = settings.out / "state.json"
    if state.exists() and not settings.resume:
        raise Refused(
            f"{state} is of a run that did not end: go on with it by --resume, or remove it"
        )
    if group is not None:
        dist.barrier(group)  # so that nobody sees a file of this run
    solver = partial(attack, restarts=settings.restarts, rivals=settings.rivals)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)  # they are printed below
        try:
            report = evaluate_robustness(
                model,
                loader,
                balls=balls,
                data_range=settings.data_range,
                solver=solver,
                steps=settings.steps,
                seed=settings.seed,
                device=device,
                state_file=state,
                group=group,
            )
        except (TypeError, ValueError) as error:
            if _is_of(error, "perturbations"):
                raise Refused(str(error)) from error
            raise  # the model's or the loader's own: its traceback helps
    if first:
        _write(report, settings.out)
        state.unlink(missing_ok=True)
    if group is not None:
        dist.barrier(group)  # torchrun stops the first one, too, where another ends badly
    return 0 if report.feasible else 1


def _write(report: RobustnessReport, out: Path) -> None:
    write_whole(out / "report.json", report.to_json())
    write_whole(out / "report.csv", report.to_csv())
    report.plot().savefig(out / "report.png")
    print(report)
    for line in report.warnings():
        print(f"warning: {line}", file=sys.stderr)
    print("", *(out / name for name in ("report.json", "report.csv", "report.png")), sep="\n")


def load_model(path: str, weights: Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model of an import path, with weights of a file that holds nothing but tensors."""
    found = _imported("--model", path)
    model: Any = found if isinstance(found, nn.Module) else _called("--model", path, found)
    if not callable(model):
        raise Refused(f"--model must give a model, got {type(model).__name__} from {path!r}")
    if isinstance(model, nn.Module):
        model.to(device)
    checked: Callable[[Tensor], Tensor] = model
    if weights is None:
        return checked
    if not isinstance(model, nn.Module):
        raise Refused(f"--weights needs a torch.nn.Module, got {type(model).__name__} as model")
    try:
        state = torch.load(weights, map_location=device, weights_only=True)
        model.load_state_dict(state)
    except (pickle.UnpicklingError, RuntimeError, TypeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise Refused(
            f"--weights must be a state_dict of the model, saved by torch.save, got {weights}: "
            f"{' '.join(line.strip() for line in reason[:3])}"
        ) from error
    return checked


def load_data(settings: Settings) -> Iterable[Any]:
    """Batches of the data of an `.npz` file or of an import path."""
    if settings.data.endswith(".npz"):
        found: Any = _arrays(Path(settings.data))
    else:
        found = _imported("--data", settings.data)
        if callable(found) and not isinstance(found, (Dataset, DataLoader)):
            found = _called("--data", settings.data, found)
    if isinstance(found, (tuple, list)) and len(found) == 2 and isinstance(found[0], Tensor):
        data, target = found
        if len(data) != len(target):
            raise Refused(
                f"--data must have one target per datum, got {len(data)} data and {len(target)} "
                "targets"
            )
        if settings.divide_by != 1:
            data = data.to(torch.get_default_dtype()) / settings.divide_by
        found = TensorDataset(data[: settings.limit], target[: settings.limit])
    elif settings.limit is not None or settings.divide_by != 1:
        raise Refused(
            "--limit and --divide-by need tensors (data, target), got "
            f"{type(found).__name__} from {settings.data!r}"
        )
    if isinstance(found, Dataset):
        return DataLoader(found, batch_size=settings.batch_size)
    if not isinstance(found, Iterable):
        raise Refused(
            "--data must give (data, target), a Dataset or batches, got "
            f"{type(found).__name__} from {settings.data!r}"
        )
    return found


def _arrays(path: Path) -> tuple[Tensor, Tensor]:
    numpy = require("numpy", extra="plots")  # matplotlib brings it
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            missing = {"data", "target"} - set(arrays)
            if missing:
                raise Refused(
                    f"--data must hold the arrays `data` and `target`, got {sorted(arrays)} in "
                    f"{path}"
                )
            data, target = (torch.from_numpy(arrays[name]) for name in ("data", "target"))
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(
            f"--data must be an .npz file of numbers, without pickled objects, got {path}: {error}"
        ) from error
    # numpy's default is float64, which few models take
    return (data.to(torch.get_default_dtype()) if data.is_floating_point() else data), target


def _imported(option: str, path: str) -> Any:
    """What `module:name` is; modules of the working directory are found, too."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        kinds = "module:name" if option == "--model" else "an .npz file or module:name"
        raise Refused(f"{option} must be {kinds}, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # of something that the module itself needs
        raise Refused(f"{option}: there is no module {error.name!r}, got {path!r}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise Refused(f"{option}: {module!r} has no {name!r}, got {path!r}")
        found = getattr(found, part)
    return found


def _called(option: str, path: str, found: Any) -> Any:
    if not callable(found):
        raise Refused(f"{option} must name a callable, got {type(found).__name__} at {path!r}")
    return found()


@contextmanager
def _ranks() -> Iterator[dist.ProcessGroup | None]:
    """All processes that were started together; None if this is the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    # What is sent is small and not on a GPU. A rank that ends is noticed at once; one that is slow
    # may be so for as long as a batch takes.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refused(f"--device must be one that is there, got {name!r}: {reason}") from error
    return torch.device(name)


def _is_of(error: BaseException, folder: str) -> bool:
    """Whether an error was raised by a file of this package, in that folder."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = Path(at.tb_frame.f_code.co_filename) if at is not None else Path()
    return Path(__file__).parents[1] / folder in place.parents
