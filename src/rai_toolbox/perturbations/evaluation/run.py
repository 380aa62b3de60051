"""Robustness of a model: clean and robust accuracy over the batches of a loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import length_hint
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rai_toolbox import extras
from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.sharding import is_sharded
from rai_toolbox.modules import modules_in
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.ensemble import short_ensemble
from rai_toolbox.perturbations.evaluation.batch import Batch
from rai_toolbox.perturbations.evaluation.fingerprint import described, fingerprint
from rai_toolbox.perturbations.evaluation.part_file import PartFile
from rai_toolbox.perturbations.evaluation.ranks import Ranks
from rai_toolbox.perturbations.evaluation.report import RobustnessReport, RobustnessWarning
from rai_toolbox.perturbations.evaluation.state_file import StateFile
from rai_toolbox.perturbations.evaluation.verification import VerificationReport, predict, wrong_by
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import Criterion, Rule, criterion_of


def evaluate_robustness(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    balls: Ball | Iterable[Ball],
    data_range: Range = (0.0, 1.0),
    solver: Callable[..., Any] = short_ensemble,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    state_file: str | PathLike[str] | None = None,
    progress: bool = True,
    examples: int = 4,
    group: dist.ProcessGroup | None = None,
    keys: tuple[Any, Any] | None = None,
    criterion: Criterion | None = None,
    correct: Rule | None = None,
) -> RobustnessReport:
    """Clean and robust accuracy over norms and radii, verified independently of the solver.

    Robust accuracy at an epsilon is the fraction of examples that are predicted right, and for
    which no perturbation that fools the model was found at this or a smaller epsilon of the norm.
    It is an upper bound of the accuracy in the worst case: a better solver may find more.

    Examples that are predicted wrong, or fooled at a smaller epsilon, are not attacked again. A
    perturbation counts only if a new call of the model predicts another class, and norm and bounds
    hold up to rounding in the dtype of the data, as `verify` allows. A `RobustnessWarning` reports
    each reason to doubt a result.

    The result for an example depends on its batch and on `seed`, and not on other batches or their
    order: random numbers are seeded by the content of the batch. So ranks can share the work, see
    `group`, and the report is that of one process.

    Parameters
    ----------
    model : Callable
        From data to logits, shape (N, K), or to an object or dict with `logits`. With
        `correct`, any output. During the evaluation a module is in eval mode and its weights are
        frozen.
    loader : Iterable
        Batches of data, shape (N, ...), and classes, shape (N,), such as a DataLoader; see `keys`.
        With `correct`, targets may have any dtype and the shape (N, ...).
    balls : LinfBall, L2Ball or L1Ball, or an iterable of them
        Each has a number as radius, and no center.
    data_range : (float or Tensor, float or Tensor), optional
        Lower and upper bound of all data, also of perturbed ones, in their unit; a tensor
        broadcasts against the data. None for no bounds.
    solver : Callable
        Called as ``solver(model, data, target, ball=..., data_range=..., generator=...)``; returns
        an object whose ``data`` are the perturbed data. By default a few attacks, `short_ensemble`.
        For figures to publish pass ``standard()``; for a single attack, `attack` or a partial of
        it.
    steps : int, optional
        If given, passed to `solver`.
    seed : int
        Seed of all random numbers. The state of torch's generators is restored afterwards.
    device : torch.device or str, optional
        The device to which data are moved. By default that of the model's parameters.
    state_file : path, optional
        A JSON file for an interrupted run to resume from, by the same call; its folder must exist.
        It is replaced after each batch. The first rank also writes a file with the ending ".part"
        after each attack on the current batch. So at most one attack on one batch is lost, and one
        batch on each other rank. The file stays after the run: to start again, delete it.
    progress : bool
        Whether to show a progress bar, with the ball, the attack and the number that withstood.
    examples : int
        Number of examples of the first batch to keep for `RobustnessReport.plot`, attacked again in
        the largest ball of each norm: the first that are fooled there.
    group : ProcessGroup, optional
        Ranks that share the work, such as ``torch.distributed.group.WORLD``. Each one calls this
        with the same arguments (except `device`), reads all batches, attacks every k-th one, and
        returns the whole report. The first one has the bar, the state file and the warnings. An
        error on one rank raises on all. None: this process works alone.
    keys : pair, optional
        Where data and classes are in each batch: ``("pixel_values", "labels")`` for dicts, ``(0,
        1)`` for tuples of more items. None: batches are pairs.
    criterion : Callable, optional
        The loss of each example, which `solver` is also called with.
    correct : Callable, optional
        Called with the model's output and the target, returns a bool for each example: whether the
        prediction is right. By default it compares classes. A solver that takes `fooled` gets its
        negation. The report's settings name it. A state file identifies a function by its name, a
        lambda by its code, and a `functools.partial` also by its arguments.

    Returns
    -------
    RobustnessReport

    Raises
    ------
    TypeError, ValueError
        If a setting is wrong, the folder of `state_file` does not exist, data are outside
        `data_range`, a class is not one of the model's, or model or batches differ between ranks. A
        `StateFileError`, which is a ValueError, if `state_file` is of another run.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations import evaluate_robustness
    >>> data = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.8], [0.2, 0.3]])
    >>> batches = [(data, torch.tensor([0, 0, 1, 0]))]
    >>> balls = [LinfBall(0.05), LinfBall(0.2)]
    >>> model = torch.nn.Identity()  # predicts the larger entry
    >>> print(evaluate_robustness(model, batches, balls=balls, steps=10, progress=False))
    norm  epsilon   data   clean  robust   95% interval
    Linf     0.05      4   75.0%   75.0%  30.1% - 95.4%
    Linf      0.2      4   75.0%   25.0%   4.6% - 69.9%
    """
    by_norm = _by_norm(balls)
    check_count("examples", examples, 0)
    check_count("seed", seed, 0)
    inputs.check_solver(solver)
    if steps is not None:
        solver = partial(solver, steps=steps)
    if criterion is not None:
        solver = partial(solver, criterion=criterion_of(criterion, criterion, targeted=False))
    settings = {"data_range": described(data_range), "solver": described(solver), "seed": seed}
    fooled = wrong_by(correct)  # which checks it
    if correct is not None:
        settings["correct"] = described(correct)
        if inputs.takes(solver, "fooled")[0]:
            solver = partial(solver, fooled=fooled)
    judge = partial(predict, correct=correct, criterion=criterion)
    start = RobustnessReport(
        settings,
        {norm: tuple(map(inputs.radius_of, found)) for norm, found in by_norm.items()},
        {norm: () for norm in by_norm},
        {norm: (VerificationReport(),) * len(found) for norm, found in by_norm.items()},
    )
    ranks = Ranks(group)
    state = _shared_state(ranks, model, None if state_file is None else Path(state_file), start)
    device = inputs.device_of(model) if device is None else torch.device(device)
    path = None
    if state.path is not None and ranks.rank == 0:  # (others would write the same file)
        path = state.path.with_name(state.path.name + ".part")
    part_file = PartFile(path, fingerprint(state.model, settings, by_norm))
    first: list[Batch] = []
    per_batch = sum(map(len, by_norm.values()))

    def unknown_batches(bar: extras.Bar) -> Iterator[Batch]:
        number = 0
        pairs = loader if keys is None else ([batch[key] for key in keys] for batch in loader)
        found = inputs.batches(pairs, device, classes=correct is None)
        for number, (data, target) in enumerate(found, start=1):
            inputs.bounds_of(data, data_range)  # which checks the data
            name = fingerprint(data, target)
            batch = Batch(
                model, by_norm, data_range, solver, judge, seed, data, target, name, number
            )
            if number == 1:
                first.append(batch)
            if state.holds(number - 1, batch.name):
                bar.update(per_batch)
            else:
                yield batch
        state.check_number(number)

    total = length_hint(loader) * per_batch
    with extras.progress("evaluating", total, shown=progress and ranks.rank == 0) as bar:
        remaining = unknown_batches(bar)

        def next_round() -> tuple[list[str], RobustnessReport]:
            """The names of the next batches, one per rank, and the report of this rank's."""
            if ranks.rank == 0:
                state.save()  # inside the round, so that a failure raises on all ranks
                part_file.remove()
            names, part = list[str](), start
            for rank, batch in enumerate(islice(remaining, ranks.size)):
                names.append(batch.name)
                if rank == ranks.rank:
                    part = batch.report(start, bar, part_file)
                else:
                    bar.update(per_batch)
            return names, part

        names = [""]
        while names:
            found = ranks.gather(next_round)
            names = found[0][0]
            if any(others != names for others, _ in found):
                raise wrong("loader", "give the same batches on each rank, in one order", "others")
            state.add(names, [part for _, part in found[: len(names)]])
        shown = first[0].examples(examples, state.report) if examples else []
    report = replace(state.report, examples=tuple(shown))
    if ranks.rank == 0:
        for line in report.warnings():
            warnings.warn(line, RobustnessWarning, stacklevel=2)
    return report


