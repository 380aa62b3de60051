"""The engine: an optimizer that transforms gradients, steps an inner one, projects parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox import foreach
from rai_toolbox._torch import (
    graph_break,
    set_grad_dtype,
    share_memory,
    use_grad_for_differentiable,
)
from rai_toolbox.batch import batch_shape, check_param_ndim, sub_ndim, view_or_copy
from rai_toolbox.checks import check_number
from rai_toolbox.optim.gradients import by_device_and_dtype, is_own, with_own_gradient
from rai_toolbox.optim.inner import step_inner
from rai_toolbox.optim.settings import is_zero_on_host, labels
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper, Params


class ParamTransformingOptimizer(OptimizerWrapper):
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
        super().__init__(
            params,
            InnerOpt,
            settings={
                "param_ndim": param_ndim,
                "grad_scale": grad_scale,
                "grad_bias": grad_bias,
                **(defaults or {}),
            },
            inner_opt_kwargs=inner_opt_kwargs,
        )

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
            self._transform_gradients_([param], [param.grad], self._group_of_view(optim_group))

    def _post_step_transform_(self, param: Tensor, optim_group: Group) -> None:
        """Transform `param` in place, after the inner step. For subclasses to override.

        Parameters
        ----------
        param : Tensor, shape (N, d0, ...)
            View of a parameter, with or without a gradient.
        optim_group : dict
            The parameter group, with all its settings. It is passed by keyword.
        """
        self._project_parameters_([param], self._group_of_view(optim_group))

    def _group_of_view(self, group: Group) -> Group:
        """The settings that make of a view `(N, d0, ...)` the sub-tensors that it shows."""
        return {**group, "param_ndim": -1}

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        """Built-in classes override this: a group's gradients of one device and dtype at once."""

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        """Built-in classes override this: all parameters of a group."""

    def _after_inner_step_(self, group: Group) -> None:
        """Built-in classes override this: what is to be done once per step and group."""

    def _init_state_(self, group: Group) -> None:
        """Built-in classes with a state of their own override this: make it, empty."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("grad_scale", group["grad_scale"])
        check_number("grad_bias", group["grad_bias"])
        check_param_ndim(group["param_ndim"])
        shown = self._overrides("_pre_step_transform_") or self._overrides("_post_step_transform_")
        if self._sees_elements(group) and not shown:
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

    def _sees_elements(self, group: Group) -> bool:
        """Whether the built-in transforms act on each element, whatever `param_ndim` is."""
        return False

    def _has_gradient_transform(self, group: Group) -> bool:
        """Whether the built-in transform changes gradients."""
        unchanged = ParamTransformingOptimizer._transform_gradients_
        return type(self)._transform_gradients_ is not unchanged

    def _keeps_zero(self, optim_group: Group) -> bool:
        """Whether the gradient's transform is elementwise with 0 -> 0: fit for sparse gradients."""
        return not self._has_gradient_transform(optim_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @use_grad_for_differentiable
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
                for group in self.param_groups:
                    self._init_state_(group)
                return None
            self._pre_step()
            if torch.compiler.is_compiling() and self._must_break_graph():
                graph_break()
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
        seen: set[int] = set()
        for group in self.param_groups:
            if self._transforms_gradients(group):
                params = [param for param in group["params"] if param.grad is not None]
                if not torch.compiler.is_compiling():
                    params = with_own_gradient(params, seen)
                if params:
                    todo.append((group, params, self._gradients(params, group)))
        for group, params, grads in todo:  # now that all gradients are found fit
            self._transform_group_gradients_(params, grads, group)

    def _post_step(self) -> None:
        for group in self.param_groups:
            self._after_inner_step_(group)
            self._transform_group_parameters_(group["params"], group)

    def _transforms_gradients(self, group: Group) -> bool:
        return (
            self._overrides("_pre_step_transform_")
            or self._has_gradient_transform(group)
            or group["grad_scale"] != 1.0
            or group["grad_bias"] != 0.0
        )

    def _gradients(self, params: list[Tensor], group: Group) -> list[Tensor]:
        """What there is to transform of each parameter's gradient, fit to be written to."""
        grads: list[Any] = [param.grad for param in params]
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad.layout is not torch.strided:
                grads[i] = self._sparse_values(param, grad, group)
            elif torch.is_grad_enabled() or not is_own(grad):
                # (differentiable steps leave the graph's own tensor as it is)
                grads[i] = param.grad = grad.clone(memory_format=torch.contiguous_format)
        return grads

    def _sparse_values(self, param: Tensor, grad: Tensor, group: Group) -> Tensor:
        if not (
            grad.layout is torch.sparse_coo
            and self._keeps_zero(group)
            and group["grad_bias"] == 0.0
            and not self._overrides("_pre_step_transform_")
        ):
            label = labels(group)[next(i for i, p in enumerate(group["params"]) if p is param)]
            raise ValueError(
                f"{type(self).__name__} needs dense gradients (only elementwise transforms "
                f"that map 0 to 0 take sparse COO ones), got {grad.layout} for {label}"
            )
        param.grad = grad.coalesce()
        return param.grad._values()

    def _transform_group_gradients_(
        self, params: list[Tensor], grads: list[Tensor], group: Group
    ) -> None:
        if self._overrides("_pre_step_transform_"):
            for param, grad in zip(params, grads, strict=True):
                self._show_gradient_(param, grad, group)
        else:
            for some_params, some_grads in by_device_and_dtype(params, grads):
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
            self._check_in_place("_post_step_transform_", view, param, copied)
            if copied:
                param.copy_(view.view(param.shape))

    def _show_gradient_(self, param: Tensor, grad: Tensor, group: Group) -> None:
        """Call the documented hook on one parameter and gradient, in their batch view."""
        shape = batch_shape(param.shape, group["param_ndim"])
        grad_view, copied = view_or_copy(grad, shape)
        view = view_or_copy(param.detach(), shape)[0]
        if grad.dtype != param.dtype:
            set_grad_dtype(view, grad.dtype)
        view.grad = grad_view
        outer = self._shown  # where a chain's hook is shown a view, and here a view of that
        self._shown = param if outer is None else outer
        try:
            self._pre_step_transform_(view, optim_group=group)
        finally:
            self._shown = outer
        if view.grad is not grad_view:
            raise ValueError(
                f"{type(self).__name__}._pre_step_transform_ must write into `param.grad` in "
                "place, got another tensor assigned to it"
            )
        self._check_in_place("_pre_step_transform_", grad_view, grad, copied)
        if copied:
            grad.copy_(grad_view.view(grad.shape))

    def _check_in_place(self, hook: str, view: Tensor, tensor: Tensor, copied: bool) -> None:
        # A view that has got other data by `view.data = ...` would not tell the tensor.
        if copied or view is tensor or not foreach.are_plain([tensor]):
            return
        if not share_memory(view, tensor):
            raise ValueError(
                f"{type(self).__name__}.{hook} must write in place, got new data for `.data`"
            )

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
