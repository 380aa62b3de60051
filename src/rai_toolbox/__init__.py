"""Constrained optimization for PyTorch: optimizers that keep parameters in sets."""

from rai_toolbox.batch import to_batch
from rai_toolbox.functional import negate
from rai_toolbox.modules import evaluating, freeze, frozen

__version__ = "0.2.0"  # the build reads it here

__all__ = ["evaluating", "freeze", "frozen", "negate", "to_batch"]
