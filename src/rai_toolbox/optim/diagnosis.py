"""Diagnosis of constrained parameters: how far from stationary they are; of batches (N, ...)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import OPEN
from rai_toolbox.constraints.kernels.blocks import widened
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim.gradient_mapping import downhill, step_size
from rai_toolbox.optim.own_step import as_batches, device_of
from rai_toolbox.optim.settings import trained
from rai_toolbox.optim.transforms import Projection
from rai_toolbox.optim.wrapper import Group


class Constrained:
    """Methods of optimizers with a set per group: `make_feasible_`, `violation`, `kkt_residual`."""

    _ball: ClassVar[type[Any] | None] = None
    """The set, where groups have its radius, `epsilon`, instead of a `constraint`."""

    def _constraint(self, group: Group) -> Any:
        """The set that the parameters of a group are in; None if they are unconstrained."""
        return group["constraint"] if self._ball is None else self._ball(group["epsilon"])

    def _with_sets(self) -> list[Group]:
        groups = self.param_groups  # type: ignore[attr-defined]
        return [{"param_ndim": -1, **each, "constraint": self._constraint(each)} for each in groups]

    @torch.no_grad()
    def make_feasible_(self) -> None:
        """Project all parameters but frozen ones onto their sets, now."""
        for group in self._with_sets():
            Projection().change_(trained(group), group)

    def violation(self) -> list[Tensor]:
        """How far each group is outside its set: the largest over its sub-tensors.

        Returns
        -------
        list of Tensor
            One number per group, in float64, without synchronizing with the host.
        """
        return totals(self._with_sets(), lambda x, _, c: c.violation(x), torch.amax, False)

    def kkt_residual(self) -> list[Tensor]:
        """How far each group is from a stationary point: ``|p - P(p - g)|``.

        Here g is what the inner optimizer descends on: the gradient with `grad_scale` and
        `grad_bias`, or minus it with `maximize`. Weight decay, which the inner optimizer adds in
        its step, is no part of g. Call it between `backward` and `step`, which changes gradients:
        it is NaN where no parameter has one, and ``|g|`` for an unconstrained group.

        Returns
        -------
        list of Tensor
            One number per group, in float64, without synchronizing with the host.
        """
        return totals(self._with_sets(), kkt_residual, torch.linalg.vector_norm)


@torch.no_grad()
def totals(
    groups: Sequence[Group],
    of: Callable[[Tensor, Tensor, Constraint], Tensor],
    total: Callable[[Tensor], Tensor],
    gradients: bool = True,
) -> list[Tensor]:
    """The total of what `of` finds for each parameter of a group, in float64.

    With `gradients` only parameters that have one count, and it is that which the optimizer
    descends. Where none has one, nothing is known: NaN.
    """
    found = []
    known = not gradients or any(p.grad is not None for each in groups for p in each["params"])
    for group in groups:
        constraint = OPEN if group["constraint"] is None else group["constraint"]
        device = device_of(group)
        values = []
        for param in trained(group):
            if param.numel() > 0 and (param.grad is not None or not gradients):
                x, gradient = as_batches(param, group)
                gradient = downhill(gradient, group)
                if x.is_complex():  # it is unconstrained
                    x, gradient = map(torch.view_as_real, (x, gradient.resolve_conj()))
                value = complete(of(x, gradient, constraint))
                values.append(value.to(device, torch.float64).flatten())
        none = torch.full((1,), 0.0 if known else nan, dtype=torch.float64, device=device)
        found.append(total(torch.cat(values or [none])))
    return found


def kkt_residual(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """``|x - P(x - gradient)|``, which is 0 just at the stationary points of the constraint."""
    step = widened(x) - widened(gradient)
    return torch.linalg.vector_norm(widened(x) - constraint.project(step))


def active_mask(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """Which sub-tensors, or elements in an elementwise set, a small step down takes out of the set.

    The step has the length ``sqrt(eps) |x|``, with the eps of the dtype of x.
    """
    reach = torch.finfo(x.dtype).eps ** 0.5
    x, gradient = widened(x), widened(gradient)
    y = x - step_size(x, gradient, constraint, reach=reach, lr=reach) * gradient
    # (older torch, such as 2.9, cannot tell where sharded tensors are unequal)
    moved = complete((constraint.project(y) == y).logical_not())
    return moved if constraint.elementwise else moved.flatten(1).any(1)


def frank_wolfe_gap(x: Tensor, gradient: Tensor, constraint: Constraint) -> Tensor:
    """``<gradient, x - lmo(gradient)>``, an upper bound on f(x) - min f if f is convex."""
    if constraint is OPEN:
        return x.new_tensor(inf)
    gradient = widened(gradient)
    return (gradient * (widened(x) - constraint.lmo(gradient))).sum()
