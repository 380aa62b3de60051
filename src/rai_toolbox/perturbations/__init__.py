"""Perturbations of data: models of them, solvers that find the worst, and evaluations."""

from .attack import attack as attack
from .classifier import classifier as classifier
from .ensemble import Ensembled as Ensembled
from .ensemble import ensemble as ensemble
from .ensemble import short_ensemble as short_ensemble
from .ensemble import standard as standard
from .evaluation.report import Examples as Examples
from .evaluation.report import RobustnessReport as RobustnessReport
from .evaluation.report import RobustnessWarning as RobustnessWarning
from .evaluation.run import evaluate_robustness as evaluate_robustness
from .evaluation.state_file import StateFileError as StateFileError
from .evaluation.verification import VerificationReport as VerificationReport
from .evaluation.verification import verify as verify
from .fab import fab_attack as fab_attack
from .init import uniform_like_l1_n_ball_ as uniform_like_l1_n_ball_
from .init import uniform_like_l2_n_ball_ as uniform_like_l2_n_ball_
from .init import uniform_like_linf_n_ball_ as uniform_like_linf_n_ball_
from .journal import Journal as Journal
from .losses import cross_entropy as cross_entropy
from .losses import dlr_loss as dlr_loss
from .losses import is_fooled as is_fooled
from .losses import margin_loss as margin_loss
from .losses import most_likely_rivals as most_likely_rivals
from .losses import rival_margin as rival_margin
from .losses import targeted_dlr_loss as targeted_dlr_loss
from .minimum_norm import MinimumNorm as MinimumNorm
from .minimum_norm import minimum_norm_attack as minimum_norm_attack
from .models import AdditivePerturbation as AdditivePerturbation
from .models import AffineWarp as AffineWarp
from .models import ColorShift as ColorShift
from .models import MaskedPerturbation as MaskedPerturbation
from .models import PerturbationModel as PerturbationModel
from .rivals import nearest_rivals as nearest_rivals
from .solve import Attacked as Attacked
from .solvers import ZeroGradientWarning as ZeroGradientWarning
from .solvers import gradient_ascent as gradient_ascent
from .solvers import random_restart as random_restart
from .square import square_attack as square_attack
from .universal import UniversalPerturbation as UniversalPerturbation
from .universal import universal_perturbation as universal_perturbation

__all__ = sorted(name for name, value in globals().items() if callable(value))  # no modules
