"""Gradient transforms and projections: small values that optimizers apply to whole groups.

Non-finite values are never hidden: a NaN entry stays NaN, and where a norm is involved a NaN or an
infinity turns its whole sub-tensor to NaN.
"""
# ruff: noqa: D102 (the methods are described once, in `Transform`)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from inspect import get_annotations
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor, default_generator

from rai_toolbox import foreach
from rai_toolbox.batch import batch_shape, sub_ndim
from rai_toolbox.checks import check_fraction, check_non_negative, check_order
from rai_toolbox.constraints.box import checked_box
from rai_toolbox.constraints.kernels import directions
from rai_toolbox.constraints.kernels.blocks import BLOCK, in_groups, is_eager
from rai_toolbox.constraints.kernels.l2 import project_l2_ball_, project_l2_each_
from rai_toolbox.constraints.sharding import is_sharded, local_of, on_shards_
from rai_toolbox.constraints.sparse import keep_largest_
from rai_toolbox.optim.settings import (
    batch_in,
    check_bound,
    check_constraint,
    check_fits,
    refuse_complex,
)
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper

Key = str
"""Name under which a group holds a setting: plain (`q`), or with a chain's number (`0.q`)."""

_Self = TypeVar("_Self", bound="Transform")


class Transform:
    """What an optimizer does to the gradients, or to the parameters, of each group.

    A value: nothing writes to it. Its attributes of type `Key` name the settings that it reads; a
    chain renames them.
    """

    divides_by_norms: ClassVar[bool] = False
    """Whether it divides by norms of rows, which see `_must_break_graph`."""

    param_ndim: Key = "param_ndim"
    prefix: str = ""
    """Goes before the names of its state: the number of a chain's member."""

    def renamed(self: _Self, names: Mapping[str, str], prefix: str) -> _Self:
        """The same transform as a member of a chain, where settings have other names."""
        member = copy(self)
        member.prefix = prefix + self.prefix
        for kind in type(self).__mro__:
            for attribute, of_type in get_annotations(kind).items():
                if of_type == "Key":
                    key = getattr(self, attribute)
                    setattr(member, attribute, names.get(key, key))
        return member

    def check_given(self, given: Group, defaults: Group) -> None:
        """Raise if a new group lacks what neither it nor the defaults have."""

    def check(self, group: Group) -> None:
        """Raise if one of its settings breaks its rule, or does not fit a parameter."""

    def is_elementwise(self, group: Group) -> bool:
        """Whether it acts elementwise, so that `param_ndim` has no effect."""
        return False

    def keeps_zero(self, group: Group) -> bool:
        """Whether it is elementwise with 0 -> 0: fit for the values of sparse gradients."""
        return False

    def is_active(self, group: Group) -> bool:
        """Whether gradients need it."""
        return True

    def by_parts(self, group: Group) -> bool:
        """Whether tensors may be taken in another order than one transform after the other."""
        return True

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        """Transform gradients, or parameters, in place."""
        raise NotImplementedError

    def apply_(
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        """`change_`, with the parameters and the optimizer for a transform that needs them."""
        self.change_(tensors, group)

    def count_step(self, group: Group) -> None:
        """Note that the inner optimizer has taken a step: once per step and group."""

    def init_state(self, group: Group, optimizer: OptimizerWrapper) -> None:
        """Make the state that `apply_` would make, of zeros."""


# Elementwise


class _Elementwise(Transform):
    """Elementwise, with 0 -> 0 unless a subclass says otherwise."""

    def is_elementwise(self, group: Group) -> bool:
        return True

    def keeps_zero(self, group: Group) -> bool:
        return True


class Sign(_Elementwise):
    """``g / |g|``, with 0 -> 0."""

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        directions.sign_(tensors)


class Clamp(_Elementwise):
    """``min(max(x, clamp_min), clamp_max)``; nothing where both are None."""

    clamp_min: Key = "clamp_min"
    clamp_max: Key = "clamp_max"

    def check_given(self, given: Group, defaults: Group) -> None:
        lower, upper = self.clamp_min, self.clamp_max
        no_default = defaults[lower] is None and defaults[upper] is None
        if no_default and not {lower, upper} & given.keys():
            raise ValueError(
                f"`{lower}` or `{upper}` must be given (None for both, in a group, makes it "
                f"unconstrained), got {lower}=None and {upper}=None"
            )

    def check(self, group: Group) -> None:
        lower, upper = self.clamp_min, self.clamp_max
        for name in (lower, upper):
            if group[name] is not None:
                check_bound(name, group)
                refuse_complex(group, f"`{lower}` and `{upper}`")
        check_order(lower, group[lower], upper, group[upper])

    def keeps_zero(self, group: Group) -> bool:
        lower, upper = group[self.clamp_min], group[self.clamp_max]
        if isinstance(lower, Tensor) or isinstance(upper, Tensor):
            return False  # the values of a sparse gradient have another shape
        return (lower is None or lower <= 0) and (upper is None or upper >= 0)

    def is_active(self, group: Group) -> bool:
        return group[self.clamp_min] is not None or group[self.clamp_max] is not None

    def apply_(
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        if optimizer._viewed is not None:
            group = as_viewed(group, (self.clamp_min, self.clamp_max), params[0], optimizer._viewed)
        lower, upper = group[self.clamp_min], group[self.clamp_max]
        if isinstance(lower, Tensor) or isinstance(upper, Tensor):
            checked_box(lower, upper).project_each_(tensors)
        elif self.is_active(group):
            foreach.clamp_(tensors, lower, upper)


class _OfSetting(_Elementwise):
    """Elementwise, by the value of one setting."""

    setting: Key

    def __init__(self, setting: Key) -> None:
        self.setting = setting


class Scale(_OfSetting):
    """``setting * g``."""

    def is_active(self, group: Group) -> bool:
        factor = group[self.setting]
        return isinstance(factor, Tensor) or bool(factor != 1.0)

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        foreach.mul_(tensors, group[self.setting])


class Shift(_OfSetting):
    """``g + setting``."""

    def is_active(self, group: Group) -> bool:
        return bool(group[self.setting] != 0.0)

    def keeps_zero(self, group: Group) -> bool:
        return bool(group[self.setting] == 0.0)

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        foreach.add_(tensors, group[self.setting])


SCALE, SHIFT = Scale("grad_scale"), Shift("grad_bias")


class LinfProjection(_Elementwise):
    """``min(max(p, -epsilon), epsilon)``."""

    epsilon: Key = "epsilon"

    def check(self, group: Group) -> None:
        check_non_negative(self.epsilon, group[self.epsilon])
        refuse_complex(group, f"`{self.epsilon}`")

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        epsilon = group[self.epsilon]
        if isinstance(epsilon, Tensor):  # in compiled steps, which compile numbers in
            checked_box(-epsilon, epsilon).project_each_(tensors)
        else:
            foreach.clamp_(tensors, -epsilon, epsilon)


# Of sub-tensors


class L2Projection(Transform):
    """``p * min(1, epsilon / |p|_2)``."""

    epsilon: Key = "epsilon"

    def check(self, group: Group) -> None:
        check_non_negative(self.epsilon, group[self.epsilon])

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        epsilon = group[self.epsilon]
        each_ = None
        if not isinstance(epsilon, Tensor):
            each_ = partial(project_l2_each_, epsilon=epsilon)
        project_ = partial(project_l2_ball_, epsilon=epsilon)
        _on_sub_tensors_(tensors, group[self.param_ndim], project_, each_)


class OfSet(Transform):
    """What depends on a set of `rai_toolbox.constraints`; None is no set."""

    constraint: Key = "constraint"

    def set_of(self, group: Group) -> Any:
        """The set of a group."""
        return group[self.constraint]

    def is_elementwise(self, group: Group) -> bool:
        # (None, or what `check` is to refuse, constrains nothing)
        return bool(getattr(self.set_of(group), "elementwise", True))


class Projection(OfSet):
    """The Euclidean projection onto the set."""

    def check(self, group: Group) -> None:
        check_constraint(group[self.constraint])
        if group[self.constraint] is not None:
            check_fits(group[self.constraint], group, self.param_ndim)

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        if group[self.constraint] is None or not tensors:
            return
        as_batch = partial(batch_in, group=group, param_ndim=self.param_ndim)
        views, copied = zip(*map(as_batch, tensors), strict=True)
        group[self.constraint].project_each_(list(views))
        for x, view, is_copy in zip(tensors, views, copied, strict=True):
            if is_copy:
                x.copy_(view.view(x.shape))


class Normalize(Transform):
    """``g / max(|g|_p, div_by_zero_eps)``."""

    divides_by_norms = True

    div_by_zero_eps: Key = "div_by_zero_eps"

    def __init__(self, p: float) -> None:
        self.p = p

    def check(self, group: Group) -> None:
        check_non_negative(self.div_by_zero_eps, group[self.div_by_zero_eps])

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        normalize_(tensors, self.p, group[self.param_ndim], group[self.div_by_zero_eps])


class TopQ(Transform):
    """Keep the largest magnitudes."""

    q: Key = "q"
    dq: Key = "dq"

    def __init__(self, generator: Generator | None = None) -> None:
        # (where `q` is drawn from; None is torch's own, which a copy must not copy)
        self.generator = generator

    def check(self, group: Group) -> None:
        check_fraction(self.q, group[self.q])
        check_fraction(self.dq, group[self.dq])

    def by_parts(self, group: Group) -> bool:
        return bool(group[self.dq] == 0)  # else the order is that of random numbers

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        q, dq = group[self.q], group[self.dq]
        low, high = max(0.0, q - dq), min(1.0, q + dq)
        generator = self.generator or default_generator
        if dq == 0:
            top_q_each_(tensors, q, group[self.param_ndim])
            return
        for grad in tensors:
            # The number of entries to keep must be known on the host.
            draw = torch.rand((), generator=generator, device=generator.device).item()
            top_q_each_([grad], low + (high - low) * draw, group[self.param_ndim])


class LargestSign(Transform):
    """Keep the sign of one largest magnitude: minus the linear oracle of the unit L1 ball.

    The rest becomes 0. Of tied entries one stays, so that the answer is in the ball.
    """

    def change_(self, tensors: list[Tensor], group: Group) -> None:
        _on_rows_(tensors, group[self.param_ndim], directions.largest_sign_)


def as_viewed(group: Group, names: Sequence[Key], view: Tensor, param: Tensor) -> Group:
    """A group with its tensors of these names as a hook's view shows the parameter."""
    bounds = {name: group[name] for name in names if isinstance(group[name], Tensor)}
    return group | {k: bound.expand(param.shape).reshape(view.shape) for k, bound in bounds.items()}


def normalize_(grads: list[Tensor], p: float, param_ndim: int | None, eps: float) -> None:
    """``g / max(|g|_p, eps)`` for each sub-tensor; zeros stay zeros whatever eps is."""
    if is_one_row(grads, param_ndim) and directions.normalize_row_(grads[0], p, eps):
        return
    normalize_ = partial(directions.normalize_, p=p, div_by_zero_eps=eps)
    each_ = partial(directions.normalize_each_, p=p, div_by_zero_eps=eps)
    _on_sub_tensors_(grads, param_ndim, normalize_, each_)


def top_q_each_(grads: list[Tensor], q: float, param_ndim: int | None) -> None:
    """Keep the ``round((1 - q) * n)`` largest magnitudes of each sub-tensor of n entries.

    Exactly so many; of tied entries those of the lowest indices stay. The rest becomes 0. NaN
    counts as the largest magnitude.
    """

    def keep_(rows: Tensor) -> None:
        keep = round((1.0 - q) * rows.shape[1])
        if keep != rows.shape[1]:
            keep_largest_(rows, keep)

    _on_rows_(grads, param_ndim, keep_)


def is_one_row(tensors: list[Tensor], param_ndim: int | None) -> bool:
    """Whether it is one plain tensor of one short row, on the CPU, in eager mode."""
    if len(tensors) != 1:
        return False
    x = tensors[0]
    return (
        is_eager(x)
        and (param_ndim is None or (param_ndim == -1 and x.shape[:1] == (1,)))
        and x.ndim > 0
        and 0 < x.numel() <= BLOCK // 2
        and not torch.is_grad_enabled()
    )


def _on_sub_tensors_(
    tensors: list[Tensor],
    param_ndim: int | None,
    act_: Callable[..., object],
    act_each_: Callable[[list[Tensor]], object] | None,
) -> None:
    """Let ``act_(x, ndim=k)`` change sub-tensors, the last k dims of x; plain ones together."""
    if torch.is_grad_enabled() or not foreach.are_plain(tensors):
        for x in tensors:
            act_(x, ndim=sub_ndim(x.ndim, param_ndim))
    else:
        shape_of = partial(batch_shape, param_ndim=param_ndim)
        in_groups(tensors, lambda batch: act_(batch, ndim=batch.ndim - 1), shape_of, act_each_)


def _on_rows_(
    tensors: list[Tensor], param_ndim: int | None, act_: Callable[[Tensor], object]
) -> None:
    """Let `act_` change the sub-tensors as rows (N, n); those of a DTensor shard by shard."""

    if is_one_row(tensors, param_ndim) and tensors[0].is_contiguous():
        act_(tensors[0].view(1, -1))
        return

    def rows_shape(shape: Sequence[int]) -> tuple[int, ...]:
        first, *others = batch_shape(shape, param_ndim)
        return first, prod(others)

    whole = []
    for x in tensors:
        if is_sharded(x):

            def on_shard(whole: Any) -> Tensor:
                local = local_of(whole)
                _on_rows_([local], param_ndim, act_)
                return local

            on_shards_(x, range(x.ndim - sub_ndim(x.ndim, param_ndim), x.ndim), on_shard)
        else:
            whole.append(x)
    in_groups(whole, act_, rows_shape)
