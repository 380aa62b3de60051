"""Frank-Wolfe: step towards the answer of a linear minimization oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_value, _use_grad_for_differentiable

from rai_toolbox.checks import as_plain, check_finite, check_non_negative, check_number
from rai_toolbox.optim.inner import not_compiled
from rai_toolbox.optim.settings import TINY, is_zero_on_host
from rai_toolbox.optim.wrapper import Group, Params, as_groups, checked_group


class FrankWolfe(Optimizer):
    r"""Move each parameter towards the answer of a linear minimization oracle.

    .. math::
        p \leftarrow (1 - a) p + a s, \quad s = -\text{scaling} \cdot g, \quad
        a = \frac{\text{lr}}{\text{lr} + k}

    The gradient is read as the *negative* of the oracle's answer, as the optimizers below provide
    it; k = 0, 1, ... counts the steps of each parameter. From the first step, where a = 1, on, all
    iterates are convex combinations of the oracle's answers (Frank & Wolfe, 1956; Jaggi, 2013).

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    lr : float
        With the schedule: >= 0, and 2 is the classical choice. Without: the constant a, in [0, 1].
    lmo_scaling_factor : float
        Multiplies the oracle's answer.
    use_default_lr_schedule : bool
        Whether a is lr / (lr + k), or lr.
    div_by_zero_eps : float
        Smallest divisor in the schedule, >= 0.

    Raises
    ------
    ValueError
        If `lr` is out of its range, also where it is so only at a step.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import FrankWolfe
    >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> optim = FrankWolfe([x], lmo_scaling_factor=1.8)
    >>> x.backward(gradient=torch.tensor([0.0, 1.0]))  # minus the answer of an oracle
    >>> optim.step()
    >>> x
    tensor([ 0.0000, -1.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor = 2.0,
        lmo_scaling_factor: float = 1.0,
        use_default_lr_schedule: bool = True,
        div_by_zero_eps: float = TINY,
    ) -> None:
        defaults = {
            "lr": lr,
            "lmo_scaling_factor": lmo_scaling_factor,
            "use_default_lr_schedule": use_default_lr_schedule,
            "div_by_zero_eps": div_by_zero_eps,
            "differentiable": False,
        }
        super().__init__(cast(Any, as_groups(params)), defaults)

    @not_compiled
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Parameters
        ----------
        param_group : dict
            `params`, and any settings. It is not modified.
        """
        group = self.defaults | checked_group(param_group)
        for name in ("lr", "lmo_scaling_factor", "div_by_zero_eps"):
            group[name] = as_plain(group[name])
        _check(group)
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state.get("param_groups", ()):  # of a checkpoint, among others
            _check({**self.__dict__.get("defaults", state.get("defaults", {})), **group})
        super().__setstate__(state)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        float or None
            What the closure returned.
        """
        for group in self.param_groups:
            check_lr(group)
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
                    state["step"] = torch.zeros((), dtype=torch.float32)
                params.append(param)
                grads.append(param.grad)
                steps.append(state["step"])


def _move_(param: Tensor, grad: Tensor, step: Tensor, group: Group) -> None:
    lr = group["lr"]
    a = lr
    if group["use_default_lr_schedule"]:
        total, smallest = lr + _get_value(step), group["div_by_zero_eps"]
        divisor = total.clamp(min=smallest) if isinstance(total, Tensor) else max(total, smallest)
        a = lr / divisor
    towards = -a * group["lmo_scaling_factor"]
    param.mul_(1 - a)
    if isinstance(towards, Tensor):
        param.add_(grad * towards)
    elif grad.layout is torch.strided:  # rounds alike whatever the strides, as add_ does not
        param.addcmul_(grad, grad.new_ones(()), value=towards)
    else:
        param.add_(grad, alpha=towards)
    if torch.compiler.is_compiling() or not is_zero_on_host(lr):
        step += 1  # a step of size 0 is none: the schedule starts with the first move


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
    check_number("lmo_scaling_factor", group["lmo_scaling_factor"])
    check_non_negative("div_by_zero_eps", group["div_by_zero_eps"])
    check_lr(group)