def _by_norm(balls: Ball | Iterable[Ball]) -> dict[str, list[Ball]]:
    """The balls of each norm by ascending radius, without duplicates."""
    found: dict[str, dict[float, Ball]] = {}
    for ball in balls if isinstance(balls, Iterable) else [balls]:
        radius = inputs.radius_of(ball)
        found.setdefault(ball.norm_name, {})[radius] = type(ball)(radius)
    if not found:
        raise wrong("balls", "be one ball at least", "none")
    return {norm: [of[radius] for radius in sorted(of)] for norm, of in found.items()}


def _shared_state(
    ranks: Ranks, model: Model, path: Path | None, start: RobustnessReport
) -> StateFile:
    """The state in the file that the first rank reads, on each rank."""

    def opened() -> StateFile:
        if ranks.size > 1:
            _check_local(model)
        held = sorted(fingerprint(module) for module in modules_in(model) if module is not model)
        return StateFile(path if ranks.rank == 0 else None, fingerprint(model, *held), start)

    first, *others = ranks.gather(opened)
    if any(other.model != first.model for other in others):
        raise wrong("model", "be the same on each rank, weights too", "others")
    return first


def _check_local(model: Model) -> None:
    """Raise if calls of the model communicate: ranks call it different numbers of times."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, DistributedDataParallel):
            got = "DistributedDataParallel: give its `module`"
            raise wrong("model", "be called by each rank for itself", got)
        for name, tensor in module.named_parameters(recurse=False):
            if is_sharded(tensor):
                got = f"the sharded parameter {name!r}: do not pass `group` for a sharded model"
                raise wrong("model", "be whole on each rank", got)
