"""The rows of a robustness report: accuracies with confidence intervals, and examples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rai_toolbox.perturbations.evaluation.verification import VerificationReport

__all__ = ["Examples", "Row", "fraction", "wilson_interval"]


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
    """Some data, their perturbations in one ball, and the predictions of the model."""

    norm: str
    epsilon: float
    data: Tensor
    perturbed: Tensor
    target: Tensor
    reading: Tensor


def fraction(count: int, total: int) -> float:
    """``count / total``; NaN if both are 0."""
    return count / total if total else float("nan")


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of the fraction ``count / total`` (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, share = 1.959963984540054, count / total
    center = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + (z / (2 * total)) ** 2) ** 0.5
    low, high = ((center + side * half) / (1 + z**2 / total) for side in (-1, 1))
    return (0.0 if count == 0 else low), (1.0 if count == total else high)
