"""The report of an evaluation: robust accuracies per norm and epsilon, as tables and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rai_toolbox.perturbations.evaluation.interval import fraction, wilson_interval
from rai_toolbox.perturbations.evaluation.plot import Curve, Examples, draw
from rai_toolbox.perturbations.evaluation.verification import VerificationReport
from rai_toolbox.perturbations.inputs import Ball, check_ball

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RobustnessReport", "RobustnessWarning", "Row"]

FORMAT = "rai_toolbox robustness 1"


class RobustnessWarning(UserWarning):
    """A reason to doubt a robust accuracy."""


class Row(NamedTuple):
    """One line of the table: accuracies, with the 95 % interval of the robust one, and checks."""

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

    An example is robust at an epsilon if the original is predicted right, and no perturbation at
    this or a smaller epsilon of the norm fooled the model. So accuracy never rises with epsilon.

    Parameters
    ----------
    settings : Mapping
        The settings of the evaluation, as plain data.
    epsilons : Mapping[str, Sequence[float]]
        The radii of each norm, ascending.
    withstood : Mapping[str, Sequence[int]]
        For each norm and example, the number of radii at which it is robust; -1 if the original is
        predicted wrong.
    checks : Mapping[str, Sequence[VerificationReport]]
        For each norm and radius, the verification of the examples that were attacked there.
    examples : Sequence[Examples]
        For figures; not part of `to_json`.

    Raises
    ------
    ValueError
        If the parts do not fit each other.

    Examples
    --------
    >>> from rai_toolbox.perturbations import RobustnessReport, VerificationReport
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
            raise ValueError("`withstood` must be of the same data for each norm")

    def __len__(self) -> int:
        return len(next(iter(self.withstood.values())))

    @property
    def clean_accuracy(self) -> float:
        """The fraction of originals that are predicted right; NaN if there are none."""
        return fraction(self._number_right(next(iter(self.epsilons)), 0), len(self))

    def robust_accuracy(self, ball: Ball) -> float:
        """The fraction of examples for which nothing was found in `ball` that fools the model.

        Raises
        ------
        ValueError
            If this ball was not evaluated.
        """
        check_ball(ball)
        for row in self.rows():
            if (row.norm, row.epsilon) == (ball.norm_name, ball.epsilon):
                return row.robust_accuracy
        raise ValueError(
            f"`ball` must be one that was evaluated, {dict(self.epsilons)}, got {ball!r}"
        )

    def rows(self) -> list[Row]:
        """The table."""
        rows = []
        for norm, epsilons in self.epsilons.items():
            for i, epsilon in enumerate(epsilons):
                robust = self._number_right(norm, i + 1)
                accuracies = self.clean_accuracy, fraction(robust, len(self))
                interval = wilson_interval(robust, len(self))
                checks = self.checks[norm][i]
                rows.append(Row(norm, epsilon, len(self), *accuracies, *interval, checks))
        return rows

    @property
    def feasible(self) -> bool:
        """Whether all perturbed data were finite, in their balls and in the data range."""
        return all(row.checks.feasible for row in self.rows())

    def warnings(self) -> list[str]:
        """Reasons to doubt the table, as sentences."""
        found = []
        if self.clean_accuracy == 0:
            found.append("no original is predicted right: are data, range and targets right?")
        for row in self.rows():
            found += row.checks.warnings(f"{row.norm} {row.epsilon:g}")
        return found

    def _number_right(self, norm: str, number: int) -> int:
        """The number of examples that are robust at the first `number` radii of a norm."""
        return sum(k >= number for k in self.withstood[norm])

    def __str__(self) -> str:
        return "\n".join(
            ["norm  epsilon   data   clean  robust   95% interval"]
            + [
                f"{row.norm:<5} {f'{row.epsilon:g}':>7} {row.data:>6} {row.clean_accuracy:>7.1%} "
                f"{row.robust_accuracy:>7.1%}  {f'{row.low:.1%} - {row.high:.1%}':>13}"
                for row in self.rows()
            ]
        )

    # Parts

    @classmethod
    def merged(cls, parts: Sequence[RobustnessReport]) -> RobustnessReport:
        """The report of all examples of `parts`, in order, such as parts of several processes.

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
        """The report of the plain data of `to_plain`.

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
        """The report as JSON, which also has the table: `from_json` ignores it."""
        table = [
            {name: None if value != value else value for name, value in _flat(row).items()}
            for row in self.rows()
        ]
        return json.dumps(self.to_plain() | {"table": table}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RobustnessReport:
        """The report of the text of `to_json`; without examples.

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

    def plot(self) -> Figure:
        """Accuracy against epsilon, a panel per norm, and the examples below.

        Requires matplotlib: ``pip install "rai-toolbox[plots]"``. The figure opens no window; write
        it with its method ``savefig``.
        """
        curves = {
            norm: Curve(
                (0.0, *epsilons),
                [self._number_right(norm, i) for i in range(len(epsilons) + 1)],
                len(self),
            )
            for norm, epsilons in self.epsilons.items()
        }
        return draw(curves, self.examples)


def _flat(row: Row) -> dict[str, Any]:
    """A row with its checks, as columns of one table."""
    plain, checks = row._asdict(), row.checks.to_plain()
    del plain["checks"]
    return plain | {"attacked": checks.pop("data")} | checks
