"""Constraint sets: immutable values with four methods.

`project_` finds the nearest point, `lmo` minimizes a linear function, `violation` measures how far
outside a point is, `sample_` draws a point. All act on batches `(N, ...)` of sub-tensors.
`Projected` makes a module of one.
"""

from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall
from rai_toolbox.constraints.box import Box, NonNegative
from rai_toolbox.constraints.box_hyperplane import BoxSection
from rai_toolbox.constraints.intersection import Intersection
from rai_toolbox.constraints.isotonic import Monotone
from rai_toolbox.constraints.linear import Affine, HalfSpace, Hyperplane
from rai_toolbox.constraints.masked import Masked
from rai_toolbox.constraints.matrices import PSD, Rank, Stiefel
from rai_toolbox.constraints.norm_range import MaxNorm, MinMaxNorm, UnitNorm
from rai_toolbox.constraints.projected import Projected
from rai_toolbox.constraints.simplex import Simplex, SparseSimplex
from rai_toolbox.constraints.sparse import TopK
from rai_toolbox.constraints.spectral import NuclearBall, SpectralBall
from rai_toolbox.constraints.transport import Birkhoff, Transport

__all__ = [
    "PSD",
    "Affine",
    "Birkhoff",
    "BoundedBall",
    "Box",
    "BoxSection",
    "Constraint",
    "HalfSpace",
    "Hyperplane",
    "Intersection",
    "L1Ball",
    "L2Ball",
    "LinfBall",
    "Masked",
    "MaxNorm",
    "MinMaxNorm",
    "Monotone",
    "NonNegative",
    "NuclearBall",
    "Projected",
    "Rank",
    "Simplex",
    "SparseSimplex",
    "SpectralBall",
    "Stiefel",
    "TopK",
    "Transport",
    "UnitNorm",
]
