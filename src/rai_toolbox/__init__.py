"""Constrained optimization for PyTorch: optimizers that keep what they optimize in a set."""

from rai_toolbox.batch import to_batch
from rai_toolbox.functional import negate
from rai_toolbox.modules import evaluating, freeze, frozen

__all__ = ["evaluating", "freeze", "frozen", "negate", "to_batch"]
