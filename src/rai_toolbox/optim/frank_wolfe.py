"""Frank-Wolfe: steps towards the answer of a linear minimization oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from math import isfinite
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from rai_toolbox import checks, foreach
from rai_toolbox._torch import (
    foreach_add_,
    foreach_addcmul_,
    function_transforms_active,
    get_value,
    has_own_step_hooks,
    known_plain_step,
    plain_step,
)
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.blocks import are_apart, one_like, widened
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.foreach import cache_sized, with_gradients
from rai_toolbox.optim.diagnosis import Constrained, frank_wolfe_gap, totals
from rai_toolbox.optim.own_step import Move, OwnStepOptimizer, as_batches, check_lr_value, evaluated
from rai_toolbox.optim.settings import TINY, check_constraint, is_zero_on_host
from rai_toolbox.optim.transforms import Projection
from rai_toolbox.optim.wrapper import Group, Params

# The factors by which the line search lowers and raises the smoothness (Pedregosa et al., 2020).
_DECREASE, _INCREASE = 0.9, 2.0
_MOST_TRIALS = 40

_LARGEST = torch.finfo(torch.float64).max

_STEP = plain_step(OwnStepOptimizer.step)
_STRIDED = {torch.strided}
_DTYPE = attrgetter("dtype")


class FrankWolfe(Constrained, OwnStepOptimizer):
    r"""Move each parameter towards the answer of a linear minimization oracle.

    .. math::
        p \leftarrow (1 - a) p + a s, \quad s \in \arg\min_{s \in C} \langle g, s \rangle

    The `constraint` C must be bounded and convex and have an oracle. All iterates are in C if the
    start is, and otherwise after a first step with a = 1; before other first steps, a start outside
    is projected. `gap` is an upper bound of f - min f (Frank & Wolfe, 1956; Jaggi, 2013). There is
    no other projection: in sets other than boxes, rounding errors add up to a violation of about
    1e-6 of the size of C in 1,000 steps in float32, and of some percent in bfloat16 and float16.
    The step size a is one of

    - the schedule ``lr / (lr + k)``, where k = 0, 1, ... counts the steps of each parameter: with
      lr = 2, ``f - min f`` falls like 1/k for any smooth convex f. The first step has a = 1 and
      does not depend on the start, unless `initial_step` is given;
    - `lr`, if `use_default_lr_schedule` is False;
    - the short step ``min(1, <g, p - s> / (L |p - s|^2))``, with L = `smoothness`: f never rises.
      Each sub-tensor has its own a (each element, in an elementwise set), because the upper bound
      ``f + <g, move> + L/2 |move|^2`` is a sum with one term for each;
    - the short step with an L found by `line_search` (Pedregosa, Negiar, Askari & Jaggi, 2020):
      starting with .9 times the last one, L is doubled until f falls as much as the bound says.

    With `momentum` the oracle gets a moving average m of the gradients, from 0,
    ``m <- momentum m + (1 - momentum) g``, which averages noise out (Mokhtari, Hassani & Karbasi,
    2020); `gap` is still that of the present gradient. `Scion` does so with a constant a.

    Without a constraint the gradient is read as the *negative* of the oracle's answer,
    ``s = -lmo_scaling_factor * g``, as the optimizers below provide it.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    lr : float
        With the schedule: >= 0, and 2 is the classical choice. Without: the constant a, in [0, 1].
        With 0 nothing moves.
    lmo_scaling_factor : float
        Multiplies the oracle's answer; 1 with a constraint.
    use_default_lr_schedule : bool
        Whether a is lr / (lr + k), or lr.
    div_by_zero_eps : float
        Smallest divisor in the schedule, >= 0.
    constraint : Constraint, optional
        The set C of each sub-tensor, of `rai_toolbox.constraints`.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`. Only for
        `constraint`.
    smoothness : float, optional
        L > 0, a Lipschitz constant of the gradient (in units of loss / parameter^2), for the short
        step. With `line_search` it is the first L to try, and each search writes the L that it
        found to the group.
    line_search : bool
        Search for the smoothness, in all groups together. `step` then needs a closure, which must
        be deterministic and compute gradients; it is called once more for each trial, of which
        there is mostly one. Losses are compared on the host, or by gradients if their difference is
        within rounding. If no trial lowers the loss, parameters do not change.
    initial_step : int
        Number of steps, >= 0, that the schedule counts as done, for warm starts.
    momentum : float
        The weight of past gradients, in [0, 1). Only with a constraint, and not with `smoothness`
        or `line_search`, whose steps depend on the gradient itself.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, the constraint does not fit a parameter, or settings
        contradict each other. At each step, if `lr` is out of its range.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Simplex
    >>> from rai_toolbox.optim import FrankWolfe
    >>> x = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    >>> optim = FrankWolfe([x], constraint=Simplex(), param_ndim=None, initial_step=2)
    >>> x.backward(gradient=torch.tensor([0.0, 1.0, 2.0]))
    >>> optim.gap()
    [tensor(1.3000, dtype=torch.float64)]
    >>> optim.step()  # half of the way to (1, 0, 0)
    >>> x
    tensor([0.6000, 0.1500, 0.2500], requires_grad=True)
    """

    _checks = {
        "lmo_scaling_factor": checks.check_number,
        "div_by_zero_eps": checks.check_non_negative,
        "smoothness": lambda name, value: value is None or checks.check_positive(name, value),
        "line_search": checks.check_flag,
        "initial_step": lambda name, value: checks.check_count(name, value, 0),
        "momentum": lambda name, value: check_momentum(name, value),
        "constraint": lambda _, value: check_oracle(value),
    }

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor = 2.0,
        lmo_scaling_factor: float = 1.0,
        use_default_lr_schedule: bool = True,
        div_by_zero_eps: float = TINY,
        constraint: Constraint | None = None,
        param_ndim: int | None = -1,
        smoothness: float | None = None,
        line_search: bool = False,
        initial_step: int = 0,
        momentum: float = 0.0,
    ) -> None:
        arguments = dict(locals())
        if constraint is None and param_ndim == -1:
            del arguments["param_ndim"]  # no effect here, and a wrapper has a setting of that name
        super().__init__(params, arguments)

    def _completed(self, group: Mapping[str, Any]) -> Group:
        if group.get("constraint") is not None:
            group = {"param_ndim": -1, **group}
        return super()._completed(group)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        self._check_step_size(group)

    def _check_step_size(self, group: Group) -> None:
        """Raise if settings of the step size are out of range, or contradict each other."""
        self._check_before_step(group)
        _check_step_size(group)

    def _check_before_step(self, group: Group) -> None:
        check_lr(group)

    def _check_groups(self, groups: Sequence[Group]) -> None:
        super()._check_groups(groups)
        found = [group.get("line_search", False) for group in groups]
        if len(set(found)) > 1:
            raise ValueError(f"`line_search` must be the same in all groups, got {found}")

    def gap(self) -> list[Tensor]:
        """The duality gap of each group, from the present gradients; without synchronization.

        ``<g, p - s>``, summed over the parameters of the group that have a gradient. For a convex
        f, and parameters in their sets, the sum over all groups is an upper bound on f - min f.

        Returns
        -------
        list of Tensor, shape ()
            In float64.

        Raises
        ------
        ValueError
            If a group has no constraint.
        """
        for i, group in enumerate(self.param_groups):
            if group["constraint"] is None:
                raise ValueError(f"`gap` needs a constraint in every group, got none in group {i}")
        return totals(self.param_groups, frank_wolfe_gap, torch.sum)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        for group in self.param_groups:
            self._check_before_step(group)
        if any(group.get("line_search") for group in self.param_groups):
            return self._search(closure)
        return super()._step(closure)

    def mover(self, params: list[Tensor], grads: list[Tensor]) -> Move | None:
        """A function that moves parameters, if calls of it for all of them do what a step does.

        There is none where a subclass, a hook or a scheduler has a part in the step, where groups
        have constraints, or where tensors are sparse or share memory.
        """
        if not self._has_own_step() or "step" in self.__dict__ or has_own_step_hooks(self):
            return None
        constrained = any(group["constraint"] is not None for group in self.param_groups)
        return None if constrained else self._mover_of(params, grads)

    def step_of_one(self, param: Tensor) -> Callable[[Tensor], object] | None:  # noqa: D102
        (group,) = self.param_groups
        if not self._has_own_step() or group["constraint"] is not None:
            return None
        return lambda grad: self._move_(param, grad, group)

    def _has_own_step(self) -> bool:
        """Whether its step is the one defined here."""
        step = type(self).step
        is_own = type(step) is FunctionType and known_plain_step(step) is _STEP
        return is_own and type(self) is FrankWolfe

    def _mover_of(self, params: list[Tensor], grads: list[Tensor]) -> Move | None:
        """A function that moves parameters, unless any tensors are sparse or share memory."""
        both = [*params, *grads]  # (two lists that may be sorted by address already)
        are_usual = (
            _STRIDED.issuperset(map(attrgetter("layout"), both))
            and foreach.are_plain(both)
            and not function_transforms_active()
            and are_apart(both)
        )
        if not are_usual:
            return None
        return self._move_together_ if all(map(attrgetter("is_cpu"), both)) else self._move_each_

    def _move_each_(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        moves = not is_zero_on_host(group["lr"])
        for param, grad in zip(params, grads, strict=True):
            if moves:
                self._move_(param, grad, group)
            else:
                self._started(param, group)

    def _move_(self, param: Tensor, grad: Tensor, group: Group) -> None:
        step = self._started(param, group)["step"]
        _add_(param, grad, _fraction(step.item(), group), group["lmo_scaling_factor"])
        step.add_(one_like(step))  # (a number would be made a tensor each time)

    def _move_together_(self, params: list[Tensor], grads: list[Tensor], group: Group) -> None:
        steps = [self._started(param, group)["step"] for param in params]
        is_shared = len(set(map(Tensor.data_ptr, steps))) < len(steps)  # (it counts each)
        if is_shared or isinstance(group["lr"], Tensor) or group["lr"] == 0:
            self._move_each_(params, grads, group)
            return
        for done, xs, gs, counts in _alike(params, grads, steps):
            a, ones = _fraction(done, group), [one_like(xs[0])] * len(xs)
            foreach_addcmul_(xs, xs, ones, value=-a)  # as `_add_`
            foreach_addcmul_(xs, gs, ones, value=-a * group["lmo_scaling_factor"])
            foreach_add_(counts, one_like(counts[0]), alpha=1)  # (one that is a tensor)

    def _step_group_(self, group: Group) -> None:
        constraint = group["constraint"]
        if constraint is None and not torch.compiler.is_compiling():
            params, grads = with_gradients(group["params"])
            move_ = self._mover_of(params, grads) if len(params) > 1 else None
            for part in cache_sized(params) if move_ else [slice(None)]:
                (move_ or self._move_each_)(params[part], grads[part], group)
            return
        for param, step in self._moving(group):
            if constraint is None:
                a = _fraction(get_value(step), group)
                _add_(param, param.grad, a, group["lmo_scaling_factor"])
            elif group["smoothness"] is None:
                x, direction = self._directed(param, group)
                end = constraint.lmo(direction).to(x.dtype)
                interpolate_(param, x, end, _fraction(get_value(step), group))
            else:
                _Segment(param, group).take_short_step_()
            step += 1

    def _directed(self, param: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """A parameter, and what the oracle gets: its gradient, or the average; as batches."""
        x, gradient = as_batches(param, group)
        if group["momentum"] == 0:
            return x, gradient
        average = self.state[param]["momentum_buffer"]
        gradient = gradient.reshape(param.shape).to(average.dtype)
        average.lerp_(gradient, 1 - group["momentum"])
        if group.get("nesterov"):
            average = gradient.lerp(average, group["momentum"])
        return x, average.reshape(x.shape)

    def _moving(self, group: Group) -> list[tuple[Tensor, Tensor]]:
        """The parameters that a step moves, and how many steps each has made.

        A step of size 0 does not count: the schedule starts with the first move.
        """
        params: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, steps)
        return [] if is_zero_on_host(group["lr"]) else list(zip(params, steps, strict=True))

    def _init_group(self, group: Group, params: list[Tensor], steps: list[Tensor]) -> None:
        # By this name torch.compile knows the method that creates the state, and runs it eagerly.
        self._enter_(group)
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                steps.append(self._started(param, group)["step"])

    def _started(self, param: Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter, which is made if there is none."""
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            done = group.get("initial_step", 0)
            state["step"] = torch.full((), done, dtype=torch.float32, device="cpu")
        if group["momentum"] != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state

    def _enter_(self, group: Group) -> None:
        """Project what has not moved yet before a step that stays between two points."""
        if not self._starts_inside(group) or torch.compiler.is_compiling():
            return
        done = group.get("initial_step", 0)
        if not is_zero_on_host(group["lr"]):
            states = ((p, self.state.get(p)) for p in group["params"] if p.requires_grad)
            new = [p for p, state in states if not state or get_value(state["step"]) == done]
            Projection().change_(new, group)

    def _starts_inside(self, group: Group) -> bool:
        """Whether the first step must start in the set; that of the schedule may start anywhere."""
        if group["constraint"] is None:
            return False
        adaptive = group["line_search"] or group["smoothness"] is not None
        return adaptive or not group["use_default_lr_schedule"] or group["initial_step"] > 0

    def _search(self, closure: Callable[[], Any] | None) -> Any:
        self._check_groups(self.param_groups)  # a group may have been edited
        if closure is None:
            if all(is_zero_on_host(group["lr"]) for group in self.param_groups):
                return None  # the step by which a distributed checkpoint creates empty state
            raise ValueError("`closure` must be given with `line_search=True`, got None")
        for group in self.param_groups:
            self._enter_(group)
        loss = evaluated(closure)
        moving = [(group, *each) for group in self.param_groups for each in self._moving(group)]
        segments = [_Segment(param, group) for group, param, _ in moving]
        if _search_(segments, loss, closure):
            for _, _, step in moving:
                step += 1
        return loss


# Steps


def _fraction(done: Any, group: Group) -> float | Tensor:
    """The step size after so many steps: a number, and one or a tensor while a compiler traces."""
    lr: float | Tensor = group["lr"]
    if not group["use_default_lr_schedule"]:
        return lr
    total, smallest = lr + done, group["div_by_zero_eps"]
    return lr / (total.clamp(min=smallest) if isinstance(total, Tensor) else max(total, smallest))


def _alike(*rows: list[Tensor]) -> Iterator[tuple[Any, ...]]:
    """Of parameters, gradients and steps, those of equal dtypes and counts, after the count."""
    columns = [list(map(Tensor.item, rows[-1])), *(list(map(_DTYPE, row)) for row in rows)]
    if all(len(set(column)) == 1 for column in columns):  # mostly
        yield columns[0][0], *rows
        return
    kinds = list(zip(*columns, strict=True))
    for kind in dict.fromkeys(kinds):  # (in the same order in every process)
        yield kind[0], *(list(compress(row, map(kind.__eq__, kinds))) for row in rows)


def _add_(param: Tensor, grad: Any, a: float | Tensor, scaling: float) -> None:
    """Move towards ``-scaling * grad``."""
    if isinstance(a, Tensor):
        param.mul_(1 - a)
        param.add_(grad * (-a * scaling))
    else:  # rounds alike whatever the strides, unlike add_
        if grad.layout is not torch.strided:
            grad = grad.to_dense()  # (torch adds a sparse one to a wrong place in a view)
        one = one_like(param)
        param.addcmul_(param, one, value=-a)  # (in half the time of mul_, which wraps its factor)
        param.addcmul_(grad, one, value=-a * scaling)


def interpolate_(param: Tensor, start: Tensor, end: Tensor, a: float | Tensor) -> None:
    """Put a parameter at a fraction `a` of the segment from `start` to `end`."""
    # Unlike (1 - a) start + a end, this never rounds to a point outside a box, and is `end` at 1.
    weight = a.to(start) if isinstance(a, Tensor) else a
    param.copy_(torch.lerp(start, end, weight).reshape(param.shape))


class _Segment:
    """The segment from a parameter to the oracle's answer, as batches of sub-tensors."""

    def __init__(self, param: Tensor, group: Group) -> None:
        self.param, self.group = param, group
        x, gradient = as_batches(param, group)
        # (a line search writes to the parameter at each trial)
        self.start = x.clone() if group["line_search"] else x
        self.end = group["constraint"].lmo(gradient).to(x.dtype)
        offset = widened(x) - widened(self.end)
        self.gap = _inner(gradient, offset, group)
        self.square = _inner(offset, offset, group)
        self.smoothness = group["smoothness"]

    def take_short_step_(self) -> None:
        """Put the parameter where the upper bound of the loss is lowest."""
        # (two divisions, because the product of the divisors may underflow to 0)
        length = (self.gap.clamp(min=0) / self.square / self.smoothness).clamp(max=1)
        self.fraction = torch.where(self.square == 0, 0.0, length)
        interpolate_(self.param, self.start, self.end, self.fraction)

    def bound(self) -> float:
        """The upper bound of the change of the loss in the last step."""
        a = self.fraction
        return _total([a * (a * self.square * (self.smoothness / 2) - self.gap)])

    def change_by_gradients(self) -> float:
        """The change of a quadratic loss, from the gradients at both ends of the last step."""
        _, gradient = as_batches(self.param, self.group)
        slope = _inner(gradient, widened(self.end) - widened(self.start), self.group)
        return _total([self.fraction * (slope - self.gap)]) / 2


def _inner(a: Tensor, b: Tensor, group: Group) -> Tensor:
    """Inner products of sub-tensors, or products of elements that the set bounds alone."""
    products = widened(a) * widened(b)
    if group["constraint"].elementwise:
        return products
    return products.sum(tuple(range(1, a.ndim)), keepdim=True)


def _search_(segments: list[_Segment], loss: Any, closure: Callable[[], Any]) -> bool:
    """Take the short step with the first smoothness whose bound holds; whether anything moved."""
    value = _as_number(loss)
    gap = _total(segment.gap for segment in segments)
    if gap <= 0:  # there is nothing to gain, or no gradient
        return False
    square = _total(segment.square for segment in segments)
    full_step = gap / max(square, TINY)  # the smoothness with which the step is the whole segment
    for segment in segments:
        known = segment.smoothness
        least = full_step / 1024
        segment.smoothness = full_step if known is None else max(_DECREASE * known, least)
    rounding = 8 * _precision(loss, segments) * abs(value)
    for _ in range(_MOST_TRIALS):
        for segment in segments:
            segment.take_short_step_()
        change = _as_number(evaluated(closure)) - value
        if abs(change) <= rounding:
            change = sum(segment.change_by_gradients() for segment in segments)
        if not isfinite(value + gap):  # nothing can be compared, and NaN is not to be hidden
            return True
        if change <= sum(segment.bound() for segment in segments):
            for segment in segments:
                segment.group["smoothness"] = segment.smoothness
            return True
        for segment in segments:
            segment.smoothness *= _INCREASE
    for segment in segments:
        segment.param.copy_(segment.start.reshape(segment.param.shape))
    evaluated(closure)  # for the gradients there
    return False


def _as_number(loss: Any) -> float:
    if loss is None:
        raise TypeError("`closure` must return the loss with `line_search=True`, got None")
    return float(complete(loss.detach()) if isinstance(loss, Tensor) else loss)


def _total(tensors: Iterable[Tensor]) -> float:
    return sum(float(complete(tensor.sum())) for tensor in tensors)


def _precision(loss: Any, segments: list[_Segment]) -> float:
    """The relative precision of a loss; of the parameters, if it is a number."""
    is_tensor = isinstance(loss, Tensor) and loss.is_floating_point()
    tensors = [loss] if is_tensor else [segment.param for segment in segments]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


# Checks


def check_lr(group: Group) -> None:
    """Raise if `lr` is out of its range; a value on a device is not read."""
    lr, scheduled = group["lr"], group["use_default_lr_schedule"]
    if type(lr) is float and 0 <= lr <= (_LARGEST if scheduled else 1):
        return  # (as it is at most steps)
    read = check_lr_value("lr", lr)
    if read is not None and read > 1 and not scheduled:
        raise ValueError(f"`lr` must be in [0, 1] without the default schedule, got {lr!r}")


def _check_step_size(group: Group) -> None:
    """Raise if two settings that choose the step size contradict each other."""
    constraint, scheduled = group["constraint"], group["use_default_lr_schedule"]
    done, scaling = group["initial_step"], group["lmo_scaling_factor"]
    adaptive = [f"{k}={group[k]!r}" for k in ("line_search", "smoothness") if group.get(k)]
    other = [*adaptive, "use_default_lr_schedule=False"][0]
    if adaptive and constraint is None:
        raise ValueError(f"`constraint` must be given with {other}, got None")
    if adaptive and not scheduled:
        raise ValueError(
            f"`use_default_lr_schedule` must be True (no constant step) with {other}, got "
            f"{scheduled!r}"
        )
    if done and (adaptive or not scheduled):
        raise ValueError(f"`initial_step` must be 0 without the schedule ({other}), got {done!r}")
    if group["momentum"] and (adaptive or constraint is None):
        other = adaptive[0] if adaptive else "constraint=None"
        raise ValueError(f"`momentum` must be 0 with {other}, got {group['momentum']!r}")
    if constraint is not None and scaling != 1:
        raise ValueError(
            "`lmo_scaling_factor` must be 1 with a constraint (or steps would lead outside), got "
            f"{scaling!r}"
        )


def check_momentum(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    checks.check_fraction(name, value)
    if value == 1:
        raise ValueError(f"`{name}` must be < 1 (or the gradient has no weight), got {value!r}")


def check_oracle(constraint: Any) -> None:
    """Raise unless it is a bounded convex set that has an oracle, or None."""
    check_constraint(constraint)
    if constraint is None:
        return
    if not (constraint.convex and constraint.bounded):
        raise ValueError(f"`constraint` must be convex and bounded, got {constraint!r}")
    if type(constraint)._minimizer is Constraint._minimizer:
        raise ValueError(f"`constraint` must have an oracle, `lmo`, got {constraint!r}")
