"""Laws that each set has to keep, to check sets of your own with."""

from rai_toolbox.testing.check import check_constraint
from rai_toolbox.testing.laws import LAWS
from rai_toolbox.testing.trial import Trial

__all__ = ["LAWS", "Trial", "check_constraint"]
