"""The loop of a solver, on arguments that have been checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rai_toolbox._torch import has_global_step_hooks
from rai_toolbox.modules import evaluating, frozen
from rai_toolbox.optim.inner import step_inner
from rai_toolbox.perturbations.active import (
    Kept,
    Success,
    check_per_datum,
    parameters_of_data,
    without_gradient,
)
from rai_toolbox.perturbations.losses import Criterion
from rai_toolbox.perturbations.protocol import PerturbationModel

__all__ = ["Ascent", "Model", "ascend", "solving"]

Model = Callable[[Tensor], Tensor]

_CHECKS = (1, 2, 4, 8)  # evaluations after which to look who has stopped; then every so many:
_EVERY = 10


class Ascent(NamedTuple):
    """What `ascend` found, for each datum; and how often it called the model."""

    data: Tensor
    losses: Tensor
    success: Tensor
    zero_gradient: Tensor
    model_calls: int


def ascend(
    model: Model,
    data: Tensor,
    target: Tensor,
    perturbation: PerturbationModel,
    optimizer: Any,
    params: Sequence[Tensor],
    *,
    steps: int,
    criterion: Criterion,
    reduction_fn: Callable[[Tensor], Tensor] = torch.sum,
    targeted: bool = False,
    use_best: bool = True,
    success: Success | None = None,
    stop: bool = False,
    samples: int = 1,
) -> Ascent:
    """The loop of `gradient_ascent`, on checked arguments and inside `solving`.

    `success` tells of each datum whether it has succeeded, which comes before any loss where the
    best iterate is kept; with `stop`, a datum that has succeeded is done.
    """
    if steps:
        _check_steps(optimizer)
    observe = getattr(optimizer, "observe_", None)
    look = partial(
        _evaluate, model, perturbation, data, criterion=criterion, success=success, samples=samples
    )
    push = partial(_push, reduction_fn=reduction_fn, targeted=targeted, params=list(params))
    keeps = use_best or success is not None
    kept: Kept | None = None
    rows: Tensor | None = None
    seen_target, calls = target, 0
    for step in range(steps + 1):
        last = step == steps
        for param in params:
            param.grad = None
        with torch.set_grad_enabled(not last):
            found = look(seen_target, rows, backward=None if last else push)
        calls += samples
        if step == 0:
            per_datum = parameters_of_data(perturbation, params, found.perturbed)
            flat = torch.zeros(found.perturbed.shape[:1], dtype=torch.bool, device=data.device)
            if not last:
                flat = without_gradient(params, found.perturbed, per_datum is not None)
        if keeps or observe is not None:
            cost = found.loss if targeted else -found.loss
            points = ([found.perturbed] if per_datum is None else per_datum) if keeps else []
            if kept is None:
                _check_losses(found, use_best, success)
                kept = Kept(cost, points, found.success, best=use_best, stop=stop)
            else:
                kept.update_(cost, points, found.success, rows)
        if last:
            break
        if stop and kept is not None and _is_check(step + 1):
            rows = kept.open_rows()
            if len(rows) == 0:
                break
            seen_target = target if target.ndim == 0 else target[rows]
        if observe is not None and kept is not None:
            observe(kept.last_cost)
        if isinstance(optimizer, Optimizer) and not has_global_step_hooks():
            # past torch's wrapper, which takes as long as the step of a small model
            step_inner(optimizer, None)
        else:
            optimizer.step()
    for param in params:
        param.grad = None
    if kept is None or not keeps:
        return Ascent(found.perturbed, found.loss, torch.zeros_like(flat), flat, calls)
    result = kept.points[0]
    if per_datum is not None:
        with torch.no_grad():
            for param, value in zip(params, kept.points, strict=True):
                param.copy_(value)
            result = perturbation(data).detach()
    done = torch.zeros_like(flat) if kept.success is None else kept.success
    return Ascent(result, kept.cost if targeted else -kept.cost, done, flat, calls)


class _Evaluation(NamedTuple):
    perturbed: Tensor
    loss: Tensor
    success: Tensor | None


def _evaluate(
    model: Model,
    perturbation: PerturbationModel,
    data: Tensor,
    target: Tensor,
    rows: Tensor | None,
    *,
    criterion: Criterion,
    success: Success | None,
    samples: int,
    backward: Callable[[Tensor], None] | None,
) -> _Evaluation:
    """Losses of some rows of the data, means over samples; gradients if asked."""
    losses, outputs = [], []
    for _ in range(samples):
        perturbed = perturbation(data)
        output = model(perturbed if rows is None else perturbed.index_select(0, rows))
        loss = criterion(output, target)
        if backward is not None:
            backward(loss if samples == 1 else loss / samples)
        losses.append(loss.detach())
        if success is not None:
            outputs.append(output.detach())
    with torch.no_grad():
        mean = losses[0] if samples == 1 else torch.stack(losses).mean(0)
        done = None
        if success is not None:
            output = outputs[0] if samples == 1 else torch.stack(outputs).mean(0)
            done = success(output, target)
    return _Evaluation(perturbed.detach(), mean, done)


def _push(
    loss: Tensor,
    *,
    reduction_fn: Callable[[Tensor], Tensor],
    targeted: bool,
    params: list[Tensor],
) -> None:
    """Add the gradients of what is minimized to the parameters, and to nothing else."""
    # a sum is differentiated by ones: this spares a small model a tenth of its time
    total = loss if reduction_fn is torch.sum else reduction_fn(loss)
    if total.ndim != 0 and reduction_fn is not torch.sum:
        raise ValueError(f"`reduction_fn` must give one number, got shape {tuple(total.shape)}")
    if not total.requires_grad:
        raise ValueError(
            "`model` and `criterion` must be differentiable, got a loss that does not depend on "
            "the perturbation (is something detached, or computed under no_grad?)"
        )
    way = torch.full_like(total, 1.0 if targeted else -1.0)
    torch.autograd.backward(total, way, inputs=params)


def _check_steps(optimizer: Any) -> None:
    """Raise unless this can step, with gradients alone."""
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"`optimizer` must be or make what has a `step`, got {optimizer!r}")
    inner = getattr(optimizer, "inner_opt", optimizer)  # to which a wrapper passes its closure on
    if not isinstance(inner, Optimizer):
        return
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TypeError(
            "`optimizer` must step by gradients alone, without a `closure`, got "
            f"{type(inner).__name__}"
        )


def _check_losses(found: _Evaluation, use_best: bool, success: Success | None) -> None:
    why = "use_best=True" if use_best else "a stop" if success is not None else "this optimizer"
    check_per_datum("criterion", found.loss, found.perturbed, why)
    if found.success is not None:
        check_per_datum("stop_once", found.success, found.perturbed, "a stop")


def _is_check(evaluations: int) -> bool:
    return evaluations in _CHECKS or evaluations % _EVERY == 0


@contextmanager
def solving(model: object) -> Iterator[None]:
    """Grad mode on, and a module in eval mode with frozen weights; all is undone on leaving."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(frozen(model))
            stack.enter_context(evaluating(model))
        yield
