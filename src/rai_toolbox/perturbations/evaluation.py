"""How many data a model reads right, as they are and anywhere in balls around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rai_toolbox.checks import check_count
from rai_toolbox.constraints.sharding import is_sharded
from rai_toolbox.extras import Bar
from rai_toolbox.extras import progress as progress_bar
from rai_toolbox.perturbations.ascent import Model
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.box import Ball, Range
from rai_toolbox.perturbations.fingerprint import described, fingerprint
from rai_toolbox.perturbations.job import Job, Perturbed, seed_of, seeded
from rai_toolbox.perturbations.ranks import Ranks
from rai_toolbox.perturbations.report import Examples, RobustnessReport, RobustnessWarning
from rai_toolbox.perturbations.state_file import StateFile
from rai_toolbox.perturbations.verification import (
    NORMS,
    VerificationReport,
    beyond_range,
    check_ball,
    check_batch,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["evaluate_robustness"]


def evaluate_robustness(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    balls: Iterable[Ball],
    data_range: Range = (0.0, 1.0),
    solver: Callable[..., Perturbed] = attack,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_file: str | PathLike[str] | None = None,
    progress: bool = True,
    examples: int = 4,
    group: ProcessGroup | None = None,
) -> RobustnessReport:
    """Clean and robust accuracy over norms and radii, verified apart from the solver.

    ``robust accuracy at epsilon = share of data that are read right, and that no perturbation found
    at this or a smaller epsilon of the norm fools``

    It is an upper bound of the accuracy in the worst case: a better solver may find more. Data that
    are misread, or fooled at a smaller epsilon, are not attacked again. A perturbed datum counts as
    fooling only if a fresh call of the model misreads it, and norm and bounds, computed anew in
    float64, hold. What seems wrong is warned of by a `RobustnessWarning`, in words.

    What is found for a datum depends on the batch that it comes in and on `seed`, and not on other
    batches or their order, as random numbers are seeded by the content of the batch. So ranks can
    share the work, see `group`: the report is that of one process.

    Parameters
    ----------
    model : Callable
        Gives logits of shape (N, K). A module is in eval mode with frozen weights meanwhile.
    loader : Iterable
        Batches of data, shape (N, ...), and classes, shape (N,), such as a DataLoader.
    balls : Iterable of LinfBall, L2Ball or L1Ball
        Each with a number as radius, without a center.
    data_range : (float or Tensor, float or Tensor), optional
        The bounds of all data, that perturbed data keep, too; None for no bounds.
    solver : Callable
        Called as ``solver(model, data, target, ball=..., data_range=..., generator=...)``, gives an
        object whose ``data`` are the perturbed data. ``partial(attack, restarts=5)`` sets options.
    steps : int, optional
        Passed on to `solver` if it is given.
    seed : int
        Of all random numbers. torch's own generators are as before afterwards.
    device : torch.device or str, optional
        Where the data are moved to. By default that of the parameters of the model.
    state_file : path, optional
        A JSON file that is replaced after each batch. Where it exists, the run goes on from it: a
        run that was killed loses one batch at most, or one of each rank.
    progress : bool
        Whether to show a bar.
    examples : int
        How many data of the first batch to keep for `RobustnessReport.plot`, attacked for that in
        the largest ball of each norm.
    group : ProcessGroup, optional
        Ranks that share the work, such as ``torch.distributed.group.WORLD``. Each calls this with
        the same arguments (but for `device`), reads all batches, attacks every k-th of them, and
        returns the whole report; the first one has the bar, the state file and the warnings. An
        error on one of them is one on all. None: this process works for itself, also where a group
        is initialized.

    Returns
    -------
    RobustnessReport

    Raises
    ------
    TypeError, ValueError
        If a setting is wrong, data are outside `data_range`, a class is not one of the model's, or
        model or batches are not the same on each rank.
        A `StateFileError`, which is a ValueError, if `state_file` is of another run.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations.evaluation import evaluate_robustness
    >>> data = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.8], [0.2, 0.3]])
    >>> batches = [(data, torch.tensor([0, 0, 1, 0]))]
    >>> balls = [LinfBall(0.05), LinfBall(0.2)]
    >>> model = torch.nn.Identity()  # reads the larger entry
    >>> print(evaluate_robustness(model, batches, balls=balls, steps=10, progress=False))
    norm  epsilon   data   clean  robust   95% interval
    Linf     0.05      4   75.0%   75.0%  30.1% - 95.4%
    Linf      0.2      4   75.0%   25.0%   4.6% - 69.9%
    """
    radii = _radii(balls)
    check_count("examples", examples, 0)
    check_count("seed", seed, 0)
    if steps is not None:
        solver = partial(solver, steps=steps)
    settings = {
        "data_range": described(data_range),
        "solver": described(solver),
        "seed": seed,
    }
    start = RobustnessReport(
        settings,
        {name: tuple(ball.epsilon for ball in found) for name, found in radii.items()},  # type: ignore[misc]
        {name: () for name in radii},
        {name: (VerificationReport(),) * len(found) for name, found in radii.items()},
    )
    ranks = Ranks.of(group)
    path = None if state_file is None else Path(state_file)
    state = _agreed(ranks, model, path, start)
    job = Job(model, radii, data_range, solver, seed)
    device = _device(model) if device is None else torch.device(device)
    shown: list[Examples] = []
    per_batch = sum(map(len, radii.values()))
    total = length_hint(loader) * per_batch

    def unknown(bar: Bar) -> Iterator[tuple[str, Tensor, Tensor]]:
        for data, target in _batches(loader, device, data_range):
            batch = fingerprint(data, target)
            if not state.read and examples:
                with seeded(seed_of(seed, batch), data.device):
                    shown.extend(job.examples(data, target, batch, examples))
            if state.knows(batch):
                bar.update(per_batch)
            else:
                yield batch, data, target

    with progress_bar("evaluating", total, shown=progress and ranks.rank == 0) as bar:
        todo = unknown(bar)

        def next_round() -> tuple[list[str], RobustnessReport]:
            """The names of the next batches, one for each rank, and what is found of our own."""
            if ranks.rank == 0:
                state.save()  # here, so that no rank waits where that fails
            names, part = list[str](), start
            for rank, (batch, data, target) in enumerate(islice(todo, ranks.size)):
                names.append(batch)
                if rank == ranks.rank:
                    with seeded(seed_of(seed, batch), data.device):
                        part = job.report(start, data, target, batch, bar)
                else:
                    bar.update(per_batch)
            return names, part

        while True:
            found = ranks.gathered(next_round)
            names = found[0][0]
            if any(others != names for others, _ in found):
                raise ValueError("`loader` must give the same batches on each rank, in one order")
            if not names:
                break
            state.add(names, [part for _, part in found[: len(names)]])
    if not state.read:
        raise ValueError("`loader` must give one batch at least, got none")
    report = replace(state.finish(), examples=tuple(shown))
    if ranks.rank == 0:
        for line in report.warnings():
            warnings.warn(line, RobustnessWarning, stacklevel=2)
    return report


def _agreed(ranks: Ranks, model: Model, path: Path | None, start: RobustnessReport) -> StateFile:
    """What has been found so far, by the file that the first rank sees; the same on each rank."""

    def opened() -> tuple[str, StateFile | None]:
        if ranks.size > 1:
            _check_whole(model)
        name = fingerprint(model)
        return name, StateFile(path, name, start) if ranks.rank == 0 else None

    found = ranks.gathered(opened)
    (name, state), *_ = found
    if any(other != name for other, _ in found):
        raise ValueError("`model` must be the same on each rank, weights too, got others")
    assert state is not None
    return state


def _check_whole(model: Model) -> None:
    """Raise if calls of the model would wait for those on other ranks, which are not as many."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "`model` must be called by each rank for itself, got DistributedDataParallel: give "
                "its `module`"
            )
        for name, tensor in module.named_parameters(recurse=False):
            if is_sharded(tensor):
                raise ValueError(
                    f"`model` must be whole on each rank, got the sharded parameter {name!r}; "
                    "without `group`, all ranks do the same work on the shards of one model"
                )


