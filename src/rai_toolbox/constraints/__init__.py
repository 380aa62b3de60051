"""Constraint sets: immutable values with four methods.

`project_` finds the nearest point, `lmo` minimizes a linear function, `violation` measures how far
outside a point is, `sample_` draws a point. All act on batches `(N, ...)` of sub-tensors.
`Projected` makes a module of one.
"""

from .balls import L1Ball as L1Ball
from .balls import L2Ball as L2Ball
from .balls import LinfBall as LinfBall
from .base import Constraint as Constraint
from .bounded_ball import BoundedBall as BoundedBall
from .box import Box as Box
from .box import NonNegative as NonNegative
from .box_hyperplane import BoxSection as BoxSection
from .intersection import Intersection as Intersection
from .isotonic import Monotone as Monotone
from .linear import Affine as Affine
from .linear import HalfSpace as HalfSpace
from .linear import Hyperplane as Hyperplane
from .masked import Masked as Masked
from .matrices import PSD as PSD
from .matrices import Rank as Rank
from .matrices import Stiefel as Stiefel
from .norm_range import MaxNorm as MaxNorm
from .norm_range import MinMaxNorm as MinMaxNorm
from .norm_range import UnitNorm as UnitNorm
from .projected import Projected as Projected
from .simplex import Simplex as Simplex
from .simplex import SparseSimplex as SparseSimplex
from .sparse import TopK as TopK
from .spectral import NuclearBall as NuclearBall
from .spectral import SpectralBall as SpectralBall
from .transport import Birkhoff as Birkhoff
from .transport import Transport as Transport

__all__ = sorted(name for name, value in globals().items() if callable(value))  # no modules
