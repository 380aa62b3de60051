"""The inner optimizer of a wrapper: how it is made, stepped and copied."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from rai_toolbox._torch import is_wrapped_by_scheduler, known_plain_step, mark_stepped, plain_step
from rai_toolbox.checks import wrong
from rai_toolbox.optim.adam import step_adam
from rai_toolbox.optim.settings import trained
from rai_toolbox.optim.sgd import can_step, step_sgd

_SLOW = {"slow_buffer", "slow_param", "slow_params"}
"""Names of the slow weights in the state of Lookahead, in its implementations."""


def optimizer_class(InnerOpt: object) -> type[Optimizer]:
    """Class of the optimizer that `InnerOpt` is or makes."""
    made_by = InnerOpt.func if isinstance(InnerOpt, partial) else InnerOpt
    if isinstance(made_by, Optimizer):
        made_by = type(made_by)
    if not (inspect.isclass(made_by) and issubclass(made_by, Optimizer)):
        rule = "be a torch.optim.Optimizer class, a functools.partial of one, or an instance"
        raise wrong("InnerOpt", rule, repr(InnerOpt), TypeError)
    return made_by


def step_inner(inner: Optimizer, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
    """Step the inner optimizer as a part of another optimizer's step.

    Torch gives each optimizer class a `step` that runs the global step hooks; those belong to the
    outer step, so that the function behind it is called. The inner's own hooks are run here.
    """
    args: tuple[Any, ...] = () if closure is None else (closure,)
    own = inner.__dict__.get("step")
    if own is not None:
        if not (is_wrapped_by_scheduler(own) and own.__wrapped__ is type(inner).step):
            return own(*args, **kwargs)  # a user has replaced it
        mark_stepped(inner)  # as the scheduler's wrapper does
    # (Without torch's decorator that switches grad mode: it would switch to the present one.)
    step: Any = type(inner).step
    compiling = torch.compiler.is_compiling()
    if compiling:
        step = plain_step(step)
        step = getattr(step, "__wrapped__", step)  # (one breaks the graph, whosever it is)
    else:  # (a user's callable may have no hash)
        step = known_plain_step(step) if type(step) is FunctionType else plain_step(step)
    args = (inner, *args)
    for pre_hook in getattr(inner, "_optimizer_step_pre_hooks", {}).values():
        args, kwargs = pre_hook(inner, args, kwargs) or (args, kwargs)
    is_bare = args == (inner,) and not kwargs and not compiling  # (nor looks at empty state then)
    is_adam = is_bare and isinstance(inner, (Adam, AdamW)) and len(inner.state) > 1
    result = None
    if is_bare and isinstance(inner, SGD) and can_step(inner, step):
        step_sgd(inner)
    elif is_adam and can_step(inner, step):
        step_adam(inner, step)
    else:
        result = step(*args, **kwargs)
    for post_hook in getattr(inner, "_optimizer_step_post_hooks", {}).values():
        post_hook(inner, args, kwargs)
    return result


def with_iterates(inner: Optimizer, group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors of a group that must be in its set, and the parameter that each belongs to.

    Besides the parameters that is the slow weights of Lookahead, and the second iterate of
    schedule-free optimizers, from which the next parameters are made.
    """
    params, state = trained(group), inner.state
    one = next(iter(state.values()), None)
    names = {*_SLOW, "z"} if hasattr(inner, "eval") else _SLOW
    if not isinstance(one, dict) or names.isdisjoint(one):
        return params, params
    more = [(state[p][name], p) for p in params for name in names if name in state.get(p, ())]
    return [*params, *(iterate for iterate, _ in more)], [*params, *(param for _, param in more)]


def picklable_state(optimizer: Optimizer) -> dict[str, Any]:
    """All the attributes that a copy of an optimizer must have.

    That is more than `Optimizer.__getstate__` gives: LBFGS could not step without its others.
    """
    if type(optimizer).__getstate__ is not Optimizer.__getstate__:
        return optimizer.__getstate__()
    return own_state(optimizer)


def own_state(optimizer: Optimizer) -> dict[str, Any]:
    """The instance's attributes without the hooks, which torch adds, and what schedulers add."""
    return {
        name: value
        for name, value in optimizer.__dict__.items()
        if name not in ("step", "_opt_called", "_short_step")
        and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
    }
