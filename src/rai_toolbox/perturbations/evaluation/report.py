"""The report of an evaluation: robust accuracies per norm and epsilon, as tables and files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rai_toolbox.constraints.balls import Ball
from rai_toolbox.perturbations.evaluation.plot import draw_report
from rai_toolbox.perturbations.evaluation.verification import VerificationReport
from rai_toolbox.perturbations.inputs import check_ball, wrong

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "rai_toolbox robustness 1"


class RobustnessWarning(UserWarning):
    """A reason to doubt a robust accuracy."""


class Row(NamedTuple):
    """Accuracies at one epsilon, with the 95 % interval of the robust one, and the checks."""

    norm: str
    epsilon: float
    data: int
    clean_accuracy: float
    robust_accuracy: float
    low: float
    high: float
    checks: VerificationReport


class Examples(NamedTuple):
    """Some data, their perturbations in one ball, what the model predicts, and where it is wrong.

    With a rule `correct`, `reading` is the output of the model, if it has one entry per example.
    """

    norm: str
    epsilon: float
    data: Tensor
    perturbed: Tensor
    target: Tensor
    reading: Tensor
    misread: Tensor | None = None


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
            got = f"{list(self.epsilons)}, {list(self.withstood)} and {list(self.checks)}"
            names = "epsilons`, `withstood` and `checks"
            raise wrong(names, "have the same norms, at least one", got)
        for name, epsilons in self.epsilons.items():
            if not epsilons or list(epsilons) != sorted(set(epsilons)):
                raise wrong("epsilons", "ascend in each norm", f"{epsilons} for {name}")
            if len(epsilons) != len(self.checks[name]):
                raise wrong("checks", "be one per epsilon", f"{len(self.checks[name])} for {name}")
            outside = [k for k in self.withstood[name] if not -1 <= k <= len(epsilons)]
            if outside:
                raise wrong("withstood", f"be in [-1, {len(epsilons)}] for {name}", outside[0])
        if len({len(found) for found in self.withstood.values()}) != 1:
            raise wrong("withstood", "be of the same data for each norm", "others")

    def __len__(self) -> int:
        return len(next(iter(self.withstood.values())))

    @property
    def clean_accuracy(self) -> float:
        """The fraction of originals that are predicted right; NaN if there are none."""
        return self.rows_of(next(iter(self.epsilons)))[0].robust_accuracy

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
        raise wrong("ball", f"be one that was evaluated, {dict(self.epsilons)}", ball)

    def rows(self) -> list[Row]:
        """The table."""
        return [row for norm in self.epsilons for row in self.rows_of(norm)[1:]]

    def rows_of(self, norm: str) -> list[Row]:
        """The rows of a norm, after one of the originals at epsilon 0."""
        withstood, total = self.withstood[norm], len(self)
        epsilons, checks = (0.0, *self.epsilons[norm]), (VerificationReport(), *self.checks[norm])
        robust = [sum(k >= number for k in withstood) for number in range(len(epsilons))]
        rows = []
        for epsilon, count, check in zip(epsilons, robust, checks, strict=True):
            clean, here = (number / total if total else nan for number in (robust[0], count))
            interval = wilson_interval(count, total)
            rows.append(Row(norm, epsilon, total, clean, here, *interval, check))
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

    def __str__(self) -> str:
        lines = ["norm  epsilon   data   clean  robust   95% interval"]
        for row in self.rows():
            accuracies = f"{row.clean_accuracy:>7.1%} {row.robust_accuracy:>7.1%}"
            interval = f"{row.low:.1%} - {row.high:.1%}"
            start = f"{row.norm:<5} {row.epsilon:>7g} {row.data:>6}"
            lines.append(f"{start} {accuracies}  {interval:>13}")
        return "\n".join(lines)

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
            raise wrong("parts", "be one report at least", "none")
        first = parts[0]
        for part in parts[1:]:
            if (part.settings, part.epsilons) != (first.settings, first.epsilons):
                got = " and ".join(f"{r.settings}, {r.epsilons}" for r in (part, first))
                raise wrong("parts", "have the same settings and epsilons", got)
        withstood, checks = {}, {}
        for name in first.epsilons:
            withstood[name] = tuple(k for part in parts for k in part.withstood[name])
            of_radii = zip(*(part.checks[name] for part in parts), strict=True)
            checks[name] = tuple(sum(found, VerificationReport()) for found in of_radii)
        examples = next((part.examples for part in parts if part.examples), ())
        return replace(first, withstood=withstood, checks=checks, examples=examples)

    # Files

    def to_plain(self) -> dict[str, Any]:
        """The report as plain data."""
        plain = asdict(replace(self, examples=()))
        del plain["examples"]
        return {"format": FORMAT, **plain}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RobustnessReport:
        """The report of the plain data of `to_plain`.

        Raises
        ------
        ValueError
            If this is something else.
        """
        found = plain.get("format") if isinstance(plain, Mapping) else type(plain).__name__
        if found != FORMAT:
            raise wrong("format", f"be {FORMAT!r}", repr(found))
        epsilons, withstood, checks = (
            {norm: tuple(values) for norm, values in plain[name].items()}
            for name in ("epsilons", "withstood", "checks")
        )
        for norm, found in checks.items():
            checks[norm] = tuple(VerificationReport(**check) for check in found)
        return cls(plain["settings"], epsilons, withstood, checks)

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
        figure: Figure = draw_report(self)
        return figure


def _flat(row: Row) -> dict[str, Any]:
    """A row with its checks, as columns of one table."""
    plain = row._asdict()
    checks: dict[str, Any] = plain.pop("checks").to_plain()
    return plain | {"attacked": checks.pop("data")} | checks


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of the fraction ``count / total`` (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959963984540054, count / total
    center = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + (z / (2 * total)) ** 2) ** 0.5
    low, high = ((center + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return (0.0 if count == 0 else low), (1.0 if count == total else high)
