"""Models of perturbations: modules that map data to perturbed data."""

from .additive import AdditivePerturbation as AdditivePerturbation
from .additive import MaskedPerturbation as MaskedPerturbation
from .base import PerturbationModel as PerturbationModel
from .color import ColorShift as ColorShift
from .warp import AffineWarp as AffineWarp
