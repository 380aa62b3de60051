"""A copy of all that an optimizer's step may change, to undo a step and to compare two steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.constraints.sharding import complete


class Snapshot:
    """Parameters, gradients, state, settings and random numbers of an optimizer at one time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._contents = [(container, dict(container)) for container in _containers(optimizer)]
        self._grads = [(param, param.grad) for param in _params(optimizer)]
        self._tensors = dict(_named_values(optimizer))
        self._values = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        generators = [torch.default_generator, getattr(optimizer, "generator", None)]
        generators += getattr(optimizer, "_generators", dict)().values()
        self._random = [(g, g.get_state()) for g in generators if g is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Give everything the value that it had, in the tensors of that time."""
        for container, content in self._contents:
            container.clear()
            container.update(content)
        for param, grad in self._grads:
            param.grad = grad
        for name, tensor in self._tensors.items():
            # (no step writes to an expanded gradient, nor can it)
            if tensor.layout is not torch.strided or 0 not in tensor.stride():
                tensor.copy_(self._values[name])
        for generator, state in self._random:
            generator.set_state(state)

    @torch.no_grad()
    def difference(self, start: Snapshot) -> str:
        """Name a value that differs from the present one by more than rounding.

        Both are of the same step from `start`.
        """
        present = dict(_named_values(self._optimizer))
        differing = self._values.keys() ^ present.keys()
        for name in self._values.keys() & present.keys():
            if not _agree(start._values.get(name), present[name], self._values[name]):
                differing.add(name)
        return min(differing, default="")


def _named_values(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Parameters, gradients, and the tensors and numbers in state and groups."""
    for i, param in enumerate(_params(optimizer)):
        yield from _leaves(f"parameter {i}", param)
        yield from _leaves(f"the gradient of parameter {i}", param.grad)
    for depth, state in enumerate(_states(optimizer)):
        yield from _leaves(f"state {depth}" if depth else "state", list(state.values()))
    for i, group in enumerate(optimizer.param_groups):
        yield from _leaves(f"group {i}", {k: v for k, v in group.items() if k != "params"})


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors and numbers in nested containers, each with its path as its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (int, float)):
        yield name, torch.tensor(value)
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}[{key!r}]", part)


def _nested(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, the one that it wraps, the one that this wraps (Lookahead), and so on."""
    found = [optimizer]
    for each in found:
        inside = [value for value in vars(each).values() if isinstance(value, Optimizer)]
        found += [value for value in inside if all(value is not other for other in found)]
    return found


def _states(optimizer: Optimizer) -> list[Any]:
    """The states of all of them; an optimizer of this library has that of the one it wraps."""
    return list({id(each.state): each.state for each in _nested(optimizer)}.values())


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _containers(optimizer: Optimizer) -> list[dict[Any, Any]]:
    """The dicts in which a step may put other objects."""
    states = _states(optimizer)
    of_params = [value for state in states for value in state.values() if isinstance(value, dict)]
    return [*map(vars, _nested(optimizer)), *states, *of_params, *optimizer.param_groups]


def _agree(start: Tensor | None, eager: Tensor, compiled: Tensor) -> bool:
    """Whether two results of a step from `start` are equal to within rounding.

    Compiled code takes sums in another order and rounds less often, which makes a difference of
    some roundings of the largest entry: 16 are allowed. Numbers of the step that eager code
    computes in float64, such as Adam's ``1 - beta ** step``, are float32 in compiled code: at the
    second step, and with ``beta = 0.9999``, this changes a move by 1 part in 3,000. Allowed is 1
    in 256 of the largest move. A step in which an operation is missing differs by much more.
    """
    if eager.layout is not torch.strided:
        eager, compiled = eager.to_dense(), compiled.to_dense()
    if compiled.shape != eager.shape or compiled.dtype != eager.dtype:
        return False
    if eager.numel() == 0 or not (eager.is_floating_point() or eager.is_complex()):
        return bool(complete((eager == compiled).all()))
    if start is None or start.shape != eager.shape:
        start = torch.zeros_like(eager)
    move = _largest(eager - start)
    tolerance = 16 * torch.finfo(eager.dtype).eps * (_largest(eager) + move) + move / 256
    return bool(complete(eager.isclose(compiled, 0.0, tolerance, equal_nan=True).all()))


def _largest(tensor: Tensor) -> float:
    return float(complete(tensor.abs().nan_to_num(0, 0, 0).amax()))
