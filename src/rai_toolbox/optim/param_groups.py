"""Parameter groups of a module, each with its set, by parameter names or module types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize

from rai_toolbox._torch import NORMALIZATIONS
from rai_toolbox.checks import check_type, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.settings import check_constraint
from rai_toolbox.optim.wrapper import Group

Pattern: TypeAlias = str | type[nn.Module]

_MOST_NAMES = 20  # in an error


def constrain(
    module: nn.Module,
    constraints: Mapping[Any, Constraint | Mapping[str, Any] | None],
    *,
    skip_bias_and_norm: bool = False,
) -> list[Group]:
    """Make parameter groups of a module, each with a set, from patterns of parameter names.

    Each pattern makes one group, in the order of the mapping; parameters that no pattern matches
    are in a last group, whose constraint is None. A parameter that several modules share has
    several names, any of which may match, and is in one group. Frozen parameters are in their
    groups, too, but no step changes them. A parametrized tensor is not a parameter: name those that
    it is computed from, ``"...parametrizations.weight.*"``.

    Parameters
    ----------
    module : nn.Module
        The parameters are given by their names in `module.named_parameters()`.
    constraints : dict
        Keys are globs for these names, in which `*` also matches dots (``"head.*"``), or types of
        modules, which match the parameters that modules of this type hold themselves
        (``nn.Linear``). Values are sets, None for no constraint, or dicts of group settings, one of
        which is `constraint`.
    skip_bias_and_norm : bool
        Put biases, and all parameters of torch's normalization layers, in the last group. A bias
        is called ``bias``, ``bias_...`` or ``..._bias``.

    Returns
    -------
    list of dict
        The `params` of an optimizer.

    Raises
    ------
    ValueError
        If a pattern matches no parameter, or two match the same one; if there are no parameters;
        if a type matches a parametrized module, and no pattern the parameters that it is made from.
    TypeError
        If a key or a value of `constraints` is of another type.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import MaxNorm, NonNegative
    >>> from rai_toolbox.optim import constrain
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    >>> for group in constrain(model, {"0.weight": MaxNorm(1.0), "1.*": NonNegative()}):
    ...     print(group["constraint"], [name for name, _ in group["params"]])
    MaxNorm(max_norm=1.0, p=2, dim=None) ['0.weight']
    NonNegative() ['1.weight', '1.bias']
    None ['0.bias']
    """
    check_type("module", module, nn.Module, "be a torch.nn.Module")
    check_type("constraints", constraints, Mapping, "be a dict from patterns to constraints")
    keys = _keys(module)
    if not keys:
        raise ValueError(f"`module` must have parameters, got {module!r}")
    left_out = {p for p in keys if skip_bias_and_norm and any(map(_is_bias_or_norm, keys[p]))}
    groups: list[Group] = []
    claims: dict[Tensor, list[Pattern]] = {param: [] for param in keys}
    for pattern, given in constraints.items():
        settings = _settings(pattern, given)
        matches = [param for param in keys if any(_matches(key, pattern) for key in keys[param])]
        kept = [param for param in matches if param not in left_out]
        if not kept:
            alike = [key for param in keys for key in keys[param] if _alike(key, pattern)]
            found = f"none of {_listed(map(_name, alike))}"
            if any(isinstance(key, str) and key.startswith(f"{pattern}.") for key in alike):
                found += f" (did you mean '{pattern}.*'?)"
            if matches:
                names = _listed(_name(keys[param][0]) for param in matches)
                found = f"only what `skip_bias_and_norm` leaves out: {names}"
            found = f"{_name(pattern)}, which matches {found}"
            raise wrong("constraints", "match a parameter with each pattern", found)
        for param in kept:
            claims[param].append(pattern)
        groups.append({"params": [(keys[param][0], param) for param in kept], **settings})
    claimed_twice = [
        f"{' = '.join(_name(key) for key in keys[param] if isinstance(key, str))} "
        f"(by {' and '.join(map(_name, patterns))})"
        for param, patterns in claims.items()
        if len(patterns) > 1
    ]
    if claimed_twice:
        found = f"several for {_listed(claimed_twice)}"
        raise wrong("constraints", "match each parameter by one pattern at most", found)
    for owner in filter(parametrize.is_parametrized, module.modules()):
        if any(_matches(type(owner), pattern) for pattern in constraints):
            parts = owner.get_submodule("parametrizations").parameters()
            unnamed = [_name(keys[p][0]) for p in parts if not claims[p] and p not in left_out]
            if unnamed:
                found = f"none of {_listed(unnamed)} for a {type(owner).__name__}"
                raise wrong("constraints", "name what a parametrized tensor is made from", found)
    rest = [(keys[param][0], param) for param in keys if not claims[param]]
    return [*groups, {"params": rest, "constraint": None}] if rest else groups


def _keys(module: nn.Module) -> dict[Tensor, list[Any]]:
    """What a pattern may match of each parameter: its names, then types of modules that hold it."""
    keys: dict[Tensor, list[Any]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        keys.setdefault(param, []).append(name)
    for owner in module.modules():
        for param in owner.parameters(recurse=False):
            if param in keys:
                keys[param].append(type(owner))
    return keys


def _alike(key: Pattern, pattern: Pattern) -> bool:
    return isinstance(key, str) == isinstance(pattern, str)


def _matches(key: Any, pattern: Any) -> bool:
    match = fnmatchcase if isinstance(pattern, str) else issubclass
    return _alike(key, pattern) and match(key, pattern)


def _is_bias_or_norm(key: Any) -> bool:
    """Whether it is one of torch's normalization layers, or the name of a bias.

    Torch calls biases `in_proj_bias`, `bias_k`, `bias_hh_l0` and the like.
    """
    if not isinstance(key, str):
        return issubclass(key, NORMALIZATIONS)
    last = key.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_") or last.endswith("_bias")


def _settings(pattern: Any, given: object) -> Mapping[str, Any]:
    """The settings of the group of a pattern, checked."""
    is_module_type = isinstance(pattern, type) and issubclass(pattern, nn.Module)
    if not (isinstance(pattern, str) or is_module_type):
        rule = "have names of parameters (globs) or types of modules as keys"
        raise wrong("constraints", rule, repr(pattern), TypeError)
    settings = given if isinstance(given, Mapping) else {"constraint": given}
    if "constraint" not in settings or "params" in settings:
        rule = "have `constraint`, and no `params`, in a dict of settings"
        raise wrong("constraints", rule, f"{list(settings)} for {_name(pattern)}")
    try:
        check_constraint(settings["constraint"])
    except TypeError as error:
        raise TypeError(f"{error} for {_name(pattern)}") from None
    return settings


def _name(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


def _listed(items: Iterable[str]) -> str:
    unique = list(dict.fromkeys(items))
    more = f", and {len(unique) - _MOST_NAMES} more" if len(unique) > _MOST_NAMES else ""
    return ", ".join(unique[:_MOST_NAMES]) + more
