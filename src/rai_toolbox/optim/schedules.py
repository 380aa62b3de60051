"""Schedulers of any setting of a parameter group, in the manner of torch's of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import as_plain, check_setting
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.settings import as_loaded, as_saved
from rai_toolbox.optim.wrapper import Group

Schedule: TypeAlias = Callable[[int], Any]
Path: TypeAlias = tuple[str, ...]


class SettingScheduler:
    """Set a setting of an optimizer's parameter groups to a value for each step.

    ``setting <- values(step)``, for step 0 as soon as the scheduler is made, and for the next one
    at each `step()`, which is to be called after that of the optimizer.

    Parameters
    ----------
    optimizer : Optimizer
        Ours, or any other one.
    setting : str
        Name of a setting of its groups (``"epsilon"``, in chains also ``"0.clamp_max"``), or a
        path into a set or tuple that is one (``"constraint.epsilon"``, ``"betas.0"``,
        ``"constraint.ball.epsilon"``). A set is replaced by one with another setting.
    values : callable, or sequence of callable or None
        From the number of the step, an int, to the value; a sequence has one for each group, and
        None leaves a group alone.
    last_step : int
        The number of the last step that is done; -1 to begin.

    Raises
    ------
    ValueError
        If a group has no such setting, or a value breaks a rule of the optimizer or of the set.
        Also at each step, before anything is changed.
    TypeError
        If an argument, or a value, is of the wrong type.

    Notes
    -----
    Values live in `optimizer.param_groups`, and so in its checkpoint; save `state_dict()` of the
    scheduler, too. No device is waited for, unless a set has tensors as settings: it reads them
    when it is made. Optimizers that are not ours do not check a value before their step.

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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {optimizer!r}")
        if not isinstance(setting, str):
            raise TypeError(f"`setting` must be the name of a setting, got {setting!r}")
        _check_step("last_step", last_step)
        self.optimizer = optimizer
        self.setting = setting
        self.values = _per_group(values, len(optimizer.param_groups))
        self.last_step = last_step
        self.step()

    def step(self) -> None:
        """Set the values of the next step."""
        following = self.last_step + 1
        values = [
            None if schedule is None else _own(schedule(following)) for schedule in self.values
        ]
        self._set(values, following)

    def get_last_value(self) -> list[Any]:
        """The values that were set last, one for each group.

        Returns
        -------
        list
            None for a group that is left alone.
        """
        return [_own(value) for value in self._last_value]

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved, beside the state of the optimizer.

        Returns
        -------
        dict
            Of `values`, only callable objects are in it, by their attributes; functions are not.
        """
        return {
            "setting": self.setting,
            "last_step": self.last_step,
            "last_value": _each(as_saved, self._last_value),
            "values": [_attributes(schedule) for schedule in self.values],
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
            raise ValueError(
                f"`setting` in `state_dict` must be {self.setting!r}, got {state_dict['setting']!r}"
            )
        _check_step("last_step", state_dict["last_step"])
        for name in ("last_value", "values"):
            if len(state_dict[name]) != len(self.values):
                raise ValueError(
                    f"`{name}` in `state_dict` must be of {len(self.values)} groups, got "
                    f"{len(state_dict[name])}"
                )
        self._set(_each(as_loaded, state_dict["last_value"]), state_dict["last_step"])
        for schedule, attributes in zip(self.values, state_dict["values"], strict=True):
            if attributes is not None and _attributes(schedule) is not None:
                schedule.__dict__.update(attributes)

    def _set(self, values: list[Any], step: int) -> None:
        """Set all values of a step, once each is found to be right for its group."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.values):
            raise ValueError(
                f"`values` must be of {len(groups)} groups, as many as the optimizer has, got "
                f"{len(self.values)}"
            )
        todo = [
            (group, *self._replacement(group, value, f"group {i} at step {step}"))
            for i, (group, schedule, value) in enumerate(
                zip(groups, self.values, values, strict=True)
            )
            if schedule is not None
        ]
        for group, name, value in todo:
            _write(groups, group, name, value)
        self._last_value = values
        self.last_step = step

    def _replacement(self, group: Group, value: Any, where: str) -> tuple[str, Any]:
        """What to write to a group, under which name, for the setting to have a value."""
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        paths = _paths(settings)
        if self.setting not in paths:
            raise ValueError(
                f"`setting` must be one of {', '.join(paths)} (or `values` None) for {where}, got "
                f"{self.setting!r}"
            )
        name, *path = paths[self.setting]
        check = getattr(self.optimizer, "_check_group", None)
        try:
            replacement = _replaced(group[name], tuple(path), value)
            if check is not None:
                check({**group, name: replacement})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (`{self.setting}` of {where})") from None
        return name, replacement


