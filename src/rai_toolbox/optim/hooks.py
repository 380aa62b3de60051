"""The documented hooks of a user's subclass, as transforms that call them tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from rai_toolbox import foreach
from rai_toolbox._torch import set_grad_dtype, share_memory
from rai_toolbox.optim.settings import batch_in
from rai_toolbox.optim.transforms import Transform
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper

GRADIENT_HOOK, PARAMETER_HOOK = "_pre_step_transform_", "_post_step_transform_"

NEUTRAL = {"grad_scale": 1.0, "grad_bias": 0.0}
"""What scales and shifts nothing, as a chain's member without such settings."""


class Hook(Transform):
    """A user's override of a documented hook, which gets a view of each tensor."""

    def __init__(
        self, owner: Any, hook: str, replaced: tuple[Transform, ...], names: Mapping[str, str]
    ) -> None:
        self.owner = owner  # the optimizer that has it: the one that steps, or a chain's member
        self.hook = hook
        self.replaced = replaced  # of its class, whose settings, state and counts stay
        self.names = names  # under which the group holds the settings of the owner

    def renamed(self, names: Mapping[str, str], prefix: str) -> Hook:  # noqa: D102
        member = super().renamed(names, prefix)
        member.replaced = tuple(each.renamed(names, prefix) for each in self.replaced)
        member.names = {
            own: names.get(key, key)
            for own, key in self.names.items()
            if own not in NEUTRAL or key in names
        }
        return member

    def check(self, group: Group) -> None:  # noqa: D102
        for transform in without_hooks(self.replaced):
            name = transform.param_ndim
            if group[name] != group[self.param_ndim]:
                raise ValueError(
                    f"`{name}` must equal `{self.param_ndim}`, because the hooks of "
                    f"{type(self.owner).__name__} get a view of it, got {name}={group[name]} and "
                    f"{self.param_ndim}={group[self.param_ndim]}"
                )
        for transform in self.replaced:
            transform.check(group)

    def by_parts(self, group: Group) -> bool:  # noqa: D102
        return False

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        if self.owner is optimizer:
            self._call(tensors, params, group)
            return
        own = {**group, **NEUTRAL, **{name: group[key] for name, key in self.names.items()}}
        before = dict(own)
        lent = {
            "inner_opt": optimizer.inner_opt,
            "_new_state": optimizer._new_state,
            "_viewed": optimizer._viewed,
            "_prefix": optimizer._prefix + self.prefix,
        }
        for name, value in lent.items():
            setattr(self.owner, name, value)
        try:
            self._call(tensors, params, own)
        finally:
            for name in lent:
                delattr(self.owner, name)
        for name, value in own.items():  # what the hook has written to its group
            if name not in before or value is not before[name]:
                group[self.names.get(name, name)] = value

    def count_step(self, group: Group) -> None:  # noqa: D102
        for transform in self.replaced:
            transform.count_step(group)

    def _call(self, tensors: list[Tensor], params: list[Tensor], group: Group) -> None:
        """Show the hook a view of each tensor, into which it writes."""
        for tensor, param in zip(tensors, params, strict=True):
            view, copied = batch_in(tensor, group)
            shown = view
            if self.hook == GRADIENT_HOOK:
                shown, _ = batch_in(param.detach(), group)
                if tensor.dtype != param.dtype:
                    set_grad_dtype(shown, tensor.dtype)
                shown.grad = view
            self._call_with_state(shown, param, group)
            if self.hook == GRADIENT_HOOK and shown.grad is not view:
                raise ValueError(
                    f"{type(self.owner).__name__}.{self.hook} must write into `param.grad` in "
                    "place, got another tensor assigned to it"
                )
            is_view = view is not tensor and foreach.are_plain([tensor])
            # (`view.data = ...` gives a view data that the tensor does not get)
            if copied or (is_view and not share_memory(view, tensor)):
                tensor.copy_(view.view(tensor.shape))

    def _call_with_state(self, shown: Tensor, param: Tensor, group: Group) -> None:
        """Call the hook, which meanwhile finds the parameter's state as that of what is shown."""
        owner = self.owner
        outer = owner._viewed  # set if `param` is a view that a hook of a chain got
        viewed, states = param if outer is None else outer, owner.state
        state = states.get(viewed) or owner._new_state.setdefault(viewed, {})
        own_state = state.get(owner._prefix, {}) if owner._prefix else state
        before = states.get(shown)
        try:
            owner._viewed = viewed
            states[shown] = own_state
            getattr(owner, self.hook)(shown, optim_group=group)
        finally:
            owner._viewed = outer
            if before is None:
                del states[shown]
            else:
                states[shown] = before
            if own_state is not state and own_state:  # that of a chain's member
                state[owner._prefix] = own_state


def without_hooks(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """Transforms, with those that hooks replace in the place of the hooks."""
    for transform in transforms:
        if isinstance(transform, Hook):
            yield from without_hooks(transform.replaced)
        else:
            yield transform
