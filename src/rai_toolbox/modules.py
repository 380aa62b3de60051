"""Temporary changes, restored exactly: frozen parameters, modules in eval mode; finding modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, ExitStack
from functools import partial
from gc import get_referents
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from types import FunctionType, ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rai_toolbox.checks import wrong

Freezable: TypeAlias = Tensor | nn.Module | Optimizer | Mapping[str, Any] | Iterable[Any]
"""A tensor, a module (its parameters), an optimizer (the parameters of its groups), a parameter
group (its ``"params"``), or an iterable of these or of `(name, tensor)` pairs."""

_Holder: TypeAlias = Tensor | nn.Module | Optimizer
_Fn = TypeVar("_Fn", bound=Callable[..., Any])

# The search for the modules that a callable refers to.
_NOT_SEARCHED = (type, ModuleType, Tensor)
_IN_ATTRIBUTES = (nn.Module, list, tuple, dict, set)  # what may hold modules that are no submodules
_OF_ALL_MODULES = vars(nn.Module()).keys()
_OBJECTS, _REFERENTS = 3_000, 1_000  # the largest numbers to look at, of all and of one


def _holders(item: Freezable) -> Iterator[_Holder]:
    """The tensors, modules and optimizers in `item`; iterators are consumed."""
    if isinstance(item, (Tensor, nn.Module, Optimizer)):
        yield item
    elif isinstance(item, Mapping) and "params" in item:
        yield from _holders(item["params"])
    elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        yield from _holders(item[1])
    elif isinstance(item, Iterable) and not isinstance(item, (str, bytes, Mapping)):
        for part in item:
            yield from _holders(part)
    else:
        rule = "be tensors, modules, optimizers, groups (dicts with 'params') or iterables of these"
        raise wrong("items", rule, f"{item!r} of type {type(item).__name__}", TypeError)


def _tensors(holder: _Holder) -> Iterable[Tensor]:
    if isinstance(holder, nn.Module):
        return holder.parameters()
    if isinstance(holder, Optimizer):
        return [tensor for group in holder.param_groups for tensor in group["params"]]
    return [holder]


def freeze(*items: Freezable) -> Callable[[], None]:
    """Set `requires_grad` to False for all tensors in `items`; return the function that undoes it.

    Parameters
    ----------
    *items : Tensor | nn.Module | Optimizer | dict | Iterable
        Leaf tensors of any shape, or what holds them: modules (all parameters), optimizers (all
        groups), parameter groups (dicts with ``"params"``), and iterables of these or of
        `(name, tensor)` pairs. A tensor may occur more than once.

    Returns
    -------
    Callable[[], None]
        `restore`: sets `requires_grad` of each tensor to its value before, which may be False.

    Raises
    ------
    TypeError
        An item is none of the above. Nothing has been changed.
    ValueError
        An item holds a non-leaf tensor. Nothing has been changed.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import freeze
    >>> layer = torch.nn.Linear(2, 1)
    >>> restore = freeze(layer)
    >>> layer.weight.requires_grad
    False
    >>> restore()
    >>> layer.weight.requires_grad
    True
    """
    tensors = [t for item in items for holder in _holders(item) for t in _tensors(holder)]
    for tensor in tensors:
        if not tensor.is_leaf:
            rule = "hold leaf tensors only (results cannot be frozen: `detach` them)"
            got = f"a non-leaf tensor of shape {tuple(tensor.shape)} made by {tensor.grad_fn!r}"
            raise wrong("items", rule, got)
    before = [tensor.requires_grad for tensor in tensors]

    def restore() -> None:
        for tensor, flag in zip(tensors, before, strict=True):
            # (in-place operators may have made it a non-leaf tensor)
            if tensor.is_leaf and tensor.requires_grad != flag:
                with torch.inference_mode(tensor.is_inference()):
                    tensor.requires_grad_(flag)

    for tensor in tensors:
        tensor.requires_grad_(False)
    return restore


class _Switch(ContextDecorator):
    """A context manager of a function that changes something, and returns how to undo it.

    A stack of undo functions lets one object be entered many times, also recursively.
    """

    def __init__(self, switch: Callable[[], Callable[[], None]]) -> None:
        self._switch = switch
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._undo.append(self._switch())

    def __exit__(self, *exc_info: object) -> None:
        self._undo.pop()()

    def __call__(self, func: _Fn) -> _Fn:
        # A call of one of these only creates the generator or coroutine: its body runs later.
        if isgeneratorfunction(func) or iscoroutinefunction(func) or isasyncgenfunction(func):
            got = f"the generator or coroutine function {func!r}; use `with` inside it"
            raise wrong(type(self).__name__, "decorate a plain function", got, TypeError)
        return super().__call__(func)


class frozen(_Switch):
    """Context manager and decorator: `requires_grad` is False inside, and restored on exit.

    See `freeze` for `items`. The tensors of modules and optimizers are looked up at each entry;
    iterables are read once, when `frozen` is created.

    Parameters
    ----------
    *items : Tensor | nn.Module | Optimizer | dict | Iterable
        As in `freeze`.

    Raises
    ------
    TypeError
        An item is of another type, or a generator or coroutine function is decorated.
    ValueError
        On entry: an item holds a non-leaf tensor. Nothing has been changed.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import frozen
    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> with frozen(x):
    ...     print((2 * x).requires_grad)
    False
    >>> x.requires_grad
    True
    """

    def __init__(self, *items: Freezable) -> None:
        holders = [holder for item in items for holder in _holders(item)]
        super().__init__(partial(freeze, *holders))


class evaluating(_Switch):
    """Context manager and decorator: modules are in eval mode inside, and restored on exit.

    Entry calls `module.eval()`. Exit restores the `training` flag of each submodule, so that a
    batch norm in eval mode within a model in training mode stays in eval mode. It does not call
    `train`, which a module may have overridden.

    Parameters
    ----------
    *modules : nn.Module
        They may share submodules.

    Raises
    ------
    TypeError
        An argument is not a module, or a generator or coroutine function is decorated.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import evaluating
    >>> net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2).eval())
    >>> with evaluating(net):
    ...     print([m.training for m in net])
    [False, False]
    >>> [m.training for m in net]
    [True, False]
    """

    def __init__(self, *modules: nn.Module) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                got = f"{module!r} of type {type(module).__name__}"
                raise wrong("modules", "be of type torch.nn.Module", got, TypeError)
        super().__init__(partial(_evaluate, modules))


def _evaluate(modules: Iterable[nn.Module]) -> Callable[[], None]:
    with ExitStack() as undo:  # last in, first out: what two modules share ends as it was at first
        for module in modules:
            for sub in module.modules():  # of which frozen scripts have no mode
                undo.callback(setattr, sub, "training", getattr(sub, "training", False))
            try:
                module.eval()
            except NotImplementedError:  # of an exported program, whose mode is fixed
                if not any("train" in vars(sub) for sub in module.modules()):
                    raise
                for sub in module.modules():
                    sub.training = False
        return undo.pop_all().close


def modules_in(call: object) -> list[nn.Module]:
    """The modules that a callable is or refers to, the nearest first; no submodules of others.

    The search follows closures, defaults and the globals that functions name, bound objects,
    arguments of `functools.partial`, attributes, and collections, such as a list of networks that a
    module holds. It looks at a limited number of objects, in some milliseconds: not at a whole data
    set that a closure holds.
    """
    found, inside = list[nn.Module](), set[int]()
    reached, seen = [call], set[int]()
    for item in reached:  # which grows
        if isinstance(item, nn.Module):
            if id(item) in inside:
                continue
            found.append(item)
            for sub in item.modules():
                inside.add(id(sub))
                own = [value for key, value in vars(sub).items() if key not in _OF_ALL_MODULES]
                reached += [value for value in own if isinstance(value, _IN_ATTRIBUTES)]
        elif id(item) not in seen and len(seen) < _OBJECTS and not isinstance(item, _NOT_SEARCHED):
            seen.add(id(item))
            referents = get_referents(item)
            reached += referents if len(referents) < _REFERENTS else []
            reached.append(vars(type(item)).get("__call__"))
            if isinstance(item, FunctionType):
                # All globals of its file, of which it names some, are not searched.
                seen |= {id(item.__globals__), id(item.__builtins__)}
                names = item.__code__.co_names
                named = [item.__globals__.get(name) for name in names]
                spaces = [vars(space) for space in named if isinstance(space, (type, ModuleType))]
                reached += named + [space.get(name) for space in spaces for name in names]
    return found
