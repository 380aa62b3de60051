"""Schedulers of any setting of parameter groups, like torch's schedulers of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import as_plain, check_setting, check_type, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.settings import as_loaded, as_saved
from rai_toolbox.optim.wrapper import Group

Schedule: TypeAlias = Callable[[int], Any]


class SettingScheduler:
    """Set a setting of an optimizer's parameter groups to another value at each step.

    ``setting <- values(step)``: for step 0 when the scheduler is created, and for the next one at
    each `step()`, which is to be called after that of the optimizer.

    Parameters
    ----------
    optimizer : Optimizer
        Of this library, or any other.
    setting : str
        Name of a setting of its groups (``"epsilon"``, in chains also ``"0.clamp_max"``), or a
        path into a set or tuple that is one (``"constraint.epsilon"``, ``"betas.0"``,
        ``"constraint.ball.epsilon"``). A set is replaced by one with another setting.
    values : callable, or sequence of callable or None
        A function from the number of the step, an int, to the value; a sequence has one for each
        group, and None leaves a group unchanged.
    last_step : int
        The number of the last step that was done; -1 to start.

    Raises
    ------
    ValueError
        If a group has no such setting, or a value breaks a rule of the optimizer or of the set.
        Also at each step, before anything is changed.
    TypeError
        If an argument or a value has the wrong type.

    Notes
    -----
    Values are kept in `optimizer.param_groups`, and so in its checkpoint; save `state_dict()` of
    the scheduler, too. Nothing synchronizes with the host, except that tensors as settings, but
    for learning rates, are read to check them. Other optimizers check no value before their step.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2ProjectedOptim, SettingScheduler
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = L2ProjectedOptim([x], epsilon=1.0, param_ndim=None)
    >>> scheduler = SettingScheduler(optim, "epsilon", lambda step: 4.0 * 0.5**step)
    >>> for _ in range(2):
    ...     optim.step()
    ...     scheduler.step()
    >>> optim.param_groups[0]["epsilon"]
    1.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        setting: str,
        values: Schedule | Sequence[Schedule | None],
        *,
        last_step: int = -1,
    ) -> None:
        check_type("setting", setting, str, "be the name of a setting")
        _check_int("last_step", last_step, -1)
        self.values = _for_each_group("values", values, optimizer)
        if values is None or not all(each is None or callable(each) for each in self.values):
            raise TypeError(
                "`values` must be a callable from the step to the value, or a sequence of one, "
                f"or None, for each group, got {values!r}"
            )
        if all(schedule is None for schedule in self.values):
            raise ValueError(f"`values` must not be None for all groups, got {values!r}")
        self.optimizer = optimizer
        self.setting = setting
        self.last_step = last_step
        self.step()

    def step(self) -> None:
        """Set the values of the next step."""
        step = self.last_step + 1
        values = [None if schedule is None else schedule(step) for schedule in self.values]
        self._set(list(map(_copied, values)), step)

    def get_last_value(self) -> list[Any]:
        """The values that were set last, one for each group.

        Returns
        -------
        list
            None for a group that does not change.
        """
        return list(map(_copied, self._last_value))

    def get_last_lr(self) -> list[Any]:
        """The learning rates of all groups, which trainers log.

        Returns
        -------
        list
        """
        return [_copied(group.get("lr")) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved, besides the state of the optimizer.

        Returns
        -------
        dict
            Of `values`, only the attributes of callable objects are in it; functions are not.
        """
        return {
            "setting": self.setting,
            "last_step": self.last_step,
            "last_value": _converted(as_saved, self._last_value),
            "values": list(map(_attributes, self.values)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, and set the values that were set last.

        Parameters
        ----------
        state_dict : dict
            Of a scheduler of the same setting of as many groups. It is not modified.

        Raises
        ------
        ValueError
            If it is of another one, or its values break a rule, before anything is changed.
        """
        for name in ("setting", "last_step", "last_value", "values"):
            if name not in state_dict:
                raise ValueError(f"`state_dict` must have `{name}`, got {list(state_dict)}")
        if state_dict["setting"] != self.setting:
            got = repr(state_dict["setting"])
            raise wrong("setting` in `state_dict", f"be {self.setting!r}", got)
        _check_int("last_step", state_dict["last_step"], -1)
        for name in ("last_value", "values"):
            _check_length(f"`{name}` in `state_dict`", state_dict[name], len(self.values))
        self._set(_converted(as_loaded, state_dict["last_value"]), state_dict["last_step"])
        for schedule, attributes in zip(self.values, state_dict["values"], strict=True):
            if attributes is not None and _attributes(schedule) is not None:
                schedule.__dict__.update(attributes)

    def _set(self, values: list[Any], step: int) -> None:
        """Set all values of a step, after all are found to keep the rules of their groups."""
        groups = self.optimizer.param_groups
        _check_length("`values`", self.values, len(groups))
        changed = [
            (group, *self._changed(group, values[i], f"group {i} at step {step}"))
            for i, group in enumerate(groups)
            if self.values[i] is not None
        ]
        for group, name, value in changed:
            _write(groups, group, name, value)
        self._last_value = values
        self.last_step = step

    def _changed(self, group: Group, value: Any, where: str) -> tuple[str, Any]:
        """The name of what changes in a group, and what it becomes, checked."""
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        paths = _paths(settings)
        if self.setting not in paths:
            hint = "(in a list for all groups, None leaves one unchanged)"
            rule = f"be one of {', '.join(paths)} {hint} for {where}"
            raise wrong("setting", rule, repr(self.setting))
        names = paths[self.setting]
        check = getattr(self.optimizer, "_check_group", lambda group: None)
        try:
            changed = _replaced(settings, names, value)[names[0]]
            check({**group, names[0]: changed})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (`{self.setting}` of {where})") from None
        return names[0], changed


class LinearSetting(SettingScheduler):
    """Change a setting linearly from one value to another, and keep it there.

    ``start + (end - start) * min(step / total_steps, 1)``: the warm-up.

    Parameters
    ----------
    start, end : float or Tensor, or sequence of these or None
        Tensors have the shape of the setting. A sequence has one for each group, and None, in both
        of them, leaves a group unchanged.
    total_steps : int
        The number of steps from `start` to `end`, >= 1.
    optimizer, setting, last_step
        See `SettingScheduler`.

    Raises
    ------
    ValueError
        If `total_steps` is less than 1, or a value is not finite, or breaks a rule.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedParameterOptimizer, LinearSetting
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedParameterOptimizer([x], clamp_max=8.0)
    >>> scheduler = LinearSetting(optim, "clamp_max", start=8.0, end=2.0, total_steps=3)
    >>> for _ in range(2):
    ...     scheduler.step()
    >>> scheduler.get_last_value()
    [4.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        setting: str,
        start: float | Tensor | Sequence[float | Tensor | None],
        end: float | Tensor | Sequence[float | Tensor | None],
        total_steps: int,
        *,
        last_step: int = -1,
    ) -> None:
        starts = _for_each_group("start", start, optimizer)
        ends = _for_each_group("end", end, optimizer)
        schedules = []
        for first, last in zip(starts, ends, strict=True):
            if (first is None) != (last is None):
                got = f"{first!r} and {last!r}"
                raise wrong("start` and `end", "be None for the same groups", got)
            schedules.append(None if first is None else _Linear(first, last, total_steps))
        super().__init__(optimizer, setting, schedules, last_step=last_step)


@dataclass(eq=False, repr=False)
class _Linear:
    """A linear schedule; an object, so that a checkpoint has its attributes."""

    start: Any
    end: Any
    total_steps: int

    def __post_init__(self) -> None:
        _check_int("total_steps", self.total_steps, 1)
        for name in ("start", "end"):
            check_setting(name, getattr(self, name))
            setattr(self, name, _copied(getattr(self, name)))

    def __call__(self, step: int) -> Any:
        if step >= self.total_steps:  # without rounding
            return self.end
        return self.start + (self.end - self.start) * (step / self.total_steps)


def _for_each_group(name: str, given: Any, optimizer: Optimizer) -> list[Any]:
    """A sequence of one item for each group as a list; anything else, repeated."""
    check_type("optimizer", optimizer, Optimizer, "be a torch.optim.Optimizer")
    groups = len(optimizer.param_groups)
    if not isinstance(given, (list, tuple)):
        return [given] * groups
    _check_length(f"`{name}`", given, groups)
    return list(given)


def _check_length(name: str, values: Sequence[Any], groups: int) -> None:
    if len(values) != groups:
        raise ValueError(f"{name} must be of {groups} groups, got {len(values)}")


def _check_int(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"`{name}` must be an int >= {least}, got {value!r}")


def _copied(value: Any) -> Any:
    """A copy of a tensor; another value as plain data, if it can be."""
    return value.detach().clone() if isinstance(value, Tensor) else as_plain(value)


def _converted(convert: Callable[[dict[str, Any]], dict[str, Any]], values: list[Any]) -> list[Any]:
    return list(convert({str(i): _copied(value) for i, value in enumerate(values)}).values())


def _attributes(schedule: Schedule | None) -> dict[str, Any] | None:
    if isinstance(schedule, (FunctionType, MethodType)) or not hasattr(schedule, "__dict__"):
        return None
    return dict(vars(schedule))


def _parts(value: Any) -> dict[str, Any]:
    """The entries of a dict, a set or a tuple, by name."""
    if isinstance(value, Constraint):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    if isinstance(value, tuple):
        return {str(i): part for i, part in enumerate(value)}
    return dict(value) if isinstance(value, dict) else {}


def _paths(value: Any) -> dict[str, list[str]]:
    """All parts of a value, and their parts: the names that lead there, by these with dots."""
    paths = {}
    for name, part in _parts(value).items():
        paths[name] = [name]
        paths |= {f"{name}.{path}": [name, *names] for path, names in _paths(part).items()}
    return paths


def _replaced(value: Any, names: list[str], new: Any) -> Any:
    """A copy with the part replaced to which `names` lead; a set checks its settings again."""
    parts = _parts(value)
    first, *others = names
    parts[first] = _replaced(parts[first], others, new) if others else new
    if isinstance(value, Constraint):
        return type(value)._from_settings(parts)
    return tuple(parts.values()) if isinstance(value, tuple) else parts


@torch.no_grad()
def _write(groups: list[Group], group: Group, name: str, value: Any) -> None:
    """Set a setting; in place where it is a learning rate that a captured graph may read."""
    present = group[name]
    same_shape = isinstance(value, Tensor) and value.shape == getattr(present, "shape", None)
    in_place = isinstance(present, Tensor) and (same_shape or isinstance(value, (int, float)))
    if name != "lr" or not in_place:
        group[name] = value
        return
    if sum(other.get(name) is present for other in groups) > 1:  # groups that share a default
        present = group[name] = present.clone()
    present.copy_(value) if isinstance(value, Tensor) else present.fill_(value)
