"""Evaluation of robustness: attack, verify, report, resume."""

from rai_toolbox.perturbations.evaluation.run import evaluate_robustness

__all__ = ["evaluate_robustness"]
