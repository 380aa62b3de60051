"""The loop of all solvers: evaluate, keep the best, step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rai_toolbox._torch import backward, has_step_hooks, plain_step, set_grad_mode, unhooked
from rai_toolbox.checks import check_type, wrong
from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.modules import evaluating, freeze, modules_in
from rai_toolbox.perturbations.best_of import BestOf
from rai_toolbox.perturbations.feasible_set import Change
from rai_toolbox.perturbations.inputs import Model, check_per_example, logits_of, takes
from rai_toolbox.perturbations.losses import Criterion, Rule, rule_of_stack
from rai_toolbox.perturbations.models.additive import AdditivePerturbation
from rai_toolbox.perturbations.models.base import InitializedModel, PerturbationModel

_FIRST_CHECKS, _CHECK_EVERY = (1, 2, 4, 8), 10
"""Evaluations after which examples that have succeeded are dropped, which synchronizes."""


class NotFiniteWarning(UserWarning):
    """Entries of the first gradient are not finite; they count as 0."""


class Attacked(NamedTuple):
    """What an attack found for each example; all values are those of the rounded data, as a batch.

    Attributes
    ----------
    data : Tensor, shape (N, ...)
        The perturbed data, exactly in the ball and the range.
    losses : Tensor, shape (N,)
        The criterion there.
    fooled : Tensor of bool, shape (N,)
        Whether the attack succeeds there.
    zero_gradient : Tensor of bool, shape (N,)
        Whether every run started at a zero gradient, so that the example was not attacked.
    model_calls : int
        Number of calls of the model, on all examples or some.
    """

    data: Tensor
    losses: Tensor
    fooled: Tensor
    zero_gradient: Tensor
    model_calls: int


@dataclass(frozen=True)
class Objective:
    """A loss of each example, to maximize with the sign -1 or to minimize with the sign 1.

    ``cost = sign * loss`` is what a solver minimizes. Losses are means over `samples` evaluations.
    `success` decides whether an example has succeeded, which comes before any cost.
    """

    model: Model
    criterion: Criterion
    sign: float = -1.0
    reduction_fn: Callable[[Tensor], Tensor] = torch.sum
    samples: int = 1
    success: Rule | None = None

    def evaluate(self, points: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The costs and success of perturbed data, which a checked model leaves as they are."""
        with torch.no_grad():
            _, cost, output = self._evaluate(lambda x: x, points, target, None, None, False)
            return cost, self.success_of(cost, output, target)

    def _evaluate(
        self,
        perturbation: Callable[[Tensor], Tensor],
        data: Tensor,
        target: Tensor,
        rows: Tensor | None,
        params: list[Tensor] | None,
        reused: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """The perturbed data, costs and output; adds the gradients of `params`.

        With `rows`, costs are those of some examples, whose target is given. A model may work in
        place: it gets a copy of perturbed data that are `reused`. To be called under `no_grad`.
        Data and output may be those that autograd has seen.
        """
        losses, outputs = [], []
        output: Any
        for _ in range(self.samples):
            set_grad_mode(params is not None)
            try:
                perturbed = perturbation(data)
                given = perturbed if rows is None else perturbed.index_select(0, rows)
                output = self.model(given.clone() if reused else given)
                loss = self.criterion(output, target)
                if params is not None:
                    self._differentiate(loss, params)
            finally:
                set_grad_mode(False)
            if self.samples > 1:  # frees the graph before the next one is made
                loss, output = loss.detach(), _detached(output)
            losses.append(loss)
            outputs.append(output)
        if self.samples > 1:
            loss = torch.stack(losses).mean(0)
            output = None if self.success is None else _mean(outputs)
        else:
            loss, output = losses[0], outputs[0]
        is_fast = self.sign == -1 and loss.is_floating_point()  # (a product makes numbers real)
        return perturbed, loss.neg() if is_fast else loss * self.sign, output

    def success_of(self, cost: Tensor, output: Any, target: Tensor) -> Tensor:
        """Which examples have succeeded."""
        if self.success is None:
            return torch.zeros_like(cost, dtype=torch.bool)
        return self.success(_detached(output), target)

    def _differentiate(self, loss: Tensor, params: list[Tensor]) -> None:
        if self.reduction_fn is not torch.sum:  # else differentiate without the sum
            loss = self.reduction_fn(loss)
            if loss.ndim != 0:
                raise wrong("reduction_fn", "give one number", f"shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            got = "a loss that does not depend on the perturbation (is something detached?)"
            raise wrong("model` and `criterion", "be differentiable", got)
        # (made each time: the gradient may be a view of it, and an optimizer may change that)
        scale = torch.full_like(loss, self.sign / self.samples)
        backward(loss, scale, params)


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output


def _mean(outputs: list[Any]) -> Tensor:
    """The mean output of a model, or the mean of its logits."""
    outputs = [logits_of(output) for output in outputs]
    check_type("model", outputs[0], Tensor, "give tensors where there are `samples`")
    return torch.stack(outputs).mean(0)


def solve(
    objective: Objective,
    data: Tensor,
    target: Tensor,
    perturbation: PerturbationModel,
    optimizer: Any,
    steps: int,
    use_best: bool = True,
    stop: bool = False,
) -> Attacked:
    """Optimize the parameters of a perturbation, inside `solving`.

    With `use_best` each example keeps its best iterate, else the last one. With `stop` it keeps the
    first one that succeeds, and is evaluated no more. What is not finite in gradients counts as 0.
    """
    params = [param for param in perturbation.parameters() if param.requires_grad]
    observe = getattr(optimizer, "observe_", None)
    rows, target_of_rows, reused = None, target, True
    waiting: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def choose_among_waiting() -> None:
        if waiting:
            costs, judged, trials = map(list, zip(*waiting, strict=True))
            if judge_stack:
                judged = list(judge_stack(torch.stack(judged), target))
            best.choose_(costs, judged, trials)
            waiting.clear()

    with torch.no_grad():
        take_step = _step_of(optimizer) if steps else lambda: None
        for step in range(steps + 1):
            for param in params:
                param.grad = None
            last = step == steps
            perturbed, cost, output = objective._evaluate(
                perturbation, data, target_of_rows, rows, None if last else params, reused
            )
            if step == 0:
                grads = [param.grad for param in params if param.grad is not None]
                not_finite = sum((g - g).count_nonzero() for g in grads)  # NaN, there
            for param in params:
                if param.grad is not None:
                    param.grad.nan_to_num_(0.0, 0.0, 0.0)
            if step == 0:
                separate = own_rows(perturbation, params, perturbed)
                reused = not (separate and isinstance(perturbation, (Change, InitializedModel)))
                zero_gradient = _zero_gradient(grads, perturbed, bool(separate))
                judge_stack = rule_of_stack(objective.success, output, target)
                room = _room([*(separate or [perturbed]), *([output] if judge_stack else [])])
            tensors = separate or [perturbed]
            if step == 0 or not (use_best or stop):
                success = objective.success_of(cost, output, target)
                best = BestOf(cost, success, tensors, use_best, stop)
            elif not stop and room > 1:
                waits = judge_stack is not None  # (a rule of the user's has to see each at once)
                judged = output.clone() if waits else objective.success_of(cost, output, target)
                waiting.append((cost, judged, list(map(torch.clone, tensors))))
                if len(waiting) == room:
                    choose_among_waiting()
            else:
                success = objective.success_of(cost, output, target_of_rows)
                best.update_(cost, success, tensors, rows)
            if step == 0 and (use_best or stop or observe is not None):
                check_per_example("criterion", cost, perturbed)
                check_per_example("stop_once", success, perturbed)
            if last:
                break
            if stop and (step + 1 in _FIRST_CHECKS or (step + 1) % _CHECK_EVERY == 0):
                rows = best.rows_without_success()
                if len(rows) == 0:
                    break
                target_of_rows = target if target.ndim == 0 else target[rows]
            if observe is not None:
                observe(cost if rows is None else best.last_cost)
            del perturbed, output, tensors  # and with them the graph
            take_step()
        choose_among_waiting()
    warn_of_not_finite(not_finite)
    for param in params:
        param.grad = None
    perturbed = best.tensors[0]
    if separate:
        copy_into(params, best.tensors)
        perturbed = perturbation(data).detach()
    calls = objective.samples * (step + 1)
    return Attacked(perturbed, objective.sign * best.cost, best.success, zero_gradient, calls)


def warn_of_not_finite(number: Tensor | int) -> None:
    """Warn of entries of the first gradient that are not finite; reads one number."""
    if number:
        text = f"{int(number)} entries of the first gradient are not finite (a root at 0?)"
        warnings.warn(f"{text}, and count as 0", NotFiniteWarning, stacklevel=4)


@torch.no_grad()
def copy_into(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Set parameters to values."""
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


def own_rows(model: PerturbationModel, params: list[Tensor], data: Tensor) -> list[Tensor]:
    """The parameters, if each has one independent row per example; else none."""
    separate = getattr(model, "per_datum", False) and data.ndim > 0
    if isinstance(model, AdditivePerturbation):
        separate = separate and model.delta.shape == data.shape
    fits = all(param.shape[:1] == data.shape[:1] for param in params)
    return params if separate and fits else []


def _room(tensors: list[Tensor]) -> int:
    """How many trials wait to be judged together, which takes a third of the time if each is small.

    (Operators are slow where others have run between two calls of the same one.)
    """
    return BLOCK // max(1, sum(tensor.numel() for tensor in tensors))


def _zero_gradient(grads: list[Tensor], data: Tensor, separate: bool) -> Tensor:
    """Whether there are gradients, and all are 0, shape (N,): of the example, or of shared ones."""
    zeros = [grad == 0 for grad in grads if grad.numel()]
    if not zeros:
        return torch.zeros(data.shape[:1], dtype=torch.bool, device=data.device)
    if separate:
        return reduce(torch.logical_and, [each.reshape(len(each), -1).all(1) for each in zeros])
    return reduce(torch.logical_and, [each.all() for each in zeros]).expand(data.shape[:1])


def _step_of(optimizer: Any) -> Callable[[], object]:
    """The step of an optimizer, to call under `no_grad`, if it can step with gradients alone.

    Without hooks this bypasses torch's wrappers, which cost as much as the step of a small model.
    """
    step: Callable[[], object] | None = getattr(optimizer, "step", None)
    if not callable(step):
        raise wrong("optimizer", "be or make what has a `step`", optimizer, TypeError)
    inner = getattr(optimizer, "inner_opt", optimizer)  # to which a wrapper passes its closure on
    if isinstance(inner, Optimizer) and takes(type(inner).step, "closure")[1]:
        rule = "step by gradients alone, without a `closure`"
        raise wrong("optimizer", rule, type(inner).__name__, TypeError)
    plain = isinstance(optimizer, Optimizer) and "step" not in vars(optimizer)
    if plain and not has_step_hooks(optimizer):
        # (of its own class: who passes attributes of another optimizer on has a step of its own)
        prepare = getattr(type(optimizer), "_prepared_step", None)
        prepared = None if prepare is None else prepare(optimizer)
        if prepared is not None:
            return prepared
        behind_hooks, bare = unhooked(type(optimizer).step), plain_step(type(optimizer).step)
        if bare is not behind_hooks and not optimizer.defaults.get("differentiable"):
            return partial(bare, optimizer)
        step = partial(behind_hooks, optimizer)
    return torch.enable_grad()(step)


def _has_training_mode(module: nn.Module) -> bool:
    """Whether a module is in training mode, and may be another function there."""
    if not module.training:
        return False
    stateless = not [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    has_none = stateless and not hasattr(module, "p")  # that of dropout
    return not (has_none and type(module).__module__.startswith("torch.nn."))


@contextmanager
def solving(model: Any) -> Iterator[Any]:
    """Context: gradients enabled, modules in eval mode, a module's weights frozen; undone on exit.

    Gives the model to call. The first call of a callable that is no module is watched for modules
    that were not found; each call, if none was. Replicas of DistributedDataParallel call their
    module: ranks may need different numbers of calls.
    """
    modules, thread = modules_in(model), get_ident()
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as undo:
        undo.callback(freeze(*(modules if isinstance(model, nn.Module) else [])))
        undo.enter_context(evaluating(*modules))
        for module in modules:
            for sub in module.modules():
                if isinstance(sub, DistributedDataParallel) and "forward" not in vars(sub):
                    vars(sub)["forward"] = sub.module
                    undo.callback(vars(sub).pop, "forward")

        def meet(module: nn.Module, args: object) -> None:
            if get_ident() == thread and any(map(_has_training_mode, module.modules())):
                undo.enter_context(evaluating(module))
                text = f"`model` hides a {type(module).__name__} in training mode"
                warnings.warn(f"{text}: it is in eval mode meanwhile", stacklevel=2)

        is_first = True

        def watched(data: Tensor) -> Any:
            nonlocal is_first
            is_watched, is_first = is_first or not modules, False
            with register_module_forward_pre_hook(meet) if is_watched else nullcontext():
                return model(data)

        yield model if isinstance(model, nn.Module) else watched
