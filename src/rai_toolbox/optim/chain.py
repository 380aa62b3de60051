"""The optimizer whose transforms are those of several others, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.inner import optimizer_class
from rai_toolbox.optim.wrapper import Group, Params

# A member scales and shifts only if it was told to, else only the chain does.
_NEUTRAL = {"grad_scale": 1.0, "grad_bias": 0.0}


class ChainedParamTransformingOptimizer(ParamTransformingOptimizer):
    """Apply the transforms of several optimizers, left to right, around one inner optimizer.

    ``g <- T_n(...T_1(g))``, inner step, ``p <- P_n(...P_1(p))``.

    Parameters
    ----------
    *transforming_optimizers : ParamTransformingOptimizer class, or functools.partial of one
        The members. A member's own `grad_scale`, `grad_bias` and `param_ndim` count for that
        member, where its partial gives them.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Notes
    -----
    Parameter groups hold the members' settings. A setting that one member has goes by its name
    (`q`); one that several have goes by the member's number too (`0.clamp_max`, `1.clamp_max`).

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
        inner = optimizer_class(InnerOpt)
        self._members = tuple(_make_member(each, inner) for each in transforming_optimizers)
        self._divides_by_norms = any(member._divides_by_norms for member in self._members)
        own = [
            _own_settings(member, factory)
            for member, factory in zip(self._members, transforming_optimizers, strict=True)
        ]
        # A nested chain's names that have a number already get another one: 0.1.clamp_max.
        self._claims = Counter(_base(name) for settings in own for name in settings)
        self._claims.update({"param_ndim": 1, **dict.fromkeys(_NEUTRAL, 1)})  # the chain's own
        self._names = tuple(
            {name: name if self._claims[name] == 1 else f"{i}.{name}" for name in settings}
            for i, settings in enumerate(own)
        )
        settings = {
            names[name]: value
            for names, values in zip(self._names, own, strict=True)
            for name, value in values.items()
        }
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={**settings, **self._spelled(defaults or {})},
            **inner_opt_kwargs,
        )

    def _each_member(self, group: Group) -> Iterator[tuple[ParamTransformingOptimizer, Any]]:
        for i, (member, names) in enumerate(zip(self._members, self._names, strict=True)):
            if "inner_opt" in self.__dict__:
                member.state, member._shown = self.state, self._shown
                member._place = f"{self._place}{i}."
            yield member, _MemberGroup(group, names)

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        for member, group in self._each_member(optim_group):
            member._transform_group_gradients_(params, grads, group)

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        for member, group in self._each_member(optim_group):
            member._transform_group_parameters_(params, group)

    def _after_inner_step_(self, group: Group) -> None:
        for member, seen in self._each_member(group):
            member._after_inner_step_(seen)

    def _init_state_(self, group: Group) -> None:
        for member, seen in self._each_member(group):
            member._init_state_(seen)

    def _sees_elements(self, group: Group) -> bool:
        return all(member._sees_elements(seen) for member, seen in self._each_member(group))

    def _has_gradient_transform(self, group: Group) -> bool:
        # A member may also scale, shift, or have a hook of its own.
        return any(member._transforms_gradients(seen) for member, seen in self._each_member(group))

    def _group_of_view(self, group: Group) -> Group:
        stored = [name for names in self._names for name in names.values()]
        return {
            **super()._group_of_view(group),
            **{name: -1 for name in stored if _base(name) == "param_ndim"},
        }

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        stored = [name for names in self._names for name in names.values()]
        hooked = self._overrides("_pre_step_transform_") or self._overrides("_post_step_transform_")
        for name in stored:
            if hooked and _base(name) == "param_ndim" and group[name] != group["param_ndim"]:
                raise ValueError(
                    f"`{name}` must equal `param_ndim`, because the hooks of {type(self).__name__} "
                    f"get a view of it, got {name}={group[name]} and "
                    f"param_ndim={group['param_ndim']}"
                )
        inner = self.__dict__.get("inner_opt")
        if not isinstance(inner, _NoInner):
            of_inner = set() if inner is None else inner.defaults.keys() - self._settings.keys()
            for name in sorted(self._claims.keys() & group.keys() - of_inner):
                if self._claims[name] > 1 and name not in ("param_ndim", *_NEUTRAL):
                    spelled = [other for other in stored if _base(other) == name]
                    raise ValueError(
                        f"`{name}` must be spelled as one of {', '.join(spelled)}, because several "
                        f"members have it; got {name}={group[name]!r}"
                    )
        for member, members_group in self._each_member(group):
            member._check_group(members_group)

    def _completed(self, param_group: Mapping[str, Any]) -> Group:
        if isinstance(param_group, Mapping):
            param_group = self._spelled(param_group)
        return super()._completed(param_group)

    def _spelled(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by the names under which groups hold them; a number needs not be left out."""
        known = {
            spelled: stored
            for i, names in enumerate(self._names)
            for name, stored in names.items()
            for spelled in (f"{i}.{name}", stored)
        }
        settings: dict[str, Any] = {}
        for name, value in given.items():
            stored = known.get(name, name)
            if stored in settings:
                raise ValueError(f"`{stored}` must be given once, got it as `{name}` too")
            if stored not in known and name.partition(".")[0].isdigit():
                raise ValueError(
                    f"`{name}` must be a setting of a member (one of {', '.join(sorted(known))}), "
                    f"got {name}={value!r}"
                )
            settings[stored] = value
        return settings

    def _keeps_zero(self, optim_group: Group) -> bool:
        return all(
            member._keeps_zero(group)
            and group["grad_bias"] == 0.0
            and not member._overrides("_pre_step_transform_")
            for member, group in self._each_member(optim_group)
        )

    def _extra_state(self) -> dict[str, Tensor]:
        return {
            f"{i}.{name}": value
            for i, member in enumerate(self._members)
            for name, value in member._extra_state().items()
        }

    def _check_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        for i, member in enumerate(self._members):
            member._check_extra_state(_of_member(extra, i))

    def _load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        for i, member in enumerate(self._members):
            member._load_extra_state(_of_member(extra, i))

    def _repr_name(self) -> str:
        if type(self) is not ChainedParamTransformingOptimizer:
            return super()._repr_name()
        return " ○ ".join(member._repr_name() for member in reversed(self._members))


class _MemberGroup(MutableMapping[str, Any]):
    """A chain's parameter group as one member sees it: its own settings by their plain names."""

    def __init__(self, group: Group, names: Mapping[str, str]) -> None:
        self._group, self._names = group, names

    def __getitem__(self, name: str) -> Any:
        if name in _NEUTRAL and name not in self._names:
            return _NEUTRAL[name]
        return self._group[self._names.get(name, name)]

    def __setitem__(self, name: str, value: Any) -> None:
        self._group[self._names.get(name, name)] = value

    def __delitem__(self, name: str) -> None:
        del self._group[self._names.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._group, **self._names})

    def __len__(self) -> int:
        return len({**self._group, **self._names})


