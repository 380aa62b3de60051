"""Frank-Wolfe on balls: the linear minimization oracle of each, and `FrankWolfe` steps."""

from __future__ import annotations

from functools import partial

from torch import Generator, Tensor, default_generator

from rai_toolbox import foreach
from rai_toolbox.checks import check_finite
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.frank_wolfe import FrankWolfe, check_lr
from rai_toolbox.optim.l1q import L1qNormedGradientOptim
from rai_toolbox.optim.normed import L2NormedGradientOptim
from rai_toolbox.optim.settings import REQUIRED, TINY
from rai_toolbox.optim.signed import SignedGradientOptim
from rai_toolbox.optim.transforms import largest_sign_
from rai_toolbox.optim.wrapper import Group, Params


class _FrankWolfeBall(ParamTransformingOptimizer):
    """What the named optimizers share: the oracle of a ball is `epsilon` times the unit ball's.

    Their other base class turns a gradient into minus the answer of the unit ball's oracle.
    """

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_finite("epsilon", group["epsilon"])
        if {"lr", "use_default_lr_schedule"} <= group.keys():  # else the inner will check them
            check_lr(group)

    def _pre_step(self) -> None:
        for group in self.param_groups:
            check_lr(group)
        super()._pre_step()

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
