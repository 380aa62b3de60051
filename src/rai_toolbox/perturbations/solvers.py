"""Solvers: a plain training loop over the parameters of a perturbation, and its restarts."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.best_of import BestOf
from rai_toolbox.perturbations.inputs import Model
from rai_toolbox.perturbations.losses import Criterion, Rule, criterion_of, cross_entropy
from rai_toolbox.perturbations.models.additive import AdditivePerturbation
from rai_toolbox.perturbations.models.base import PerturbationModel
from rai_toolbox.perturbations.solve import Objective, copy_into, own_rows, solve, solving

OptimizerLike = Optimizer | Callable[..., Any]
PerturbationLike = PerturbationModel | Callable[[Tensor], PerturbationModel]
Solver = Callable[..., tuple[Tensor, Tensor]]


class ZeroGradientWarning(UserWarning):
    """The gradient of some examples is 0 at the start, so that no attack along it changed them."""


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
    stop_once: Rule | None = None,
    **optim_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    r"""Perturb data to maximize a loss of each example.

    .. math::
        \max_\theta \; \sum_i L\big(f(p_\theta(x)_i), y_i\big)

    where p is the perturbation model and theta are its parameters. Any optimizer does the steps,
    and keeps the parameters in their set. Gradients are computed for these parameters only. Works
    inside `no_grad`, `inference_mode` and `autocast`; no step synchronizes with the host.

    During the search a model that is a module is in eval mode, and its weights are frozen. Modules
    in its lists or dicts are in eval mode, too, and so are those that a callable refers to in its
    closure, globals, attributes or partial. Any other module in training mode that the callable
    calls is put in eval mode with a warning; one that only the `forward` of a module refers to,
    such as a global, stays as it is. Everything is restored, also after an error.
    DistributedDataParallel calls its module directly, as ranks may need different numbers of calls.
    The model may change its input in place.

    Parameters
    ----------
    model : callable
        From perturbed data to the first argument of `criterion`.
    data : Tensor or array-like, shape (N, ...)
        Of a floating-point dtype; plain Python numbers get torch's default dtype.
    target : Tensor or array-like, shape (N, ...)
        The second argument of `criterion`; for the default one, classes of shape (N,).
    optimizer : Optimizer class, functools.partial of one, or instance
        An instance requires a `perturbation_model` instance, of whose parameters it is. A method
        `observe_` of an optimizer is called before each step with the costs of the examples, shape
        (N,): the losses with the sign in which they are to decrease.
    steps : int
        Number of steps, >= 0. The model is evaluated once more than that.
    perturbation_model : PerturbationModel class, factory, or instance
        By default data plus a tensor of zeros. A class or factory is called with the data.
    targeted : bool
        Minimize the loss instead.
    use_best : bool
        Return the best iterate of each example; by default the last. A perturbation model instance
        with `per_datum` is left with the parameters of those iterates. The losses are those of the
        iterates, also if the model depends on the rest of the batch, which then is another one.
    criterion : callable, optional
        The loss of each example, from the model's output and the target. By default cross entropy.
    reduction_fn : callable
        From all losses to the number that is differentiated.
    samples : int
        Number of evaluations of perturbation and model per gradient, for random models: losses are
        means over them (Athalye et al., 2018).
    stop_once : callable, optional
        From the model's output and the target to a bool for each example, such as `is_fooled`.
        Where it is True, the example keeps this iterate and is not evaluated again.
    **optim_kwargs
        Keyword arguments of the optimizer class.

    Returns
    -------
    (Tensor, Tensor)
        The perturbed data, shape (N, ...), and their losses with the sign of `criterion`.

    Raises
    ------
    TypeError
        If data are integers, or an optimizer instance comes with keyword arguments or without a
        perturbation model instance.
    ValueError
        If there is not one loss per example where that is needed, or the loss has no gradient with
        respect to the perturbation.

    Warns
    -----
    ZeroGradientWarning
        If the gradient of an example is 0 at the start.
    UserWarning
        If the model calls a module in training mode that could not be found; or if entries of the
        first gradient are not finite, which count as 0 at every step.

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
    criterion = criterion_of(criterion, cross_entropy, targeted)
    sign = 1.0 if targeted else -1.0
    with solving(model) as model:
        objective = Objective(model, criterion, sign, reduction_fn, samples, stop_once)
        data = inputs.as_data(data)
        if isinstance(optimizer, Optimizer) and not _is_model(perturbation_model):
            rule = "be an instance, whose parameters the optimizer has, with an optimizer instance"
            raise wrong("perturbation_model", rule, perturbation_model, TypeError)
        perturbation = _perturbation(perturbation_model, data)
        if not any(param.requires_grad for param in perturbation.parameters()):
            rule = "have parameters that require gradients"
            raise wrong("perturbation_model", rule, perturbation)
        made = _optimizer(optimizer, perturbation, optim_kwargs)
        if not isinstance(target, Tensor):
            target = torch.as_tensor(target, device=data.device)
        target, stop = inputs.without_history(target), stop_once is not None
        found = solve(objective, data, target, perturbation, made, steps, use_best, stop)
    warn_of_zero_gradient(found.zero_gradient)
    return found.data, found.losses


