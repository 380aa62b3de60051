"""The step of an optimizer of one parameter, in few calls: what the step before knew is not asked.

A small tensor is changed in a microsecond, and each question takes a tenth of that or more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any
from weakref import proxy, ref

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox._torch import has_own_step_hooks, known_plain_step
from rai_toolbox.constraints.kernels import directions
from rai_toolbox.constraints.kernels.blocks import is_eager
from rai_toolbox.constraints.sparse import keep_largest_of_row_
from rai_toolbox.optim.hooks import GRADIENT_HOOK, PARAMETER_HOOK, Hook
from rai_toolbox.optim.own_step import OwnStepOptimizer
from rai_toolbox.optim.sgd import can_step, step_of_one
from rai_toolbox.optim.transforms import (
    SCALE,
    SHIFT,
    LargestSign,
    Normalize,
    Sign,
    TopQ,
    Transform,
    is_one_row,
)
from rai_toolbox.optim.wrapper import Group

_HOOKS = {GRADIENT_HOOK, PARAMETER_HOOK}
_REPLACED = {"step", "grad_scale", "found_inf"}  # what a user or a GradScaler sets on an optimizer

_LONGEST = 1e30  # what is less than a rounding of the largest numbers, so that no step is infinite

_Change = Callable[[Tensor], object]
_Kinds = tuple[type[Optimizer], Any, Any, Any]


def short_step(optimizer: Any) -> Callable[[Any], bool] | None:
    """A step that does what `step` does without a closure, for the only parameter, or None.

    It returns whether it could: where anything has changed, it does nothing, and is of no more use.
    Settings are those that a step has just taken.
    """
    gradient = unchanged(optimizer)
    if gradient is None:
        return None
    inner, (group,) = optimizer.inner_opt, optimizer.inner_opt.param_groups
    (param,) = params = list(group["params"])
    if param.grad is None:  # the step before has not read all settings
        return None
    declared = (*optimizer._before, SCALE, SHIFT)
    active = [transform for transform in declared if transform.is_active(group)]
    before = _changes(active, param, group, proxy(optimizer))
    after = optimizer._after
    move_ = step_of_one(inner, param) if type(inner) is SGD else inner.step_of_one(param)
    if move_ is None:
        return None

    def step(optimizer: Any) -> bool:
        grad = gradient(optimizer)
        if grad is None:
            return False
        for change_ in before:
            change_(grad)
        move_(grad)
        if optimizer._new_state:
            optimizer._add_new_state()
        for transform in after:
            transform.count_step(group)
            transform.apply_(params, params, group, optimizer)
        return True

    return step


def unchanged(optimizer: Any) -> Callable[..., Tensor | None] | None:
    """A look whether an optimizer is what it is now, and its only parameter has a gradient.

    It gives the gradient, to which operators may write, or None. There is none for optimizers of
    more parameters, tensors that are not plain ones on the CPU, hooks, inner optimizers that are
    not torch's SGD or ours, and settings that are tensors, whose values may change.
    """
    inner = optimizer.inner_opt
    groups = inner.param_groups
    if len(groups) != 1 or len(groups[0]["params"]) != 1:
        return None
    group = groups[0]
    (param,), settings = group["params"], list(group.values())
    kinds, is_sgd = _kinds(optimizer, inner), type(inner) is SGD
    declared = (*optimizer._transforms(GRADIENT_HOOK), *optimizer._transforms(PARAMETER_HOOK))
    if (
        not (is_sgd or isinstance(inner, OwnStepOptimizer))
        or (is_sgd and not can_step(inner, known_plain_step(type(inner).step)))
        or any(isinstance(transform, Hook) for transform in declared)
        or any(isinstance(setting, Tensor) for setting in settings)
        or param.is_complex()
    ):
        return None
    owner: Any = ref(optimizer)
    shape, dtype, at_lr = param.shape, param.dtype, list(group).index("lr")

    def has_settings() -> bool:
        """Whether all are what they were; the learning rate may be another positive number."""
        if all(map(is_, group.values(), settings)):
            return len(group) == len(settings)
        settings[at_lr] = group.get("lr")
        return len(group) == len(settings) and all(map(is_, group.values(), settings))

    def gradient(optimizer: Any, could_replace: bool = True) -> Tensor | None:
        params, grad = group["params"], param.grad
        is_same = (
            grad is not None
            and len(params) == 1
            and params[0] is param
            and has_settings()
            and type(lr := group["lr"]) is float
            and 0.0 < lr <= _LONGEST
            and is_eager(grad)
            and grad.dtype == param.dtype == dtype
            and grad.shape == shape
            and grad.is_contiguous()
        )
        if not is_same or (could_replace and not has_parts(optimizer)):
            return None
        if not is_sgd:
            inner._check_before_step(group)
        return grad

    def has_parts(optimizer: Any) -> bool:
        """Whether nobody has replaced a part of the optimizers, or added one."""
        groups = inner.param_groups
        return (
            len(groups) == 1
            and groups[0] is group
            and not torch.is_grad_enabled()
            and owner() is optimizer  # not a copy, as trainers make, that has its attributes
            and optimizer.inner_opt is inner
            and not optimizer._new_state
            and kinds == _kinds(optimizer, inner)
            and _HOOKS.isdisjoint(optimizer.__dict__)
            and _REPLACED.isdisjoint(inner.__dict__)
            and not has_own_step_hooks(inner)
        )

    return gradient


def _kinds(optimizer: Any, inner: Optimizer) -> _Kinds:
    """The classes of both optimizers, and what they do at a step; a user may replace that."""
    kind, of_inner = type(optimizer), type(inner)
    return of_inner, of_inner.step, kind._pre_step_transform_, kind._post_step_transform_


def _changes(
    transforms: Sequence[Transform], param: Tensor, group: Group, optimizer: Any
) -> list[_Change]:
    """What some transforms do to the gradient. Of signs of k entries, the 1-norm is k."""
    changes = [_change(transform, param, group, optimizer) for transform in transforms]
    match list(transforms):
        case [TopQ() as top_q, Sign(), Normalize(p=1) as normalize, *_]:
            keep = _kept_of_row(top_q, param, group)
            is_row = is_one_row([param], group[normalize.param_ndim])
            if keep is not None and is_row and group[normalize.div_by_zero_eps] < keep:
                number = torch.full((), keep, dtype=torch.float64, device="cpu")
                sign_, normalize_ = changes[1:3]

                def sparse_signs_(x: Tensor) -> None:
                    if keep_largest_of_row_(x.view(1, -1), keep) and x.equal(x):
                        x.sgn_().div_(number)
                    else:
                        sign_(x)
                        normalize_(x)

                changes[:3] = [sparse_signs_]
    return changes


def _change(transform: Transform, param: Tensor, group: Group, optimizer: Any) -> _Change:
    """`apply_` of a transform to a contiguous gradient of the shape and dtype of `param`."""
    params = [param]

    def apply_(x: Tensor) -> None:
        transform.apply_([x], params, group, optimizer)

    match transform:
        case Sign() if directions.is_small(param):
            return directions.sign_small_
        case Normalize(p=p) if is_one_row(params, group[transform.param_ndim]):
            eps = group[transform.div_by_zero_eps]

            def normalize_(x: Tensor) -> None:
                if not directions.normalize_row_(x, p, eps):
                    apply_(x)

            return normalize_
        case TopQ() if (keep := _kept_of_row(transform, param, group)) is not None:
            return lambda x: keep_largest_of_row_(x.view(1, -1), keep)
        case LargestSign() if is_one_row(params, group[transform.param_ndim]):
            return directions.largest_sign_of_row_
    return apply_


def _kept_of_row(top_q: TopQ, param: Tensor, group: Group) -> int | None:
    """How many entries of one short row stay; None if it is none, or all or none of it stay."""
    size = param.numel()
    keep = round((1.0 - group[top_q.q]) * size)
    is_row = group[top_q.dq] == 0 and is_one_row([param], group[top_q.param_ndim])
    return keep if is_row and 0 < keep < size else None
