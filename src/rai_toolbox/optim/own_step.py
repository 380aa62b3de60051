"""An optimizer of its own, around no other, whose settings are checked before they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer

from rai_toolbox._torch import not_compiled
from rai_toolbox.checks import as_plain
from rai_toolbox.optim.settings import as_loaded, as_saved
from rai_toolbox.optim.wrapper import Group, Params, as_groups, checked_group


class CheckedOptimizer(Optimizer):
    """Groups are completed and checked wherever they come from, and saved as plain data."""

    _options: Mapping[str, Any] = {}
    """Settings that a group may have beside those of `defaults`."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        super().__init__(cast(Any, as_groups(params)), defaults)

    def _completed(self, group: Mapping[str, Any]) -> Group:
        """A copy of a group that has all settings, the numbers among them as plain ones."""
        return {name: as_plain(value) for name, value in group.items()}

    def _check_group(self, group: Group) -> None:
        """Raise if a setting of a complete group breaks its rule; schedulers of settings ask it."""

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Raise if the settings of two groups contradict each other."""

    @not_compiled
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Parameters
        ----------
        param_group : dict
            `params`, and any settings. It is not modified.
        """
        group = self._completed(self.defaults | checked_group(param_group))
        self._check_group(group)
        self._check_together([*self.param_groups, group])
        super().add_param_group(group)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """The state, as plain data and tensors; a constraint as its `to_plain`.

        Returns
        -------
        dict
            `state` and `param_groups`, in the format of every torch optimizer.
        """
        state_dict = super().state_dict()
        return {**state_dict, "param_groups": list(map(as_saved, state_dict["param_groups"]))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.get("param_groups", ())  # of a checkpoint, among others
        defaults = self.__dict__.get("defaults", state.get("defaults", {}))
        present = self.__dict__.get("param_groups") or [{}] * len(loaded)
        ours = defaults.keys() | self._options.keys()
        groups = []
        for now, group in zip(present, loaded, strict=False):
            kept = {name: now[name] for name in now.keys() & ours}
            given = as_loaded(group, device_of(group))
            groups.append(self._completed({**defaults, **kept, **given}))
        for group in groups:
            self._check_group(group)
        self._check_together(groups)
        for group, full in zip(loaded, groups, strict=False):
            group.update(full)
        super().__setstate__(state)


def device_of(group: Mapping[str, Any]) -> torch.device | None:
    """Where the parameters of a group are; None if it has none."""
    return group["params"][0].device if group["params"] else None
