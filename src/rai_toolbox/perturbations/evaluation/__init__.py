"""Evaluation of robustness: attack, verify, report, resume."""
