"""Checks of the inputs of attacks and evaluations: data, classes, balls, and the model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rai_toolbox.checks import check_order, check_type, parameters_of, wrong
from rai_toolbox.constraints import balls
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.modules import modules_in
from rai_toolbox.optim.engine import ParamTransformingOptimizer

Model: TypeAlias = Callable[[Tensor], Tensor]
Range: TypeAlias = tuple[float | Tensor, float | Tensor] | None
"""Lower and upper bound of all data; None if they are unbounded."""

FLOATING = "be of a floating-point dtype (images of bytes: `data.float() / 255`)"
_OTHERS = " (if not of classes: pass `criterion`, a rule `fooled` or `correct`, and no `rivals`)"


def as_data(data: Any) -> Tensor:
    """A floating-point tensor without history, which autograd may save."""
    tensor = torch.as_tensor(data)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        if hasattr(data, "dtype"):
            raise wrong("data", FLOATING, tensor.dtype, TypeError)
        tensor = tensor.to(torch.get_default_dtype())
    return without_history(tensor)


def without_history(tensor: Tensor) -> Tensor:
    """The tensor as a constant, which autograd may save: a copy if made in inference mode."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def as_target(target: Any, data: Tensor, classes: bool | None) -> Tensor:
    """The target of each example, a copy; as indices if these are, or have to be, classes."""
    found: Tensor = torch.as_tensor(target, device=data.device)
    check_target(found, data, classes)
    found = found.detach().clone()
    return found.long() if are_classes(found) else found


def expects_classes(criterion: object, fooled: object) -> bool | None:
    """Whether targets are classes: they must be without a criterion; None if a rule may say."""
    return criterion is None or (None if fooled is None else False)


def check_target(target: Tensor, data: Tensor, classes: bool | None) -> None:
    """Raise unless there is one target for each example, of any shape if they are not classes."""
    if classes:
        check_classes("target", target)
        check_per_example("target", target, data)
    elif target.shape[:1] != data.shape[:1]:
        rule = f"have one entry for each of {len(data)} examples, in its first dim"
        raise wrong("target", rule, f"shape {tuple(target.shape)}")


def are_classes(target: Tensor) -> bool:
    """Whether targets can be classes: integers, one for each example."""
    return is_index(target.dtype) and target.ndim == 1


def is_index(dtype: Any) -> bool:
    """Whether this is a dtype of integers."""
    is_dtype = isinstance(dtype, torch.dtype) and dtype != torch.bool
    return is_dtype and not (dtype.is_floating_point or dtype.is_complex)


def check_classes(name: str, classes: object) -> None:
    """Raise unless this is a tensor of integers."""
    dtype: Any = getattr(classes, "dtype", type(classes))
    if not is_index(dtype):
        got = str(dtype) + _OTHERS * (name == "target")
        raise wrong(name, "hold classes, which are integers, in a tensor", got, TypeError)


def check_per_example(name: str, value: Tensor, data: Tensor) -> None:
    """Raise unless there is one value for each example."""
    if value.shape != data.shape[:1]:
        rule = f"give one value for each example, shape {tuple(data.shape[:1])}"
        got = f"shape {tuple(value.shape)}"
        if name == "criterion":
            rule += ', as with `reduction="none"`' + " and `.flatten(1).mean(1)`" * (value.ndim > 1)
        elif name == "target" and value.ndim == 0:
            got += " (one example alone: `data[None]`, `torch.tensor([label])`)"
        elif name == "target" and value.ndim > 1:
            got += _OTHERS
        raise wrong(name, rule, got)


def check_batch(data: Any, target: Any, classes: bool | None = True) -> None:
    """Raise unless these are floating-point data, shape (N, ...), and a target of each example."""
    if not isinstance(data, Tensor) or not isinstance(target, Tensor):
        got = f"{type(data).__name__} and {type(target).__name__} (use `torch.from_numpy`)"
        raise wrong("data` and `target", "be tensors", got, TypeError)
    if not data.is_floating_point():
        raise wrong("data", FLOATING, data.dtype, TypeError)
    if data.ndim < 2:
        raise wrong("data", "have the shape (N, ...)", tuple(data.shape))
    check_target(target, data, classes)


