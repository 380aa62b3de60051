"""What an evaluation does with one batch, whoever does it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rai_toolbox.extras import Bar
from rai_toolbox.perturbations.ascent import Model, solving
from rai_toolbox.perturbations.box import Ball, Range
from rai_toolbox.perturbations.gradient_ascent import ZeroGradientWarning
from rai_toolbox.perturbations.report import Examples, RobustnessReport
from rai_toolbox.perturbations.verification import (
    Reading,
    VerificationReport,
    judge,
    read,
)

__all__ = ["Job", "Perturbed", "seed_of", "seeded"]


class Perturbed(Protocol):
    """What a solver returns; nothing but the perturbed data is believed."""

    @property
    def data(self) -> Tensor:
        """The perturbed data, in the shape of the originals."""


class Job(NamedTuple):
    """What is the same for all batches."""

    model: Model
    radii: Mapping[str, list[Ball]]
    data_range: Range
    solver: Callable[..., Perturbed]
    seed: int

    def report(
        self, start: RobustnessReport, data: Tensor, target: Tensor, batch: str, bar: Bar
    ) -> RobustnessReport:
        """What is found of one batch."""
        before = read(self.model, data, target)
        withstood, checks = {}, {}
        for name, balls in self.radii.items():
            robust = ~before.misread
            count = robust.long() - 1
            found = []
            for ball in balls:
                verified, robust = self._withstand(data, target, before, robust, ball, batch)
                count += robust
                found.append(verified)
                bar.update()
            withstood[name], checks[name] = tuple(count.tolist()), tuple(found)
        return RobustnessReport(start.settings, start.epsilons, withstood, checks)

    def _withstand(
        self,
        data: Tensor,
        target: Tensor,
        before: Reading,
        robust: Tensor,
        ball: Ball,
        batch: str,
    ) -> tuple[VerificationReport, Tensor]:
        """Attack those that are robust so far; which of them still are."""
        rows = robust.nonzero().squeeze(1)
        if ball.epsilon == 0 or not len(rows):  # that ball's one point has been read already
            return VerificationReport(), robust
        data, target = data[rows], target[rows]
        perturbed = self.perturbed(data, target, ball, batch)
        after = read(self.model, perturbed, target, gradient=False)
        verdict = judge(data, perturbed, before.at(rows), after, ball, self.data_range)
        robust = robust.index_fill(0, rows[verdict.fooled], False)
        return verdict.report(), robust

    def perturbed(self, data: Tensor, target: Tensor, ball: Ball, batch: str) -> Tensor:
        """What the solver makes of the data, with random numbers that only this batch decides."""
        if ball.epsilon == 0:
            return data
        seed = seed_of(self.seed, batch, repr(ball))
        with seeded(seed, data.device), warnings.catch_warnings():
            warnings.simplefilter("ignore", ZeroGradientWarning)  # the report tells of all of them
            answer = self.solver(
                self.model,
                data,
                target,
                ball=ball,
                data_range=self.data_range,
                generator=torch.Generator().manual_seed(seed),
            )
        perturbed = getattr(answer, "data", None)
        if not isinstance(perturbed, Tensor):
            raise TypeError(
                f"`solver` must return an object with `data`, got {type(answer).__name__}"
            )
        if perturbed.shape != data.shape or perturbed.dtype != data.dtype:
            raise ValueError(
                f"`solver` must return data of shape {tuple(data.shape)} and {data.dtype}, got "
                f"shape {tuple(perturbed.shape)} and {perturbed.dtype}"
            )
        return perturbed.detach()

    def examples(
        self, data: Tensor, target: Tensor, batch: str, number: int
    ) -> tuple[Examples, ...]:
        """What is done to the first data that are read right, in the largest ball of each norm."""
        right = ~read(self.model, data, target, gradient=False).misread
        rows = right.nonzero().squeeze(1)[:number]
        if not len(rows):
            return ()
        data, target = data[rows], target[rows]
        found = []
        for name, balls in self.radii.items():
            perturbed = self.perturbed(data, target, balls[-1], batch)
            with solving(self.model), torch.no_grad():
                reading = self.model(perturbed).argmax(1)
            kept = (tensor.cpu() for tensor in (data, perturbed, target, reading))
            found.append(Examples(name, float(balls[-1].epsilon), *kept))
        return tuple(found)


def seed_of(*values: object) -> int:
    """A seed that these values decide, by what `repr` tells of them."""
    text = repr(values).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators, which models that draw numbers use, seeded, and as before later."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
