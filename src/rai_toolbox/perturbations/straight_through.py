"""Attacks along gradients through roundings, whose own are 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from rai_toolbox._torch import eagerly, set_grad_mode
from rai_toolbox.autograd import with_value
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.inputs import Model
from rai_toolbox.perturbations.solve import Attacked, solving

_NAMES = ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside")
_STEPS = {getattr(where, name) for where in (torch, Tensor) for name in _NAMES}
_IN_PLACE = {
    getattr(where, f"{name}_"): getattr(torch, name)
    for where in (torch, Tensor)
    for name in _NAMES
    if hasattr(where, f"{name}_")
}
_CASTS = {
    getattr(Tensor, name)
    for name in ("to", "type", "byte", "char", "short", "int", "long", "half", "float", "double")
}
_AS_IT_IS = {
    set_grad_mode,
    Tensor.requires_grad_,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__deepcopy__,
}
"""Called with the model's constants, not with what they are made of."""

_WIDTHS = (None, 0.5, 0.25, 0.12, 0.06, 0.03)  # of a step; in turns


@wraps(attack)
def through_attack(model: Model, data: Tensor, target: Tensor, **settings: Any) -> Attacked:
    """Run `attack` with gradients through the roundings of the model."""
    return attack(StraightThrough(model), data, target, **settings)


class StraightThrough:
    r"""A model with the same outputs, whose roundings have gradients.

    A step function f, such as `torch.round`, gets the derivative

    .. math::
        \frac{1}{2} + \frac{f(x + h) - f(x - h)}{4 h}

    The first term is the slope of the staircase (the straight-through estimator: Bengio, Leonard,
    Courville 2013; in attacks: Athalye, Carlini, Wagner 2018). It alone moves all entries by a
    little, which changes few of the rounded ones. The second term prefers those that are about to
    reach another step, and lets go those just beyond one. The width h is another one in each call,
    from half of a step to a thirtieth; in every sixth call the derivative is 1.

    It sees functions of torch that Python calls: round, floor, ceil, trunc, fix, sign, sgn and
    heaviside, as functions, methods and in place, and casts to integers that are cast back at once.
    Gradients that are passed through roundings otherwise, by `detach`, under `no_grad`, or by a
    `torch.autograd.Function` in Python, are replaced by these, too. It does not see comparisons,
    ``//``, integer arithmetic, ``.data``, what inference mode, `torch.func` and `checkpoint` run,
    and what TorchScript, extensions or NumPy compute. What the model keeps, such as buffers and
    caches, gets no graph.

    Parameters
    ----------
    model : callable
        Called in grad mode as it is, except that compiled functions run uncompiled.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.widths, self.steps = model, cycle(_WIDTHS), 0

    def __call__(self, data: Tensor) -> Any:
        """The output of the model."""
        if not torch.is_grad_enabled():
            return self.model(data)
        mode = _ThroughSteps(next(self.widths))
        with eagerly(), mode:
            output = self.model(data)
        self.steps += mode.steps
        return mode.source_of(output)


def rounds(model: Model, data: Tensor) -> bool | None:
    """Whether gradients go through roundings of the model; None if there are no gradients.

    Calls it with one example.
    """
    try:
        with solving(model) as called:  # (not of its copy with gradients: weights are frozen)
            through = StraightThrough(called)
            example = inputs.as_data(data)[:1].clone().requires_grad_()
            output = inputs.logits_of(through(example.clone()))
            (gradient,) = torch.autograd.grad(output.sum(), example, allow_unused=True)
    except Exception:  # a model that cannot do this, or bad input, which others explain
        return None
    return None if gradient is None else through.steps > 0


class _ThroughSteps(TorchFunctionMode):
    """Context: step functions have gradients, and nothing is a constant that depends on the data.

    What the model takes for a constant has a source: the tensor with a graph that it is made of,
    which takes its place as an argument of the next function. Sources are forgotten with the mode,
    after one call of the model, which may keep its constants for the next one.
    """

    def __init__(self, width: float | None) -> None:
        super().__init__()
        self.width, self.steps = width, 0
        self.sources = WeakTensorKeyDictionary()  # of constants
        self.rounded = WeakTensorKeyDictionary()  # what integers are when they are cast back

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AS_IT_IS or "out" in kwargs:
            return func(*args, **kwargs)
        constant = not (torch.is_grad_enabled() and _has_graph((*args, *kwargs.values())))
        given: Any = args[0] if args else None
        first = self.source_of(given)
        if _is_in_place(func) and first is not given:  # a constant: its source changes with it
            with torch.enable_grad():
                changed = first.clone()
                self.__torch_function__(func, types, (changed, *args[1:]), kwargs)
            self.sources[given] = changed
            return given.copy_(changed.detach())
        if _is_in_place(func) and (constant or not _has_graph(first)):
            return func(*args, **kwargs)  # as buffers of the model are to get no graph
        args = tuple(map(self.source_of, args))
        kwargs = {name: self.source_of(arg) for name, arg in kwargs.items()}
        with torch.enable_grad():
            if func in (torch.detach, Tensor.detach):
                constant, found = True, first
            elif func in _STEPS and first is not None:
                found = self.step(func, *args, **kwargs)
            elif func in _IN_PLACE:
                found = first.copy_(self.step(_IN_PLACE[func], first.clone(), *args[1:], **kwargs))
            else:
                found = func(*args, **kwargs)
            if func in _CASTS and isinstance(found, Tensor):
                found = self.cast(first, found)
        if found is not first and getattr(found, "is_leaf", False):  # made here, as parameters are
            return found
        return self.as_constant(found) if constant else found

    def as_constant(self, found: Any) -> Any:
        """What the model is to get for a result that has a graph only here; in lists, too."""
        if isinstance(found, (list, tuple)):
            return type(found)([self.as_constant(each) for each in found])
        if not isinstance(found, Tensor) or not found.requires_grad:
            return found
        plain = found.detach()
        self.sources[plain] = found
        return plain

    def source_of(self, arg: Any) -> Any:
        """An argument, or what it is made of; in lists, too."""
        if type(arg) in (list, tuple):
            return type(arg)(map(self.source_of, arg))
        return self.sources.get(arg, arg) if isinstance(arg, Tensor) and self.sources else arg

    def step(self, func: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A step function with a derivative."""
        if not x.requires_grad:
            return func(x, *args, **kwargs)
        self.steps += 1
        value = func(x.detach(), *args, **kwargs)
        slope = torch.ones_like(value)
        if self.width is not None:
            h = self.width * 0.1 ** kwargs.get("decimals", 0)
            ends = (func(x.detach() + each, *args, **kwargs) for each in (h, -h))
            slope = 0.5 + torch.sub(*ends) / (4 * h)
        return with_value(value, slope * x)

    def cast(self, x: Tensor, found: Tensor) -> Tensor:
        """Integers remember what they are made of until they are cast back."""
        if inputs.is_index(found.dtype) and x.requires_grad:
            self.rounded[found] = self.step(torch.trunc, x)
        elif found.is_floating_point() and x in self.rounded:
            return with_value(found, self.rounded[x])
        return found


def _has_graph(arg: Any) -> bool:
    """Whether this is, or a list holds, what depends on the data for the model, too."""
    if isinstance(arg, (list, tuple)):
        return any(map(_has_graph, arg))
    return isinstance(arg, Tensor) and arg.requires_grad


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    is_operator = name.startswith("__i") or name == "__setitem__"
    return is_operator or (name.endswith("_") and not name.endswith("__"))
