"""The base class of optimizers that compute their own step, without an inner optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox._torch import not_compiled, profile_hook_step, use_grad_for_differentiable
from rai_toolbox.batch import check_param_ndim
from rai_toolbox.checks import as_plain, check_number
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim import settings
from rai_toolbox.optim.wrapper import Group, Params, as_groups, checked_group

Move = Callable[[list[Tensor], list[Tensor], Group], object]
"""A function that moves some parameters by their gradients, with the settings of their group."""


class OwnStepOptimizer(Optimizer):
    """An optimizer whose groups are completed, checked, and saved as plain data.

    A subclass declares the rules of its settings in `_checks`, and overrides `_step_group_`.
    """

    _checks: ClassVar[Mapping[str, Callable[[str, Any], object]]] = {}
    """For each setting, a function of its name and value that raises if the value is wrong."""

    profile_hook_step = staticmethod(profile_hook_step)

    def __init__(self, params: Params, arguments: Mapping[str, Any]) -> None:
        """`arguments` may be the `locals()` of a subclass's constructor."""
        others = ("self", "params", "__class__")
        defaults = {name: value for name, value in arguments.items() if name not in others}
        super().__init__(cast(Any, as_groups(params)), {**defaults, "differentiable": False})

    def _completed(self, group: Mapping[str, Any]) -> Group:
        """A copy of a group that has all settings, with plain numbers."""
        return {name: as_plain(value) for name, value in group.items()}

    def _constraint(self, group: Group) -> Constraint | None:
        """The set that the parameters of a group are in."""
        return group["constraint"]

    def _check_group(self, group: Group) -> None:
        """Raise if a setting of a complete group breaks its rule, or does not fit a parameter."""
        for name, check in self._checks.items():
            if name in group:
                check(name, group[name])
        check_param_ndim(group.get("param_ndim"))
        constraint = self._constraint(group)
        are_tensors = all(isinstance(param, Tensor) for param in group["params"])
        if constraint is not None and are_tensors:  # else torch refuses them
            settings.check_fits(constraint, group)

    def _check_before_step(self, group: Group) -> None:
        """Raise if a setting that may change from step to step is out of range."""

    def mover(self, params: list[Tensor], grads: list[Tensor]) -> Move | None:
        """A function that moves parameters, if calls of it for all of them do what a step does.

        All that have gradients are given, and these.
        """
        return None

    def step_of_one(self, param: Tensor) -> Callable[[Tensor], object] | None:
        """A step of the only parameter, by its gradient, as long as its settings are the same."""
        return None

    def _check_groups(self, groups: Sequence[Group]) -> None:
        """Raise if a setting of any group breaks its rule."""
        for group in groups:
            self._check_group(group)

    @not_compiled
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Parameters
        ----------
        param_group : dict
            `params`, and any settings. It is not modified.
        """
        group = self._completed(self.defaults | checked_group(param_group))
        self._check_groups([*self.param_groups, group])
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.
        """
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> float | None:
        loss = None if closure is None else evaluated(closure)
        for group in self.param_groups:
            self._step_group_(group)
        return loss

    def _step_group_(self, group: Group) -> None:
        raise NotImplementedError

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """The state, as plain data and tensors; a constraint as its `to_plain`.

        Returns
        -------
        dict
            `state` and `param_groups`, in the format of every torch optimizer.
        """
        state_dict = super().state_dict()
        groups = [settings.as_saved(group) for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state["param_groups"]  # of a checkpoint, or of the optimizer that is copied
        present = self.__dict__.get("param_groups", loaded)
        groups = [
            self._completed({**now, **settings.as_loaded(group, device_of(group))})
            for now, group in zip(present, loaded, strict=True)
        ]
        self._check_groups(groups)
        super().__setstate__({**state, "param_groups": groups})


def evaluated(closure: Callable[[], Any]) -> Any:
    """The value of a closure, computed with gradients."""
    with torch.enable_grad():
        return closure()


def device_of(group: Mapping[str, Any]) -> torch.device | None:
    """Where the parameters of a group are; None if it has none."""
    return group["params"][0].device if group["params"] else None


def check_lr_value(name: str, lr: Any) -> float | None:
    """Raise unless a learning rate is finite and >= 0; None for a value on a device, not read."""
    if isinstance(lr, Tensor):
        if torch.compiler.is_compiling() or lr.device.type != "cpu":
            return None
        lr = lr.item()
    return check_number(name, lr, 0, finite=True)


def as_batches(
    param: Tensor, group: Group, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient, or zeros if it has none, as batches of sub-tensors.

    Their `shape` may be given, where it is known.
    """
    x, gradient = param.detach(), param.grad
    gradient = torch.zeros_like(x) if gradient is None else gradient.detach()
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    shape = settings.batch_shape_in(x, group) if shape is None else shape
    return x.reshape(shape), gradient.reshape(shape)