def random_restart(solver: Solver, repeats: int) -> Solver:
    """Make a solver that runs `solver` several times, and returns the best result of each example.

    Runs differ by random starts, such as an `init_fn` of the perturbation model, or by a random
    model. Instances of perturbation models and optimizers start each run in their given state; a
    model with a method `reset_parameters` is reset by it before each run but the first. In the end
    a model instance with `per_datum` has the parameters of the best results, any other one those of
    the last run.

    Parameters
    ----------
    solver : callable
        `gradient_ascent`, a `functools.partial` of it, or another solver with its keyword arguments
        and results. A lower loss is better if its argument `targeted` is True.
    repeats : int
        Number of runs, >= 1.

    Returns
    -------
    callable
        It has the arguments of `solver`.

    Raises
    ------
    ValueError
        If repeats < 1; when called, if there is not one loss per example.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from rai_toolbox.perturbations import (
    ...     AdditivePerturbation, gradient_ascent, random_restart, uniform_like_linf_n_ball_)
    >>> start = partial(AdditivePerturbation, init_fn=uniform_like_linf_n_ball_)
    >>> solve = random_restart(partial(gradient_ascent, perturbation_model=start), repeats=9)
    >>> _ = torch.manual_seed(0)
    >>> data, losses = solve(model=lambda x: x, criterion=lambda out, target: out.cos(),
    ...                      data=[1.6], target=0, optimizer=torch.optim.SGD, lr=0.5, steps=20)
    >>> losses
    tensor([1.])
    """
    check_count("repeats", repeats, 1)
    if not callable(solver):
        raise wrong("solver", "be callable", solver, TypeError)

    @functools.wraps(solver, updated=())
    @torch.inference_mode(False)
    def restarted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        bound = inspect.signature(solver).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        given = {**getattr(solver, "keywords", {}), **bound.arguments, **kwargs}  # by name
        model: Any = given.get("perturbation_model")
        model = model if _is_model(model) else None
        params = [p for p in model.parameters() if p.requires_grad] if model is not None else []
        restore = _restorer(model, given.get("optimizer"))
        sign = 1 if given.get("targeted") else -1
        data, losses = solver(*args, **kwargs)
        if repeats == 1:
            return data, losses
        inputs.check_per_example("criterion", losses, data)
        params = own_rows(model, params, data)
        failure = torch.zeros_like(losses, dtype=torch.bool)
        best = BestOf(sign * losses, failure, [data, losses, *params])
        for _ in range(repeats - 1):
            restore()
            data, losses = solver(*args, **kwargs)
            best.update_(sign * losses, failure, [data, losses, *params])
        copy_into(params, best.tensors[2:])
        return best.tensors[0], best.tensors[1]

    return restarted


def warn_of_zero_gradient(zero: Tensor) -> None:
    """Warn of examples whose gradient is 0; reads one number."""
    number = int(zero.sum())
    if number:
        warnings.warn(
            f"the gradient of {number} of {zero.numel()} examples is 0 at the start (a saturated "
            "loss, a model whose output does not depend on them, or a loss at its minimum, which a "
            "random start leaves): attacks along it did not change them",
            ZeroGradientWarning,
            stacklevel=3,
        )


def _is_model(given: object) -> bool:
    """Whether this is a perturbation model, rather than a class or factory of one."""
    return not isinstance(given, type) and isinstance(given, PerturbationModel)


def _perturbation(given: Any, data: Tensor) -> PerturbationModel:
    made = given(data) if callable(given) and not _is_model(given) else given
    if not isinstance(made, PerturbationModel):
        raise wrong("perturbation_model", "be or make a PerturbationModel", made, TypeError)
    return made


def _optimizer(given: Any, model: PerturbationModel, kwargs: dict[str, Any]) -> Any:
    if isinstance(given, Optimizer):
        if kwargs:
            rule = "not be given with an optimizer instance"
            raise wrong("optim_kwargs", rule, ", ".join(kwargs), TypeError)
        return given
    if not callable(given):
        raise wrong("optimizer", "be an Optimizer, or make one", given, TypeError)
    return given(model.parameters(), **kwargs)


def _restorer(model: Any, optimizer: Any) -> Callable[[], None]:
    """Make a function that restores the state of both, or resets a model that can be reset."""
    values = [] if model is None else [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()) if isinstance(optimizer, Optimizer) else None

    def restore() -> None:
        if hasattr(model, "reset_parameters"):
            model.reset_parameters()
        elif model is not None:
            copy_into(model.parameters(), values)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))

    return restore
