"""What a law is tried on: a set, and batches of points that find out its faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints import Constraint
from rai_toolbox.constraints.kernels.rounding import noise, spacing

_SLACK = 4  # units of the last place that a projection may be off, of its own size and of the set's
_SUMS = 8  # errors of a sum in float64


@dataclass(frozen=True, eq=False)
class Trial:
    """A set and the batches to try it on.

    Parameters
    ----------
    constraint : Constraint
        The set.
    shape : tuple of int
        Of the batches, ``(N, ...)``; the settings of the set must broadcast against it.
    dtype : torch.dtype
        Of the batches.
    scale : float
        The magnitude of the entries of points of the set. Points are tried around it, and far
        above and below it.
    seed : int
        Of the random points.
    tolerance : float
        The relative accuracy of a set that iterates; 0 for rounding errors only.
    reach : float
        How many times as large, and as small, as the set's own are the points that are tried.
    """

    constraint: Constraint
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    seed: int = 0
    tolerance: float = 0.0
    reach: float = 10.0

    def __str__(self) -> str:
        tried = f"scale {self.scale:g}, shape {self.shape}"
        allowed = f"reach={self.reach:g}, tolerance={self.tolerance:g}"
        return f"{self.constraint!r}, {self.dtype}, {tried}, {allowed}"

    def generator(self, salt: int = 0) -> Generator:
        """A generator of random numbers, another one for each `salt`."""
        return Generator().manual_seed(1000 * self.seed + salt)

    def normal(self, salt: int, size: float = 1.0) -> Tensor:
        """A batch of normal numbers of magnitude `size`, in units of the scale of the set."""
        drawn = torch.randn(self.shape, generator=self.generator(salt), dtype=torch.float64)
        return self.held(drawn * size * self.scale)

    def held(self, x: Tensor) -> Tensor:
        """Float64 `x` in the dtype, which has to hold it and sums of few such numbers."""
        most = torch.finfo(self.dtype).max / 8
        return x.clamp(-most, most).to(self.dtype)

    def projected(self, x: Tensor) -> Tensor:
        """The projection of a batch, in place; float64 is `held` in the dtype first."""
        x = self.held(x) if x.dtype != self.dtype else x
        return self.constraint.project_(x.clone(memory_format=torch.contiguous_format))

    @cached_property
    def batches(self) -> list[Tensor]:
        """Batches in which each kind of row occurs twice, or more often."""
        count = math.ceil(2 * len(_KINDS) / max(1, self.shape[0]))
        return [self._batch(i) for i in range(count)]

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The batches, each with its projection."""
        return [(x, self.projected(x)) for x in self.batches]

    @cached_property
    def members(self) -> list[Tensor]:
        """Points of the set, of all of its size."""
        members = [self.projected(torch.zeros(self.shape, dtype=self.dtype))]
        members += [self.projected(self.normal(200)), self.projected(self.normal(230, 100.0))]
        if self.constraint.bounded:
            blank = torch.empty(self.shape, dtype=self.dtype)
            members.append(self.constraint.sample_(blank, self.generator(260)))
        return members

    @cached_property
    def neighbors(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each batch other points, near its own and far, each with its projection."""
        found = []
        for index, x in enumerate(self.batches):
            wide = x.double()
            size = self.column(wide.abs().flatten(1).amax(1)) / self.scale
            far = size * self.normal(360 + index)
            steps = (self.normal(300 + index), self.normal(330 + index, 1e-3), far)
            points = [self.held(wide + step) for step in steps]
            found.append([(point, self.projected(point)) for point in points])
        return found

    def _batch(self, index: int) -> Tensor:
        rows, size = self.shape[0], math.prod(self.shape[1:])
        normal = torch.randn(rows, size, generator=self.generator(10 + index), dtype=torch.float64)
        each = torch.randn(rows, 1, generator=self.generator(50 + index), dtype=torch.float64)
        many = torch.stack([self.scale * kind(normal, each, self) for kind in _KINDS])
        kind = (torch.arange(rows) + index * rows) % len(_KINDS)
        x = self.held(many[kind, torch.arange(rows)].view(self.shape))
        # Some rows near the boundary: on both of its sides by rounding, and clearly off it.
        point = self.projected(self.normal(90 + index, 3.0)).double()
        largest = point.flatten(1).abs().amax(1)
        step = torch.where(
            kind == _BESIDE, 2 * torch.finfo(self.dtype).eps * largest, self.scale / 1e3
        )
        off = self.normal(130 + index).double() / self.scale
        beside = self.held(point + self.column(step) * off)
        at = self.column((kind == _BESIDE) | (kind == _NEAR)) & beside.isfinite()
        return torch.where(at, beside, x)

    # Rows in float64

    def wide(self, x: Tensor) -> Tensor:
        """The rows of a batch in float64, flattened."""
        return x.detach().double().reshape(len(x), -1)

    def length(self, x: Tensor) -> Tensor:
        """The Euclidean norm of each row."""
        return torch.linalg.vector_norm(self.wide(x), dim=1)

    def column(self, of_rows: Tensor) -> Tensor:
        """A value per row, to broadcast against a batch."""
        return of_rows.view(-1, *(1,) * (len(self.shape) - 1))

    def slack(self, *points: Tensor) -> Tensor:
        """How far rounding may lead each row, at points of the set as large as these.

        All tolerances come from here: a few units in the last place of the largest of them and
        of the set's own size, or of the smallest numbers that the dtype has; and a few errors of
        sums in float64, which count in float64 only.
        """
        entries = math.prod(self.shape[1:])
        size = torch.stack([self.length(p) for p in points]).amax(0) + self.scale * entries**0.5
        relative = _SLACK * torch.finfo(self.dtype).eps + _SUMS * noise(entries) + self.tolerance
        return relative * size + _SLACK * spacing(self.dtype) * entries**0.5

    def coarse(self, x: Tensor) -> Tensor:
        """How far float64 arithmetic on rows as large as those of x may be off."""
        return _SUMS * noise(math.prod(self.shape[1:])) * self.length(x)

    def require(self, right: Tensor, found: Tensor, rule: str, x: Tensor | None = None) -> None:
        """Raise unless each row is right; name the worst one, the largest `found` of the others."""
        if bool(right.all()):
            return
        found = found.double()
        blamed = torch.where(right, -math.inf, found.nan_to_num(math.inf, math.inf))
        worst = int(blamed.argmax())
        message = f"{rule}; row {worst} is worst, of {int((~right).sum())} of {len(right)}: "
        message += f"{found[worst].item():.6g}"
        if x is not None:
            message += f" at {x[worst].detach().flatten()[:12].tolist()}"
        raise AssertionError(message)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """For each row, whether its bits are the same in both: -0.0 is not 0.0, and NaN is NaN."""
    alike = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
    return alike.reshape(len(a), -1).all(1)


def _one_entry(normal: Tensor, each: Tensor, trial: Trial) -> Tensor:
    at = torch.nn.functional.one_hot(normal.argmax(1), normal.shape[1])
    return 3 * each * at


def _huge(trial: Trial) -> float:
    return max(1.0, min(trial.reach, torch.finfo(trial.dtype).max / (1e3 * trial.scale)))


# Rows in units of the scale, from a normal row and a normal number.
_KINDS: list[Callable[[Tensor, Tensor, Trial], Tensor]] = [
    lambda normal, each, trial: normal,
    lambda normal, each, trial: normal,  # this and the next are replaced by rows near the boundary
    lambda normal, each, trial: normal,
    lambda normal, each, trial: 3 * normal + 4 * each,
    lambda normal, each, trial: normal.round(),  # ties
    lambda normal, each, trial: 0 * normal,  # zeros of either sign
    lambda normal, each, trial: each.expand_as(normal),
    lambda normal, each, trial: _huge(trial) * normal,
    lambda normal, each, trial: _huge(trial) * normal.round(),
    lambda normal, each, trial: normal / trial.reach,
    lambda normal, each, trial: normal * trial.reach ** normal.roll(1, 1).clamp(-1, 1),
    lambda normal, each, trial: trial.reach**0.3 + normal,
    _one_entry,
]
_BESIDE, _NEAR = 1, 2
