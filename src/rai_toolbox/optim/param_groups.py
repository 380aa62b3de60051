"""Parameter groups of a module, each with its set, by names of parameters or types of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from rai_toolbox._torch import BATCH_NORMS
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim.settings import check_constraint
from rai_toolbox.optim.wrapper import Group

Pattern: TypeAlias = str | type[nn.Module]
Given: TypeAlias = Constraint | Mapping[str, Any] | None

_NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SHOWN = 20  # names in an error


def constrain(
    module: nn.Module,
    constraints: Mapping[Any, Given],  # (of patterns; but mappings are invariant in their keys)
    *,
    skip_bias_and_norm: bool = False,
) -> list[Group]:
    """Parameter groups of a module: which of its parameters are to be kept in which set.

    Each pattern makes one group, in the order of the mapping; parameters that none claims come
    last, in a group whose constraint is None. A parameter that several modules share has several
    names, any of which claims it, and is in one group. Frozen parameters are in their groups, too:
    an optimizer keeps them in their sets.

    Parameters
    ----------
    module : nn.Module
        The parameters are given by their names in `module.named_parameters()`.
    constraints : dict
        From a glob on these names, of which `*` also matches dots (``"head.*"``), or a type of
        modules, which claims all parameters that modules of it hold themselves (``nn.Linear``).
        To a set, to None for none, or to a dict of group settings, one of which is `constraint`.
    skip_bias_and_norm : bool
        Leave biases, and all parameters of torch's normalization layers, to the last group. A
        bias is called ``bias``, ``bias_...`` or ``..._bias``.

    Returns
    -------
    list of dict
        To be given to an optimizer as `params`.

    Raises
    ------
    ValueError
        If a pattern matches no parameter, or two match the same one; if there are no parameters.
    TypeError
        If a pattern, or what it stands for, is of another type.

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
    found = _found(module)
    if not found:
        raise ValueError(f"`module` must have parameters, got {module!r}")
    _check_each_matches(settings, found)
    if skip_bias_and_norm:
        found = [one._replace(free=one.is_bias_or_norm()) for one in found]
    claims = [[pattern for pattern in settings if one.is_claimed_by(pattern)] for one in found]
    _check_claims(settings, found, claims)
    groups: dict[Pattern, Group] = {
        pattern: {"params": [], **given} for pattern, given in settings.items()
    }
    rest: Group = {"params": [], "constraint": None}
    for one, patterns in zip(found, claims, strict=True):
        group = groups[patterns[0]] if patterns else rest
        group["params"].append((one.names[0], one.param))
    return [*groups.values(), *([rest] if rest["params"] else [])]


class _Found(NamedTuple):
    """A parameter of a module: all its names, the types of the modules that hold it."""

    param: Tensor
    names: list[str]
    kinds: list[type[nn.Module]]
    free: bool = False

    def matches(self, pattern: Pattern) -> bool:
        if isinstance(pattern, str):
            return any(fnmatchcase(name, pattern) for name in self.names)
        return any(issubclass(kind, pattern) for kind in self.kinds)

    def is_claimed_by(self, pattern: Pattern) -> bool:
        return not self.free and self.matches(pattern)

    def is_bias_or_norm(self) -> bool:
        return any(map(_is_bias, self.names)) or any(issubclass(k, _NORMS) for k in self.kinds)


def _found(module: nn.Module) -> list[_Found]:
    """All parameters, each once, in the order of `named_parameters`."""
    names: dict[Tensor, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    kinds: dict[Tensor, list[type[nn.Module]]] = {}
    for owner in module.modules():
        for held in owner.parameters(recurse=False):
            kinds.setdefault(held, []).append(type(owner))
    return [_Found(param, named, kinds.get(param, [])) for param, named in names.items()]


def _checked(module: object, constraints: object) -> dict[Pattern, Mapping[str, Any]]:
    """The settings of each pattern's group."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module, got {module!r}")
    if not isinstance(constraints, Mapping):
        raise TypeError(
            f"`constraints` must be a dict from patterns to constraints, got {constraints!r}"
        )
    for pattern in constraints:
        of_modules = isinstance(pattern, type) and issubclass(pattern, nn.Module)
        if not (isinstance(pattern, str) or of_modules):
            raise TypeError(
                "`constraints` must have names of parameters (globs) or types of modules as keys, "
                f"got {pattern!r}"
            )
    return {pattern: _settings(pattern, given) for pattern, given in constraints.items()}


def _settings(pattern: Pattern, given: object) -> Mapping[str, Any]:
    settings = given if isinstance(given, Mapping) else {"constraint": given}
    if "constraint" not in settings or "params" in settings:
        raise ValueError(
            "`constraints` must have `constraint`, and no `params`, in a dict of settings, got "
            f"{list(settings)} for {_spelled(pattern)}"
        )
    try:
        check_constraint(settings["constraint"])
    except TypeError as error:
        raise TypeError(f"{error} for {_spelled(pattern)}") from None
    return settings


def _is_bias(name: str) -> bool:
    """Whether it is what torch calls a bias, such as `in_proj_bias`, `bias_k`, `bias_hh_l0`."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def _check_each_matches(patterns: Iterable[Pattern], found: list[_Found]) -> None:
    for pattern in patterns:
        if not any(one.matches(pattern) for one in found):
            there: list[Pattern] = []
            for one in found:
                there += one.names if isinstance(pattern, str) else one.kinds
            raise ValueError(
                f"`constraints` must match a parameter with each pattern, got {_spelled(pattern)}, "
                f"which matches none of {_listed(map(_spelled, there))}"
            )


def _check_claims(
    patterns: Iterable[Pattern], found: list[_Found], claims: list[list[Pattern]]
) -> None:
    """Raise unless each parameter is claimed once at most, and each pattern claims one at least."""
    clashes = [
        f"{' = '.join(map(repr, one.names))} (by {' and '.join(map(_spelled, claimed_by))})"
        for one, claimed_by in zip(found, claims, strict=True)
        if len(claimed_by) > 1
    ]
    if clashes:
        raise ValueError(
            f"`constraints` must claim no parameter twice, got two claims of {_listed(clashes)}"
        )
    for pattern in patterns:
        if not any(pattern in claimed_by for claimed_by in claims):
            names = [repr(one.names[0]) for one in found if one.matches(pattern)]
            raise ValueError(
                f"`constraints` must match a parameter with each pattern, got {_spelled(pattern)}, "
                f"which matches only what `skip_bias_and_norm` leaves out: {_listed(names)}"
            )


def _spelled(item: Pattern) -> str:
    return repr(item) if isinstance(item, str) else item.__name__


def _listed(items: Iterable[str]) -> str:
    unique = list(dict.fromkeys(items))
    more = f", and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more
