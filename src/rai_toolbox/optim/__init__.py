"""Optimizers that transform gradients before an inner optimizer's step, and parameters after it."""

from .apgd import APGD as APGD
from .chain import ChainedParamTransformingOptimizer as ChainedParamTransformingOptimizer
from .compile import compiled as compiled
from .engine import ParamTransformingOptimizer as ParamTransformingOptimizer
from .exponentiated_gradient import ExponentiatedGradient as ExponentiatedGradient
from .frank_wolfe import FrankWolfe as FrankWolfe
from .named import ClampedGradientOptimizer as ClampedGradientOptimizer
from .named import ClampedParameterOptimizer as ClampedParameterOptimizer
from .named import L1FrankWolfe as L1FrankWolfe
from .named import L1NormedGradientOptim as L1NormedGradientOptim
from .named import L1qFrankWolfe as L1qFrankWolfe
from .named import L1qNormedGradientOptim as L1qNormedGradientOptim
from .named import L2FrankWolfe as L2FrankWolfe
from .named import L2NormedGradientOptim as L2NormedGradientOptim
from .named import L2ProjectedOptim as L2ProjectedOptim
from .named import LinfFrankWolfe as LinfFrankWolfe
from .named import LinfProjectedOptim as LinfProjectedOptim
from .named import SignedGradientOptim as SignedGradientOptim
from .named import TopQGradientOptimizer as TopQGradientOptimizer
from .norm_groups import norm_groups as norm_groups
from .param_groups import constrain as constrain
from .pgd import PGD as PGD
from .projected import ProjectedOptimizer as ProjectedOptimizer
from .projected_lbfgs import ProjectedLBFGS as ProjectedLBFGS
from .schedules import LinearSetting as LinearSetting
from .schedules import SettingScheduler as SettingScheduler
from .scion import Scion as Scion

__all__ = sorted(name for name, value in globals().items() if callable(value))  # no modules
