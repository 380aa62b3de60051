"""The gradient mapping: the part of a gradient along which a constrained parameter can move."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Optimizer

from rai_toolbox._torch import Muon, graph_break
from rai_toolbox.autograd import readable
from rai_toolbox.checks import check_number
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import OPEN, checked_box
from rai_toolbox.constraints.kernels.blocks import (
    BLOCK,
    GROUP,
    Workspace,
    can_read,
    joined,
    needs_grad,
    wide_dtype,
)
from rai_toolbox.constraints.kernels.norms import (
    EXACT_CHUNK,
    LEAST,
    fast_norms,
    fast_products,
    for_each,
    least_and_most,
    scale_dtype,
    sum_error,
    sums_fast,
    wide_norms,
)
from rai_toolbox.constraints.sharding import beside
from rai_toolbox.optim.own_step import OwnStepOptimizer
from rai_toolbox.optim.settings import batch_in
from rai_toolbox.optim.transforms import Key, OfSet, as_viewed
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper

# Their step is one number times an average of gradients. Projected, it is right as it is.
_STEP_ALONG_GRADIENTS = (SGD, ASGD)
# Their step scales averages elementwise, by positive numbers: right in elementwise sets, too.
_SCALED = "Adadelta Adafactor Adagrad Adam Adamax NAdam RAdam RMSprop Rprop SparseAdam"
# (those of this library know their sets)
ELEMENTWISE = (SGD, ASGD, OwnStepOptimizer, *(getattr(optim, name) for name in _SCALED.split()))
# Their weight decay is no part of the gradient; so it is in groups with `decoupled_weight_decay`.
_DECOUPLED = (Adafactor, AdamW, *filter(None, [Muon]))
_REACH, _AVERAGING = 0.1, 0.9
_STATE = "gradient_average"


class GradientMapping(OfSet):
    """The gradient mapping by an average of gradients, kept in the state of a parameter."""

    gradient_mapping: Key = "gradient_mapping"
    reach: Key = "reach"
    averaging: Key = "averaging"
    warmup: Key = "warmup"
    steps_taken: Key = "steps_taken"
    grad_scale: Key = "grad_scale"
    grad_bias: Key = "grad_bias"

    def __init__(self, inner: type[Optimizer]) -> None:
        self.inner = inner

    def check(self, group: Group) -> None:  # noqa: D102
        wanted, reach, averaging = self.gradient_mapping, self.reach, self.averaging
        if not isinstance(group.get(wanted), (bool, type(None))):
            raise TypeError(f"`{wanted}` must be a bool or None, got {group[wanted]!r}")
        if not 0 < check_number(reach, group.get(reach, _REACH)) < float("inf"):
            raise ValueError(f"`{reach}` must be > 0 and finite, got {group[reach]!r}")
        if not 0 <= check_number(averaging, group.get(averaging) or 0.0) < 1:
            raise ValueError(f"`{averaging}` must be >= 0 and < 1, got {group[averaging]!r}")
        search = group.get("line_search_fn")
        if search is not None and self.set_of(group) not in (None, OPEN):
            raise ValueError(f"`line_search_fn` must be None with a constraint, got {search!r}")

    def is_elementwise(self, group: Group) -> bool:  # noqa: D102
        return not self.is_active(group)

    def is_active(self, group: Group) -> bool:  # noqa: D102
        wanted, constraint = group[self.gradient_mapping], group[self.constraint]
        if constraint is None:
            return False
        # (what `check` is to refuse may be anything)
        elementwise = getattr(constraint, "elementwise", True)
        right = ELEMENTWISE if elementwise else _STEP_ALONG_GRADIENTS
        return not issubclass(self.inner, right) if wanted is None else wanted

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        averages = self._averages(tensors, params, group, optimizer)
        if group.get(self.steps_taken, 0) < group.get(self.warmup, 0):
            return
        large: list[tuple[Tensor, ...]] = []
        for grad, param, average in zip(tensors, params, averages, strict=True):
            x, _ = batch_in(param, group, self.param_ndim)
            view, copied = batch_in(grad, group, self.param_ndim)
            batches = (view, x) if average is None else (view, x, average.reshape(x.shape))
            is_large = view.numel() > BLOCK // 2 and not copied
            if is_large and self._judges_rows(group) and _are_summed_fast(batches):
                large.append(batches)
                continue
            self.map_(view, x, average, group)
            if copied:
                grad.copy_(view.view(grad.shape))
        if not large:
            return
        workspace = Workspace()
        columns = [joined(list(column), GROUP) for column in zip(*large, strict=True)]
        for piece in zip(*columns, strict=True):
            if not self._map_rows_(*piece, group=group, workspace=workspace):
                for grad, x, *others in zip(*piece, strict=True):
                    self.map_(grad, x, others[0] if others else None, group)

    def _judges_rows(self, group: Group) -> bool:
        """Whether `_map_rows_`, and `map_` of some rows, fit the settings of a group."""
        as_it_is = group.get(self.grad_scale, 1.0) == 1.0 and group.get(self.grad_bias, 0.0) == 0.0
        return (
            as_it_is
            and self._decay(group) == 0.0
            and self.set_of(group)._dims is None
            and not self.set_of(group)._tensors  # (which may have one value per row)
            and issubclass(self.inner, ELEMENTWISE)
        )

    def _map_rows_(
        self,
        grads: list[Tensor],
        xs: list[Tensor],
        ms: list[Tensor] | None = None,
        *,
        group: Group,
        workspace: Workspace,
    ) -> bool:
        """`map_` for large batches, if the projection multiplies each row by a factor f.

        That is then ``g + (1 - f) (x / e - m)``. The norm of y, by which f is known, follows from
        those of x and m and their product, so that y is not made.
        """
        reach, sign = group.get(self.reach, _REACH), -1 if group.get("maximize") else 1
        found = _row_steps(xs, grads, ms, reach)
        if found is None or reach > 0.5:  # (y could be much shorter than x)
            return False
        e, length, slope = found
        product = fast_products(xs, grads if ms is None else ms, workspace).double()
        square = length.square() - 2 * sign * e * product + (e * slope).square()
        factor = self.set_of(group)._scaling(square.sqrt(), xs[0])
        if factor is None:  # all of y is in the set
            return True
        if factor is NotImplemented:
            return False
        # (norms of x and m are off by `sum_error`, that of y, which is the shorter one, by more)
        size = xs[0].shape[1:].numel()
        beyond = _beyond(factor, 4 * sum_error(min(size, EXACT_CHUNK)) / (1 - reach) ** 2)
        pulls = for_each((beyond / (sign * e)).float(), xs)
        shares = for_each((1 - beyond if ms is None else -beyond).float(), xs)
        for grad, x, m, pull, share in zip(grads, xs, ms or grads, pulls, shares, strict=True):
            _ = grad.mul_(share) if ms is None else grad.addcmul_(m, share)
            grad.addcmul_(x, pull)
        return True

    def _decay(self, group: Group) -> float:
        """The weight decay that the inner optimizer adds to gradients."""
        decoupled = issubclass(self.inner, _DECOUPLED) or group.get("decoupled_weight_decay")
        return 0.0 if decoupled else group.get("weight_decay", 0.0)

    def map_(self, grad: Tensor, x: Tensor, average: Tensor | None, group: Group) -> Tensor:
        """Replace the gradient g by ``g + (y - P(y)) / e`` with ``y = x - e m``, in place.

        Here m is `average`, of recent gradients, or g itself. Where m is g, that is the gradient
        mapping ``(x - P(x - e g)) / e``: it is 0 just where x is a stationary point of the
        constrained problem, whatever e > 0 is. Where y is in the set it is g, bit for bit. The
        gradient and x are batches of shape (N, ...). The step e is such that it reaches as far as
        `reach` times the length of x; see `step_size`.

        Where the inner optimizer ascends (`maximize`), or adds ``weight_decay * x`` to its
        gradient, that is allowed for: it then descends on the mapping of the sum.
        """
        constraint, scale = self.set_of(group), group.get(self.grad_scale, 1.0)
        weight_decay = self._decay(group)
        dtype = torch.promote_types(scale_dtype(x), grad.dtype)
        x, g = readable(x).to(dtype), readable(grad)  # (changed before this is differentiated)
        followed = []
        for gradient in [g] if average is None else [g, average.reshape(x.shape)]:
            down = downhill(gradient.to(dtype), group, self.grad_scale, self.grad_bias)
            followed.append(down + weight_decay * x if weight_decay != 0.0 else down)
        reach, lr = group.get(self.reach, _REACH), group.get("lr", 1.0)
        whole = not issubclass(self.inner, ELEMENTWISE)
        e = step_size(x, followed[0], constraint, reach=reach, lr=lr, m=followed[-1], whole=whole)
        # (the gradient is still to be scaled, where that is not by 0)
        alpha = (-1 if group.get("maximize") else 1) / (scale or 1.0)
        y = torch.addcmul(x, e, followed[-1], value=-1)
        factor = NotImplemented
        scales = type(constraint)._scaling is not Constraint._scaling
        if scales and constraint._dims is None and can_read(y):
            fast = sums_fast([y], EXACT_CHUNK)
            length = fast_norms([y], 2, EXACT_CHUNK) if fast else wide_norms([y], Workspace())
            error = sum_error(EXACT_CHUNK) if fast else 0.0
            factor = constraint._scaling(length, y)
        if factor is NotImplemented:
            # (exactly 0 where y is in the set)
            pushed_back = (y - constraint.project_(y.clone())) / e
            return grad.add_(pushed_back, alpha=alpha)
        if factor is not None:  # else all of y is in the set
            grad.addcmul_(y, for_each(_beyond(factor, error), [y])[0].to(dtype) / e, value=alpha)
        return grad

    def init_state(self, group: Group, optimizer: OptimizerWrapper) -> None:  # noqa: D102
        if self.is_active(group) and self._past(group) != 0.0:
            for param in group["params"]:
                if param.grad is not None:
                    optimizer.state[param][self.prefix + _STATE] = torch.zeros_like(param)

    def _averages(
        self, grads: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> list[Tensor | None]:
        """Averages of gradients, the present ones included; None where it is the gradient."""
        past, states = self._past(group), optimizer.inner_opt.state
        if past == 0.0:
            return [None] * len(params)
        name = f"{optimizer._prefix}{self.prefix}{_STATE}"
        if optimizer._viewed is not None:  # by a hook, which gets one parameter at a time
            params = [optimizer._viewed]
        if torch.compiler.is_compiling() and any(name not in states.get(p, ()) for p in params):
            # The compiler would not look again at the state, once the inner has made its own.
            graph_break()
        averages: list[Tensor | None] = []
        for grad, param in zip(grads, params, strict=True):
            grad = grad.to(param.dtype).reshape(param.shape)  # as checkpoints hold it
            state = states.get(param, {})
            if name not in state:
                state = optimizer._new_state.setdefault(param, {})
            if name not in state:
                state[name] = grad.clone()
            else:
                lerp = Tensor.lerp if torch.is_grad_enabled() else Tensor.lerp_  # (differentiable)
                state[name] = lerp(state[name], grad, 1.0 - past)
            averages.append(state[name])
        return averages

    def _past(self, group: Group) -> float:
        """The share of past gradients in the average."""
        given: float | None = group.get(self.averaging)
        if given is not None:
            return given
        constraint = self.set_of(group)
        # (what pushed against a curve that is not convex pushes elsewhere after a step along it)
        exact = constraint.flat or not constraint.convex or issubclass(self.inner, LBFGS)
        return 0.0 if exact else _AVERAGING


class ClampMapping(GradientMapping):
    """The gradient mapping in the box of two bounds, without averages: it keeps no state."""

    clamp_min: Key = "clamp_min"
    clamp_max: Key = "clamp_max"

    def set_of(self, group: Group) -> Any:  # noqa: D102
        return checked_box(group[self.clamp_min], group[self.clamp_max])

    def is_elementwise(self, group: Group) -> bool:  # noqa: D102
        return True

    def is_active(self, group: Group) -> bool:  # noqa: D102
        return self.set_of(group) is not None

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        group = {**group, self.param_ndim: None}
        if optimizer._viewed is not None:
            group = as_viewed(group, (self.clamp_min, self.clamp_max), params[0], optimizer._viewed)
        super().apply_(tensors, params, group, optimizer)

    def _past(self, group: Group) -> float:
        return 0.0


def downhill(g: Tensor, group: Group, scale: Key = "grad_scale", bias: Key = "grad_bias") -> Tensor:
    """What the inner optimizer is to descend on: the gradient scaled and shifted, or minus it."""
    factor, shift = group.get(scale, 1.0), group.get(bias, 0.0)
    if factor != 1.0 or shift != 0.0:
        g = factor * g + shift
    return g.neg() if group.get("maximize", False) else g


def step_size(
    x: Tensor,
    gradient: Tensor,
    constraint: Constraint,
    *,
    reach: float,
    lr: float | Tensor,
    m: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """``e = reach * |x| / max(|g|, |m|)``, of a gradient g and an average m.

    It is one number for all elements that the constraint couples, or for the `whole` batch.
    Neither the units of the gradient nor those of x matter, and a gradient that is mostly noise
    is not followed far. Where x is 0, which has no scale, its length counts as that of a step of
    `lr` in each element; in a ball with a center of its own, as the radius at most.
    """
    dims, wide = tuple(range(x.ndim)) if whole else constraint.coupled_dims(x.ndim), wide_dtype(x)
    ball: Any = getattr(constraint, "ball", constraint)
    centered = getattr(ball, "center", None) is not None
    if x.numel() > BLOCK and dims == tuple(range(1, x.ndim)) and not centered:
        fast = _fast_step_size(x, gradient, m, reach)
        if fast is not None:
            return fast
    norm = partial(torch.linalg.vector_norm, ord=2, dim=dims, keepdim=True, dtype=wide)
    length, slope = norm(x), norm(gradient)
    if m is not None and m is not gradient:
        slope = torch.maximum(slope, norm(m))
    of_step = lr * (x.numel() / max(slope.numel(), 1)) ** 0.5
    length = torch.where(length > 0, length, of_step)
    if centered:
        length = length.clamp(max=beside(ball.epsilon, x))
    e: Tensor = reach * length / slope.clamp(min=torch.finfo(wide).tiny)
    largest = torch.finfo(x.dtype).max ** 0.5  # e and 1 / e times anything stay finite
    return e.clamp(1 / largest, largest).to(x.dtype)


def _fast_step_size(x: Tensor, gradient: Tensor, m: Tensor | None, reach: float) -> Tensor | None:
    """`step_size` by norms in float32, right to about 1e-6; None if these do not hold all of it."""
    fast = sums_fast([x, gradient], EXACT_CHUNK)
    if not fast or needs_grad(x, gradient):
        return None
    averages = None if m is None or m is gradient else [m.contiguous()]
    found = _row_steps([x], [gradient], averages, reach)
    return None if found is None else for_each(found[0].to(x.dtype), [x])[0]


def _are_summed_fast(batches: Sequence[Tensor]) -> bool:
    """Whether norms and products of a gradient, its parameter, and an average are for float32."""
    return (
        all(batch.dtype == torch.float32 for batch in batches)
        and sums_fast(batches, EXACT_CHUNK)
        and not needs_grad(*batches)
    )


def _beyond(factor: Tensor, error: float) -> Tensor:
    """``1 - factor``; 0 for rows that are outside by less than an error, as they may be inside."""
    beyond = 1 - factor
    return beyond.masked_fill_(beyond.abs() <= error, 0.0)


def _row_steps(
    xs: list[Tensor], gradients: list[Tensor], averages: list[Tensor] | None, reach: float
) -> list[Tensor] | None:
    """Step sizes for all rows; the norms of x, and of the average or the gradient; in float64.

    None if norms in float32 do not hold all of it.
    """
    vectors = [xs, gradients] if averages is None else [xs, gradients, averages]
    lengths = [fast_norms(batches, 2, EXACT_CHUNK) for batches in vectors]
    for least, most in map(least_and_most, lengths):
        if not (LEAST[torch.float32] < least and most < 1 / LEAST[torch.float32]):
            return None
    length, *slopes = (each.double() for each in lengths)
    slope = slopes[0] if averages is None else torch.maximum(*slopes)
    return [reach * length / slope, length, slopes[-1]]
