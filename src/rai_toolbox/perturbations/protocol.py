"""What a solver asks of a model of perturbations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["PerturbationModel"]


@runtime_checkable
class PerturbationModel(Protocol):
    """A parametric change of data: called with data, it gives the perturbed data.

    Its parameters are what a solver optimizes. If it has an attribute `per_datum` that is True,
    each parameter has a leading dim that runs over the data, and row i of the result depends on
    row i of the data and the parameters alone, without chance: then a solver keeps rows apart,
    and writes the best of each datum back.

    Examples
    --------
    >>> from rai_toolbox.perturbations import AdditivePerturbation, PerturbationModel
    >>> isinstance(AdditivePerturbation((2, 3)), PerturbationModel)
    True
    """

    def __call__(self, data: Any, /) -> Tensor:
        """Perturb the data."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """What is optimized."""
        ...
