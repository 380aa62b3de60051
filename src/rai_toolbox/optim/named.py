"""The named optimizers: declarations of what they do before and after the inner step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Generator, Tensor, default_generator
from torch.optim import SGD, Optimizer

from rai_toolbox.checks import check_finite, check_type
from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.constraints.box import Box, checked_box
from rai_toolbox.optim import transforms
from rai_toolbox.optim.chain import ChainedParamTransformingOptimizer
from rai_toolbox.optim.diagnosis import Constrained
from rai_toolbox.optim.engine import ParamTransformingOptimizer
from rai_toolbox.optim.frank_wolfe import FrankWolfe, check_lr
from rai_toolbox.optim.gradient_mapping import ELEMENTWISE, ClampMapping
from rai_toolbox.optim.inner import optimizer_class
from rai_toolbox.optim.settings import REQUIRED, TINY, constructor_arguments
from rai_toolbox.optim.wrapper import Group, Params


class _ClampingOptimizer(ParamTransformingOptimizer):
    """The constructor of the two classes that clamp."""

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        clamp_min: float | Tensor | None = None,
        clamp_max: float | Tensor | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        arguments = constructor_arguments(locals())
        inner = optimizer_class(InnerOpt)
        if self._after and not issubclass(inner, ELEMENTWISE):  # (not if it clamps gradients)
            self._before = (*self._before, ClampMapping(inner))
        super().__init__(**arguments)


class ClampedParameterOptimizer(Constrained, _ClampingOptimizer):
    """Clamp each element of each parameter to [clamp_min, clamp_max] after the inner step.

    ``p <- min(max(p, clamp_min), clamp_max)``, elementwise: the Euclidean projection onto the box
    (gradient projection: Goldstein, 1964; Levitin & Polyak, 1966). Bounds count as rounded to the
    parameter's dtype. NaN stays NaN. Around inner optimizers that mix elements, such as LBFGS and
    Muon, gradients are replaced by their gradient mapping, see `ProjectedOptimizer`. For losses of
    full batches there is `ProjectedLBFGS`, which searches inside the box.

    Parameters
    ----------
    clamp_min, clamp_max : float or Tensor or None
        The bounds, in the unit of the parameter; a tensor broadcasts against each parameter of its
        group, of any shape. At least one of them must be given, to the optimizer or to each group.
        A group that gives None for both is unconstrained.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If no bound is given, a bound is NaN or does not fit a parameter, ``clamp_min > clamp_max``
        anywhere, or LBFGS is to search along a line.

    Examples
    --------
    A step of SGD with a learning rate of 1, after which the parameter is clamped to [-1, 3]:

    >>> import torch
    >>> from rai_toolbox.optim import ClampedParameterOptimizer
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedParameterOptimizer([x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
    >>> x.backward(gradient=torch.tensor([0.5, -10.0]))
    >>> optim.step()
    >>> x
    tensor([0.5000, 3.0000], requires_grad=True)
    """

    _after = (transforms.Clamp(),)

    def _constraint(self, group: Group) -> Box | None:
        return checked_box(group["clamp_min"], group["clamp_max"])

    def _with_sets(self) -> list[Group]:
        return [{**group, "param_ndim": None} for group in super()._with_sets()]


class ClampedGradientOptimizer(_ClampingOptimizer):
    """Clamp each element of each gradient to [clamp_min, clamp_max] before the inner step.

    ``g <- min(max(g, clamp_min), clamp_max)``, elementwise, for gradients of any shape: clipping by
    value (Mikolov, 2012). NaN stays NaN. A sparse gradient is clamped by its values, which takes
    bounds that leave 0 as it is.

    Parameters
    ----------
    clamp_min, clamp_max : float or Tensor or None
        The bounds, as in `ClampedParameterOptimizer`, in the unit of the gradient; a tensor
        broadcasts against each gradient.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If no bound is given, a bound is NaN or does not fit a parameter, or
        ``clamp_min > clamp_max`` anywhere.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedGradientOptimizer
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedGradientOptimizer([x], lr=1.0, clamp_min=-1.0, clamp_max=3.0)
    >>> x.backward(gradient=torch.tensor([-0.5, 10.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([-0.5000,  3.0000]), tensor([ 1.5000, -2.0000], requires_grad=True))
    """

    _before = (transforms.Clamp(),)


class SignedGradientOptim(ParamTransformingOptimizer):
    """Replace each element of each gradient by its sign before the inner step.

    ``g <- g / |g|``, elementwise, with 0 -> 0, for gradients of any shape: the steepest direction
    in the Linf norm (Goodfellow, Shlens & Szegedy, 2015; Bernstein et al., 2018). A step of SGD
    moves each element by `lr`, in the unit of the parameter. NaN stays NaN. A complex gradient is
    turned to unit modulus, a sparse one is signed by its values.

    Parameters
    ----------
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    TypeError, ValueError
        As `ParamTransformingOptimizer`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import SignedGradientOptim
    >>> x = torch.tensor([-1.5, 1.5], requires_grad=True)
    >>> optim = SignedGradientOptim([x], lr=1.0)
    >>> x.backward(gradient=torch.tensor([-2.0, 20.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([-1.,  1.]), tensor([-0.5000,  0.5000], requires_grad=True))
    """

    _before: tuple[transforms.Transform, ...] = (transforms.Sign(),)

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        param_ndim: int | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(**constructor_arguments(locals()))


class _NormedGradientOptim(ParamTransformingOptimizer):
    """The constructor of the classes that normalize; their order is `p`."""

    p: ClassVar[float]

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        param_ndim: int | None = -1,
        defaults: Mapping[str, Any] | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(**constructor_arguments(locals()))


class L1NormedGradientOptim(_NormedGradientOptim):
    """Divide each sub-tensor of each gradient by its L1 norm before the inner step.

    ``g <- g / max(|g|_1, div_by_zero_eps)``, for each sub-tensor g, of a shape (d0, ...) that
    `param_ndim` gives; one of zeros stays zero. A step of SGD has the length `lr` in the L1 norm,
    in the unit of the parameter.

    Parameters
    ----------
    div_by_zero_eps : float
        Smallest divisor, >= 0, in the unit of the gradient. The norm neither overflows nor
        underflows in any dtype.
    params, InnerOpt, param_ndim, defaults, grad_scale, grad_bias, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `div_by_zero_eps` is negative or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1NormedGradientOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L1NormedGradientOptim([x], param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([0.5000, 0.5000]), tensor([-1.5000,  0.5000], requires_grad=True))
    """

    p: ClassVar[float] = 1

    _before: tuple[transforms.Transform, ...] = (transforms.Normalize(p),)


class L2NormedGradientOptim(_NormedGradientOptim):
    """Divide each sub-tensor of each gradient by its L2 norm before the inner step.

    ``g <- g / max(|g|_2, div_by_zero_eps)``, for each sub-tensor g, of a shape (d0, ...) that
    `param_ndim` gives: the steepest direction in the L2 norm (Hazan, Levy & Shalev-Shwartz, 2015).
    A sub-tensor of zeros stays zero. A step of SGD has the length `lr` in the L2 norm, in the unit
    of the parameter.

    Parameters
    ----------
    div_by_zero_eps
        See `L1NormedGradientOptim`.
    params, InnerOpt, param_ndim, defaults, grad_scale, grad_bias, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `div_by_zero_eps` is negative or NaN.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2NormedGradientOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L2NormedGradientOptim([x], param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x.grad, x
    (tensor([0.7071, 0.7071]), tensor([-1.7071,  0.2929], requires_grad=True))
    """

    p: ClassVar[float] = 2

    _before: tuple[transforms.Transform, ...] = (transforms.Normalize(p),)


class L2ProjectedOptim(Constrained, L2NormedGradientOptim):
    """L2-normalize each gradient, step, and project each parameter onto an L2 ball.

    ``g <- g / |g|_2``, inner step, ``p <- p * min(1, epsilon / |p|_2)``, for each sub-tensor, of a
    shape (d0, ...) that `param_ndim` gives (Madry et al., 2018). A step of SGD has the length `lr`.
    The result is in the ball after rounding to the parameter's dtype too.

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0, in the unit of the parameter. Required, here or in every parameter
        group.
    div_by_zero_eps
        See `L1NormedGradientOptim`.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L2ProjectedOptim
    >>> x = torch.tensor([-1.0, 1.0], requires_grad=True)
    >>> optim = L2ProjectedOptim([x], param_ndim=None, lr=1.0, epsilon=0.8)
    >>> x.backward(gradient=torch.tensor([2.0, 2.0]))
    >>> optim.step()
    >>> x
    tensor([-0.7885,  0.1353], requires_grad=True)
    """

    _after, _ball = (transforms.L2Projection(),), L2Ball

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(**constructor_arguments(locals()))


class LinfProjectedOptim(Constrained, SignedGradientOptim):
    """Take the sign of each gradient, step, and clamp each parameter to [-epsilon, epsilon].

    ``g <- sign(g)``, inner step, ``p <- min(max(p, -epsilon), epsilon)``, elementwise, for
    parameters of any shape (Madry et al., 2018). A step of SGD moves each element by `lr`.

    Parameters
    ----------
    epsilon : float
        Radius of the Linf ball, >= 0, in the unit of the parameter. Required, here or in every
        parameter group.
    params, InnerOpt, grad_scale, grad_bias, defaults, param_ndim, **inner_opt_kwargs
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.

    Raises
    ------
    ValueError
        If `epsilon` is negative or NaN.
    TypeError
        If `epsilon` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import LinfProjectedOptim
    >>> x = torch.tensor([-1.0, 0.5], requires_grad=True)
    >>> optim = LinfProjectedOptim([x], epsilon=1.8, lr=1.0)
    >>> x.backward(gradient=torch.tensor([2.0, -2.0]))
    >>> optim.step()
    >>> x
    tensor([-1.8000,  1.5000], requires_grad=True)
    """

    _after, _ball = (transforms.LinfProjection(),), LinfBall

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        epsilon: float | type[REQUIRED] = REQUIRED,
        param_ndim: int | None = None,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(**constructor_arguments(locals()))


class TopQGradientOptimizer(ParamTransformingOptimizer):
    """Keep the largest-magnitude entries of each gradient's sub-tensors before the inner step.

    Of the n entries of a sub-tensor, of a shape (d0, ...) that `param_ndim` gives, the
    ``round((1 - q) * n)`` largest magnitudes stay, exactly so many also if there are ties; the rest
    become 0 (Tramèr & Boneh, 2019).

    Parameters
    ----------
    q : float
        Fraction of entries set to 0, in [0, 1]. Required, here or in every parameter group.
    dq : float
        If > 0, `q` is drawn for each parameter at each step, uniformly from
        [max(0, q - dq), min(1, q + dq)]. In [0, 1].
    generator : torch.Generator
        Where these draws come from. The state of a generator other than torch's default one is
        saved in `state_dict()` and restored.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `q` or `dq` is outside [0, 1].
    TypeError
        If `q` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import TopQGradientOptimizer
    >>> x = torch.ones(2, 2, requires_grad=True)
    >>> optim = TopQGradientOptimizer([x], q=0.5, param_ndim=None, lr=1.0)
    >>> x.backward(gradient=torch.tensor([[0.5, 1.0], [-2.5, 0.3]]))
    >>> optim.step()
    >>> x.grad
    tensor([[ 0.0000,  1.0000],
            [-2.5000,  0.0000]])
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        q: float | type[REQUIRED] = REQUIRED,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        generator: Generator = default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        check_type("generator", generator, Generator, "be a torch.Generator")
        self._before = (
            transforms.TopQ(generator=None if generator is default_generator else generator),
        )
        super().__init__(**constructor_arguments(locals()))

    @property
    def generator(self) -> Generator:
        """What `q` is drawn from."""
        return self._generators().get("generator_state", default_generator)


class L1qNormedGradientOptim(ChainedParamTransformingOptimizer):
    """Follow the signs of the largest gradient entries, at unit L1 norm per sub-tensor.

    Top-q, then sign, then L1-normalize: the chain of `TopQGradientOptimizer`, `SignedGradientOptim`
    and `L1NormedGradientOptim`. A sparse direction of steepest ascent (Tramèr & Boneh, 2019). A
    step of SGD has the length `lr` in the L1 norm of each sub-tensor, of a shape (d0, ...) that
    `param_ndim` gives, in the unit of the parameter.

    Parameters
    ----------
    q, dq, generator
        See `TopQGradientOptimizer`.
    div_by_zero_eps
        See `L1NormedGradientOptim`.
    params, InnerOpt, param_ndim, grad_scale, grad_bias, defaults, **inner_opt_kwargs
        See `ParamTransformingOptimizer`.

    Raises
    ------
    ValueError
        If `q` or `dq` is outside [0, 1].
    TypeError
        If `q` is missing.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import L1qNormedGradientOptim
    >>> x = torch.ones(3, requires_grad=True)
    >>> optim = L1qNormedGradientOptim([x], q=0.3, grad_scale=1.8, lr=1.0, param_ndim=None)
    >>> x.backward(gradient=torch.tensor([0.0, 1.0, 2.0]))
    >>> optim.step()
    >>> x.grad
    tensor([0.0000, 0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Params = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        q: float | type[REQUIRED] = REQUIRED,
        dq: float = 0.0,
        param_ndim: int | None = -1,
        grad_scale: float = 1.0,
        grad_bias: float = 0.0,
        defaults: Mapping[str, Any] | None = None,
        div_by_zero_eps: float = TINY,
        generator: Generator = default_generator,
        **inner_opt_kwargs: Any,
    ) -> None:
        super().__init__(
            partial(TopQGradientOptimizer, generator=generator),
            SignedGradientOptim,
            L1NormedGradientOptim,
            **constructor_arguments(locals()),
        )


class _FrankWolfeOnBall(Constrained, ParamTransformingOptimizer):
    """`FrankWolfe`, for gradients that become minus the answer of a ball's oracle.

    That is `epsilon` times the direction that the other transforms make of the gradient.
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
        super().__init__(InnerOpt=FrankWolfe, **constructor_arguments(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_finite("epsilon", group["epsilon"])
        check_lr(group)


class L1FrankWolfe(_FrankWolfeOnBall):
    """Frank-Wolfe on the L1 ball of radius `epsilon`.

    ``s = -epsilon * sign(g_i) * e_i``, i the index of a largest magnitude of each sub-tensor, of a
    shape (d0, ...) that `param_ndim` gives; `FrankWolfe` steps toward s (Jaggi, 2013).

    Parameters
    ----------
    epsilon : float
        Radius of the ball, >= 0, in the unit of the parameter. Required, here or in every parameter
        group.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps
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

    _before, _ball = (transforms.LargestSign(), transforms.Scale("epsilon")), L1Ball


class L2FrankWolfe(_FrankWolfeOnBall, L2NormedGradientOptim):
    """Frank-Wolfe on the L2 ball of radius `epsilon`.

    ``s = -epsilon * g / |g|_2``, for each sub-tensor, of a shape (d0, ...) that `param_ndim` gives;
    `FrankWolfe` steps toward s (Jaggi, 2013).

    Parameters
    ----------
    epsilon
        See `L1FrankWolfe`.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps
        See `L1NormedGradientOptim`.

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

    _before, _ball = (transforms.Normalize(2), transforms.Scale("epsilon")), L2Ball


class LinfFrankWolfe(_FrankWolfeOnBall, SignedGradientOptim):
    """Frank-Wolfe on the Linf ball of radius `epsilon`.

    ``s = -epsilon * sign(g)``, elementwise, for parameters of any shape; `FrankWolfe` steps toward
    s (Jaggi, 2013).

    Parameters
    ----------
    epsilon
        See `L1FrankWolfe`.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`. `param_ndim` has no effect here.
    div_by_zero_eps
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

    _before, _ball = (transforms.Sign(), transforms.Scale("epsilon")), LinfBall


class L1qFrankWolfe(_FrankWolfeOnBall, L1qNormedGradientOptim):
    """Frank-Wolfe on the L1 ball of radius `epsilon`, toward points of few equal entries.

    ``s = -epsilon * L1q(g)``, for each sub-tensor, of a shape (d0, ...) that `param_ndim` gives,
    with the transform L1q of `L1qNormedGradientOptim`; `FrankWolfe` steps toward s (Jaggi, 2013;
    Tramèr & Boneh, 2019).

    Parameters
    ----------
    epsilon
        See `L1FrankWolfe`.
    q, dq, generator
        See `TopQGradientOptimizer`.
    lr, use_default_lr_schedule
        See `FrankWolfe`.
    params, param_ndim
        See `ParamTransformingOptimizer`.
    div_by_zero_eps
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

    _before, _ball = (transforms.Scale("epsilon"),), L1Ball

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
        arguments = constructor_arguments(locals())
        L1qNormedGradientOptim.__init__(self, InnerOpt=FrankWolfe, generator=generator, **arguments)
