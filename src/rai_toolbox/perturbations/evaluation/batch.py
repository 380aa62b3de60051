"""The evaluation of one batch, which only the batch and the seed determine."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rai_toolbox.extras import Bar
from rai_toolbox.perturbations.evaluation.plot import Examples
from rai_toolbox.perturbations.evaluation.report import RobustnessReport
from rai_toolbox.perturbations.evaluation.verification import (
    Prediction,
    VerificationReport,
    compare,
    predict,
)
from rai_toolbox.perturbations.inputs import Ball, Model, Range
from rai_toolbox.perturbations.solvers import ZeroGradientWarning

__all__ = ["BatchEvaluation", "Perturbed"]


class Perturbed(Protocol):
    """What a solver returns, of which only the perturbed data are used."""

    @property
    def data(self) -> Tensor:
        """The perturbed data, in the shape of the originals."""


class BatchEvaluation(NamedTuple):
    """The settings that are the same for all batches."""

    model: Model
    balls: Mapping[str, list[Ball]]
    data_range: Range
    solver: Callable[..., Perturbed]
    seed: int

    def report(
        self, start: RobustnessReport, data: Tensor, target: Tensor, batch: str, bar: Bar
    ) -> RobustnessReport:
        """The report of one batch; `start` has the settings."""
        withstood, checks = {}, {}
        with _seeded(_seed(self.seed, batch), data.device):
            before = predict(self.model, data, target)
            for norm, balls in self.balls.items():
                robust, found = ~before.wrong, []
                count = robust.long() - 1
                for ball in balls:
                    check, robust = self._attack(data, target, before, robust, ball, batch)
                    count += robust
                    found.append(check)
                    bar.update()
                withstood[norm], checks[norm] = tuple(count.tolist()), tuple(found)
        return replace(start, withstood=withstood, checks=checks)

    def examples(
        self, data: Tensor, target: Tensor, batch: str, number: int
    ) -> tuple[Examples, ...]:
        """The first data that are predicted right, perturbed in the largest ball of each norm."""
        found = []
        with _seeded(_seed(self.seed, batch), data.device):
            right = ~predict(self.model, data, target, gradient=False).wrong
            rows = right.nonzero().squeeze(1)[:number]
            data, target = data[rows], target[rows]
            for norm, balls in self.balls.items() if len(rows) else ():
                perturbed = self._perturb(data, target, balls[-1], batch)
                classes = predict(self.model, perturbed, target, gradient=False).classes
                kept = (tensor.cpu() for tensor in (data, perturbed, target, classes))
                found.append(Examples(norm, float(balls[-1].epsilon), *kept))
        return tuple(found)

    def _attack(
        self,
        data: Tensor,
        target: Tensor,
        before: Prediction,
        robust: Tensor,
        ball: Ball,
        batch: str,
    ) -> tuple[VerificationReport, Tensor]:
        """Attack the examples that are robust so far, and verify; which of them are robust now."""
        rows = robust.nonzero().squeeze(1)
        if ball.epsilon == 0 or not len(rows):  # the only point of that ball is the original
            return VerificationReport(), robust
        data, target = data[rows], target[rows]
        perturbed = self._perturb(data, target, ball, batch)
        after = predict(self.model, perturbed, target, gradient=False)
        report, fooled = compare(data, perturbed, before.rows(rows), after, ball, self.data_range)
        return report, robust.index_fill(0, rows[fooled], False)

    def _perturb(self, data: Tensor, target: Tensor, ball: Ball, batch: str) -> Tensor:
        """The solver's perturbed data, with random numbers that only batch and ball determine."""
        if ball.epsilon == 0:
            return data
        seed = _seed(self.seed, batch, repr(ball))
        with _seeded(seed, data.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", ZeroGradientWarning)  # the report counts them
            found = self.solver(
                self.model,
                data,
                target,
                ball=ball,
                data_range=self.data_range,
                generator=torch.Generator().manual_seed(seed),
            )
        perturbed = getattr(found, "data", None)
        if not isinstance(perturbed, Tensor):
            raise TypeError(
                f"`solver` must return an object with `data`, got {type(found).__name__}"
            )
        if perturbed.shape != data.shape or perturbed.dtype != data.dtype:
            raise ValueError(
                f"`solver` must return data of shape {tuple(data.shape)} and {data.dtype}, got "
                f"shape {tuple(perturbed.shape)} and {perturbed.dtype}"
            )
        return perturbed.detach()


def _seed(*values: object) -> int:
    """A seed that only the `repr` of these values determines."""
    text = repr(values).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context: torch's own generators, which random models use, are seeded; restored on exit."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
