"""Optimizer steps compiled by `torch.compile`, each graph checked once against the eager step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox import _torch
from rai_toolbox.checks import check_type
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.bounded_ball import BoundedBall
from rai_toolbox.constraints.box_hyperplane import BoxSection
from rai_toolbox.constraints.intersection import Intersection
from rai_toolbox.optim.hooks import GRADIENT_HOOK, PARAMETER_HOOK
from rai_toolbox.optim.settings import is_zero_on_host
from rai_toolbox.optim.snapshot import Snapshot

__all__ = ["compiled"]

_BOUNDS = {"clamp_min", "clamp_max", "epsilon"}  # settings of groups that may be tensors
_METHODS = {"step", GRADIENT_HOOK, PARAMETER_HOOK}  # that an instance may have its own of
_MOST_CAPTURES = 8  # torch's own limit, beyond which it runs a function eagerly


def compiled(
    optimizer: Optimizer, *, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Return a function that does the same as ``optimizer.step()``, by compiled code.

    Transform, inner step and projection become one graph, so that each parameter is read and
    written once. The optimizer itself does not change: its state, groups and schedulers are used,
    and ``optimizer.step()`` remains the eager step; the two may alternate.

    The first step is eager, because it creates the state; so is the first one with the gradient of
    a parameter that had none before. The second one compiles, which takes seconds to minutes, more
    with more tensors. A learning rate, or another number in a group, may change between steps
    without a new compilation.

    A step that compiles is computed twice, compiled and eagerly, from the same values, and the
    eager result is kept. If the two differ by more than rounding, if the step cannot be captured,
    or if the compiler fails, one warning says so and all later steps are eager. This needs memory
    for two more copies of parameters, gradients and state, during that step only.

    Steps with a closure, with a learning rate of 0, and differentiable ones are eager, and so are
    those of an instance that has a `step` or a transform of its own in the place of its class's, or
    whose inner optimizer has hooks.

    Parameters
    ----------
    optimizer : Optimizer
        Of this library, or any other.
    backend : str or callable
        The backend of `torch.compile`.

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
    On CPU, gradient transforms that divide by norms are a graph of their own, because torch 2.13
    cannot compile them together with the update. Compiled and eager steps agree within rounding.
    Before torch 2.13 at most 8 steps per process are compiled; others stay eager.
    `APGD` and `TopQGradientOptimizer` with ``dq > 0`` stay eager, and so do sets whose projection
    iterates: `Intersection`, `BoxSection`, and `BoundedBall` of a ball other than `LinfBall`, also
    within `Masked`.

    Plain ``torch.compile(optimizer.step)`` checks nothing, and misses some changes: where two
    groups share one object as a setting (a set, or a tensor as learning rate), and one of them gets
    another object, the compiled step uses the first one in both. So do torch's own optimizers.

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
    check_type("optimizer", optimizer, Optimizer, "be a torch.optim.Optimizer")
    return _CompiledStep(optimizer, backend)


class _CompiledStep:
    """The step of an optimizer: compiled, until that fails once."""

    def __init__(self, optimizer: Optimizer, backend: str | Callable[..., Any]) -> None:
        self.optimizer = optimizer
        self._inner = getattr(optimizer, "inner_opt", optimizer)
        self.graphs = 0
        self._captures = 0
        self._is_eager = False
        # Ids of parameters that have had a gradient; of those that had no state before that step.
        self._had_gradient: set[int] = set()
        self._had_no_state: set[int] = set()
        # In the present step: it is to be checked, or a graph has run, so that it must be finished.
        self._may_compile = False
        self._backend = _torch.lookup_backend(backend)
        # Hooks run outside the graph: what they do is not compiled in, and not done twice.
        self._hooked_step = _torch.profile_hook_step(self._step)
        self._eager_step = _torch.unhooked(type(optimizer).step)
        traced_step = _torch.plain_step(type(optimizer).step)
        self._graph_step = _torch.compile_apart(
            lambda: traced_step(optimizer), backend=self._compile
        )

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            return self.optimizer.step(closure)
        if self._creates_state() or self._is_eager or not self._can_be_compiled():
            return self.optimizer.step()
        _torch.mark_stepped(self.optimizer)
        _torch.mark_stepped(self._inner)
        return self._hooked_step(self.optimizer)

    def _creates_state(self) -> bool:
        """Whether a parameter may get its first state, or again after that was cleared."""
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        stateless = {id(param) for param in params if param not in self.optimizer.state}
        ids = set(map(id, params))
        creates_state = not (ids and ids <= self._had_gradient and stateless <= self._had_no_state)
        self._had_gradient |= ids
        self._had_no_state = (self._had_no_state - ids) | stateless
        return creates_state

    def _can_be_compiled(self) -> bool:
        # Torch.compile does not detect a replaced method, and would trace the inner one's hooks.
        both = (self.optimizer, self._inner)
        own = [vars(each)[name] for each in both for name in _METHODS & vars(each).keys()]
        has_hooks = self._inner is not self.optimizer and _torch.has_own_step_hooks(self._inner)
        if has_hooks or not all(map(_torch.is_wrapped_by_scheduler, own)):
            return False
        # Torch's formulas for tensor learning rates, such as Adam's, divide by them.
        return not any(
            is_zero_on_host(group.get("lr")) or group.get("differentiable")
            for group in self.optimizer.param_groups
        )

    def _step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """The step without its hooks; a hook may have given it a closure."""
        if args or kwargs:
            return self._eager_step(optimizer, *args, **kwargs)
        if self._captures:
            self._may_compile = False
            try:
                return self._run()
            except Exception:
                if self._may_compile:
                    raise
        return self._checked_step()

    def _checked_step(self) -> Any:
        """Try a compiled step, undo it, do the eager one, and compare their results."""
        before = Snapshot(self.optimizer)
        try:
            failure = self._try_step()
            compiled_step = Snapshot(self.optimizer)
        finally:
            before.restore()
        result = self._eager_step(self.optimizer)
        difference = compiled_step.difference(before)
        if not failure and difference:
            failure = f"compiled and eager steps differ in {difference}"
        self._captures += 1
        if not failure and self._captures >= _MOST_CAPTURES:
            failure = f"it had to be compiled {_MOST_CAPTURES} times"
        if failure:
            self._is_eager = True
            warnings.warn(
                f"the step of {type(self.optimizer).__name__} cannot be compiled as a whole and "
                f"stays eager: {failure}",
                stacklevel=5,
            )
        return result

    def _try_step(self) -> str:
        """Compile and run a step; return the reason if that failed, else an empty string."""
        for group in self.optimizer.param_groups:
            for setting in filter(_is_slow_to_trace, group.values()):
                return f"it takes minutes to trace the projection of {type(setting).__name__}"
        graphs_before, breaks_before = self.graphs, _torch.graph_breaks()
        self._may_compile = True
        try:
            self._run()
        except Exception as error:  # of whatever kind: no C++ compiler, a bug of the backend
            cause = getattr(error, "inner_exception", error)  # of the backend
            return f"{type(cause).__name__}: {cause}".partition("\n")[0]
        for reason, count in _torch.graph_breaks().items():
            if count > breaks_before.get(reason, 0):
                return reason.strip().partition("\n")[0]
        return "" if self.graphs > graphs_before else "nothing of it could be captured"

    def _compile(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """The backend that `torch.compile` gets."""
        if not self._may_compile:
            raise RuntimeError("the step has to be compiled again")  # `_checked_step` will do so
        compiled_graph = self._backend(module, inputs)
        self.graphs += 1

        def run(*args: Any) -> Any:
            self._may_compile = True
            return compiled_graph(*args)

        return run

    def _run(self) -> Any:
        """Run the compiled step, with tensors for the numbers that may change between steps.

        A graph would have any other number compiled in.
        """
        of_torch = type(self._inner).__module__.startswith("torch.optim")
        names = _BOUNDS | ({"lr"} if of_torch else set())
        originals = []
        for group in self.optimizer.param_groups:
            tensors = _as_tensors(group, names)
            kept = {"capturable", *tensors} & group.keys()  # (torch sets or adds it as it traces)
            originals.append((group, {name: group[name] for name in kept}))
            group.update(tensors)
        try:
            with torch.no_grad():
                return self._graph_step()
        finally:
            for group, original in originals:
                group.update(original)
                if "capturable" not in original:
                    group.pop("capturable", None)


def _as_tensors(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Tensors for numbers of these names, and copies of tensors and sets, which share memory.

    Two groups may share an object: torch.compile does not detect if one gets another one later.
    """
    params = settings.get("params")
    device = params[0].device if params else None
    tensors: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Constraint):
            bounds = {"lower", "upper", *value._for_each}
            tensors[name] = copy(value)
            vars(tensors[name]).update(_as_tensors({**vars(value), "params": params}, bounds))
        elif isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif name in names and type(value) is float:
            where = None if name == "lr" else device
            tensors[name] = torch.full((), value, dtype=torch.float64, device=where)
    return tensors


def _is_slow_to_trace(setting: object) -> bool:
    """Whether it is or holds a set whose unrolled loops take 10 s and more for each tensor."""
    if isinstance(setting, BoundedBall):
        return not setting.ball.elementwise
    if isinstance(setting, (BoxSection, Intersection)):
        return True
    return isinstance(setting, Constraint) and any(map(_is_slow_to_trace, vars(setting).values()))
