"""Laws that each set has to keep, to check sets of your own with."""

from rai_toolbox.testing import batch_laws, points_laws  # noqa: F401 (they fill LAWS)
from rai_toolbox.testing.check import LAWS, check_constraint
from rai_toolbox.testing.trial import Trial

__all__ = ["LAWS", "Trial", "check_constraint"]
