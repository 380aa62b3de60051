"""One word for a step that is compiled as a whole: gradient, inner step and projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox._torch import (
    compile_apart,
    graph_breaks,
    is_of_compiler,
    is_restart,
    lookup_backend,
    tree_leaves,
)
from rai_toolbox.constraints.base import Constraint

__all__ = ["compiled"]

_BOUNDS = ("clamp_min", "clamp_max", "epsilon")  # of groups, that may be tensors
_MEANT = (
    "User-inserted graph break"  # torch's own around a step, and that before an update by norms
)
_NOTHING = "nothing of it could be captured"


def compiled(
    optimizer: Optimizer, *, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """A function that does what ``optimizer.step()`` does, by compiled code.

    Transform, inner step and projection become one graph, so that each parameter is read and
    written once. The optimizer stays what it is: its state, groups and schedulers are used, and
    ``optimizer.step()`` remains the eager step, with which compiled ones may alternate.

    The first step is eager, for it makes the state; the second compiles, which takes seconds to
    minutes, the longer the more tensors there are. A learning rate, or any other number in a
    group, may change from step to step and nothing is compiled again. A step with a closure is
    eager. Where the step cannot be captured, or the compiler fails, a warning says so, once, and
    all steps are eager.

    Parameters
    ----------
    optimizer : Optimizer
        Of this library, or any other.
    backend : str or callable
        That of `torch.compile`.

    Returns
    -------
    callable
        ``step(closure=None)``; it returns what `optimizer.step` returns.

    Raises
    ------
    TypeError
        If `optimizer` is not an optimizer.

    Notes
    -----
    The gradient transforms that divide by norms are a graph of their own on CPU, as torch 2.13
    cannot compile them together with the update. Compiled and eager steps agree to within
    rounding. `APGD`, whose step depends on how many there were, and sets that iterate on matrices
    or on other sets (`SpectralBall`, `NuclearBall`, `Intersection`) stay eager.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import ClampedParameterOptimizer
    >>> from rai_toolbox.optim import compiled
    >>> x = torch.ones(2, requires_grad=True)
    >>> optim = ClampedParameterOptimizer([x], lr=1.0, clamp_max=3.0)
    >>> step = compiled(optim)
    >>> x.backward(gradient=torch.tensor([0.5, -10.0]))
    >>> step()
    >>> x
    tensor([0.5000, 3.0000], requires_grad=True)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {optimizer!r}")
    return _CompiledStep(optimizer, backend)


class _CompiledStep:
    """The step of an optimizer: eager, compiled, and eager for good if that did not work."""

    def __init__(self, optimizer: Optimizer, backend: str | Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self.graphs = 0
        self._backend = lookup_backend(backend)
        self._step: Callable[[], Any] | None = compile_apart(
            lambda: optimizer.step(), backend=self._capture
        )
        self._numbers: dict[tuple[int, str, str], Tensor] = {}
        self._made_state = False
        self._failure = ""

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            return self.optimizer.step(closure)
        if self._step is None or not self._made_state:
            self._made_state = True
            return self.optimizer.step()
        if self.graphs:
            return self._with_numbers_as_tensors(self._step)
        return self._first(self._step)

    def _first(self, step: Callable[[], Any]) -> Any:
        # Dynamo runs what it cannot capture as it is, so that no part of a step is done twice.
        before = graph_breaks()
        untouched = self._versions()
        try:
            result = self._with_numbers_as_tensors(step)
        except Exception as error:
            # Only what the compiler itself could not do, before any part of the step was done.
            if self.graphs or not is_of_compiler(error) or self._versions() != untouched:
                raise
            result = self.optimizer.step()
            self._failure = _first_line(error)
        breaks = graph_breaks().items()
        found = [why for why, n in breaks if n > before.get(why, 0) and _MEANT not in why]
        self._failure = self._failure or "".join(found[:1]).strip() or _NOTHING * (not self.graphs)
        if self._failure:
            self._step = None
            warnings.warn(
                f"the step of {type(self.optimizer).__name__} cannot be compiled as a whole and "
                f"stays eager: {self._failure}",
                stacklevel=3,
            )
        return result

    def _versions(self) -> list[tuple[int, int]]:
        """Each tensor of a step, and how often torch has written to it."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        tensors = [*params, *(param.grad for param in params)]
        tensors += tree_leaves(list(self.optimizer.state.values()))
        counted = [x for x in tensors if isinstance(x, Tensor) and not x.is_inference()]
        return [(id(x), x._version) for x in counted]

    def _capture(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        try:
            made: Callable[..., Any] = self._backend(module, inputs)
        except Exception as error:  # of whatever kind: no C++ compiler, a bug of the backend
            if is_restart(error):  # dynamo's own: it will try again
                self.graphs -= 1
                raise
            self._failure = self._failure or _first_line(error)
            return module.forward
        return made

    def _with_numbers_as_tensors(self, step: Callable[[], Any]) -> Any:
        """Step with tensors in place of numbers that schedules change: a graph holds no others."""
        changed: list[tuple[dict[str, Any], str, Any]] = []
        inner = getattr(self.optimizer, "inner_opt", self.optimizer)
        of_torch = type(inner).__module__.startswith("torch.optim")  # whose lr may be a tensor
        names = ("lr", *_BOUNDS) if of_torch else _BOUNDS
        for i, group in enumerate(self.optimizer.param_groups):
            found = {name: group[name] for name in names if type(group.get(name)) is float}
            constraint = group.get("constraint")
            tensors: dict[str, Any] = {
                name: self._as_tensor((i, "", name), value, group) for name, value in found.items()
            }
            if isinstance(constraint, Constraint):
                tensors["constraint"] = self._of_tensors(constraint, i, group)
            changed += [(group, name, group[name]) for name in tensors]
            group.update(tensors)
        try:
            return step()
        finally:
            for group, name, value in changed:
                group[name] = value

    def _of_tensors(self, constraint: Constraint, i: int, group: dict[str, Any]) -> Constraint:
        names = {"lower", "upper", *constraint._for_each} & vars(constraint).keys()
        return constraint._replaced(
            {
                name: self._as_tensor((i, "constraint", name), value, group)
                for name, value in vars(constraint).items()
                if name in names and type(value) is float
            }
        )

    def _as_tensor(self, key: tuple[int, str, str], value: float, group: dict[str, Any]) -> Tensor:
        known = self._numbers.get(key)
        if known is None:
            device = None if key[2] == "lr" or not group["params"] else group["params"][0].device
            known = torch.empty((), dtype=torch.float64, device=device)
            self._numbers[key] = known
        return known.fill_(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
