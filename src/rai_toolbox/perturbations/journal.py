"""What an ensemble of attacks has done so far, to be shown, or to be resumed."""

from __future__ import annotations

from typing import Any


class Journal:
    """Called by `ensemble` at the start and at the end of each attack, to show or resume a run.

    This base class does nothing: override its methods in a subclass.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import Journal, attack, ensemble, square_attack
    >>> class Shown(Journal):
    ...     def begin(self, attack, left):
    ...         print(f"{attack}: {left} left")
    >>> data, target = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> settings = {"ball": L2Ball(0.2), "attacks": {"APGD": attack, "Square": square_attack}}
    >>> found = ensemble(lambda x: x, data, target, journal=Shown(), **settings)
    APGD: 2 left
    Square: 1 left
    """

    def earlier(self) -> dict[str, Any]:
        """The last state given to `keep` in an interrupted run; empty if there was none."""
        return {}

    def begin(self, attack: str, left: int) -> None:
        """An attack begins on a number of examples."""

    def keep(self, state: dict[str, Any]) -> None:
        """An attack is finished: `state`, of tensors, numbers and strings, can resume the run."""
