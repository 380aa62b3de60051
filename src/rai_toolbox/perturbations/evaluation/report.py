"""The report of an evaluation: robust accuracies per norm and epsilon, as tables and files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from rai_toolbox.checks import wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.perturbations.ensemble import BLACK_BOX
from rai_toolbox.perturbations.evaluation.plot import draw_report
from rai_toolbox.perturbations.evaluation.rows import (
    AttackRow,
    AttackTable,
    Row,
    flat,
    wilson_interval,
)
from rai_toolbox.perturbations.evaluation.verification import VerificationReport
from rai_toolbox.perturbations.inputs import check_ball

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "rai_toolbox robustness 1"


class RobustnessWarning(UserWarning):
    """A reason to doubt a robust accuracy."""


_FEW = 0.002  # of all data may be fooled by the black box alone (Croce & Hein, 2020)


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
    fooled_by : Mapping[str, Sequence[str or None]]
        For each norm and example, the attack of an ensemble that fooled it, at the first radius at
        which it is not robust. None where no attack did, or the solver is no ensemble.
    calls : Mapping[str, Sequence[Mapping[str, int]]]
        For each norm and radius, the number of examples that each attack called the model with.

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
    fooled_by: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    calls: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.epsilons or not set(self.epsilons) == set(self.withstood) == set(self.checks):
            got = f"{list(self.epsilons)}, {list(self.withstood)} and {list(self.checks)}"
            names = "epsilons`, `withstood` and `checks"
            raise wrong(names, "have the same norms, at least one", got)
        for name, of, what in (
            ("checks", self.epsilons, "epsilon"),
            ("fooled_by", self.withstood, "example"),
            ("calls", self.epsilons, "epsilon"),
        ):
            for norm, found in getattr(self, name).items():
                if len(found) != len(of[norm]):
                    raise wrong(name, f"be one per {what}", f"{len(found)} for {norm}")
        for name, epsilons in self.epsilons.items():
            if not epsilons or list(epsilons) != sorted(set(epsilons)):
                raise wrong("epsilons", "ascend in each norm", f"{epsilons} for {name}")
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
        for number, (epsilon, count) in enumerate(zip(epsilons, robust, strict=True)):
            clean, here = (n / total if total else nan for n in (robust[0], count))
            interval, check = wilson_interval(count, total), checks[number]
            doubt = self._doubt(norm, number)
            rows.append(Row(norm, epsilon, total, clean, here, *interval, check, doubt))
        return rows

    def by_attack(self) -> AttackTable:
        """What each attack of an ensemble did at each norm and epsilon; empty for other solvers."""
        rows = AttackTable()
        for norm, calls in self.calls.items():
            for number, of_attacks in enumerate(calls):
                for attack, examples in of_attacks.items():
                    fooled = self._fooled_by(norm, attack)[number]
                    epsilon = self.epsilons[norm][number]
                    rows.append(AttackRow(norm, epsilon, attack, fooled, examples))
        return rows

    def _fooled_by(self, norm: str, attack: str) -> list[int]:
        """The number of examples that an attack fooled at each radius."""
        by = zip(self.fooled_by.get(norm, ()), self.withstood[norm], strict=False)
        radii = [radius for name, radius in by if name == attack]
        return [radii.count(radius) for radius in range(len(self.epsilons[norm]))]

    def _doubt(self, norm: str, number: int) -> str:
        """Why the robust accuracy after a number of radii is unreliable; empty if it may not be."""
        checks, reasons = self.checks[norm][:number], []
        if any(check.zero_gradient for check in checks):
            reasons.append("gradients are 0")
        blind = sum(sum(self._fooled_by(norm, name)[:number]) for name in BLACK_BOX)
        if blind > _FEW * len(self):
            reasons.append("the black box finds more than gradients")
        return ", ".join(reasons)

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
            name = f"{row.norm} {row.epsilon:g}"
            found += row.checks.warnings(name)
            if row.unreliable:
                found.append(f"{name}: the robust accuracy is unreliable: {row.unreliable}")
        return found

    def __str__(self) -> str:
        lines = ["norm  epsilon   data   clean  robust   95% interval"]
        for row in self.rows():
            accuracies = f"{row.clean_accuracy:>7.1%} {row.robust_accuracy:>7.1%}"
            interval = f"{row.low:.1%} - {row.high:.1%}"
            start = f"{row.norm:<5} {row.epsilon:>7g} {row.data:>6}"
            mark = f"  unreliable: {row.unreliable}" if row.unreliable else ""
            lines.append(f"{start} {accuracies}  {interval:>13}{mark}")
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
        attacks = _merged_attacks(parts)
        return replace(first, withstood=withstood, checks=checks, examples=examples, **attacks)

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
        attacks: dict[str, Any] = {
            name: {norm: tuple(values) for norm, values in plain.get(name, {}).items()}
            for name in ("fooled_by", "calls")  # which older reports lack
        }
        return cls(plain["settings"], epsilons, withstood, checks, **attacks)

    def to_json(self) -> str:
        """The report as JSON, which also has the tables: `from_json` ignores them."""
        table = [
            {name: None if value != value else value for name, value in flat(row).items()}
            for row in self.rows()
        ]
        tables = {"table": table, "attacks": [row._asdict() for row in self.by_attack()]}
        return json.dumps(self.to_plain() | tables, allow_nan=False) + "\n"

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
        lines = [flat(row) for row in self.rows()]
        text = io.StringIO()
        table = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        return text.getvalue()

    def plot(self, title: str = "") -> Figure:
        """Accuracy against epsilon, a panel per norm, and the examples below.

        The title is to name model and data; the attacks are named below it.

        Requires matplotlib: ``pip install "rai-constrained[plots]"``. The figure opens no window;
        write it with its method ``savefig``.
        """
        return draw_report(self, title)


def _merged_attacks(parts: Sequence[RobustnessReport]) -> dict[str, Any]:
    """What the attacks of ensembles did in all parts; nothing if in none."""
    if not any(part.calls for part in parts):
        return {}
    fooled_by, calls = dict[str, Any](), dict[str, Any]()
    for norm, epsilons in parts[0].epsilons.items():
        names, sums = list[str | None](), [Counter[str]() for _ in epsilons]
        for part in parts:
            names += part.fooled_by.get(norm) or [None] * len(part)
            for total, of_attacks in zip(sums, part.calls.get(norm, ()), strict=False):
                total.update(of_attacks)
        fooled_by[norm], calls[norm] = tuple(names), tuple(map(dict, sums))
    return {"fooled_by": fooled_by, "calls": calls}
