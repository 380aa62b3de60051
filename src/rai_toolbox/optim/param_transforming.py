"""The engine: an optimizer that transforms gradients, steps an inner one, projects parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from rai_toolbox import foreach
from rai_toolbox.batch import batch_shape, check_param_ndim, sub_ndim, view_or_copy
from rai_toolbox.optim.inner import (
    make_inner,
    not_compiled,
    optimizer_class,
    own_state,
    picklable_state,
    step_inner,
)
from rai_toolbox.optim.settings import REQUIRED, check_number, is_zero_on_host, labels

Params = Iterable[Any] | None
Group = dict[str, Any]


class ParamTransformingOptimizer(Optimizer):
    r"""Transform each gradient before an inner optimizer's step, and each parameter after it.

    .. math::
        g \leftarrow \text{scale} \cdot T(g) + \text{bias}, \quad
        p \leftarrow \text{inner step}(p, g), \quad p \leftarrow P(p)

    On its own it transforms nothing. A subclass overrides one or both of the hooks
    `_pre_step_transform_` (T) and `_post_step_transform_` (P), which see each tensor as a batch
    of sub-tensors, of shape `(N, d0, ...)`.

    Parameters
    ----------
    params : iterable, optional
        Tensors, named tensors `(name, tensor)`, or dicts that define parameter groups. Left out
        if, and only if, `InnerOpt` is an instance.
    InnerOpt : Optimizer class, functools.partial of one, or instance
        The optimizer that updates the parameters. The groups of an instance are used.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`.
    grad_scale : float
        Multiplies each gradient, after its transform.
    grad_bias : float
        Added to each gradient, after its scaling.
    defaults : dict, optional
        More defaults for all parameter groups; they win over the arguments.
    **inner_opt_kwargs
        Keyword arguments of `InnerOpt`.

    Notes
    -----
    `param_ndim`, `grad_scale`, `grad_bias`, and the settings of each subclass can be given, and
    scheduled, per parameter group. `state`, `param_groups` and `defaults` are those of
    `inner_opt`; so is `state_dict()`. With a closure, gradients are transformed after each of its
    evaluations, and parameters once, after the step.

    Raises
    ------
    TypeError, ValueError
        For any setting of any group that breaks its rule, before anything is changed.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ParamTransformingOptimizer
    >>> class Reversed(ParamTransformingOptimizer):
    ...     def _pre_step_transform_(self, param, optim_group):
    ...         param.grad.neg_()
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = Reversed([x], lr=1.0)
    >>> x.backward(gradient=torch.tensor([0.5, -10.0]))
    >>> optim.step()
    >>> x
    tensor([ 1.5000, -9.0000], requires_grad=True)
    """

    inner_opt: Optimizer
    """The optimizer that updates the parameters."""

    _elementwise: bool = False
    """Whether the built-in transforms act on each element by itself, whatever `param_ndim` is."""

    _divides_by_norms: bool = False
    """Whether the built-in transform divides gradients by norms of theirs."""

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
        self._settings: dict[str, Any] = {
            "param_ndim": param_ndim,
            "grad_scale": grad_scale,
            "grad_bias": grad_bias,
            **(defaults or {}),
        }
        if issubclass(optimizer_class(InnerOpt), ParamTransformingOptimizer):
            raise TypeError(
                "`InnerOpt` must not transform parameters itself (chain the two by "
                f"ChainedParamTransformingOptimizer), got {InnerOpt!r}"
            )
        if isinstance(InnerOpt, Optimizer):
            if params is not None or inner_opt_kwargs:
                given = ", ".join(["params"] * (params is not None) + list(inner_opt_kwargs))
                raise TypeError(
                    f"`{given}` must not be given together with an InnerOpt instance, which has "
                    f"its own, got InnerOpt={type(InnerOpt).__name__}(...)"
                )
            self._complete_live_groups(InnerOpt.param_groups)
            self.inner_opt = InnerOpt
        else:
            groups = [self._completed(group) for group in _as_groups(params)]
            self.inner_opt = make_inner(InnerOpt, groups, inner_opt_kwargs)
        self.inner_opt.defaults.update(self._given_settings())
        # Not Optimizer.__init__: that would give this object groups and a state of its own.
        Optimizer.__setstate__(self, {})

    # ------------------------------------------------------------------ hooks

    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Transform `param.grad` in place, before the inner step. For subclasses to override.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            View of a parameter that has a gradient; `param.grad` is the same view of that.
        optim_group : dict
            The parameter group, with all its settings. It is passed by keyword.
        """
        if param.grad is not None:
            self._transform_gradients_([param], [param.grad], {**optim_group, "param_ndim": -1})

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Transform `param` in place, after the inner step. For subclasses to override.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            View of a parameter, with or without a gradient.
        optim_group : dict
            The parameter group, with all its settings. It is passed by keyword.
        """
        self._project_parameters_([param], {**optim_group, "param_ndim": -1})

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        """Built-in classes override this: a group's gradients of one device and dtype at once."""

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        """Built-in classes override this: all parameters of a group."""

    def _check_group(self, group: Group) -> None:
        """Raise if a setting of a complete group breaks its rule, or does not fit a parameter."""
        check_number("grad_scale", group["grad_scale"])
        check_number("grad_bias", group["grad_bias"])
        check_param_ndim(group["param_ndim"])
        shown = self._overrides("_pre_step_transform_") or self._overrides("_post_step_transform_")
        if self._elementwise and not shown:
            return
        for param, label in zip(group["params"], labels(group), strict=True):
            try:
                sub_ndim(param.ndim, group["param_ndim"])
            except ValueError as error:
                raise ValueError(f"{error} ({label})") from None
            if getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"{type(self).__name__} needs parameters in their own shape, got {label}, "
                    "flattened by FullyShardedDataParallel; shard it by fully_shard instead"
                )

    def _keeps_zero(self, optim_group: Group) -> bool:
        """Whether the gradient's transform is elementwise with 0 -> 0: fit for sparse gradients."""
        unchanged = ParamTransformingOptimizer._transform_gradients_
        return type(self)._transform_gradients_ is unchanged

    # ------------------------------------------------------------------- step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Transform the gradients, step `inner_opt`, transform the parameters.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.
        """
        if closure is None:
            # (Dynamo traces only frames that name torch, or hold a tensor: do not move this call.)
            if not torch.compiler.is_compiling() and self._initializes_state():
                step_inner(self.inner_opt, None)
                return None
            self._pre_step()
            if torch.compiler.is_compiling() and self._must_break_graph():
                torch._dynamo.graph_break()
            loss: float | None = step_inner(self.inner_opt, None)
        else:
            loss = step_inner(self.inner_opt, self._transforming(closure))
        self._post_step()
        return loss

    def _must_break_graph(self) -> bool:
        # Inductor of torch 2.13 fails on CPU ("KeyError: 'buf4'", pytorch #188228 and #196570) if
        # one graph holds norms of rows, a division by them, and an update by the quotients.
        return self._divides_by_norms and any(
            param.device.type == "cpu" for group in self.param_groups for param in group["params"]
        )

    def _transforming(self, closure: Callable[[], float]) -> Callable[[], float]:
        def evaluate() -> float:
            with torch.enable_grad():
                loss = closure()
            with torch.set_grad_enabled(self.defaults["differentiable"]):
                self._pre_step()
            return loss

        return evaluate

    def _pre_step(self) -> None:
        todo = []
        for group in self.param_groups:
            if self._transforms_gradients(group):
                params = [p for p in group["params"] if p.grad is not None]
                todo.append((group, params, self._gradients(params, group)))
        for group, params, grads in todo:  # now that all gradients are found fit
            self._transform_group_gradients_(params, grads, group)

    def _post_step(self) -> None:
        for group in self.param_groups:
            self._transform_group_parameters_(group["params"], group)

    def _transforms_gradients(self, group: Group) -> bool:
        unchanged = ParamTransformingOptimizer._transform_gradients_
        return (
            self._overrides("_pre_step_transform_")
            or type(self)._transform_gradients_ is not unchanged
            or group["grad_scale"] != 1.0
            or group["grad_bias"] != 0.0
        )

    def _gradients(self, params: list[Tensor], group: Group) -> list[Tensor]:
        """What there is to transform of each parameter's gradient."""
        grads: list[Any] = [param.grad for param in params]
        if torch.is_grad_enabled():  # differentiable: keep the graph's own tensors as they are
            grads = [grad.clone() for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        if all(grad.layout is torch.strided for grad in grads):
            return grads
        keeps_zero = (
            not self._overrides("_pre_step_transform_")
            and self._keeps_zero(group)
            and group["grad_bias"] == 0.0
        )
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad.layout is torch.strided:
                continue
            if not (keeps_zero and grad.layout is torch.sparse_coo):
                label = labels(group)[next(j for j, p in enumerate(group["params"]) if p is param)]
                raise ValueError(
                    f"{type(self).__name__} needs dense gradients (only elementwise transforms "
                    f"that map 0 to 0 take sparse COO ones), got {grad.layout} for {label}"
                )
            param.grad = grad.coalesce()
            grads[i] = param.grad._values()
        return grads

    def _transform_group_gradients_(
        self, params: list[Tensor], grads: list[Tensor], group: Group
    ) -> None:
        if self._overrides("_pre_step_transform_"):
            for param, grad in zip(params, grads, strict=True):
                self._show_gradient_(param, grad, group)
        else:
            for some_params, some_grads in _by_device_and_dtype(params, grads):
                self._transform_gradients_(some_params, some_grads, group)
        if group["grad_scale"] != 1.0:
            foreach.mul_(grads, group["grad_scale"])
        if group["grad_bias"] != 0.0:
            foreach.add_(grads, group["grad_bias"])

    def _transform_group_parameters_(self, params: list[Tensor], group: Group) -> None:
        if not self._overrides("_post_step_transform_"):
            self._project_parameters_(params, group)
            return
        for param in params:
            view, copied = view_or_copy(param, batch_shape(param.shape, group["param_ndim"]))
            self._post_step_transform_(view, optim_group=group)
            if copied:
                param.copy_(view.view(param.shape))

    def _show_gradient_(self, param: Tensor, grad: Tensor, group: Group) -> None:
        """Call the documented hook on one parameter and gradient, in their batch view."""
        shape = batch_shape(param.shape, group["param_ndim"])
        grad_view, copied = view_or_copy(grad, shape)
        view = view_or_copy(param.detach(), shape)[0]
        if grad.dtype != param.dtype:
            view.grad_dtype = grad.dtype
        view.grad = grad_view
        self._pre_step_transform_(view, optim_group=group)
        if view.grad is not grad_view:
            raise ValueError(
                f"{type(self).__name__}._pre_step_transform_ must write into `param.grad` in "
                "place, got another tensor assigned to it"
            )
        if copied:
            grad.copy_(grad_view.view(grad.shape))

    def _overrides(self, hook: str) -> bool:
        """Whether a user's subclass, or the user on this instance, has overridden a hook."""
        mine = getattr(ParamTransformingOptimizer, hook)
        return getattr(type(self), hook) is not mine or hook in self.__dict__

    def _initializes_state(self) -> bool:
        """Whether this step is the one by which a distributed checkpoint makes empty state.

        It comes before any state is there, with every lr 0 and every gradient 0, and must leave
        parameters, gradients and random numbers alone. Values are read only if all else fits.
        """
        if self.inner_opt.state:
            return False
        if not all(is_zero_on_host(group.get("lr")) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return bool(params) and not any(p.grad is None or bool(p.grad.any()) for p in params)

    # ------------------------------------------------------------------ state

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of `inner_opt`."""
        return self.inner_opt.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.inner_opt.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The group defaults of `inner_opt`, which include the settings of this class."""
        return self.inner_opt.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner_opt.defaults = defaults

    @property
    def param_groups(self) -> list[Group]:
        """The parameter groups of `inner_opt`."""
        return self.inner_opt.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._complete_live_groups(groups)
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
        extra = self._extra_state()
        if extra:
            first, *others = state_dict["param_groups"]
            state_dict = {**state_dict, "param_groups": [{**first, **extra}, *others]}
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
        groups, extra = self._merged(state_dict["param_groups"])
        self.inner_opt.load_state_dict({**state_dict, "param_groups": groups})
        self._load_extra_state(extra)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _extra_state(self) -> dict[str, Tensor]:
        """What a subclass must remember outside the groups: tensors, by unique names."""
        return {}

    def _load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Restore what `_extra_state` gave; a checkpoint of another optimizer has none of it."""

    def _merged(self, loaded: Sequence[Group]) -> tuple[list[Group], dict[str, Tensor]]:
        """Groups of a checkpoint, completed by the present settings and checked; extra state."""
        if len(loaded) != len(self.param_groups):
            raise ValueError(
                f"`state_dict` must have {len(self.param_groups)} parameter groups, got "
                f"{len(loaded)}"
            )
        extra_names = [name for group in loaded[:1] for name in group if _is_extra(name)]
        merged = []
        for i, (live, new) in enumerate(zip(self.param_groups, loaded, strict=True)):
            if len(live["params"]) != len(new["params"]):
                raise ValueError(
                    f"`state_dict` must have {len(live['params'])} parameters in group {i}, got "
                    f"{len(new['params'])}"
                )
            ours = {name: live[name] for name in self._settings}
            group = ours | {k: v for k, v in new.items() if k not in extra_names}
            names = {k: live[k] for k in ("params", "param_names") if k in live}
            self._check_group(group | names)
            merged.append(group)
        return merged, {name: loaded[0][name] for name in extra_names}

    def __getstate__(self) -> dict[str, Any]:
        inner = self.inner_opt
        return own_state(self) | {"inner_opt": (type(inner), picklable_state(inner))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "inner_opt" in state:
            inner_class, inner_state = state.pop("inner_opt")
            self.inner_opt = inner_class.__new__(inner_class)
            self.inner_opt.__setstate__(inner_state)
        names = {"state", "param_groups", "defaults"} & state.keys()
        theirs: dict[str, Any] = {name: state.pop(name) for name in names}
        if theirs:
            self.inner_opt.__setstate__(theirs)
        Optimizer.__setstate__(self, state)

    # ----------------------------------------------------------------- groups

    def _given_settings(self) -> dict[str, Any]:
        return {name: v for name, v in self._settings.items() if v is not REQUIRED}

    def _completed(self, param_group: Mapping[str, Any]) -> Group:
        """A copy of a group in which every setting has a value that keeps its rule."""
        if not isinstance(param_group, Mapping):
            raise TypeError(f"a parameter group must be a dict, got {param_group!r}")
        if "params" not in param_group:
            raise ValueError(f"a parameter group must have `params`, got {list(param_group)}")
        given = param_group["params"]
        group = self._given_settings() | dict(param_group)
        group["params"] = given = [given] if isinstance(given, Tensor) else _in_order(given)
        for name in self._settings:
            if name not in group:
                raise TypeError(
                    f"`{name}` must be given, to {type(self).__name__} or in every parameter "
                    f"group, got a group without it"
                )
        named = all(isinstance(param, tuple) for param in given)
        tensors = [param[1] for param in given] if named else given
        names = {"param_names": [param[0] for param in given]} if given and named else {}
        if all(isinstance(tensor, Tensor) for tensor in tensors):  # else the inner will refuse
            self._check_group({**group, "params": tensors, **names})
        return group

    def _complete_live_groups(self, groups: Sequence[Group]) -> None:
        """Add the settings that groups lack, in place, once all of them are found right."""
        completed = [self._completed(group) for group in groups]
        for group, full in zip(groups, completed, strict=True):
            for name in self._settings:
                group.setdefault(name, full[name])

    def __repr__(self) -> str:
        own, inner = type(self).__name__, type(self.inner_opt).__name__
        return f"{self._repr_name()} [{inner}]{Optimizer.__repr__(self).removeprefix(own + ' ')}"

    def _repr_name(self) -> str:
        return type(self).__name__


def _as_groups(params: Params) -> list[Any]:
    if params is None:
        raise TypeError("`params` must be given, unless InnerOpt is an instance; got None")
    if isinstance(params, Tensor):
        raise TypeError(
            "`params` must be an iterable of tensors or dicts, got a tensor of shape "
            f"{tuple(params.shape)}"
        )
    listed = _in_order(params)
    if not listed:
        raise ValueError("`params` must not be empty, got an empty iterable")
    return listed if isinstance(listed[0], Mapping) else [{"params": listed}]


def _in_order(params: Any) -> list[Any]:
    if isinstance(params, (set, frozenset)):
        raise TypeError("`params` must have an order that is the same in every run, got a set")
    if not isinstance(params, Iterable):
        raise TypeError(f"`params` must be an iterable, got {params!r}")
    return list(params)


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "generator_state"


def _by_device_and_dtype(
    params: list[Tensor], grads: list[Tensor]
) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param, grad in zip(params, grads, strict=True):
        some_params, some_grads = alike.setdefault((grad.device, grad.dtype), ([], []))
        some_params.append(param)
        some_grads.append(grad)
    return alike.values()
