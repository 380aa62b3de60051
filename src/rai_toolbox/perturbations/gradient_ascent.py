"""The solver: a plain training loop over the parameters of a perturbation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import check_count
from rai_toolbox.perturbations.active import Success
from rai_toolbox.perturbations.additive import AdditivePerturbation
from rai_toolbox.perturbations.ascent import Model, ascend, solving
from rai_toolbox.perturbations.losses import Criterion, cross_entropy
from rai_toolbox.perturbations.protocol import PerturbationModel

__all__ = ["Model", "ZeroGradientWarning", "gradient_ascent", "solving"]

OptimizerLike = Optimizer | Callable[..., Any]
PerturbationLike = PerturbationModel | Callable[[Tensor], PerturbationModel]


class ZeroGradientWarning(UserWarning):
    """The loss of some data does not change with them: what a solver finds says nothing."""


def gradient_ascent(
    *,
    model: Model,
    data: Any,
    target: Any,
    optimizer: OptimizerLike,
    steps: int,
    perturbation_model: PerturbationLike = AdditivePerturbation,
    targeted: bool = False,
    use_best: bool = False,
    criterion: Criterion | None = None,
    reduction_fn: Callable[[Tensor], Tensor] = torch.sum,
    samples: int = 1,
    stop_once: Success | None = None,
    **optim_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    r"""Perturb data so that a loss of each datum is as large as possible.

    .. math::
        \max_\theta \; \sum_i L\big(f(p_\theta(x)_i), y_i\big)

    where p is the perturbation model and theta are its parameters. Any optimizer does the steps: it
    keeps the parameters in their set. Gradients are computed for them alone. A model that is a
    module is in eval mode with frozen weights meanwhile, and as it was afterwards, also after an
    error. It works inside `no_grad`, `inference_mode` and `autocast`; no step waits for a device.

    Parameters
    ----------
    model : callable
        From perturbed data to what `criterion` takes.
    data : Tensor or array-like, shape (N, ...)
        Of a floating-point dtype; plain Python numbers get torch's default dtype.
    target : Tensor or array-like
        What `criterion` takes.
    optimizer : Optimizer class, functools.partial of one, or instance
        An instance needs a `perturbation_model` instance, whose parameters it has. An optimizer
        with a method `observe_` is told, before each step, the costs of the data, shape (N,): the
        losses in the sign in which it descends.
    steps : int
        Number of steps, >= 0; the model is evaluated once more.
    perturbation_model : PerturbationModel class, factory, or instance
        By default data plus a tensor of zeros. A class or factory is called with the data.
    targeted : bool
        Minimize the loss instead.
    use_best : bool
        Return, for each datum, the best iterate seen; by default the last. An instance of a
        perturbation model with `per_datum` gets the parameters of that iterate, too.
    criterion : callable, optional
        The loss of each datum, from the model's output and the target. By default cross entropy.
    reduction_fn : callable
        What is differentiated: a number from all losses.
    samples : int
        Number of evaluations of the perturbation and the model for each gradient, for models that
        depend on chance: losses are the means of theirs (Athalye et al., 2018).
    stop_once : callable, optional
        From the model's output and the target to a bool for each datum, such as `is_fooled`: a
        datum for which it is True keeps this iterate, and the model sees it no more.
    **optim_kwargs
        Keyword arguments of the optimizer class.

    Returns
    -------
    (Tensor, Tensor)
        The perturbed data, and their losses in the sign of `criterion`.

    Raises
    ------
    TypeError
        If data are integers, or an optimizer instance comes with keyword arguments or without an
        instance of a perturbation model.
    ValueError
        If the loss is not one of each datum where that is needed, or does not depend on the
        perturbation as far as autograd can tell.

    Warns
    -----
    ZeroGradientWarning
        If the gradient of a datum is 0 at the start.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import gradient_ascent
    >>> gradient_ascent(model=lambda x: x, criterion=lambda out, target: (out - target).abs(),
    ...                 data=[-1.0, 2.0], target=0.0, optimizer=torch.optim.SGD, lr=0.1, steps=5)
    (tensor([-1.5000,  2.5000]), tensor([1.5000, 2.5000]))
    """
    check_count("steps", steps, 0)
    check_count("samples", samples, 1)
    with torch.inference_mode(False):
        data = as_data(data)
        target = _as_target(target, data)
        perturbation = _perturbation(perturbation_model, data)
        params = [p for p in perturbation.parameters() if p.requires_grad]
        if not params:
            raise ValueError(
                "`perturbation_model` must have parameters that require gradients, got none of "
                f"{perturbation!r}"
            )
        made = _optimizer(optimizer, perturbation, perturbation_model, optim_kwargs)
        with solving(model):
            found = ascend(
                model,
                data,
                target,
                perturbation,
                made,
                params,
                steps=steps,
                criterion=cross_entropy if criterion is None else criterion,
                reduction_fn=reduction_fn,
                targeted=targeted,
                use_best=use_best,
                success=stop_once,
                stop=stop_once is not None,
                samples=samples,
            )
    warn_of_zero_gradient(found.zero_gradient)
    return found.data, found.losses


def warn_of_zero_gradient(flat: Tensor) -> None:
    """Warn of data whose gradient is 0; reads one number."""
    number = int(flat.sum())
    if number:
        warnings.warn(
            f"the gradient of {number} of {flat.numel()} data is 0 at the start (a saturated "
            "loss, or a model whose output does not depend on them): they were not attacked",
            ZeroGradientWarning,
            stacklevel=3,
        )


def as_data(data: Any) -> Tensor:
    """A floating-point tensor without history, which autograd may save."""
    given = hasattr(data, "dtype")
    tensor = torch.as_tensor(data).detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        if given:
            raise TypeError(
                "`data` must be of a floating-point dtype (images of bytes: `data.float() / 255`), "
                f"got {tensor.dtype}"
            )
        tensor = tensor.to(torch.get_default_dtype())
    return tensor.clone() if tensor.is_inference() else tensor


def _as_target(target: Any, data: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        return torch.as_tensor(target, device=data.device)
    return target.detach().clone() if target.is_inference() else target.detach()


def _perturbation(given: PerturbationLike, data: Tensor) -> PerturbationModel:
    if is_instance_of_model(given):
        return given  # type: ignore[return-value]
    if not callable(given):
        raise TypeError(
            f"`perturbation_model` must be a PerturbationModel, or make one, got {given!r}"
        )
    made = given(data)
    if not isinstance(made, PerturbationModel):
        raise TypeError(f"`perturbation_model` must make a PerturbationModel, got {made!r}")
    return made


def is_instance_of_model(given: object) -> bool:
    """Whether this is a perturbation model, rather than a class or factory of one."""
    return not isinstance(given, type) and isinstance(given, PerturbationModel)


def _optimizer(
    given: OptimizerLike, model: PerturbationModel, of_user: object, kwargs: dict[str, Any]
) -> Any:
    if not isinstance(given, Optimizer):
        if not callable(given):
            raise TypeError(f"`optimizer` must be an Optimizer, or make one, got {given!r}")
        return given(model.parameters(), **kwargs)
    if not is_instance_of_model(of_user):
        raise TypeError(
            "`perturbation_model` must be an instance, whose parameters the optimizer has, with "
            f"an optimizer instance, got {of_user!r}"
        )
    if kwargs:
        raise TypeError(
            f"`optim_kwargs` must not be given with an optimizer instance, got {', '.join(kwargs)}"
        )
    return given
