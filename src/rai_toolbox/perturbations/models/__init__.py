"""Models of perturbations: modules that map data to perturbed data."""

from rai_toolbox.perturbations.models.additive import AdditivePerturbation, MaskedPerturbation
from rai_toolbox.perturbations.models.base import PerturbationModel
from rai_toolbox.perturbations.models.color import ColorShift
from rai_toolbox.perturbations.models.warp import AffineWarp

__all__ = [
    "AdditivePerturbation",
    "AffineWarp",
    "ColorShift",
    "MaskedPerturbation",
    "PerturbationModel",
]
