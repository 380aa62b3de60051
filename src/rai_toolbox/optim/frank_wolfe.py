"""Frank-Wolfe: step towards the answer of a linear minimization oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from rai_toolbox._torch import get_value, use_grad_for_differentiable
from rai_toolbox.batch import check_param_ndim
from rai_toolbox.checks import check_finite, check_non_negative, check_number
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.sharding import complete
from rai_toolbox.optim.diagnosis import frank_wolfe_gap
from rai_toolbox.optim.frank_wolfe_steps import go_, move_of, search_, seen
from rai_toolbox.optim.own_step import CheckedOptimizer, device_of
from rai_toolbox.optim.settings import (
    TINY,
    check_constraint,
    check_fits,
    is_zero_on_host,
    with_names_apart,
)
from rai_toolbox.optim.wrapper import Group, Params

# What a group has if it has a constraint, and else where it is given only.
_OPTIONS: Group = {
    "constraint": None,
    "param_ndim": -1,
    "smoothness": None,
    "line_search": False,
    "initial_step": 0,
}


class FrankWolfe(CheckedOptimizer):
    r"""Move each parameter towards the answer of a linear minimization oracle.

    .. math::
        p \leftarrow (1 - a) p + a s, \quad s \in \arg\min_{s \in C} \langle g, s \rangle

    With a `constraint` C, which must be bounded and convex and have an oracle, all iterates are in
    C, from the first step on if that has a = 1, else from a start in C; `gap` bounds what is left
    to gain (Frank & Wolfe, 1956; Jaggi, 2013). There is no projection: out of other sets than
    boxes the rounding of sums leads by about 1e-6 of their size in 1,000 steps in float32, and by
    percents in bfloat16 and float16. The step size a is one of

    - the schedule ``lr / (lr + k)``, where k = 0, 1, ... counts the steps of each parameter: with
      lr = 2 ``f - min f`` falls like 1/k for any smooth convex f. The first step, where a = 1,
      forgets the start, unless `initial_step` says that so many steps count as done;
    - `lr`, where `use_default_lr_schedule` is False;
    - the short step ``min(1, <g, p - s> / (L |p - s|^2))``, where `smoothness` is L: f never rises.
      Each sub-tensor has its own a (each element, in a set that bounds elements alone), which is
      right for any f: the bound ``f + <g, move> + L/2 |move|^2`` is a sum of one part for each, and
      a common a could not bring it lower;
    - that of a `line_search`, which is the short step with an L that it finds (Pedregosa, Negiar,
      Askari & Jaggi, 2020): from .9 times the last one on it is doubled until f falls as much as
      the bound says.

    Without a constraint the gradient is read as the *negative* of the oracle's answer,
    ``s = -lmo_scaling_factor * g``, as the optimizers below provide it.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    lr : float
        With the schedule: >= 0, and 2 is the classical choice. Without: the constant a, in [0, 1].
        Where 0, nothing moves.
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
        L > 0, a Lipschitz constant of the gradient: take the short step, by no schedule. With
        `line_search`, the first L to try; the L found last then takes its place in the group.
    line_search : bool
        Search for the step, in all groups as one. `step` needs a closure, which computes the same
        loss for the same parameters, and gradients; it is called again at each trial, mostly once.
        Losses are compared on the host. Where rounding hides the change of the loss, gradients
        tell it; where no trial lowers the loss, parameters stay as they are.
    initial_step : int
        Number of steps that the schedule counts as done, >= 0: a warm start is respected.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, the constraint does not fit a parameter, or settings
        contradict each other. If `lr` is out of its range, also where it is so only at a step.

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

    _options = _OPTIONS

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
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "lmo_scaling_factor": lmo_scaling_factor,
            "use_default_lr_schedule": use_default_lr_schedule,
            "div_by_zero_eps": div_by_zero_eps,
            "differentiable": False,
        }
        options = {
            "constraint": constraint,
            "param_ndim": param_ndim,
            "smoothness": smoothness,
            "line_search": line_search,
            "initial_step": initial_step,
        }
        if constraint is None:  # else groups of an optimizer around this one could not have theirs
            options = {k: v for k, v in options.items() if v is not _OPTIONS[k]}
        defaults.update(options)
        super().__init__(params, defaults)

    def _completed(self, group: Mapping[str, Any]) -> Group:
        given = group.get("constraint") is not None
        return super()._completed({**(_OPTIONS if given else {}), **group})

    def _check_group(self, group: Group) -> None:
        _check(group)

    def _check_together(self, groups: Sequence[Group]) -> None:
        _check_alike(groups)

    @torch.no_grad()
    def gap(self) -> list[Tensor]:
        """The duality gap of each group, from the present gradients; nothing waits for a device.

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
            if group.get("constraint") is None:
                raise ValueError(f"`gap` needs a constraint in every group, got none in group {i}")
        return [_gap(group) for group in self.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss. A line search needs it.

        Returns
        -------
        float or None
            What the closure returned, at the parameters before the step.
        """
        for group in self.param_groups:
            check_lr(group)
        if any(group.get("line_search") for group in self.param_groups):
            return self._search(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, params, grads, steps)
            for param, grad, step in zip(params, grads, steps, strict=True):
                _move_(param, grad, step, group)
        return loss

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], steps: list[Tensor]
    ) -> None:
        # By this name the compiler knows where an optimizer makes its state, and runs it eagerly.
        for param in group["params"]:
            if param.grad is not None:
                state = self.state[param]
                if not state:
                    done = group.get("initial_step", 0)
                    state["step"] = torch.full((), done, dtype=torch.float32)
                params.append(param)
                grads.append(param.grad)
                steps.append(state["step"])

    def _search(self, closure: Callable[[], float] | None) -> float | None:
        _check_alike(self.param_groups)  # somebody may have set it in one of them
        if closure is None:
            if all(is_zero_on_host(group["lr"]) for group in self.param_groups):
                return None  # the step by which a distributed checkpoint makes empty state
            raise ValueError("`closure` must be given with `line_search=True`, got None")
        with torch.enable_grad():
            loss = closure()
        moves = []
        for group in self.param_groups:
            params: list[Tensor] = []
            self._init_group(group, params, [], [])
            if not is_zero_on_host(group["lr"]):
                moves += [move_of(param, group) for param in params]
        for move in search_(moves, loss, closure):
            self.state[move.param]["step"] += 1
        return loss


