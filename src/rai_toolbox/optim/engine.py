"""The optimizer that transforms gradients, steps an inner one, and projects parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch
from torch import Generator, Tensor
from torch.optim import SGD

from rai_toolbox._torch import graph_break, use_grad_for_differentiable
from rai_toolbox.batch import check_param_ndim, sub_ndim
from rai_toolbox.checks import check_number
from rai_toolbox.foreach import cache_sized, with_gradients
from rai_toolbox.optim.hooks import GRADIENT_HOOK, NEUTRAL, PARAMETER_HOOK, Hook, without_hooks
from rai_toolbox.optim.inner import step_inner, with_iterates
from rai_toolbox.optim.own_step import OwnStepOptimizer
from rai_toolbox.optim.settings import base_name, is_zero_on_host, labels
from rai_toolbox.optim.short_step import short_step
from rai_toolbox.optim.transforms import SCALE, SHIFT, TopQ, Transform
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper, checked_group


class ParamTransformingOptimizer(OptimizerWrapper):
    r"""Transform each gradient before an inner optimizer's step, and each parameter after it.

    .. math::
        g \leftarrow \text{scale} \cdot T(g) + \text{bias}, \quad
        p \leftarrow \text{inner step}(p, g), \quad p \leftarrow P(p)

    On its own it transforms nothing. A subclass overrides one or both of the hooks
    `_pre_step_transform_` (T) and `_post_step_transform_` (P), which see each tensor as a batch
    of sub-tensors, of shape `(N, d0, ...)`. Its settings are `defaults`, and what it remembers of
    a parameter is in ``self.state[param]``; both are saved and loaded.

    Parameters
    ----------
    params : iterable, optional
        Tensors, named tensors `(name, tensor)`, or dicts that define parameter groups. Required,
        unless `InnerOpt` is an instance.
    InnerOpt : Optimizer class, functools.partial of one, or instance
        The optimizer that updates the parameters. The groups of an instance are used.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`. A parameter of
        shape (N, C, H, W) is N sub-tensors of shape (C, H, W) with -1 or 3, one of its own shape
        with None, and each of its elements is one with 0.
    grad_scale : float
        Multiplies each gradient, after its transform.
    grad_bias : float
        Added to each gradient, after its scaling.
    defaults : dict, optional
        More defaults for all parameter groups; they override the arguments.
    **inner_opt_kwargs
        Keyword arguments of `InnerOpt`.

    Notes
    -----
    `param_ndim`, `grad_scale`, `grad_bias`, and the settings of each subclass can be given, and
    scheduled, per parameter group. `state`, `param_groups` and `defaults` are those of
    `inner_opt`; so is `state_dict()`. With a closure, gradients are transformed after each of its
    evaluations, and parameters once, after the step. Frozen parameters (those that require no
    gradient and have none, and so all integer ones) stay as they are.

    An inner optimizer's second iterates are transformed as the parameters are: the slow weights of
    Lookahead (`slow_param`, `slow_params` or `slow_buffer` in its state), and the `z` of
    schedule-free optimizers, whose `train` and `eval` the wrapper then has, too.

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

    _before: tuple[Transform, ...] = ()
    """What a subclass does to gradients, before the inner step."""

    _after: tuple[Transform, ...] = ()
    """What a subclass does to parameters, after the inner step."""

    _short_step: Callable[[Any], bool] | None = None
    """A step in few calls, made after a step; it returns whether it fits this optimizer."""

    _has_initialized = False
    """Whether a distributed checkpoint may have made its step."""

    def _pre_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Transform `param.grad` in place, before the inner step. For subclasses to override.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            View of a parameter that has a gradient; `param.grad` is the same view of that.
            ``self.state[param]`` is the state of the parameter, which the inner optimizer shares:
            use names that it does not. In a chain, each member has its own part of it.
        optim_group : dict
            The parameter group, with all its settings. It is passed by keyword.
        """
        if param.grad is not None:
            group = self._group_of_view(optim_group)
            for transform in self._before:
                if transform.is_active(group):
                    transform.apply_([param.grad], [param], group, self)

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Transform `param` in place, after the inner step. For subclasses to override.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            View of a parameter, with or without a gradient, that is not frozen; or of a second
            iterate of it.
        optim_group : dict
            The parameter group, with all its settings. It is passed by keyword.
        """
        group = self._group_of_view(optim_group)
        for transform in self._after:
            transform.apply_([param], [param], group, self)

    def _completed(self, param_group: Mapping[str, Any]) -> Group:
        given = checked_group(param_group)
        for transform in without_hooks((*self._before, *self._after)):
            transform.check_given(given, self._settings)
        return super()._completed(given)

    def _group_of_view(self, group: Group) -> Group:
        """The settings by which a view `(N, d0, ...)` has the sub-tensors that it shows."""
        names = [name for name in self._settings if base_name(name) == "param_ndim"]
        return {**group, **dict.fromkeys(names, -1)}

    def _check_group(self, group: Group) -> None:
        for name in self._settings:  # those of a chain's members, too
            if base_name(name) in NEUTRAL:
                check_number(name, group[name])
            elif base_name(name) == "param_ndim":
                check_param_ndim(group[name])
        transforms = (*self._transforms(GRADIENT_HOOK), *self._transforms(PARAMETER_HOOK))
        with_shapes = {each.param_ndim for each in transforms if not each.is_elementwise(group)}
        for name in sorted(with_shapes if transforms else {"param_ndim"}):
            self._check_shapes(group, group[name])
        for transform in transforms:
            transform.check(group)

    def _transforms(self, hook: str) -> tuple[Transform, ...]:
        """What comes before or after the inner step: what is declared, or a hook in its place."""
        declared = self._before if hook == GRADIENT_HOOK else self._after
        if getattr(type(self), hook) is _DEFAULTS[hook] and hook not in self.__dict__:
            return declared
        return (Hook(self, hook, declared, names={name: name for name in self._settings}),)

    def _check_shapes(self, group: Group, param_ndim: int | None) -> None:
        """Raise if a parameter has no sub-tensors of `param_ndim` dims."""
        for param, label in zip(group["params"], labels(group), strict=True):
            try:
                sub_ndim(param.ndim, param_ndim)
            except ValueError as error:
                raise ValueError(f"{error} ({label})") from None
            if getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"{type(self).__name__} needs parameters in their own shape, got {label}, "
                    "flattened by FullyShardedDataParallel; shard it by fully_shard instead"
                )

    def _generators(self) -> dict[str, Generator]:
        return {
            f"{each.prefix}generator_state": each.generator
            for each in without_hooks(self._before)
            if isinstance(each, TopQ) and each.generator is not None
        }

    @overload
    def step(self, closure: None = None, **kwargs: Any) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], **kwargs: Any) -> float: ...

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> float | None:
        """Transform the gradients, step `inner_opt`, transform the parameters.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.
        **kwargs
            More arguments of the step of `inner_opt`, where that has any.

        Returns
        -------
        float or None
            What the closure returned.
        """
        # (Dynamo traces only frames that name torch, or hold a tensor: do not move this call.)
        compiling = torch.compiler.is_compiling()
        is_plain = closure is None and not (compiling or kwargs)
        if is_plain and self._short_step is not None and self._short_step(self):
            return None
        self._new_state.clear()  # what a step that failed has left
        is_done = False
        if closure is not None:
            closure = partial(self._evaluated, closure)
        elif not (compiling or self.inner_opt.state) and self._initializes_state():
            step_inner(self.inner_opt, None, kwargs)
            for group in self.param_groups:
                for transform in without_hooks(self._before):
                    transform.init_state(group, self)
            if self._has_initialized:  # a step of the user's, around an inner that has no state
                self._post_step(is_step=False)
            self._has_initialized = True
            return None
        else:
            is_done = self._pre_step(may_move=is_plain)
            if compiling and self._must_break_graph():
                graph_break()
        loss: float | None = None
        if not is_done:
            loss = step_inner(self.inner_opt, closure, kwargs)
        self._post_step()
        if is_plain:  # (settings that this step took)
            few = len(self.inner_opt.param_groups) == 1  # (or asked each time in vain)
            few = few and isinstance(self.inner_opt, (SGD, OwnStepOptimizer))
            self._short_step = self._make_short_step() if few else None
        return loss

    def _make_short_step(self) -> Callable[[Any], bool] | None:
        """A step in few calls, with the same results, for settings as they are, if there is one.

        It must not hold the optimizer: each would keep the other, and all tensors, in memory.
        """
        return short_step(self)

    def _prepared_step(self) -> Callable[[], object] | None:
        """A step as a function of its own, if parameters are finite, for a solver that makes many.

        It gives finite gradients only, and adds no hooks meanwhile.
        """
        return None

    def _must_break_graph(self) -> bool:
        # Inductor of torch 2.13 fails on CPU ("KeyError: 'buf4'", pytorch #188228 and #196570) if
        # one graph holds norms of rows, a division by them, and an update by the quotients.
        return any(each.divides_by_norms for each in without_hooks(self._before)) and any(
            param.device.type == "cpu" for group in self.param_groups for param in group["params"]
        )

    def _evaluated(self, closure: Callable[[], float]) -> float:
        """The value of a closure, whose gradients are then transformed."""
        with torch.enable_grad():
            loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._pre_step()
        return loss

    def _pre_step(self, may_move: bool = False) -> bool:
        """Transform all gradients; whether parameters have been moved, too.

        If they may, and an inner optimizer of ours can do its step so, each is moved while its
        gradient is in cache.
        """
        inner: Any = self.inner_opt
        is_own = isinstance(inner, OwnStepOptimizer)
        for group in inner.param_groups if is_own else ():
            inner._check_before_step(group)
        may_move = may_move and is_own
        transforms = self._transforms(GRADIENT_HOOK)
        todo: list[tuple[Any, ...]] = []
        all_params: list[Tensor] = []
        all_grads: list[Tensor] = []
        for group in inner.param_groups:
            active, by_parts = [], may_move or len(group["params"]) > 1
            for transform in transforms:
                if transform.is_active(group):
                    active.append(transform)
                    by_parts = by_parts and transform.by_parts(group)
            if group["grad_scale"] != 1:
                active.append(SCALE)
            if group["grad_bias"] != 0:
                active.append(SHIFT)
            may_move = may_move and by_parts
            if active or may_move:
                params, grads = with_gradients(group["params"])
                todo.append((active, by_parts, params, grads, group))
                all_params += params
                all_grads += grads
        if not all_grads:
            return False
        may_share = torch.compiler.is_compiling() or len(set(map(id, all_grads))) < len(all_grads)
        move_ = inner.mover(all_params, all_grads) if may_move and not may_share else None
        if may_share or not _are_writable(all_grads):
            self._make_writable_(todo)
        for active, by_parts, params, grads, group in todo:  # all have been checked
            several = len(params) > 1 and (move_ is not None or len(active) > 1)
            if several and by_parts and grads[0].is_cpu:
                parts = [(grads[part], params[part]) for part in cache_sized(grads)]
            else:
                parts = [(grads, params)] if params else []
            for some_grads, some in parts:
                for transform in active:
                    transform.apply_(some_grads, some, group, self)
                if move_ is not None:
                    move_(some, some_grads, group)
        return move_ is not None

    def _post_step(self, is_step: bool = True) -> None:
        if self._new_state:
            self._add_new_state()
        transforms = self._transforms(PARAMETER_HOOK)
        for group in self.inner_opt.param_groups if transforms else ():
            tensors, owners = with_iterates(self.inner_opt, group)
            for transform in transforms:
                if is_step:
                    transform.count_step(group)
                transform.apply_(tensors, owners, group, self)
        if self._new_state:
            self._add_new_state()

    @property
    def train(self) -> Callable[[], None]:
        """The method of a schedule-free `inner_opt` that starts training; others have none."""
        return partial(self._switch, self.inner_opt.train)  # type: ignore[attr-defined]

    @property
    def eval(self) -> Callable[[], None]:
        """The method of a schedule-free `inner_opt` that starts evaluation, also in the sets."""
        return partial(self._switch, self.inner_opt.eval)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _switch(self, switch: Callable[[], object]) -> None:
        switch()
        if any(self.inner_opt.state.values()):  # parameters stay as they are before the first step
            self._post_step(is_step=False)

    def _make_writable_(self, todo: list[tuple[Any, ...]]) -> None:
        """Replace gradients by what is to be transformed, to which operators may write.

        Parameters may share a gradient, which is transformed once, with the first of them.
        """
        compiling, recording = torch.compiler.is_compiling(), torch.is_grad_enabled()
        seen: set[Tensor] = set()  # (which hashes by identity, also while a compiler traces)
        for transforms, _, params, grads, group in todo:
            if not transforms:
                continue
            rows = list(zip(params, grads, strict=True))
            params.clear()
            grads.clear()
            for param, grad in rows:
                if grad in seen:
                    continue
                seen.add(grad)
                if grad.layout is not torch.strided:
                    grad = self._sparse_values(param, grad, group, transforms)
                elif (
                    recording  # differentiable steps leave tensors of the graph alone
                    or (0 in grad.stride() and not grad.is_contiguous())  # an expanded view
                    or (grad.is_complex() and grad.is_conj())
                    or (not compiling and grad.is_neg())
                ):
                    grad = param.grad = grad.clone(memory_format=torch.contiguous_format)
                params.append(param)
                grads.append(grad)

    def _sparse_values(
        self, param: Tensor, grad: Tensor, group: Group, transforms: list[Transform]
    ) -> Tensor:
        keep_zero = all(transform.keeps_zero(group) for transform in transforms)
        wrong = ""
        if grad.layout is not torch.sparse_coo or not keep_zero:
            wrong = (
                "needs dense gradients (embeddings: `sparse=False`; only elementwise transforms "
                f"that map 0 to 0 support sparse COO), got {grad.layout}"
            )
        elif param.is_cpu and param.storage_offset() and not grad.dense_dim():
            # Torch 2.13 adds coalesced ones at twice the offset, even beyond the storage.
            wrong = (
                "supports sparse gradients without dense dims only for parameters that start "
                f"where their storage does, got storage_offset() = {param.storage_offset()}"
            )
        if wrong:
            label = labels(group)[next(i for i, p in enumerate(group["params"]) if p is param)]
            raise ValueError(f"{type(self).__name__} {wrong} for {label}")
        param.grad = grad.coalesce()
        return param.grad._values()

    def _initializes_state(self) -> bool:
        """Whether this step is the one by which a distributed checkpoint makes empty state.

        It comes before any state is there, with every lr 0 and every gradient 0, and must leave
        parameters, gradients and random numbers alone. Values are read only if all else fits.
        """
        if not all(is_zero_on_host(group.get("lr")) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return bool(params) and not any(p.grad is None or bool(p.grad.any()) for p in params)


def _are_writable(grads: list[Tensor]) -> bool:
    """Whether operators may write to all of them, as they mostly may."""
    return (
        not torch.is_grad_enabled()
        and all(map(Tensor.is_contiguous, grads))  # (sparse tensors are not)
        and not any(map(Tensor.is_conj, grads))
        and not any(map(Tensor.is_neg, grads))
    )


_DEFAULTS = {
    hook: getattr(ParamTransformingOptimizer, hook) for hook in (GRADIENT_HOOK, PARAMETER_HOOK)
}