def found_by(name: str, result: Any, data: Tensor) -> Tensor:
    """The perturbed data in what a solver returned; `name` is that of the argument it was."""
    perturbed = getattr(result, "data", None)
    if not isinstance(perturbed, Tensor):
        got = type(result).__name__
        raise wrong(name, "return an object with `data`, a tensor", got, TypeError)
    kind, got = (f"shape {tuple(t.shape)} and {t.dtype}" for t in (data, perturbed))
    if got != kind:
        raise wrong(name, f"return data of {kind}", got)
    return perturbed.detach()


def check_ball(ball: object) -> None:
    """Raise unless `ball` is a ball of one of the three norms, without a center."""
    if balls.check_ball("ball", ball).center is not None:
        raise wrong("ball", "have no center, as each example is one", ball)


def radius_of(ball: Ball) -> float:
    """The radius of a ball, if it is the same finite number for all examples."""
    check_ball(ball)
    if isinstance(ball.epsilon, Tensor) or not ball.bounded:
        raise wrong("epsilon` of `ball", "be a finite number", ball)
    return float(ball.epsilon)


def bounds_of(data: Tensor, data_range: Range) -> tuple[Tensor, Tensor] | None:
    """The bounds in the shape of the data, which must be finite and within them."""
    if data_range is None:
        _check_finite(data)
        return None
    if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
        raise wrong("data_range", "be a pair (lower, upper) or None", data_range, TypeError)
    check_order("lower", data_range[0], "upper", data_range[1])
    lower = expanded("data_range", torch.as_tensor(data_range[0], dtype=data.dtype), data)
    upper = expanded("data_range", torch.as_tensor(data_range[1], dtype=data.dtype), data)
    # (inf - inf is NaN, which counts)
    if bool((data.clamp(lower, upper) - data).any()):
        _check_finite(data)
        at = tuple(((data < lower) | (data > upper)).nonzero()[0].tolist())
        low, high, value = (float(tensor[at]) for tensor in (lower, upper, data))
        rule = f"be within `data_range`, [{low:g}, {high:g}]"
        raise wrong("data", rule, f"{value:g} at {at}")
    return lower, upper


def _check_finite(data: Tensor) -> None:
    if not bool(data.isfinite().all()):
        raise wrong("data", "be finite", "NaN or infinity among them")


def expanded(name: str, setting: Tensor, data: Tensor) -> Tensor:
    """A setting in the shape of the data."""
    try:
        return without_history(setting).to(data.device).expand(data.shape)
    except RuntimeError:
        rule = f"broadcast against the data of shape {tuple(data.shape)}"
        raise wrong(name, rule, f"shape {tuple(setting.shape)}") from None


def logits_of(output: Any) -> Any:
    """What a model returns as `logits`, like those of Transformers, or else all of it."""
    if isinstance(output, Tensor):  # which has none: a look would cost an error each time
        return output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def are_logits(output: Any, number: int) -> bool:
    """Whether this is a tensor of shape (N, K), with two classes at least."""
    shape = output.shape if isinstance(output, Tensor) else ()
    return len(shape) == 2 and shape[0] == number and shape[1] >= 2


def checked(
    model: Model, target: Tensor, classes: bool | None = True, name: str = "target"
) -> Model:
    """The model with a check of its output: logits of shape (N, K), with all classes of `target`.

    It may give anything if `classes` is False; and if it is None, unless both can be of classes.
    Reads the target once, which synchronizes with the host.
    """
    lowest, highest = 0, 0
    if is_index(target.dtype) and target.numel():
        lowest, highest = map(int, target.long().aminmax())  # (torch has none of uint16)
    holds_classes = classes or (classes is None and are_classes(target))

    def output_of(data: Tensor) -> Any:
        # Leaves are used again, results of recorded operators are not: a model may work in place.
        output = model(data.clone() if data.is_leaf else data)
        if not isinstance(output, Tensor):
            output = logits_of(output)
        fits = are_logits(output, data.shape[0])
        if classes and not fits:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            rule = f"give logits of shape ({len(data)}, K), of two classes at least"
            rule += ", or an object or dict with `logits`" * (shape == ())
            raise wrong("model", rule, f"{type(output).__name__} of shape {shape}{_OTHERS}")
        if holds_classes and fits:
            number = output.shape[1]
            if lowest < 0 or highest >= number:
                got = str(lowest if lowest < 0 else highest)
                got += " (if not a class: pass the rule `fooled`)" * (classes is None)
                raise wrong(name, f"hold classes from 0 to {number - 1}", got)
        return output

    return output_of