class LinearSetting(SettingScheduler):
    """Move a setting from one value to another in equal steps, and leave it there.

    ``start + (end - start) * min(step / total_steps, 1)``: the warm-up.

    Parameters
    ----------
    start, end : float or Tensor, or sequence of these or None
        A sequence has one for each group, and None, in both of them, leaves a group alone.
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
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {optimizer!r}")
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError(f"`total_steps` must be an int >= 1, got {total_steps!r}")
        groups = len(optimizer.param_groups)
        ends = zip(_ends("start", start, groups), _ends("end", end, groups), strict=True)
        lines = [_line(first, last, total_steps) for first, last in ends]
        super().__init__(optimizer, setting, lines, last_step=last_step)


class _Line:
    """A linear schedule; an object, so that it is saved."""

    def __init__(self, start: float | Tensor, end: float | Tensor, total_steps: int) -> None:
        self.start, self.end, self.total_steps = start, end, total_steps

    def __call__(self, step: int) -> float | Tensor:
        if step >= self.total_steps:  # exactly there
            return self.end
        return self.start + (self.end - self.start) * (step / self.total_steps)


def _line(start: Any, end: Any, total_steps: int) -> _Line | None:
    if (start is None) != (end is None):
        raise ValueError(
            f"`start` and `end` must be None for the same groups, got {start!r} and {end!r}"
        )
    return None if start is None else _Line(start, end, total_steps)


def _ends(name: str, given: Any, groups: int) -> list[Any]:
    ends = list(given) if isinstance(given, (list, tuple)) else [given] * groups
    if len(ends) != groups:
        raise ValueError(f"`{name}` must be of {groups} groups, got {len(ends)}")
    for end in ends:
        if end is not None:
            check_setting(name, end)
    return [_own(end) for end in ends]


def _per_group(values: Any, groups: int) -> list[Schedule | None]:
    listed = isinstance(values, (list, tuple))
    schedules: list[Any] = list(values) if listed else [values] * groups
    if not all(callable(schedule) or (listed and schedule is None) for schedule in schedules):
        raise TypeError(
            "`values` must be a callable from the step to the value, or a sequence of one, or "
            f"None, for each group, got {values!r}"
        )
    if len(schedules) != groups:
        raise ValueError(f"`values` must be of {groups} groups, got {len(schedules)}")
    if all(schedule is None for schedule in schedules):
        raise ValueError(f"`values` must not be None for all groups, got {values!r}")
    return schedules


def _check_step(name: str, step: object) -> None:
    if type(step) is not int or step < -1:
        raise ValueError(f"`{name}` must be an int >= -1, got {step!r}")


def _own(value: Any) -> Any:
    """A value that nobody else writes to, and that is plain data where it can be."""
    return value.detach().clone() if isinstance(value, Tensor) else as_plain(value)


def _each(convert: Callable[[Mapping[str, Any]], dict[str, Any]], values: list[Any]) -> list[Any]:
    return list(convert({str(i): _own(value) for i, value in enumerate(values)}).values())


def _attributes(schedule: Schedule | None) -> dict[str, Any] | None:
    if schedule is None or isinstance(schedule, (FunctionType, MethodType)):
        return None
    attributes = getattr(schedule, "__dict__", None)
    return None if attributes is None else dict(attributes)


def _parts(value: Any) -> dict[str, Any]:
    """The settings that a setting is made of, by name."""
    if isinstance(value, Constraint):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    return {str(i): part for i, part in enumerate(value)} if isinstance(value, tuple) else {}


def _paths(settings: Mapping[str, Any]) -> dict[str, Path]:
    """All settings, and the parts of each, by their dotted names."""
    paths: dict[str, Path] = {}
    for name, value in settings.items():
        paths[name] = (name,)
        inner = _paths(_parts(value))
        paths.update({f"{name}.{dotted}": (name, *path) for dotted, path in inner.items()})
    return paths


def _replaced(value: Any, path: Path, new: Any) -> Any:
    """A value with the part at the end of a path replaced; a set checks its settings anew."""
    if not path:
        return new
    first, *rest = path
    parts = _parts(value)
    parts[first] = _replaced(parts[first], tuple(rest), new)
    if isinstance(value, Constraint):
        return type(value)._from_settings(parts)
    return tuple(parts.values())


@torch.no_grad()
def _write(groups: list[Group], group: Group, name: str, value: Any) -> None:
    present = group[name]
    fits = isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and isinstance(present, Tensor) and value.shape == present.shape
    )
    if not (isinstance(present, Tensor) and fits):
        group[name] = value
        return
    # A captured graph, or a compiled step, reads it where it is; but groups can share a default.
    if sum(other.get(name) is present for other in groups) > 1:
        present = group[name] = present.clone()
    present.copy_(value) if isinstance(value, Tensor) else present.fill_(value)
