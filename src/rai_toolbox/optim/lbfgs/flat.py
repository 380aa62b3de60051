"""Parameters of several groups, each with its set, as one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.checks import wrong
from rai_toolbox.constraints.sharding import is_sharded
from rai_toolbox.optim.lbfgs.search import Trial
from rai_toolbox.optim.own_step import evaluated
from rai_toolbox.optim.settings import labels
from rai_toolbox.optim.transforms import Projection
from rai_toolbox.optim.wrapper import Group


class FlatProblem:
    """The trained parameters as one vector, the closure as a function of it, and its set.

    An error that the closure raises is kept, and ends all evaluations.
    """

    def __init__(self, groups: Sequence[Group], closure: Callable[[], Any]) -> None:
        max_iter, max_eval = groups[0]["max_iter"], groups[0]["max_eval"]
        self._closure = closure
        self._max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
        self._groups = [(group, trainable(group)) for group in groups]
        self._params = [param for _, params in self._groups for param in params]
        self._sizes = [param.numel() for param in self._params]
        self.evaluations = 0
        self.first_loss: Any = None
        self._last: Trial | None = None
        self._graded = [False] * len(self._params)
        self.precision = 0.0
        """The relative precision of the loss."""
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether there are to be no more evaluations."""
        return self.error is not None or self.evaluations >= self._max_eval

    def point(self) -> Tensor:
        """The parameters."""
        return torch.cat([param.detach().flatten() for param in self._params])

    def restore_(self, trial: Trial) -> None:
        """Put the parameters, and the gradients that they have, at those of a trial."""
        if trial is self._last:
            return
        self._write_(trial.x)
        for (param, part), has_one in zip(self._parts(trial.gradient), self._graded, strict=True):
            if param.grad is not None and param.grad.layout is torch.strided:
                param.grad.copy_(part)
            elif has_one and param.grad is None:  # the closure has raised before it made one
                param.grad = part.clone()

    def _write_(self, x: Tensor) -> None:
        for param, part in self._parts(x):
            param.copy_(part)

    def _parts(self, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter, and its part of a vector in its shape."""
        for param, part in zip(self._params, vector.split(self._sizes), strict=True):
            yield param, part.view(param.shape)

    def evaluate(self, x: Tensor) -> Trial:
        """Put the parameters at a point, and evaluate the closure there."""
        self._last = None
        self._write_(x)
        self.evaluations += 1
        try:
            loss = evaluated(self._closure)
            value = _as_number(loss)
            gradient = torch.cat([_gradient(param) for param in self._params])
        except BaseException as error:  # raised again once the parameters are where they belong
            self.error = error
            value, gradient = nan, torch.full_like(x, nan)
        self._last = Trial(x, value, gradient)
        if self.evaluations == 1 and self.error is None:
            self._graded = [param.grad is not None for param in self._params]
            self.first_loss = loss
            of_loss = isinstance(loss, Tensor) and loss.is_floating_point()
            self.precision = 8 * torch.finfo(loss.dtype if of_loss else x.dtype).eps
        return self._last

    def project_(self, x: Tensor) -> Tensor:
        """Project a vector onto the set, in place."""
        parts = self._parts(x)
        for group, params in self._groups:
            Projection().change_([part for _, part in islice(parts, len(params))], group)
        return x

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The bounds of all elements; None if a set bounds them together.

        They are 0-d if they are the same for all.
        """
        sets = [group["constraint"] for group, params in self._groups if params]
        if not all(each is None or each.elementwise for each in sets):
            return None
        x = self._params[0]
        if all(each == sets[0] for each in sets) and not (sets[0] and sets[0]._tensors):
            ends = x.new_tensor([[-inf], [inf]])
            lower, upper = ends if sets[0] is None else sets[0].project_(ends)
            return lower, upper
        size = sum(self._sizes)
        return self.project_(x.new_full((size,), -inf)), self.project_(x.new_full((size,), inf))


def trainable(group: Group) -> list[Tensor]:
    """The parameters of a group that a step changes."""
    return [param for param in group["params"] if param.requires_grad and param.numel() > 0]


def check_alike(groups: Sequence[Group]) -> None:
    """Raise unless the parameters of all groups make one vector of float32 or float64."""
    first = None
    for group in groups:
        for param, label in zip(group["params"], labels(group), strict=True):
            if not (isinstance(param, Tensor) and param.requires_grad):
                continue
            if is_sharded(param):
                raise wrong("params", "not be sharded", label, TypeError)
            if param.dtype not in (torch.float32, torch.float64):
                got = f"{param.dtype} for {label}"
                raise wrong("params", "be of float32 or float64", got, TypeError)
            kind = f"{param.dtype} on {param.device}"
            first = first or kind
            if kind != first:
                rule = "all have one dtype and device"
                raise wrong("params", rule, f"{first}, and {kind} for {label}", TypeError)


def _as_number(loss: Any) -> float:
    if loss is None:
        raise wrong("closure", "return the loss", None, TypeError)
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        return torch.zeros_like(param).flatten()
    grad = param.grad.detach()
    return (grad if grad.layout is torch.strided else grad.to_dense()).flatten()