def lacks_lr(optimizer: object) -> bool:
    """Whether this makes an optimizer that would take its `lr` from the default of another one."""
    made: Any = getattr(optimizer, "func", optimizer)
    if not isinstance(made, type) or not issubclass(made, ParamTransformingOptimizer):
        return False
    given = getattr(optimizer, "keywords", {})
    inner = getattr(given.get("InnerOpt"), "keywords", {})
    return takes(made, "lr")[0] and "lr" not in {*given, *inner, *(given.get("defaults") or {})}


def check_lr(optimizer: object) -> None:
    """Raise if a step would be as long as the default of another optimizer, which knows no data."""
    if lacks_lr(optimizer):
        made: Any = getattr(optimizer, "func", optimizer)
        rule = f"be given `lr`, in units of the data: `partial({made.__name__}, lr=...)`"
        raise wrong("optimizer", rule, f"{made.__name__} without it", TypeError)


def check_generator(generator: object) -> None:
    """Raise unless this is a generator of random numbers, or None."""
    if generator is not None:
        rule = "be a torch.Generator, such as `torch.Generator().manual_seed(0)`"
        check_type("generator", generator, torch.Generator, rule)


def check_solver(solver: Any) -> None:
    """Raise unless this can be called as `attack` is."""
    if not callable(solver):
        raise wrong("solver", "be callable, as `attack` is", repr(solver), TypeError)
    missing = [name for name in ("ball", "data_range") if not takes(solver, name)[0]]
    if missing:
        rule = f"take `{missing[0]}`, as `attack` and `standard()` do"
        name = getattr(solver, "__name__", repr(solver))
        raise wrong("solver", rule, f"{name} (are parentheses missing?)", TypeError)


def takes(call: Callable[..., Any], name: str) -> tuple[bool, bool]:
    """Whether a callable takes an argument of this name, and whether it requires it."""
    parameters = parameters_of(call)
    if name in parameters:
        return True, parameters[name].default is inspect.Parameter.empty
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values()), False


def batches(
    loader: Iterable[Any], device: torch.device | None, classes: bool | None = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that hold examples, on the device; None leaves them on their own."""
    for i, batch in enumerate(loader):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            got = f"{type(batch).__name__} as batch {i}"
            if isinstance(batch, (tuple, list)):
                got += f" with {len(batch)} items: `[(x, y) for x, y, *_ in loader]` takes two"
            elif isinstance(batch, Mapping):
                x, y, *_ = [*map(repr, batch), "...", "..."]
                got += f": `[(batch[{x}], batch[{y}]) for batch in loader]` takes two"
            elif isinstance(batch, Tensor):
                got += " (one batch alone: `[(data, target)]`)"
            raise wrong("loader", "give pairs (data, target)", got, TypeError)
        data, target = batch
        if isinstance(target, int) or getattr(target, "ndim", 1) == 0:
            raise wrong("loader", "give batches, as a DataLoader does", "one example", TypeError)
        check_batch(data, target, classes)
        if len(data):
            at = device or data.device
            yield as_data(data).to(at), without_history(target).to(at)


def device_of(model: object) -> torch.device | None:
    """The device of the model's tensors; None if it has none."""
    tensors = (t for m in modules_in(model) for t in (*m.parameters(), *m.buffers()))
    return next((tensor.device for tensor in tensors), None)
