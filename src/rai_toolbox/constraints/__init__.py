"""Sets that a tensor can be kept in, as immutable values with four words.

`project_` finds the nearest point, `lmo` minimizes a linear function, `violation` tells how far
outside a point is, `sample_` draws a point. All act on batches `(N, ...)` of sub-tensors.
"""

from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.box import Box, NonNegative
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.simplex import Simplex

__all__ = ["Box", "Constraint", "L1Ball", "L2Ball", "LinfBall", "NonNegative", "Simplex"]
