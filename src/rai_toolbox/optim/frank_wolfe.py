"""Frank-Wolfe: step towards the point of a ball that a linear minimization oracle names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Generator, Tensor, default_generator
from torch.optim import Optimizer
from torch.optim.optimizer import _get_value, _use_grad_for_differentiable

from rai_toolbox import foreach
from rai_toolbox.optim.chained import L1qNormedGradientOptim
from rai_toolbox.optim.inner import not_compiled
from rai_toolbox.optim.normed import TINY, L2NormedGradientOptim
from rai_toolbox.optim.param_transforming import Group, Params, ParamTransformingOptimizer
from rai_toolbox.optim.settings import (
    REQUIRED,
    check_non_negative,
    check_number,
    is_zero_on_host,
)
from rai_toolbox.optim.signed import SignedGradientOptim
from rai_toolbox.optim.transforms import largest_sign_


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
        super().__init__(cast(Any, params), defaults)

    @not_compiled
    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Parameters
        ----------
        param_group : dict
            `params`, and any settings. It is not modified.
        """
        group = self.defaults | param_group
        check_number("lmo_scaling_factor", group["lmo_scaling_factor"])
        check_non_negative("div_by_zero_eps", group["div_by_zero_eps"])
        _check_lr(group)
        super().add_param_group(dict(param_group))

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_lr(group)
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
    else:
        param.add_(grad, alpha=towards)
    if torch.compiler.is_compiling() or not is_zero_on_host(lr):
        step += 1  # a step of size 0 is none: the schedule starts with the first move


def _check_lr(group: Group) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        return  # reading it would wait for its device
    check_non_negative("lr", lr)
    if not group["use_default_lr_schedule"] and lr > 1:
        raise ValueError(f"`lr` must be in [0, 1] without the default schedule, got {lr!r}")


class _FrankWolfeBall(ParamTransformingOptimizer):
    """What the named optimizers share: the oracle of a ball is `epsilon` times the unit ball's.

    Their other base class turns a gradient into minus the answer of the unit ball's oracle.
    """

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_non_negative("epsilon", group["epsilon"])

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        super()._transform_gradients_(params, grads, optim_group)
        foreach.mul_(grads, optim_group["epsilon"])


class L1FrankWolfe(_FrankWolfeBall):
    """Frank-Wolfe on the L1 ball of radius `epsilon`.

    ``s = -epsilon * sign(g_i) * e_i``, i the index of a largest magnitude of each sub-tensor;
    `FrankWolfe` steps towards s.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0. To be given here or in every parameter group.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps : float
        See `FrankWolfe`.

    Raises
    ------
    ValueError
        If `epsilon` or `lr` is out of its range.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1FrankWolfe
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = L1FrankWolfe([x], epsilon=1.8, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([1.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([ 0.0000, -1.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: Params,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        lr: float | Tensor = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
    ) -> None:
        super().__init__(
            params,
            partial(
                FrankWolfe,
                lr=lr,
                use_default_lr_schedule=use_default_lr_schedule,
                div_by_zero_eps=div_by_zero_eps,
            ),
            defaults={"epsilon": epsilon},
            param_ndim=param_ndim,
        )

    def _transform_gradients_(
        self, params: list[Tensor], grads: list[Tensor], optim_group: Group
    ) -> None:
        for grad in grads:
            largest_sign_(grad, optim_group["param_ndim"])
        super()._transform_gradients_(params, grads, optim_group)


class L2FrankWolfe(_FrankWolfeBall, L2NormedGradientOptim):
    """Frank-Wolfe on the L2 ball of radius `epsilon`.

    ``s = -epsilon * g / |g|_2``, for each sub-tensor; `FrankWolfe` steps towards s.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0. To be given here or in every parameter group.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps : float
        See `L2NormedGradientOptim`.

    Raises
    ------
    ValueError
        If `epsilon` or `lr` is out of its range.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2FrankWolfe
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = L2FrankWolfe([x], epsilon=1.8, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([1.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([-0.8050, -1.6100], requires_grad=True)
    """

    def __init__(
        self,
        params: Params,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        lr: float | Tensor = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
    ) -> None:
        super().__init__(
            params,
            partial(
                FrankWolfe,
                lr=lr,
                use_default_lr_schedule=use_default_lr_schedule,
                div_by_zero_eps=div_by_zero_eps,
            ),
            defaults={"epsilon": epsilon},
            param_ndim=param_ndim,
            div_by_zero_eps=div_by_zero_eps,
        )


class LinfFrankWolfe(_FrankWolfeBall, SignedGradientOptim):
    """Frank-Wolfe on the Linf ball of radius `epsilon`.

    ``s = -epsilon * sign(g)``, elementwise; `FrankWolfe` steps towards s.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0. To be given here or in every parameter group.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.
    div_by_zero_eps : float
        See `FrankWolfe`.

    Raises
    ------
    ValueError
        If `epsilon` or `lr` is out of its range.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfFrankWolfe
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = LinfFrankWolfe([x], epsilon=1.8, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([1.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([-1.8000, -1.8000], requires_grad=True)
    """

    def __init__(
        self,
        params: Params,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        lr: float | Tensor = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
    ) -> None:
        super().__init__(
            params,
            partial(
                FrankWolfe,
                lr=lr,
                use_default_lr_schedule=use_default_lr_schedule,
                div_by_zero_eps=div_by_zero_eps,
            ),
            defaults={"epsilon": epsilon},
            param_ndim=param_ndim,
        )


class L1qFrankWolfe(_FrankWolfeBall, L1qNormedGradientOptim):
    """Frank-Wolfe on the L1 ball of radius `epsilon`, towards points of few equal entries.

    ``s = -epsilon * L1q(g)``, with the transform L1q of `L1qNormedGradientOptim`; `FrankWolfe`
    steps towards s.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0. To be given here or in every parameter group.
    q, dq, generator
        See `TopQGradientOptimizer`.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps : float
        See `L1NormedGradientOptim`.

    Raises
    ------
    ValueError
        If `epsilon`, `q`, `dq` or `lr` is out of its range.
    TypeError
        If `epsilon` or `q` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1qFrankWolfe
    >>> x = torch.ones(3, requires_grad=True)
    >>> optim = L1qFrankWolfe([x], q=0.3, epsilon=1.8, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([0.0, 1.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([ 0.0000, -0.9000, -0.9000], requires_grad=True)
    """

    def __init__(
        self,
        params: Params,
        *,
        q: float | type[REQUIRED] = REQUIRED,
        epsilon: float | type[REQUIRED] = REQUIRED,
        dq: float = 0.0,
        lr: float | Tensor = 2.0,
        use_default_lr_schedule: bool = True,
        param_ndim: int | None = -1,
        div_by_zero_eps: float = TINY,
        generator: Generator = default_generator,
    ) -> None:
        super().__init__(
            params,
            partial(
                FrankWolfe,
                lr=lr,
                use_default_lr_schedule=use_default_lr_schedule,
                div_by_zero_eps=div_by_zero_eps,
            ),
            defaults={"epsilon": epsilon},
            param_ndim=param_ndim,
            q=q,
            dq=dq,
            div_by_zero_eps=div_by_zero_eps,
            generator=generator,
        )
