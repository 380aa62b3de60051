"""The optimizer that keeps parameters in any set, around any inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.optim import diagnosis
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.frank_wolfe import FrankWolfe
from rai_toolbox.optim.gradient_mapping import GradientMapping
from rai_toolbox.optim.inner import optimizer_class
from rai_toolbox.optim.projected_lbfgs import ProjectedLBFGS
from rai_toolbox.optim.settings import REQUIRED, constructor_arguments
from rai_toolbox.optim.transforms import Key, Projection
from rai_toolbox.optim.wrapper import Group, OptimizerWrapper, Params


class PeriodicProjection(Projection):
    """The projection in each `every`-th step after `warmup` steps."""

    every: Key = "every"
    warmup: Key = "warmup"
    steps_taken: Key = "steps_taken"

    def check(self, group: Group) -> None:  # noqa: D102
        super().check(group)
        for name, least in ((self.every, 1), (self.warmup, 0), (self.steps_taken, 0)):
            if type(group[name]) is not int or group[name] < least:
                raise ValueError(f"`{name}` must be an int >= {least}, got {group[name]!r}")

    def apply_(  # noqa: D102
        self, tensors: list[Tensor], params: list[Tensor], group: Group, optimizer: OptimizerWrapper
    ) -> None:
        every, warmup = group[self.every], group[self.warmup]
        after_warmup = group[self.steps_taken] - warmup
        if (every, warmup) == (1, 0) or (after_warmup > 0 and after_warmup % every == 0):
            self.change_(tensors, group)

    def count_step(self, group: Group) -> None:  # noqa: D102
        if (group[self.every], group[self.warmup]) != (1, 0):  # else the count has no effect
            group[self.steps_taken] += 1


class ProjectedOptimizer(diagnosis.Constrained, ParamTransformingOptimizer):
    r"""Keep each parameter in a set: take a step, then project onto the set.

    .. math::
        g \leftarrow g + (y - P(y)) / e, \; y = p - e m, \quad
        p \leftarrow \text{inner step}(p, g), \quad p \leftarrow P(p)

    The first of these is the gradient mapping. Inner optimizers that scale gradients elementwise,
    such as Adam, need it to converge to a stationary point, unless the set is elementwise, too;
    those that mix elements, such as LBFGS and Muon, need it in any set. It removes from g what
    pushes against the constraint, as measured by an average m of recent gradients, and leaves g
    unchanged where the constraint is not active (Nesterov, 2018; Beck, 2017). :doc:`/stationarity`
    has the proof for these inner optimizers, and measurements. For losses of full batches,
    `ProjectedLBFGS` takes fewer evaluations than this with torch's LBFGS.

    Parameters
    ----------
    constraint : Constraint or None
        The set that each sub-tensor, of a shape (d0, ...) that `param_ndim` gives, is kept in; None
        leaves parameters unconstrained. Required, here or in every parameter group.
    gradient_mapping : bool, optional
        Whether g is replaced by its gradient mapping. By default it is where that changes the
        point of convergence: not with SGD and ASGD, and on an elementwise set not with torch's
        optimizers that scale elementwise.
    reach : float
        How far the gradient mapping looks ahead, as a share of the length of a sub-tensor:
        ``e = reach * |p| / max(|g|, |m|)``. A larger one is quicker without noise, a smaller one
        is less sensitive to noise.
    averaging : float, optional
        The share of the past in m, ``m <- averaging * m + (1 - averaging) * g``: a larger one is
        less sensitive to noise, and a smaller one quicker where there is none. With 0, m is g, and
        no m is kept in `state`. By default 0.9; 0 with LBFGS, which needs differences of exact
        gradients; in affine subspaces, where the projection is linear and noise averages out; and
        on sets that are not convex, where the direction that the set removes changes faster than
        an average of gradients.
    every : int
        Project in each `every`-th step only.
    warmup : int
        Number of first steps without gradient mapping and projection.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    TypeError
        If `constraint` is missing, or is no constraint.
    ValueError
        If the constraint does not fit a parameter as seen by `param_ndim`, another setting is out
        of its range, or LBFGS is to search along a line, which leaves the set.

    Notes
    -----
    Parameters are not changed before the first step; see `make_feasible_`. Weight decay that the
    inner optimizer adds to the gradient (SGD, Adam, ...) is a part of what is minimized over the
    set. Decoupled weight decay (AdamW) is not: it shrinks parameters separately, so that they do
    not converge to stationary points of the loss, with or without constraints.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Simplex
    >>> from rai_toolbox.optim import ProjectedOptimizer
    >>> x = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    >>> optim = ProjectedOptimizer([x], constraint=Simplex(), param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([-0.6, 0.0, 0.6]))
    >>> optim.step()
    >>> x
    tensor([0.7500, 0.2500, 0.0000], requires_grad=True)
    """

    _after = (PeriodicProjection(),)

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        constraint: Constraint | None | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = -1,
        gradient_mapping: bool | None = None,
        reach: float = 0.1,
        averaging: float | None = None,
        every: int = 1,
        warmup: int = 0,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        arguments = constructor_arguments(locals())
        arguments["defaults"].setdefault("steps_taken", 0)  # counted only where it matters
        inner = optimizer_class(InnerOpt)
        if issubclass(inner, (FrankWolfe, ProjectedLBFGS)):
            name = inner.__name__
            raise TypeError(f"`InnerOpt` must not be {name}, which has its own set, got {name}")
        self._before = (GradientMapping(inner),)
        super().__init__(**arguments)

    def active_fraction(self) -> list[Tensor]:
        """Share of a group's sub-tensors that a small step along -g takes out of their set.

        In elementwise sets it is the share of elements. Call it between `backward` and `step`.

        Returns
        -------
        list of Tensor
        """
        return diagnosis.totals(self.param_groups, diagnosis.active_mask, torch.mean)

    def frank_wolfe_gap(self) -> list[Tensor]:
        """``<g, p - lmo(g)>`` of each group: for convex losses, an upper bound on f(p) - min f.

        Call it between `backward` and `step`. It needs bounded sets; it is inf for an
        unconstrained group.

        Returns
        -------
        list of Tensor
        """
        return diagnosis.totals(self.param_groups, diagnosis.frank_wolfe_gap, torch.sum)
