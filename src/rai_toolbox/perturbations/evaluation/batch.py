"""The evaluation of one batch, which only the batch and the seed determine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints.balls import Ball
from rai_toolbox.extras import Bar
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.evaluation.fingerprint import fingerprint
from rai_toolbox.perturbations.evaluation.part_file import BallJournal, PartFile
from rai_toolbox.perturbations.evaluation.report import Examples, RobustnessReport
from rai_toolbox.perturbations.evaluation.verification import (
    Prediction,
    VerificationReport,
    compare,
)
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.solve import NotFiniteWarning
from rai_toolbox.perturbations.solvers import ZeroGradientWarning


@dataclass(frozen=True)
class Batch:
    """The settings of an evaluation, and the data of one batch, whose name is its fingerprint.

    Its number counts from 1.
    """

    model: Model
    balls: Mapping[str, list[Ball]]
    data_range: Range
    solver: Callable[..., Any]
    predict: Callable[..., Prediction]
    seed: int
    data: Tensor
    target: Tensor
    name: str
    number: int

    def report(self, start: RobustnessReport, bar: Bar, part: PartFile) -> RobustnessReport:
        """The report of the batch; `start` has the settings, and `part` what was found before."""
        part.open(self.name)
        withstood, checks, fooled_by, calls = {}, {}, {}, {}
        with _seeded(self.data.device, self.seed, self.name):
            before = self.predict(self.model, self.data, self.target)
            for norm, balls in self.balls.items():
                robust, found = ~before.misclassified, []
                count, names, of_attacks = robust.long() - 1, [None] * len(robust), []
                for ball in balls:
                    check, of_ball = VerificationReport(), dict[str, int]()
                    if ball.epsilon > 0 and robust.any():  # at 0, the only point is the original
                        robust_rows = robust.nonzero().squeeze(1).tolist()
                        original, target = before.rows(robust), self.target[robust]
                        perturbed, by, of_ball = self._perturb(
                            original.data, target, ball, bar, part
                        )
                        after = self.predict(self.model, perturbed, target, gradient=False)
                        check, fooled = compare(original, after, ball, self.data_range)
                        for at in fooled.nonzero().squeeze(1).tolist() if by else ():
                            names[robust_rows[at]] = by[at]
                        robust = robust.masked_scatter(robust, ~fooled)
                    count += robust
                    found.append(check)
                    of_attacks.append(of_ball)
                    bar.update()
                withstood[norm], checks[norm] = tuple(count.tolist()), tuple(found)
                fooled_by[norm], calls[norm] = tuple(names), tuple(of_attacks)
        return replace(start, withstood=withstood, checks=checks, fooled_by=fooled_by, calls=calls)

    def examples(self, number: int, report: RobustnessReport) -> list[Examples]:
        """Some data, perturbed again in the largest ball of each norm: the first that are fooled.

        In the report this batch is the first one. If too few are fooled, robust ones follow.
        """
        found = []
        with _seeded(self.data.device, self.seed, self.name):
            for norm, (*_, ball) in self.balls.items():
                withstood = report.withstood[norm][: len(self.data)]
                robust = len(report.epsilons[norm])
                right = [row for row, radii in enumerate(withstood) if radii >= 0]
                chosen = sorted(right, key=lambda row: withstood[row] == robust)[:number]
                if not chosen:
                    continue
                rows = torch.tensor(sorted(chosen), device=self.data.device)
                data, target = self.data[rows], self.target[rows]
                perturbed, *_ = self._perturb(data, target, ball, Bar(), PartFile(None, ""))
                after = self.predict(self.model, perturbed, target, gradient=False)
                kept = (data, perturbed, target, after.predicted, after.misclassified)
                found.append(Examples(norm, float(ball.epsilon), *(each.cpu() for each in kept)))
        return found

    def _perturb(
        self, data: Tensor, target: Tensor, ball: Ball, bar: Bar, part: PartFile
    ) -> tuple[Tensor, list[str | None], dict[str, int]]:
        """The solver's perturbed data, with random numbers that only batch and ball determine.

        Of an ensemble also the attack that fooled each example, and the calls of each attack.
        """
        seeded, name = _seeded(data.device, self.seed, self.name, ball), fingerprint(ball, data)
        with seeded as seed, warnings.catch_warnings():
            for category in (ZeroGradientWarning, NotFiniteWarning):  # the report counts them
                warnings.simplefilter("ignore", category)
            title = f"batch {self.number}, {ball.norm_name} {ball.epsilon:g}"
            journal = BallJournal(part, name, bar, title, data.device, seed)
            before = journal.finished()
            if before is not None:
                return before["data"].to(data.device), before["by"], before["calls"]
            settings: dict[str, Any] = {"ball": ball, "data_range": self.data_range}
            settings["generator"] = journal.generator
            if "journal" in signature(self.solver).parameters:
                settings["journal"] = journal
            # Copies, as a solver may work in place, too.
            found = self.solver(self.model, data.clone(), target.clone(), **settings)
        perturbed = inputs.found_by("solver", found, data)
        by, calls = getattr(found, "fooled_by", None), getattr(found, "calls", None)
        if not isinstance(by, list) or not isinstance(calls, dict):
            by, calls = [], {}  # another solver may call other things so
        part.keep(name, {"data": perturbed, "by": by, "calls": calls})
        return perturbed, by, calls


@contextmanager
def _seeded(device: torch.device, *values: object) -> Iterator[int]:
    """Context: torch's own generators, which random models use, are seeded; restored on exit.

    Only the values determine the seed, which it gives.
    """
    seed = int(fingerprint(*values), 16) % 2**63
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield seed
