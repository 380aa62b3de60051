"""The gradient mapping: the part of a gradient along which a constrained parameter can move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Optimizer

from rai_toolbox._torch import Muon, graph_break
from rai_toolbox.autograd import readable
from rai_toolbox.checks import check_number
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import wide_dtype
from rai_toolbox.constraints.kernels.norms import scale_dtype
from rai_toolbox.optim.settings import batch_in
from rai_toolbox.optim.transforms import Key, OfSet
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper

# Their step is one number times an average of gradients. Projected, it is right as it is.
_STEP_ALONG_GRADIENTS = (SGD, ASGD)
# Their weight decay is no part of the gradient; so it is in groups with `decoupled_weight_decay`.
_DECOUPLED = (Adafactor, AdamW, *filter(None, [Muon]))
_AVERAGING = 0.9
_STATE = "gradient_average"


@dataclass(frozen=True)
class GradientMapping(OfSet):
    """The gradient mapping by an average of gradients, kept in the state of a parameter."""

    inner: type[Optimizer]
    gradient_mapping: Key = "gradient_mapping"
    reach: Key = "reach"
    averaging: Key = "averaging"
    warmup: Key = "warmup"
    steps_taken: Key = "steps_taken"

    def check(self, group: Group) -> None:  # noqa: D102
        wanted, reach, averaging = self.gradient_mapping, self.reach, self.averaging
        if group[wanted] is not None and not isinstance(group[wanted], bool):
            raise TypeError(f"`{wanted}` must be a bool or None, got {group[wanted]!r}")
        if not 0 < check_number(reach, group[reach]) < float("inf"):
            raise ValueError(f"`{reach}` must be > 0 and finite, got {group[reach]!r}")
        if group[averaging] is not None and not 0 <= check_number(averaging, group[averaging]) < 1:
            raise ValueError(f"`{averaging}` must be >= 0 and < 1, got {group[averaging]!r}")

    def is_active(self, group: Group) -> bool:  # noqa: D102
        wanted = group[self.gradient_mapping]
        if wanted is None:
            wanted = not issubclass(self.inner, _STEP_ALONG_GRADIENTS)
        return wanted and not self.is_elementwise(group)

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        averages = self._averages(tensors, params, group, optimizer)
        if group[self.steps_taken] < group[self.warmup]:
            return
        for grad, param, average in zip(tensors, params, averages, strict=True):
            x, _ = batch_in(param, group, self.param_ndim)
            view, copied = batch_in(grad, group, self.param_ndim)
            self.map_(view, x, average, group)
            if copied:
                grad.copy_(view.view(grad.shape))

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
        constraint, maximize = group[self.constraint], group.get("maximize", False)
        decoupled = issubclass(self.inner, _DECOUPLED) or group.get("decoupled_weight_decay")
        weight_decay = 0.0 if decoupled else group.get("weight_decay", 0.0)
        dtype = torch.promote_types(scale_dtype(x), grad.dtype)
        x = x.to(dtype)
        averages = [] if average is None else [average.reshape(x.shape)]
        downhill = []
        for gradient in (readable(grad), *averages):
            down = gradient.to(dtype).neg() if maximize else gradient.to(dtype)
            downhill.append(down + weight_decay * x if weight_decay != 0.0 else down)
        e = step_size(x, downhill[0], constraint, reach=group[self.reach], lr=group.get("lr", 1.0))
        y = x - e * downhill[-1]
        pushed_back = (y - constraint.project(y)) / e  # exactly 0 where y is in the set
        return grad.sub_(pushed_back) if maximize else grad.add_(pushed_back)

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
            elif torch.is_grad_enabled():  # a differentiable step
                state[name] = state[name].lerp(grad, 1.0 - past)
            else:
                state[name].lerp_(grad, 1.0 - past)
            averages.append(state[name])
        return averages

    def _past(self, group: Group) -> float:
        """The share of past gradients in the average."""
        given: float | None = group[self.averaging]
        if given is not None:
            return given
        exact = group[self.constraint].flat or issubclass(self.inner, LBFGS)
        return 0.0 if exact else _AVERAGING


def step_size(
    x: Tensor, gradient: Tensor, constraint: Constraint, *, reach: float, lr: float | Tensor
) -> Tensor:
    """``e = reach * |x| / |gradient|``, one for all elements that the constraint couples.

    Neither the units of the gradient nor those of x matter, and a gradient that is mostly noise
    is not followed far. Where x is 0, which has no scale, e is `lr`.
    """
    dims, wide = constraint.coupled_dims(x.ndim), wide_dtype(x)
    # (both are changed in place before this is differentiated)
    length = torch.linalg.vector_norm(readable(x), 2, dims, keepdim=True, dtype=wide)
    slope = torch.linalg.vector_norm(readable(gradient), 2, dims, keepdim=True, dtype=wide)
    e = torch.where(length > 0, reach * length / torch.where(slope > 0, slope, 1.0), lr)
    largest = torch.finfo(x.dtype).max ** 0.5  # e and 1 / e times anything stay finite
    return e.clamp(1 / largest, largest).to(x.dtype)
