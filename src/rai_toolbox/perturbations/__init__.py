"""Perturbations of data: models of them, solvers that find the worst, and evaluations."""

from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.classifier import classifier
from rai_toolbox.perturbations.ensemble import Ensembled, ensemble, short_ensemble, standard
from rai_toolbox.perturbations.evaluation.report import (
    Examples,
    RobustnessReport,
    RobustnessWarning,
)
from rai_toolbox.perturbations.evaluation.run import evaluate_robustness
from rai_toolbox.perturbations.evaluation.state_file import StateFileError
from rai_toolbox.perturbations.evaluation.verification import VerificationReport, verify
from rai_toolbox.perturbations.fab import fab_attack
from rai_toolbox.perturbations.init import (
    uniform_like_l1_n_ball_,
    uniform_like_l2_n_ball_,
    uniform_like_linf_n_ball_,
)
from rai_toolbox.perturbations.journal import Journal
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
from rai_toolbox.perturbations.models import (
    AdditivePerturbation,
    AffineWarp,
    ColorShift,
    MaskedPerturbation,
    PerturbationModel,
)
from rai_toolbox.perturbations.rivals import nearest_rivals
from rai_toolbox.perturbations.solve import Attacked
from rai_toolbox.perturbations.solvers import ZeroGradientWarning, gradient_ascent, random_restart
from rai_toolbox.perturbations.square import square_attack
from rai_toolbox.perturbations.universal import UniversalPerturbation, universal_perturbation

__all__ = [
    "AdditivePerturbation",
    "AffineWarp",
    "Attacked",
    "ColorShift",
    "Ensembled",
    "Examples",
    "Journal",
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
    "classifier",
    "cross_entropy",
    "dlr_loss",
    "ensemble",
    "evaluate_robustness",
    "fab_attack",
    "gradient_ascent",
    "is_fooled",
    "margin_loss",
    "minimum_norm_attack",
    "most_likely_rivals",
    "nearest_rivals",
    "random_restart",
    "rival_margin",
    "short_ensemble",
    "square_attack",
    "standard",
    "targeted_dlr_loss",
    "uniform_like_l1_n_ball_",
    "uniform_like_l2_n_ball_",
    "uniform_like_linf_n_ball_",
    "universal_perturbation",
    "verify",
]