def _gap(group: Group) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device_of(group))
    for param in group["params"]:
        if param.grad is not None:
            constraint, x, grad = seen(param, group)
            total += complete(frank_wolfe_gap(x, grad, constraint)).to(total)
    return total


def _move_(param: Tensor, grad: Tensor, step: Tensor, group: Group) -> None:
    if group.get("constraint") is None:
        _add_(param, grad, _scheduled(step, group), group["lmo_scaling_factor"])
    elif group.get("smoothness") is None:
        constraint, x, gradient = seen(param, group)
        go_(param, x, constraint.lmo(gradient).to(x.dtype), _scheduled(step, group))
    elif not is_zero_on_host(group["lr"]):
        move = move_of(param, group)
        go_(param, move.start, move.end, move.short_step(group["smoothness"]))
    if torch.compiler.is_compiling() or not is_zero_on_host(group["lr"]):
        step += 1  # a step of size 0 is none: the schedule starts with the first move


def _scheduled(step: Tensor, group: Group) -> float | Tensor:
    lr: float | Tensor = group["lr"]
    if not group["use_default_lr_schedule"]:
        return lr
    total, smallest = lr + get_value(step), group["div_by_zero_eps"]
    return lr / (total.clamp(min=smallest) if isinstance(total, Tensor) else max(total, smallest))


def _add_(param: Tensor, grad: Tensor, a: float | Tensor, scaling: float) -> None:
    """Move towards ``-scaling * grad``."""
    towards = -a * scaling
    param.mul_(1 - a)
    if isinstance(towards, Tensor):
        param.add_(grad * towards)
    elif grad.layout is torch.strided:  # rounds alike whatever the strides, as add_ does not
        param.addcmul_(grad, grad.new_ones(()), value=towards)
    else:
        param.add_(grad, alpha=towards)


def check_lr(group: Group) -> None:
    """Raise if `lr` is out of its range, if that can be told without waiting for a device."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if torch.compiler.is_compiling() or lr.device.type != "cpu":
            return
        lr = lr.item()
    check_finite("lr", lr)
    if not group["use_default_lr_schedule"] and lr > 1:
        raise ValueError(
            f"`lr` must be in [0, 1] without the default schedule, got {group['lr']!r}"
        )


def _check(group: Group) -> None:
    group = {**_OPTIONS, **group}
    check_number("lmo_scaling_factor", group["lmo_scaling_factor"])
    check_non_negative("div_by_zero_eps", group["div_by_zero_eps"])
    check_lr(group)
    check_param_ndim(group["param_ndim"])
    _check_step(group)
    if group["constraint"] is not None:
        _check_oracle(group["constraint"])
        check_fits(group["constraint"], with_names_apart(group))


def _check_step(group: Group) -> None:
    """Raise if one of the settings that choose the step is wrong, or two contradict each other."""
    smoothness, search, done = (group[n] for n in ("smoothness", "line_search", "initial_step"))
    if smoothness is not None and check_finite("smoothness", smoothness) == 0:
        raise ValueError(f"`smoothness` must be > 0, got {smoothness!r}")
    if not isinstance(search, bool):
        raise TypeError(f"`line_search` must be True or False, got {search!r}")
    if not isinstance(done, int) or isinstance(done, bool):
        raise TypeError(f"`initial_step` must be an int, got {done!r}")
    check_non_negative("initial_step", done)
    adaptive = [f"line_search={search}"] * search
    adaptive += [f"smoothness={smoothness!r}"] * (smoothness is not None)
    scheduled = group["use_default_lr_schedule"]
    if adaptive and group["constraint"] is None:
        raise ValueError(f"`constraint` must be given with {adaptive[0]}, got None")
    if adaptive and not scheduled:
        raise ValueError(
            f"`use_default_lr_schedule` must be True (no constant step) with {adaptive[0]}, got "
            f"{scheduled!r}"
        )
    if done and (adaptive or not scheduled):
        other = adaptive[0] if adaptive else "use_default_lr_schedule=False"
        raise ValueError(f"`initial_step` must be 0 without the schedule ({other}), got {done!r}")
    if group["constraint"] is not None and group["lmo_scaling_factor"] != 1:
        raise ValueError(
            "`lmo_scaling_factor` must be 1 with a constraint (or steps would lead outside), got "
            f"{group['lmo_scaling_factor']!r}"
        )


def _check_oracle(constraint: Any) -> None:
    check_constraint(constraint)
    if not (constraint.convex and constraint.bounded):
        raise ValueError(f"`constraint` must be convex and bounded, got {constraint!r}")
    if type(constraint)._minimizer is Constraint._minimizer:
        raise ValueError(f"`constraint` must have an oracle, `lmo`, got {constraint!r}")


def _check_alike(groups: Sequence[Group]) -> None:
    found = [group.get("line_search", False) for group in groups]
    if len(set(found)) > 1:
        raise ValueError(f"`line_search` must be the same in all groups, got {found}")