def _radii(balls: Iterable[Ball]) -> dict[str, list[Ball]]:
    """The balls of each norm by ascending radius, once each."""
    found: dict[str, dict[float, Ball]] = {}
    for ball in balls:
        check_ball(ball)
        if isinstance(ball.epsilon, Tensor) or not ball.bounded:
            raise ValueError(f"`epsilon` of each of `balls` must be a finite number, got {ball!r}")
        epsilon = float(ball.epsilon)
        found.setdefault(NORMS[type(ball)][0], {})[epsilon] = type(ball)(epsilon)
    if not found:
        raise ValueError("`balls` must be one ball at least, got none")
    return {name: [of[epsilon] for epsilon in sorted(of)] for name, of in found.items()}


def _batches(
    loader: Iterable[Any], device: torch.device | None, data_range: Range
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that hold data, checked, on the device."""
    for i, batch in enumerate(loader):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"`loader` must give pairs (data, target), got {type(batch).__name__} as batch {i}"
            )
        data, target = batch
        check_batch(data, target)
        if not len(data):
            continue
        data, target = data.to(device or data.device), target.to(device or data.device)
        excess = beyond_range(data, data_range)
        if not bool((data.isfinite().flatten(1).all(1) & (excess <= 0)).all()):
            raise ValueError(
                f"`data` must be finite and within `data_range`, {described(data_range)}, got "
                f"values from {float(data.min()):g} to {float(data.max()):g} in batch {i}"
            )
        yield data, target


def _device(model: object) -> torch.device | None:
    """Where the model is, None if it is no module or has no tensors."""
    if not isinstance(model, nn.Module):
        return None
    tensors = (tensor for of in (model.parameters(), model.buffers()) for tensor in of)
    return next((tensor.device for tensor in tensors), None)
