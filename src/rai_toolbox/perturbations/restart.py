"""A solver that starts again and again, and keeps the best for each datum."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import check_count
from rai_toolbox.perturbations.active import better, check_per_datum, column, parameters_of_data
from rai_toolbox.perturbations.gradient_ascent import is_instance_of_model

__all__ = ["random_restart"]

Solver = Callable[..., tuple[Tensor, Tensor]]


def random_restart(solver: Solver, repeats: int) -> Solver:
    """Make a solver that runs `solver` several times, and returns the best result of each datum.

    Chance is in what is started from, such as an `init_fn` of the perturbation model, or in the
    model. An instance of a perturbation model or an optimizer starts each run as it was given; a
    model with a method `reset_parameters` is reset by it before each run but the first. In the end
    an instance of a model with `per_datum` has the parameters of the best results, any other
    one those of the last run.

    Parameters
    ----------
    solver : callable
        `gradient_ascent`, a `functools.partial` of it, or what is called like it: with keyword
        arguments, of which `targeted` tells whether a low loss is better, and it returns the
        perturbed data and the loss of each datum.
    repeats : int
        Number of runs, >= 1.

    Returns
    -------
    callable
        Called as `solver` is.

    Raises
    ------
    ValueError
        If repeats < 1; at the call, if the losses are not one of each datum.

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
        raise TypeError(f"`solver` must be callable, got {solver!r}")

    @functools.wraps(solver, updated=())
    def restarted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        targeted = bool(_argument(solver, args, kwargs, "targeted"))
        model = _argument(solver, args, kwargs, "perturbation_model")
        optimizer = _argument(solver, args, kwargs, "optimizer")
        instance = model if is_instance_of_model(model) else None
        start = _Start(instance, optimizer if isinstance(optimizer, Optimizer) else None)
        data, losses = _run(solver, args, kwargs, repeats)
        rows = _rows_of(instance, data)
        with torch.inference_mode(False), torch.no_grad():
            best = [row.detach().clone() for row in rows]
        for _ in range(repeats - 1):
            start.restore()
            new_data, new_losses = _run(solver, args, kwargs, repeats)
            with torch.inference_mode(False), torch.no_grad():
                sign = 1 if targeted else -1
                take = better(sign * new_losses, sign * losses)
                data = torch.where(column(take, data), new_data, data)
                losses = torch.where(take, new_losses, losses)
                best = [torch.where(column(take, b), r, b) for b, r in zip(best, rows, strict=True)]
        with torch.inference_mode(False), torch.no_grad():
            for row, value in zip(rows, best, strict=True):
                row.copy_(value)
        return data, losses

    return restarted


def _run(solver: Solver, args: Any, kwargs: Any, repeats: int) -> tuple[Tensor, Tensor]:
    data, losses = solver(*args, **kwargs)
    if repeats > 1:
        check_per_datum("criterion", losses, data, "restarts")
    return data, losses


def _argument(solver: Solver, args: Any, kwargs: dict[str, Any], name: str) -> Any:
    """The value of an argument in a call: given there, bound in a partial, or a default."""
    if name in kwargs:
        return kwargs[name]
    signature = inspect.signature(solver)
    given = signature.bind_partial(*args, **kwargs)
    given.apply_defaults()
    if name in given.arguments:
        return given.arguments[name]
    bound = getattr(solver, "keywords", {})  # of a partial of what takes any keyword
    return bound.get(name)


def _rows_of(instance: Any, data: Tensor) -> list[Tensor]:
    if instance is None:
        return []
    params = [param for param in instance.parameters() if param.requires_grad]
    return parameters_of_data(instance, params, data) or []


class _Start:
    """Where instances start from, to go back there."""

    def __init__(self, model: Any, optimizer: Optimizer | None) -> None:
        self._model, self._optimizer = model, optimizer
        self._values = [] if model is None else [p.detach().clone() for p in model.parameters()]
        self._state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        if self._model is not None:
            reset = getattr(self._model, "reset_parameters", None)
            if reset is not None:
                reset()
            else:
                for param, value in zip(self._model.parameters(), self._values, strict=True):
                    param.copy_(value)
        if self._optimizer is not None and self._state is not None:
            self._optimizer.load_state_dict(copy.deepcopy(self._state))