class _NoInner(Optimizer):
    """Stands where a chain's member expects its inner optimizer: the chain has the only one."""

    def __init__(self, stands_for: type[Optimizer]) -> None:
        super().__init__([{"params": []}], {})
        self.stands_for = stands_for
        self.param_groups.clear()


def _base(name: str) -> str:
    """A setting's name without the numbers of members."""
    return name.rpartition(".")[2]


def _of_member(extra: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    prefix = f"{i}."
    return {k.removeprefix(prefix): v for k, v in extra.items() if k.startswith(prefix)}


def _make_member(factory: object, inner: type[Optimizer]) -> ParamTransformingOptimizer:
    if not (
        isinstance(factory, (type, partial))
        and issubclass(optimizer_class(factory), ParamTransformingOptimizer)
    ):
        raise TypeError(
            "`transforming_optimizers` must be ParamTransformingOptimizer classes or partials of "
            f"them, got {factory!r}"
        )
    bound = factory.keywords if isinstance(factory, partial) else {}
    for name in ("params", "InnerOpt"):
        if name in bound:
            raise TypeError(
                f"`{name}` must be given to the chain, not to a member, got {bound[name]!r}"
            )
    member: ParamTransformingOptimizer = factory(params=None, InnerOpt=_NoInner(inner))
    return member


def _own_settings(member: ParamTransformingOptimizer, factory: Any) -> dict[str, Any]:
    """The settings that count for one member only: what the chain does not say for all."""
    given = factory.keywords if isinstance(factory, partial) else {}
    return {
        name: value
        for name, value in member._settings.items()
        if (name != "param_ndim" or "param_ndim" in given)
        and (name not in _NEUTRAL or value != _NEUTRAL[name])
    }
