"""Parameter groups of a module, each with its set, by parameter names or module types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from rai_toolbox._torch import NORMALIZATIONS
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
    """Return parameter groups of a module that say which parameters are constrained to which set.

    Each pattern makes one group, in the order of the mapping; parameters that no pattern matches
    are in a last group, whose constraint is None. A parameter that several modules share has
    several names, any of which may match, and is in one group. Frozen parameters are in their
    groups, too.

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
        If a pattern matches no parameter, or two match the same one; if there are no parameters.
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
    settings = _checked(module, constraints)
    entries = _entries(module)
    if not entries:
        raise ValueError(f"`module` must have parameters, got {module!r}")
    groups: list[Group] = []
    for pattern, given in settings.items():
        matches = [entry for entry in entries if entry.matches(pattern)]
        kept = [entry for entry in matches if not (skip_bias_and_norm and entry.is_bias_or_norm())]
        if not kept:
            found = f"none of {_listed(_name(k) for entry in entries for k in entry.keys(pattern))}"
            if matches:
                left_out = _listed(repr(entry.names[0]) for entry in matches)
                found = f"only what `skip_bias_and_norm` leaves out: {left_out}"
            raise ValueError(
                f"`constraints` must match a parameter with each pattern, got {_name(pattern)}, "
                f"which matches {found}"
            )
        for entry in kept:
            entry.patterns.append(pattern)
        groups.append({"params": [entry.named for entry in kept], **given})
    matched_twice = [
        f"{' = '.join(map(repr, entry.names))} (by {' and '.join(map(_name, entry.patterns))})"
        for entry in entries
        if len(entry.patterns) > 1
    ]
    if matched_twice:
        raise ValueError(
            "`constraints` must claim no parameter twice, got two claims of "
            f"{_listed(matched_twice)}"
        )
    rest = [entry.named for entry in entries if not entry.patterns]
    return [*groups, {"params": rest, "constraint": None}] if rest else groups


class _Entry:
    """A parameter of a module, with all its names and the types of the modules that hold it."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.names: list[str] = []
        self.module_types: list[type[nn.Module]] = []
        self.patterns: list[Pattern] = []  # that match it

    @property
    def named(self) -> tuple[str, Tensor]:
        return self.names[0], self.param

    def keys(self, pattern: Pattern) -> Sequence[Pattern]:
        """What the parameter may be matched by, of the kind that the pattern is."""
        return self.names if isinstance(pattern, str) else self.module_types

    def matches(self, pattern: Pattern) -> bool:
        match: Callable[[Any, Any], bool] = fnmatchcase if isinstance(pattern, str) else issubclass
        return any(match(key, pattern) for key in self.keys(pattern))

    def is_bias_or_norm(self) -> bool:
        is_norm = any(issubclass(kind, NORMALIZATIONS) for kind in self.module_types)
        return is_norm or any(map(_is_bias, self.names))


def _entries(module: nn.Module) -> list[_Entry]:
    """All parameters, each once, in the order of `named_parameters`."""
    entries: dict[Tensor, _Entry] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        entries.setdefault(param, _Entry(param)).names.append(name)
    for owner in module.modules():
        for param in owner.parameters(recurse=False):
            if param in entries:
                entries[param].module_types.append(type(owner))
    return list(entries.values())


def _checked(module: object, constraints: object) -> dict[Pattern, Mapping[str, Any]]:
    """The settings of the group of each pattern."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {module!r}")
    if not isinstance(constraints, Mapping):
        raise TypeError(
            f"`constraints` must be a dict from patterns to constraints, got {constraints!r}"
        )
    checked: dict[Pattern, Mapping[str, Any]] = {}
    for pattern, given in constraints.items():
        is_module_type = isinstance(pattern, type) and issubclass(pattern, nn.Module)
        if not (isinstance(pattern, str) or is_module_type):
            raise TypeError(
                "`constraints` must have names of parameters (globs) or types of modules as keys, "
                f"got {pattern!r}"
            )
        settings = given if isinstance(given, Mapping) else {"constraint": given}
        if "constraint" not in settings or "params" in settings:
            raise ValueError(
                "`constraints` must have `constraint`, and no `params`, in a dict of settings, got "
                f"{list(settings)} for {_name(pattern)}"
            )
        try:
            check_constraint(settings["constraint"])
        except TypeError as error:
            raise TypeError(f"{error} for {_name(pattern)}") from None
        checked[pattern] = settings
    return checked


def _is_bias(name: str) -> bool:
    """Whether it is what torch calls a bias, such as `in_proj_bias`, `bias_k`, `bias_hh_l0`."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_") or last.endswith("_bias")


def _name(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else pattern.__name__


def _listed(items: Iterable[str]) -> str:
    unique = list(dict.fromkeys(items))
    more = f", and {len(unique) - _MOST_NAMES} more" if len(unique) > _MOST_NAMES else ""
    return ", ".join(unique[:_MOST_NAMES]) + more
