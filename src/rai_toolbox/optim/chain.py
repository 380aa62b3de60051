"""The optimizer whose transforms are those of several others, one after the other."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.optim import SGD, Optimizer

from rai_toolbox.checks import wrong
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.hooks import GRADIENT_HOOK, NEUTRAL, PARAMETER_HOOK
from rai_toolbox.optim.settings import base_name
from rai_toolbox.optim.transforms import SCALE, SHIFT
from rai_toolbox.optim.wrapper import MEMBER, Group, Params, checked_group

# Settings that the chain has itself: without a number they are the chain's. A member scales and
# shifts only if it was given a scale or a bias.
_OF_CHAIN: dict[str, Any] = {"param_ndim": None, **NEUTRAL}


class ChainedParamTransformingOptimizer(ParamTransformingOptimizer):
    """Apply the transforms of several optimizers, left to right, around one inner optimizer.

    ``g <- T_n(...T_1(g))``, inner step, ``p <- P_n(...P_1(p))``, each on sub-tensors of the shape
    that the `param_ndim` of its member gives.

    Parameters
    ----------
    *transforming_optimizers : ParamTransformingOptimizer class, or functools.partial of one
        The members. A member's own `grad_scale`, `grad_bias` and `param_ndim` count for that
        member, where its partial gives them.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Notes
    -----
    Parameter groups hold the members' settings. A setting that only one member has is named as
    there (`q`); if several have it, the member's number comes first (`0.clamp_max`,
    `1.clamp_max`).

    Raises
    ------
    TypeError
        If a member is not a class of parameter-transforming optimizers, or a partial of one.
    ValueError
        If there is no member, or a group gives an ambiguous setting.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from rai_toolbox import optim
    >>> x = torch.ones(3, requires_grad=True)
    >>> chain = optim.ChainedParamTransformingOptimizer(
    ...     partial(optim.TopQGradientOptimizer, q=0.33),
    ...     partial(optim.ClampedGradientOptimizer, clamp_max=2.8),
    ...     params=[x],
    ...     lr=1.0,
    ...     param_ndim=None,
    ... )
    >>> x.backward(gradient=torch.tensor([1.0, 2.0, 3.0]))
    >>> chain.step()
    >>> x.grad
    tensor([0.0000, 2.0000, 2.8000])
    """

    def __init__(
        self,
        *transforming_optimizers: type[ParamTransformingOptimizer] | partial[Any],
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        if not transforming_optimizers:
            raise ValueError("`transforming_optimizers` must not be empty, got no optimizer")
        members = [_member(each, InnerOpt) for each in transforming_optimizers]
        # The names in a nested chain that have a number already get another one: 0.1.clamp_max.
        claims = Counter([*_OF_CHAIN, *(base_name(name) for _, own in members for name in own)])
        self._ambiguous = {name for name, n in claims.items() if n > 1} - _OF_CHAIN.keys()
        self._keys: dict[str, str] = {}  # names in groups of members' settings, by each spelling
        settings, before, after = {}, [], []
        for i, (member, own) in enumerate(members):
            names = {name: name if claims[base_name(name)] == 1 else f"{i}.{name}" for name in own}
            for name, key in names.items():
                settings[key] = own[name]
                self._keys.update({f"{i}.{name}": key, key: key})
            scaling = [each for each in (SCALE, SHIFT) if each.setting in names]
            transforms = [*member._transforms(GRADIENT_HOOK), *scaling]
            before += [each.renamed(names, f"{i}.") for each in transforms]
            after += [each.renamed(names, f"{i}.") for each in member._transforms(PARAMETER_HOOK)]
        self._before, self._after = (*before, *self._before), (*after, *self._after)
        self._keys.update({name: name for name in self._generators()})
        self._composition = " ○ ".join(member._repr_name() for member, _ in reversed(members))
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={**settings, **self._by_key(defaults or {})},
            **inner_opt_kwargs,
        )

    def _check_group(self, group: Group) -> None:
        inner = self.__dict__.get("inner_opt")
        of_inner = set() if inner is None else inner.defaults.keys() - self._settings.keys()
        for name in sorted(self._ambiguous & group.keys() - of_inner):
            spelled = [key for key in dict.fromkeys(self._keys.values()) if base_name(key) == name]
            raise ValueError(
                f"`{name}` must be spelled as one of {', '.join(spelled)}, because several "
                f"members have it; got {name}={group[name]!r}"
            )
        super()._check_group(group)

    def _completed(self, param_group: Mapping[str, Any]) -> Group:
        return super()._completed(self._by_key(checked_group(param_group)))

    def _by_key(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by the names that groups have for them; a number may be left out or not."""
        settings: dict[str, Any] = {}
        for name, value in given.items():
            key = self._keys.get(name, name)
            if key in settings:
                raise ValueError(f"`{key}` must be given once, got it as `{name}` too")
            if name not in self._keys and name.partition(".")[0].isdigit():
                rule = f"be a setting of a member (one of {', '.join(sorted(self._keys))})"
                raise wrong(name, rule, f"{name}={value!r}")
            settings[key] = value
        return settings

    def _repr_name(self) -> str:
        is_named = type(self) is not ChainedParamTransformingOptimizer
        return super()._repr_name() if is_named else self._composition


def _member(given: Any, InnerOpt: object) -> tuple[ParamTransformingOptimizer, dict[str, Any]]:
    """A member, and the settings that count for it alone: those that the chain does not have."""
    made_by = given.func if isinstance(given, partial) else given
    if not (isinstance(made_by, type) and issubclass(made_by, ParamTransformingOptimizer)):
        rule = "be ParamTransformingOptimizer classes or partials of them"
        raise wrong("transforming_optimizers", rule, repr(given), TypeError)
    accepted = inspect.signature(given).parameters
    if "InnerOpt" not in accepted and all(p.kind is not p.VAR_KEYWORD for p in accepted.values()):
        raise TypeError(f"`transforming_optimizers` must take an `InnerOpt`, got {given!r}")
    bound = given.keywords if isinstance(given, partial) else {}
    for name in ("params", "InnerOpt"):
        if name in bound:
            rule = "be given to the chain, not to a member"
            raise wrong(name, rule, repr(bound[name]), TypeError)
    member: ParamTransformingOptimizer = given(params=MEMBER, InnerOpt=InnerOpt)
    return member, {
        name: value
        for name, value in member._settings.items()
        if name not in _OF_CHAIN
        or (name in bound if name == "param_ndim" else value != _OF_CHAIN[name])
    }
