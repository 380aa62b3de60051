"""Optimizers that transform gradients before an inner optimizer's step, and parameters after it."""

from rai_toolbox.optim.apgd import APGD
from rai_toolbox.optim.chain import ChainedParamTransformingOptimizer
from rai_toolbox.optim.compile import compiled
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.exponentiated_gradient import ExponentiatedGradient
from rai_toolbox.optim.frank_wolfe import FrankWolfe
from rai_toolbox.optim.named import (
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L1FrankWolfe,
    L1NormedGradientOptim,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfFrankWolfe,
    LinfProjectedOptim,
    SignedGradientOptim,
    TopQGradientOptimizer,
)
from rai_toolbox.optim.norm_groups import norm_groups
from rai_toolbox.optim.param_groups import constrain
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.optim.projected import ProjectedOptimizer
from rai_toolbox.optim.projected_lbfgs import ProjectedLBFGS
from rai_toolbox.optim.schedules import LinearSetting, SettingScheduler
from rai_toolbox.optim.scion import Scion

__all__ = [
    "APGD",
    "PGD",
    "ChainedParamTransformingOptimizer",
    "ClampedGradientOptimizer",
    "ClampedParameterOptimizer",
    "ExponentiatedGradient",
    "FrankWolfe",
    "L1FrankWolfe",
    "L1NormedGradientOptim",
    "L1qFrankWolfe",
    "L1qNormedGradientOptim",
    "L2FrankWolfe",
    "L2NormedGradientOptim",
    "L2ProjectedOptim",
    "LinearSetting",
    "LinfFrankWolfe",
    "LinfProjectedOptim",
    "ParamTransformingOptimizer",
    "ProjectedLBFGS",
    "ProjectedOptimizer",
    "Scion",
    "SettingScheduler",
    "SignedGradientOptim",
    "TopQGradientOptimizer",
    "compiled",
    "constrain",
    "norm_groups",
]
