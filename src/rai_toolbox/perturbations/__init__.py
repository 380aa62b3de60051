"""Perturbations of data: models of them, solvers for the worst, and robustness against it."""

from rai_toolbox.perturbations.additive import AdditivePerturbation, MaskedPerturbation
from rai_toolbox.perturbations.attack import Attacked, attack
from rai_toolbox.perturbations.color import ColorShift
from rai_toolbox.perturbations.evaluation import evaluate_robustness
from rai_toolbox.perturbations.gradient_ascent import ZeroGradientWarning, gradient_ascent
from rai_toolbox.perturbations.initializers import (
    uniform_like_l1_n_ball_,
    uniform_like_l2_n_ball_,
    uniform_like_linf_n_ball_,
)
from rai_toolbox.perturbations.losses import (
    cross_entropy,
    dlr_loss,
    is_fooled,
    margin_loss,
    most_likely_rivals,
    rival_margin,
    targeted_dlr_loss,
)
from rai_toolbox.perturbations.minimum_norm import MinimumNorm, minimum_norm_attack
from rai_toolbox.perturbations.protocol import PerturbationModel
from rai_toolbox.perturbations.report import Examples, RobustnessReport, RobustnessWarning
from rai_toolbox.perturbations.restart import random_restart
from rai_toolbox.perturbations.rivals import nearest_rivals
from rai_toolbox.perturbations.state_file import StateFileError
from rai_toolbox.perturbations.universal import UniversalPerturbation, universal_perturbation
from rai_toolbox.perturbations.verification import VerificationReport, verify
from rai_toolbox.perturbations.warp import AffineWarp

__all__ = [
    "AdditivePerturbation",
    "AffineWarp",
    "Attacked",
    "ColorShift",
    "Examples",
    "MaskedPerturbation",
    "MinimumNorm",
    "PerturbationModel",
    "RobustnessReport",
    "RobustnessWarning",
    "StateFileError",
    "UniversalPerturbation",
    "VerificationReport",
    "ZeroGradientWarning",
    "attack",
    "cross_entropy",
    "dlr_loss",
    "evaluate_robustness",
    "gradient_ascent",
    "is_fooled",
    "margin_loss",
    "minimum_norm_attack",
    "most_likely_rivals",
    "nearest_rivals",
    "random_restart",
    "rival_margin",
    "targeted_dlr_loss",
    "uniform_like_l1_n_ball_",
    "uniform_like_l2_n_ball_",
    "uniform_like_linf_n_ball_",
    "universal_perturbation",
    "verify",
]
