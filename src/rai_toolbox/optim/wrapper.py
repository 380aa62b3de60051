"""An optimizer around another one, whose state and groups it shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox._torch import not_compiled, profile_hook_step
from rai_toolbox.checks import as_plain, check_type, parameters_of, wrong
from rai_toolbox.optim.inner import optimizer_class, own_state, picklable_state
from rai_toolbox.optim.settings import REQUIRED, as_loaded, as_saved, base_name

Params = Iterable[Any] | None
Group = dict[str, Any]


MEMBER: Any = object()
"""What a chain gives as `params` to its members, which have no parameters of their own."""


class OptimizerWrapper(Optimizer):
    """What a wrapper of `inner_opt` must be for torch, schedulers and trainers: an optimizer.

    `state`, `param_groups` and `defaults` are the inner's own objects, whatever happens to either.
    The groups hold its own settings, too: its arguments, but for `inner_opt_kwargs`.
    """

    inner_opt: Optimizer
    """The optimizer that updates the parameters."""

    _viewed: Tensor | None = None
    """The parameter that a running hook sees a view of."""

    _prefix: str = ""
    """Goes before the names of state: the number of a chain's member, while its hook runs."""

    profile_hook_step = staticmethod(profile_hook_step)

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        settings = {"param_ndim": param_ndim, "grad_scale": grad_scale, "grad_bias": grad_bias}
        self._settings: dict[str, Any] = settings | dict(defaults or {})
        # State for parameters that have none yet. It is added after the inner step, because inner
        # optimizers take a state that is not empty for one of their own.
        self._new_state: dict[Tensor, dict[str, Any]] = {}
        if issubclass(optimizer_class(InnerOpt), OptimizerWrapper):
            raise TypeError(
                "`InnerOpt` must not transform parameters itself (chain the two by "
                f"ChainedParamTransformingOptimizer), got {InnerOpt!r}"
            )
        if params is MEMBER:
            for name, value in inner_opt_kwargs.items():
                rule = "be given to the chain, not to a member"
                raise wrong(name, rule, repr(value), TypeError)
            return
        # (distributed checkpoints keep only what groups name)
        self._settings |= dict.fromkeys(self._generators())
        if isinstance(InnerOpt, Optimizer):
            if params is not None or inner_opt_kwargs:
                given = ", ".join(["params"] * (params is not None) + list(inner_opt_kwargs))
                raise TypeError(
                    f"`{given}` must not be given together with an InnerOpt instance, which has "
                    f"its own, got InnerOpt={type(InnerOpt).__name__}(...)"
                )
            if any(settings.keys() <= group.keys() for group in InnerOpt.param_groups):
                raise ValueError(
                    "`InnerOpt` must not have been wrapped, nor have loaded what a wrapper saved "
                    "(its groups hold the settings of that wrapper, not the given "
                    f"{', '.join(self._settings)}), got {InnerOpt!r}"
                )
            self.inner_opt = InnerOpt
            self.param_groups = InnerOpt.param_groups  # (completed)
        else:
            self._check_keywords(inner_opt_kwargs, optimizer_class(InnerOpt))
            groups = [self._completed(group) for group in as_groups(params)]
            self.inner_opt = InnerOpt(groups, **inner_opt_kwargs)
            for group in self.inner_opt.param_groups:  # which have settings of the inner by now
                self._check_group(group)
        given_settings = {name: v for name, v in self._settings.items() if v is not REQUIRED}
        self.inner_opt.defaults.update(given_settings)
        # Not Optimizer.__init__: that would give this object groups and a state of its own.
        Optimizer.__setstate__(self, {})

    def _check_keywords(self, given: Mapping[str, Any], inner: type[Optimizer]) -> None:
        """Raise if neither this class nor the inner optimizer's has an argument of some name."""
        of_inner = parameters_of(inner)
        if given.keys() <= of_inner.keys() or any(
            p.kind is p.VAR_KEYWORD for p in of_inner.values()
        ):
            return
        name = next(name for name in given if name not in of_inner)
        own = parameters_of(type(self)).values()
        raise TypeError(
            f"`{name}` must be an argument of {type(self).__name__} "
            f"({', '.join(p.name for p in own if p.kind is p.KEYWORD_ONLY)}), or of "
            f"{inner.__name__} ({', '.join(of_inner)}), got {name}={given[name]!r}"
        )

    def _check_group(self, group: Group) -> None:
        """Raise if a setting of a complete group breaks its rule, or does not fit a parameter."""

    def _generators(self) -> dict[str, Generator]:
        """The random generators that checkpoints save, by the names of their states."""
        return {}

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of `inner_opt`."""
        return self.inner_opt.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.inner_opt.state = state

    def _add_new_state(self) -> None:
        for param, new_state in self._new_state.items():
            if new_state and param.grad is not None:  # (else the inner may have its own to make)
                self.state[param].update(new_state)
        self._new_state.clear()

    @property
    def defaults(self) -> dict[str, Any]:
        """The group defaults of `inner_opt`, which include the settings of this class."""
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner_opt.defaults = defaults

    @property
    def param_groups(self) -> list[Group]:
        """The parameter groups of `inner_opt`. Those that are set get the settings they lack."""
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        completed = [self._completed(group) for group in groups]
        for group, full in zip(groups, completed, strict=True):  # all of them have been checked
            group.update({name: full[name] for name in self._settings})
        if groups is not self.inner_opt.param_groups:  # some have no setter
            self.inner_opt.param_groups = groups

    @not_compiled
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, with its own settings where it names them.

        Parameters
        ----------
        param_group : dict
            `params`, and any settings of this optimizer and the inner one. It is not modified.
        """
        self.inner_opt.add_param_group(self._completed(param_group))

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Parameters
        ----------
        set_to_none : bool
            Set them to None rather than to zero.
        """
        name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"  # as torch calls it
        with torch.autograd.profiler.record_function(name):
            self.inner_opt.zero_grad(set_to_none=set_to_none)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """The state of `inner_opt`, as plain data and tensors.

        Returns
        -------
        dict
            `state` and `param_groups`, in the format of every torch optimizer.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.inner_opt.state_dict()
        groups = [as_saved(group) for group in _holder_of_groups(state_dict)["param_groups"]]
        for group in groups[:1]:
            group.update({name: g.get_state() for name, g in self._generators().items()})
        state_dict = _with_groups(state_dict, groups)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    @not_compiled
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, or the state of a bare inner optimizer.

        Parameters
        ----------
        state_dict : dict
            It is not modified. Settings that it lacks keep their present values.

        Raises
        ------
        ValueError, TypeError
            If its groups do not fit or hold bad settings, before anything is changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        holder = _holder_of_groups(state_dict)
        for name in ("state", "param_groups"):
            if name not in holder:
                raise ValueError(f"`state_dict` must have `{name}`, got {list(state_dict)}")
        groups, generator_states = self._merged(holder["param_groups"])
        self.inner_opt.load_state_dict(_with_groups(state_dict, groups))
        for generator, state in generator_states:
            generator.set_state(state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _merged(
        self, loaded: Sequence[Group]
    ) -> tuple[list[Group], list[tuple[Generator, Tensor]]]:
        """A checkpoint's groups, completed by present settings, and its states of generators.

        Both are checked.
        """
        if len(loaded) != len(self.param_groups):
            rule = f"have {len(self.param_groups)} parameter groups"
            raise wrong("state_dict", rule, len(loaded))
        merged = []
        for i, (live, new) in enumerate(zip(self.param_groups, loaded, strict=True)):
            if "params" not in new:
                raise ValueError(f"`state_dict` must have `params` in group {i}, got {list(new)}")
            if len(live["params"]) != len(new["params"]):
                rule = f"have {len(live['params'])} parameters in group {i}"
                raise wrong("state_dict", rule, len(new["params"]))
            group = {k: None if base_name(k) == "generator_state" else v for k, v in new.items()}
            device = live["params"][0].device if live["params"] else None
            ours = as_loaded({name: group.get(name, live[name]) for name in self._settings}, device)
            names = {k: live[k] for k in ("params", "param_names") if k in live}
            self._check_group(group | ours | names)
            merged.append(group | ours)
        return merged, [
            (generator, _checked_state(name, loaded[0][name], generator))
            for name, generator in self._generators().items()
            if loaded and loaded[0].get(name) is not None
        ]

    def __getstate__(self) -> dict[str, Any]:
        state = own_state(self)
        if "inner_opt" in state:  # a chain's member has none
            state["inner_opt"] = (type(self.inner_opt), picklable_state(self.inner_opt))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "inner_opt" in state:
            inner_class, inner_state = state.pop("inner_opt")
            self.inner_opt = inner_class.__new__(inner_class)
            self.inner_opt.__setstate__(inner_state)
            Optimizer.__setstate__(self, {})
        for name, value in state.items():
            setattr(self, name, value)

    def _completed(self, param_group: Mapping[str, Any]) -> Group:
        """A copy of a group, with a value for every setting, checked."""
        group = self._settings | checked_group(param_group)
        for name in self._settings:
            if group[name] is REQUIRED:
                rule = f"be given, to {type(self).__name__} or in every parameter group"
                if base_name(name) == "constraint":
                    rule += " (in ProjectedOptimizer None leaves it unconstrained)"
                raise wrong(name, rule, "a group without it", TypeError)
            group[name] = as_plain(group[name])
        if all(isinstance(param, Tensor) for param in group["params"]):  # else the inner refuses
            self._check_group(group)
        return group

    def __repr__(self) -> str:
        own, inner = type(self).__name__, type(self.inner_opt).__name__
        return f"{self._repr_name()} [{inner}]{Optimizer.__repr__(self).removeprefix(own + ' ')}"

    def _repr_name(self) -> str:
        return type(self).__name__


def _holder_of_groups(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where `param_groups` are: Lookahead has them in the `state_dict` of another optimizer."""
    nested = [v for v in state_dict.values() if isinstance(v, Mapping) and "param_groups" in v]
    return nested[0] if nested else state_dict


def _with_groups(state_dict: Mapping[str, Any], groups: list[Group]) -> dict[str, Any]:
    holder = _holder_of_groups(state_dict)
    full = {**holder, "param_groups": groups}
    if holder is state_dict:
        return full
    return {name: full if value is holder else value for name, value in state_dict.items()}


def as_groups(params: Any) -> list[Any]:
    """The groups in what an optimizer is given as `params`, which are not checked yet."""
    if params is None:
        raise TypeError("`params` must be given, unless InnerOpt is an instance; got None")
    if isinstance(params, Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, "
            f"but got a tensor of shape {tuple(params.shape)}"
        )
    listed = _in_order(params)
    if not listed:
        raise ValueError("`params` must not be empty, got an empty iterable")
    return listed if isinstance(listed[0], Mapping) else [{"params": listed}]


def checked_group(param_group: Any) -> Group:
    """A copy of a group, with a list of tensors as `params`, and their names in `param_names`."""
    if not isinstance(param_group, Mapping):
        raise TypeError(f"a parameter group must be a dict, got {param_group!r}")
    if "params" not in param_group:
        raise ValueError(f"a parameter group must have `params`, got {list(param_group)}")
    given = param_group["params"]
    params = [given] if isinstance(given, Tensor) else _in_order(given)
    if params and all(isinstance(param, tuple) for param in params):
        names, params = [pair[0] for pair in params], [pair[1] for pair in params]
        return {**param_group, "params": params, "param_names": names}
    return {**param_group, "params": params}


def _in_order(params: Any) -> list[Any]:
    if isinstance(params, (set, frozenset)):
        raise TypeError("`params` must have an order that is the same in every run, got a set")
    rule = "be an iterable, as `model.parameters()` (an optimizer is given as InnerOpt=)"
    check_type("params", params, Iterable, rule)
    return list(params)


def _checked_state(name: str, state: Any, generator: Generator) -> Tensor:
    """The state for a generator on the host, if it takes it."""
    try:
        host_state: Tensor = state.cpu()
        Generator(generator.device).set_state(host_state)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` in `state_dict` must be that of a generator on {generator.device}: {error}"
        ) from None
    return host_state
