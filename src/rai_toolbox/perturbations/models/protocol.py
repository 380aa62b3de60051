"""The interface that a solver requires of a perturbation model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["PerturbationModel"]


@runtime_checkable
class PerturbationModel(Protocol):
    """A parametric change of data: called with data, it returns the perturbed data.

    A solver optimizes its parameters. An attribute `per_datum` that is True promises that each
    parameter has a leading dim that runs over the examples, and that row i of the result depends
    deterministically on row i of the data and of the parameters alone. Then a solver treats the
    rows separately, and writes the best parameters of each example back.

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
        """The parameters to optimize."""
        ...
