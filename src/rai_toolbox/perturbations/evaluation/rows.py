"""The rows of the tables of a report, with their confidence intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

from rai_toolbox.perturbations.evaluation.verification import VerificationReport


class Row(NamedTuple):
    """Accuracies at one epsilon, with the 95 % interval of the robust one, and the checks.

    `unreliable` is why the robust accuracy is not to be trusted; empty if there is no reason known.
    """

    norm: str
    epsilon: float
    data: int
    clean_accuracy: float
    robust_accuracy: float
    low: float
    high: float
    checks: VerificationReport
    unreliable: str = ""


class AttackRow(NamedTuple):
    """What one attack of an ensemble did at one epsilon: examples fooled, and examples called."""

    norm: str
    epsilon: float
    attack: str
    fooled: int
    calls: int


class AttackTable(list[AttackRow]):
    """The rows of all attacks; as text, a table."""

    def __str__(self) -> str:
        wide = max((len(row.attack) for row in self), default=8)
        lines = [f"norm  epsilon  {'attack':<{wide}}  fooled     calls"]
        for norm, epsilon, attack, fooled, calls in self:
            lines.append(f"{norm:<5} {epsilon:>7g}  {attack:<{wide}} {fooled:>7} {calls:>9}")
        return "\n".join(lines)


def flat(row: Row) -> dict[str, Any]:
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
