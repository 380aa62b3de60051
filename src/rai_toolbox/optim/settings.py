"""Settings of parameter groups: how they are given, checked, saved, and named in errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.batch import batch_shape, view_or_copy
from rai_toolbox.checks import as_plain, check_setting, check_type
from rai_toolbox.constraints.base import Constraint, check_device
from rai_toolbox.constraints.box import OPEN
from rai_toolbox.constraints.sharding import check_view

TINY = torch.finfo(torch.float32).tiny
"""Default of every `div_by_zero_eps`."""

_SHARED = ("params", "InnerOpt", "param_ndim", "grad_scale", "grad_bias", "defaults")


class REQUIRED:
    """Default of a setting that has none: the constructor or each group must give it.

    The class itself is the marker: it stays one object through pickle and deepcopy.
    """


def constructor_arguments(named: Mapping[str, Any]) -> dict[str, Any]:
    """The `locals()` of a constructor, as arguments of that of `ParamTransformingOptimizer`.

    The arguments that the latter does not name are group settings: they go into `defaults`. A
    `generator` is none, and is left out.
    """
    given = {k: v for k, v in named.items() if k not in ("self", "__class__", "generator")}
    inner_opt_kwargs = given.pop("inner_opt_kwargs", {})
    shared = {name: given.pop(name) for name in _SHARED if name in given}
    return {**shared, "defaults": {**given, **(shared.get("defaults") or {})}, **inner_opt_kwargs}


def base_name(name: str) -> str:
    """A setting's name without the numbers of a chain's members: `q` for `0.1.q`."""
    return name.rpartition(".")[2]


def labels(group: Mapping[str, Any]) -> list[str]:
    """What errors call the parameters of a group: their names, where they have any."""
    return [
        f"parameter '{name}'" if name is not None else f"parameter {i} of its group"
        for i, name in enumerate(group.get("param_names") or [None] * len(group["params"]))
    ]


def trained(group: Mapping[str, Any]) -> list[Tensor]:
    """The parameters of a group that a step may change: all but frozen ones."""
    return [p for p in group["params"] if p.requires_grad or p.grad is not None]


def is_zero_on_host(value: object) -> bool:
    """Whether a setting is 0, as far as that is known without synchronizing with a device."""
    if isinstance(value, Tensor):
        known = value.device.type == "cpu" and not torch.compiler.is_compiling()
        return known and value.item() == 0
    return value is not None and value == 0


def refuse_complex(group: Mapping[str, Any], names: str) -> None:
    """Raise if a group with settings that are bounds has a complex parameter."""
    for param, label in zip(group["params"], labels(group), strict=True):
        if param.is_complex():
            raise TypeError(f"{names} must bound real numbers, got {param.dtype} for {label}")


def check_bound(name: str, group: Mapping[str, Any]) -> None:
    """Raise unless a setting is a number, or a tensor that fits each parameter of its group."""
    bound = group[name]
    check_setting(name, bound, finite=False)
    if not isinstance(bound, Tensor):
        return
    for param, label in zip(group["params"], labels(group), strict=True):
        if not param.is_floating_point():
            continue  # no step changes it
        try:
            OPEN._check_fit(name, bound, param)
            check_device(name, bound, param)
        except ValueError as error:
            raise ValueError(f"{error} ({label})") from None


def as_saved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A group as a checkpoint holds it: each constraint as plain data."""
    return {
        name: value.to_plain() if isinstance(value, Constraint) else value
        for name, value in settings.items()
    }


def as_loaded(settings: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A group of a checkpoint with constraints rebuilt from plain data, on a device.

    A checkpoint may have been loaded to another device than its parameters.
    """

    def loaded(name: str, value: Any) -> Any:
        if isinstance(value, Mapping) and "set" in value:
            return Constraint.from_plain(value).to(device)
        if isinstance(value, Tensor) and name != "lr":  # (which may be on the host)
            return value.to(device)
        return as_plain(value)

    return {name: loaded(name, value) for name, value in settings.items()}


def check_constraint(constraint: object) -> None:
    """Raise unless it is a constraint, or None."""
    kinds, rule = (Constraint, type(None)), "be a set of rai_toolbox.constraints or None"
    check_type("constraint", constraint, kinds, rule)


def batch_shape_in(
    param: Tensor, group: Mapping[str, Any], param_ndim: str = "param_ndim"
) -> tuple[int, ...]:
    """Shape `(N, d0, ...)` of the batch that a constraint gets; (1, 1) for a 0-d parameter.

    `param_ndim` is the group's name of that setting.
    """
    if param.ndim == 0:
        return (1, 1)
    return batch_shape(param.shape, group[param_ndim])


def batch_in(
    tensor: Tensor, group: Mapping[str, Any], param_ndim: str = "param_ndim"
) -> tuple[Tensor, bool]:
    """A parameter, or its gradient, as the batch that a constraint gets; and if it is a copy."""
    if group[param_ndim] == -1 and tensor.ndim > 1:
        return tensor, False
    return view_or_copy(tensor, batch_shape_in(tensor, group, param_ndim))


def check_fits(
    constraint: Constraint, group: Mapping[str, Any], param_ndim: str = "param_ndim"
) -> None:
    """Raise, with its name, if a parameter of a group is no batch that the constraint takes."""
    refuse_complex(group, "`constraint`")
    for param, label in zip(group["params"], labels(group), strict=True):
        if not (param.is_floating_point() or param.is_complex()):
            continue  # no step changes it
        couples = not constraint.elementwise and group[param_ndim] == -1
        if couples and param.ndim == 1 < param.numel():
            raise ValueError(
                "`param_ndim` must be None or 1 for a vector, because -1 makes each element a "
                f"sub-tensor, got -1 for {label} of shape {tuple(param.shape)} (for biases see "
                "`skip_bias_and_norm` of `constrain`)"
            )
        try:
            shape = batch_shape_in(param, group, param_ndim)
            # (a batch of that shape without its memory, and without its ranks)
            constraint._check_batch(
                torch.empty((), dtype=param.dtype, device=param.device).expand(shape)
            )
            check_view(param, shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} ({label})") from None
