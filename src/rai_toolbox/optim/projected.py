"""The optimizer that keeps parameters in any set, around any inner optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Adafactor, AdamW, Optimizer

from rai_toolbox._torch import Muon, graph_break
from rai_toolbox.batch import view_or_copy
from rai_toolbox.checks import check_number
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim import diagnosis
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.frank_wolfe import FrankWolfe
from rai_toolbox.optim.gradient_mapping import map_gradient_
from rai_toolbox.optim.inner import optimizer_class
from rai_toolbox.optim.settings import REQUIRED, batch_shape_in, check_constraint, check_fits
from rai_toolbox.optim.wrapper import Group, Params

# Their step is one number times an average of gradients. Projected, it is right as it is.
_STEP_ALONG_GRADIENTS = (SGD, ASGD)
# Their weight decay is no part of the gradient; nor is it where a group says so.
_DECOUPLED = (Adafactor, *filter(None, [Muon]))
_FREE = Box(-inf, inf)  # what None stands for
_AVERAGING = 0.9


class ProjectedOptimizer(ParamTransformingOptimizer):
    r"""Keep each parameter in a set: step, and go to the nearest point of the set.

    .. math::
        g \leftarrow g + (y - P(y)) / e, \; y = p - e m, \quad
        p \leftarrow \text{inner step}(p, g), \quad p \leftarrow P(p)

    The first of these is the gradient mapping, which leads to the right point with inner
    optimizers that scale each element for itself, such as Adam: without it they stop where
    nothing is optimal, unless the set bounds each element for itself. It takes from g what pushes
    against the constraint, as told by an average m of recent gradients, and leaves g as it is
    where the constraint is not active. See the user guide for proof and figures.

    Parameters
    ----------
    constraint : Constraint or None
        The set that each sub-tensor is to be kept in; None leaves parameters free. To be given
        here or in every parameter group.
    gradient_mapping : bool, optional
        Whether g is replaced by its gradient mapping. By default it is where it makes a difference
        to where the optimizer ends: not with SGD and ASGD, nor with sets that bound each element.
    reach : float
        How far the gradient mapping looks ahead, as a share of the length of a sub-tensor:
        ``e = reach * |p| / |g|``. A larger one is quicker without noise, a smaller one is less
        sensitive to noise.
    averaging : float, optional
        The share of the past in m, ``m <- averaging * m + (1 - averaging) * g``: a larger one is
        less sensitive to noise, and a smaller one quicker where there is none. With 0, m is g, and
        no m is kept in `state`. By default 0.9; 0 with LBFGS, which lives by differences of exact
        gradients, and in affine subspaces, through which noise averages out as it is.
    every : int
        Project in each `every`-th step only.
    warmup : int
        Number of first steps that are those of the inner optimizer alone.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    TypeError
        If `constraint` is missing, or is no constraint.
    ValueError
        If the constraint does not fit a parameter as seen by `param_ndim`, or another setting is
        out of its range.

    Notes
    -----
    Parameters are not changed before the first step; see `make_feasible_`. Weight decay that the
    inner optimizer adds to the gradient (SGD, Adam, ...) is a part of what is minimized over the
    set. Decoupled weight decay (AdamW) is not: it shrinks a parameter on its own, so that its
    fixed points are no stationary points of the loss, with or without constraints.

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
        inner = getattr(InnerOpt, "stands_for", optimizer_class(InnerOpt))  # in a chain's member
        if issubclass(inner, FrankWolfe):
            raise TypeError(
                "`InnerOpt` must not be FrankWolfe, which takes a constraint of its own, got "
                f"{inner.__name__}"
            )
        settings = {
            "constraint": constraint,
            "gradient_mapping": gradient_mapping,
            "reach": reach,
            "averaging": averaging,
            "every": every,
            "warmup": warmup,
            "steps_taken": 0,  # counted only where it matters
        }
        super().__init__(
            params,
            InnerOpt,
            param_ndim=param_ndim,
            grad_scale=grad_scale,
            grad_bias=grad_bias,
            defaults={**settings, **(defaults or {})},
            **inner_opt_kwargs,
        )
        self._new_averages: dict[Tensor, Tensor] = {}  # of parameters without an inner state yet

    @torch.no_grad()
    def make_feasible_(self) -> None:
        """Project all parameters onto their sets, now."""
        for group in self.param_groups:
            self._project_parameters_(group["params"], group)

    def violation(self) -> list[Tensor]:
        """By how much each group is outside its set: the largest over its sub-tensors.

        Returns
        -------
        list of Tensor
            One number per group, without waiting for a device; so are those below.
        """
        return self._each_group(lambda x, c: c.violation(x).amax(), torch.amax)

    def kkt_residual(self) -> list[Tensor]:
        """How far each group is from a stationary point: ``|p - P(p - g)|``; ``|g|`` of a free one.

        It is to be read between `backward` and `step`, which changes gradients. Weight decay, which
        the inner optimizer adds in its step, is no part of g.

        Returns
        -------
        list of Tensor
        """
        return self._each_group_by_gradient(diagnosis.kkt_residual, torch.linalg.vector_norm)

    def active_fraction(self) -> list[Tensor]:
        """Share of a group's sub-tensors that a small step along -g takes out of their set.

        In sets that bound each element for itself it is the share of elements. It is to be read
        between `backward` and `step`.

        Returns
        -------
        list of Tensor
        """
        return self._each_group_by_gradient(
            lambda x, g, c: diagnosis.active(x, g, c).double().flatten(),
            torch.mean,
        )

    def frank_wolfe_gap(self) -> list[Tensor]:
        """``<g, p - lmo(g)>`` of each group: for convex losses, no less than what is to be gained.

        It is to be read between `backward` and `step`, and needs bounded sets; a free group, of
        which nothing can be said, has inf.

        Returns
        -------
        list of Tensor
        """
        return self._each_group_by_gradient(
            lambda x, g, c: x.new_tensor(inf) if c is _FREE else diagnosis.frank_wolfe_gap(x, g, c),
            torch.sum,
        )

    # The step

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        if not self._has_gradient_transform(optim_group):
            return
        averages = self._averages(params, grads, optim_group)
        if optim_group["steps_taken"] < optim_group["warmup"]:
            return
        inner = self._inner_class()
        decoupled = issubclass(inner, _DECOUPLED) or optim_group.get(
            "decoupled_weight_decay",
            issubclass(inner, AdamW),  # whose groups do not say so in torch 2.6
        )
        for param, grad, average in zip(params, grads, averages, strict=True):
            shape = batch_shape_in(param, optim_group)
            seen, copied = view_or_copy(grad, shape)
            map_gradient_(
                seen,
                view_or_copy(param, shape)[0],
                optim_group["constraint"],
                average=None if average is None else average.reshape(shape),
                reach=optim_group["reach"],
                lr=optim_group.get("lr", 1.0),
                weight_decay=0.0 if decoupled else optim_group.get("weight_decay", 0.0),
                maximize=optim_group.get("maximize", False),
            )
            if copied:
                grad.copy_(seen.view(grad.shape))

    def _project_parameters_(self, params: list[Tensor], optim_group: Group) -> None:
        constraint = optim_group["constraint"]
        if constraint is None:
            return
        seen = [view_or_copy(p, batch_shape_in(p, optim_group)) for p in params]
        constraint.project_each_([view for view, _ in seen])
        for param, (view, copied) in zip(params, seen, strict=True):
            if copied:
                param.copy_(view.view(param.shape))

    def _after_inner_step_(self, group: Group) -> None:
        while self._new_averages:
            param, average = self._new_averages.popitem()
            self.state[param][self._average_name()] = average
        if group["every"] != 1 or group["warmup"] != 0:
            group["steps_taken"] += 1

    def _transform_group_parameters_(self, params: list[Tensor], group: Group) -> None:
        if group["every"] != 1 or group["warmup"] != 0:
            after = group["steps_taken"] - group["warmup"]
            if after <= 0 or after % group["every"] != 0:
                return
        super()._transform_group_parameters_(params, group)

    def _has_gradient_transform(self, group: Group) -> bool:
        constraint, wanted = group["constraint"], group["gradient_mapping"]
        if constraint is None or constraint.elementwise:
            return False
        if wanted is None:
            return not issubclass(self._inner_class(), _STEP_ALONG_GRADIENTS)
        return bool(wanted)

    def _sees_elements(self, group: Group) -> bool:
        constraint = group["constraint"]
        return constraint is None or constraint.elementwise

    # The averages of gradients

    def _averages(
        self, params: list[Tensor], grads: list[Tensor], group: Group
    ) -> Sequence[Tensor | None]:
        """Averages of the gradients of each parameter, these included; None stands for the last."""
        past = self._averaging(group)
        if past == 0.0:
            return [None] * len(params)
        if torch.compiler.is_compiling() and self._begins(params):
            # The compiler would not look again at the state, once the inner has made its own.
            graph_break()
        return [self._average(p, g, past) for p, g in zip(params, grads, strict=True)]

    def _begins(self, params: list[Tensor]) -> bool:
        name = self._average_name()
        shown = params if self._shown is None else [self._shown]
        return not all(name in self.state.get(param, ()) for param in shown)

    def _average(self, param: Tensor, grad: Tensor, past: float) -> Tensor:
        param = param if self._shown is None else self._shown
        name = self._average_name()
        grad = grad.to(param.dtype).reshape(param.shape)  # as checkpoints hold it
        if name not in self.state.get(param, ()):
            # Inner optimizers take a state that is not empty for one of their own.
            new = self._new_averages.get(param)
            new = grad.clone() if new is None else new.lerp(grad, 1.0 - past)
            self._new_averages[param] = new
            return new
        kept: Tensor = self.state[param][name]
        if torch.is_grad_enabled():  # a differentiable step
            kept = self.state[param][name] = kept.lerp(grad, 1.0 - past)
            return kept
        return kept.lerp_(grad, 1.0 - past)

    def _averaging(self, group: Group) -> float:
        given: float | None = group["averaging"]
        if given is not None:
            return given
        exact = group["constraint"].flat or issubclass(self._inner_class(), LBFGS)
        return 0.0 if exact else _AVERAGING

    def _average_name(self) -> str:
        return f"{self._place}gradient_average"

    def _init_state_(self, group: Group) -> None:
        if self._has_gradient_transform(group) and self._averaging(group) != 0.0:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param][self._average_name()] = torch.zeros_like(param)

    # Looking at groups

    @torch.no_grad()
    def _each_group(
        self, of: Callable[..., Tensor], total: Callable[[Tensor], Tensor], gradients: bool = False
    ) -> list[Tensor]:
        found = []
        for group in self.param_groups:
            values = list(self._values(group, of, gradients))
            device = group["params"][0].device if group["params"] else None
            values = [value.to(device, torch.float64).reshape(-1) for value in values]
            nothing = torch.zeros(1, dtype=torch.float64, device=device)
            found.append(total(torch.cat(values or [nothing])))
        return found

    def _each_group_by_gradient(
        self, of: Callable[..., Tensor], total: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        return self._each_group(of, total, gradients=True)

    def _values(self, group: Group, of: Callable[..., Tensor], gradients: bool) -> Iterator[Tensor]:
        constraint = _FREE if group["constraint"] is None else group["constraint"]
        for param in group["params"]:
            if param.numel() == 0 or (gradients and param.grad is None):
                continue
            shape = batch_shape_in(param, group)
            seen = [param.detach().reshape(shape)]
            if gradients:
                grad = param.grad.detach().to_dense() if param.grad.is_sparse else param.grad
                seen.append((-grad if group.get("maximize", False) else grad).reshape(shape))
            yield complete(of(*seen, constraint))

    # Checks

    def _check_group(self, group: Group) -> None:
        check_constraint(group["constraint"])
        super()._check_group(group)
        _check_mapping(group["gradient_mapping"], group["reach"], group["averaging"])
        for name, least in (("every", 1), ("warmup", 0), ("steps_taken", 0)):
            if type(group[name]) is not int or group[name] < least:
                raise ValueError(f"`{name}` must be an int >= {least}, got {group[name]!r}")
        if group["constraint"] is not None:
            check_fits(group["constraint"], group)


def _check_mapping(wanted: object, reach: object, averaging: object) -> None:
    if wanted is not None and not isinstance(wanted, bool):
        raise TypeError(f"`gradient_mapping` must be a bool or None, got {wanted!r}")
    check_number("reach", reach)
    if not 0 < float(reach) < float("inf"):  # type: ignore[arg-type]
        raise ValueError(f"`reach` must be > 0 and finite, got {reach!r}")
    if averaging is not None:
        check_number("averaging", averaging)
        if not 0 <= float(averaging) < 1:  # type: ignore[arg-type]
            raise ValueError(f"`averaging` must be >= 0 and < 1, got {averaging!r}")
