"""The table of robust accuracies that an evaluation ends with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rai_toolbox.perturbations.box import Ball
from rai_toolbox.perturbations.verification import (
    NORMS,
    VerificationReport,
    check_ball,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Examples", "RobustnessReport", "RobustnessWarning", "Row"]

FORMAT = "rai_toolbox robustness 1"


class RobustnessWarning(UserWarning):
    """A reason not to take a robust accuracy at its word."""


class Examples(NamedTuple):
    """Some data, what a solver made of them in one ball, and what the model reads."""

    norm: str
    epsilon: float
    data: Tensor
    perturbed: Tensor
    target: Tensor
    reading: Tensor


class Row(NamedTuple):
    """One line of the table: a norm, an epsilon, and of how many data what is so."""

    norm: str
    epsilon: float
    data: int
    clean_accuracy: float
    robust_accuracy: float
    low: float
    high: float
    checks: VerificationReport


@dataclass(frozen=True)
class RobustnessReport:
    """Clean and robust accuracy per norm and epsilon, with the verification of each attack.

    A datum is robust at an epsilon if it is read right as it is, and neither this epsilon nor a
    smaller one of the same norm has fooled the model; so accuracy never rises with epsilon.

    Parameters
    ----------
    settings : Mapping
        What was evaluated, as plain data.
    epsilons : Mapping[str, Sequence[float]]
        The radii of each norm, ascending.
    withstood : Mapping[str, Sequence[int]]
        For each norm and datum, how many of the radii do not fool the model; -1 for a datum that is
        misread as it is.
    checks : Mapping[str, Sequence[VerificationReport]]
        For each norm and radius, what was found of the data that were attacked there.
    examples : Sequence[Examples]
        For pictures; not part of `to_json`.

    Raises
    ------
    ValueError
        If the parts do not fit each other.

    Examples
    --------
    >>> from rai_toolbox.perturbations.report import RobustnessReport, VerificationReport
    >>> report = RobustnessReport(
    ...     settings={},
    ...     epsilons={"Linf": (0.1, 0.2)},
    ...     withstood={"Linf": (2, 1, 0, -1)},
    ...     checks={"Linf": (VerificationReport(3, 1), VerificationReport(2, 1))},
    ... )
    >>> print(report)
    norm  epsilon   data   clean  robust   95% interval
    Linf      0.1      4   75.0%   50.0%  15.0% - 85.0%
    Linf      0.2      4   75.0%   25.0%   4.6% - 69.9%
    """

    settings: Mapping[str, Any]
    epsilons: Mapping[str, Sequence[float]]
    withstood: Mapping[str, Sequence[int]]
    checks: Mapping[str, Sequence[VerificationReport]]
    examples: Sequence[Examples] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.epsilons or not set(self.epsilons) == set(self.withstood) == set(self.checks):
            raise ValueError(
                "`epsilons`, `withstood` and `checks` must have the same norms, at least one, got "
                f"{list(self.epsilons)}, {list(self.withstood)} and {list(self.checks)}"
            )
        for name, epsilons in self.epsilons.items():
            if not epsilons or list(epsilons) != sorted(set(epsilons)):
                raise ValueError(f"`epsilons` must ascend in each norm, got {epsilons} for {name}")
            if len(epsilons) != len(self.checks[name]):
                raise ValueError(
                    f"`checks` must be one per epsilon, got {len(self.checks[name])} for {name}"
                )
            wrong = [k for k in self.withstood[name] if not -1 <= k <= len(epsilons)]
            if wrong:
                raise ValueError(
                    f"`withstood` must be in [-1, {len(epsilons)}] for {name}, got {wrong[0]}"
                )
        if len({len(found) for found in self.withstood.values()}) != 1:
            raise ValueError("`withstood` must tell of the same data for each norm")

    def __len__(self) -> int:
        return len(next(iter(self.withstood.values())))

    @property
    def clean_accuracy(self) -> float:
        """The share of data that are read right as they are; NaN of no data."""
        return _share(sum(k >= 0 for k in next(iter(self.withstood.values()))), len(self))

    def robust_accuracy(self, ball: Ball) -> float:
        """The share of data that are read right all over `ball`, as far as was found.

        Raises
        ------
        ValueError
            If this ball was not evaluated.
        """
        check_ball(ball)
        name = NORMS[type(ball)][0]
        for row in self.rows():
            if (row.norm, row.epsilon) == (name, ball.epsilon):
                return row.robust_accuracy
        raise ValueError(
            f"`ball` must be one that was evaluated, {dict(self.epsilons)}, got {ball!r}"
        )

    def rows(self) -> list[Row]:
        """The table."""
        rows = []
        for name, epsilons in self.epsilons.items():
            for i, epsilon in enumerate(epsilons):
                robust = sum(k > i for k in self.withstood[name])
                shares = self.clean_accuracy, _share(robust, len(self))
                interval = wilson_interval(robust, len(self))
                checks = self.checks[name][i]
                rows.append(Row(name, epsilon, len(self), *shares, *interval, checks))
        return rows

    @property
    def feasible(self) -> bool:
        """Whether all that the solver returned was finite, in its ball and in the data range."""
        return all(row.checks.feasible for row in self.rows())

    def warnings(self) -> list[str]:
        """Reasons not to take the table at its word, in words."""
        said = [
            line
            for row in self.rows()
            for line in row.checks.warnings(f"{row.norm} {row.epsilon:g}")
        ]
        if self.clean_accuracy == 0:
            said.insert(0, "no datum is read right as it is: are data, range and targets right?")
        return said

    def __str__(self) -> str:
        lines = [("norm", "epsilon", "data", "clean", "robust", "95% interval")] + [
            (
                row.norm,
                f"{row.epsilon:g}",
                f"{row.data}",
                f"{row.clean_accuracy:.1%}",
                f"{row.robust_accuracy:.1%}",
                f"{row.low:.1%} - {row.high:.1%}",
            )
            for row in self.rows()
        ]
        return "\n".join(
            f"{norm:<5} {epsilon:>7} {data:>6} {clean:>7} {robust:>7}  {interval:>13}"
            for norm, epsilon, data, clean, robust, interval in lines
        )

    # Parts

    @classmethod
    def merged(cls, parts: Sequence[RobustnessReport]) -> RobustnessReport:
        """The report of all data of `parts`, such as the shards of several processes, in order.

        Raises
        ------
        ValueError
            If there is no part, or settings or epsilons differ.
        """
        if not parts:
            raise ValueError("`parts` must be one report at least, got none")
        first = parts[0]
        for part in parts[1:]:
            if (part.settings, part.epsilons) != (first.settings, first.epsilons):
                raise ValueError(
                    "`parts` must have the same settings and epsilons, got "
                    f"{part.settings}, {part.epsilons} and {first.settings}, {first.epsilons}"
                )
        return replace(
            first,
            withstood={
                name: tuple(k for part in parts for k in part.withstood[name])
                for name in first.epsilons
            },
            checks={
                name: tuple(
                    sum((part.checks[name][i] for part in parts), VerificationReport())
                    for i in range(len(epsilons))
                )
                for name, epsilons in first.epsilons.items()
            },
            examples=next((part.examples for part in parts if part.examples), ()),
        )

    # Files

    def to_plain(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "epsilons": {name: list(found) for name, found in self.epsilons.items()},
            "withstood": {name: list(found) for name, found in self.withstood.items()},
            "checks": {
                name: [check.to_plain() for check in found] for name, found in self.checks.items()
            },
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RobustnessReport:
        """The report that `to_plain` gave as plain data.

        Raises
        ------
        ValueError
            If this is something else.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, Mapping) else type(plain).__name__
            raise ValueError(f"`format` of a report must be {FORMAT!r}, got {found!r}")
        return cls(
            plain["settings"],
            {name: tuple(found) for name, found in plain["epsilons"].items()},
            {name: tuple(found) for name, found in plain["withstood"].items()},
            {
                name: tuple(VerificationReport(**check) for check in found)
                for name, found in plain["checks"].items()
            },
        )

    def to_json(self) -> str:
        """The report as JSON; beside what `from_json` reads it has the table, for other readers."""
        table = [
            {name: None if value != value else value for name, value in line.items()}
            for line in map(_flat, self.rows())
        ]
        return json.dumps(self.to_plain() | {"table": table}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        """The report that `to_json` gave; without examples.

        Raises
        ------
        ValueError
            If this is something else.
        """
        return cls.from_plain(json.loads(text))

    def to_csv(self) -> str:
        """The table as comma-separated values, with the checks of each row."""
        lines = [_flat(row) for row in self.rows()]
        text = io.StringIO()
        table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        return text.getvalue()

    # Pictures

    def plot(self) -> Figure:
        """Accuracy against epsilon, a panel per norm, and the examples below where there are any.

        Needs matplotlib: ``pip install "rai-toolbox[plots]"``. The figure is in no window; write it
        by its ``savefig``.
        """
        from rai_toolbox.perturbations.picture import draw_report  # which imports this file

        return draw_report(self)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Where the share that `count` of `total` cases estimate is with 95 % (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959963984540054, count / total
    center = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + (z / (2 * total)) ** 2) ** 0.5
    low, high = ((center + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


def _flat(row: Row) -> dict[str, Any]:
    """A row with its checks, as columns of one table."""
    plain = row._asdict()
    checks = row.checks.to_plain()
    del plain["checks"]
    return plain | {"attacked": checks.pop("data")} | checks


def _share(count: int, total: int) -> float:
    return count / total if total else float("nan")
