"""Checks of the inputs of attacks and evaluations: data, classes, balls, and the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall

Ball: TypeAlias = LinfBall | L2Ball | L1Ball
Model: TypeAlias = Callable[[Tensor], Tensor]
Range: TypeAlias = tuple[float | Tensor, float | Tensor] | None
"""Lower and upper bound of all data; None if they are unbounded."""


def as_data(data: Any) -> Tensor:
    """A floating-point tensor without history, which autograd may save."""
    tensor = torch.as_tensor(data).detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        if hasattr(data, "dtype"):
            raise TypeError(
                "`data` must be of a floating-point dtype (images of bytes: `data.float() / 255`), "
                f"got {tensor.dtype}"
            )
        tensor = tensor.to(torch.get_default_dtype())
    return tensor.clone() if tensor.is_inference() else tensor


def as_classes(target: Any, data: Tensor) -> Tensor:
    """The class of each example, as an index; a copy."""
    classes: Tensor = torch.as_tensor(target, device=data.device)
    check_classes(classes, data)
    return classes.detach().clone().long()


def check_classes(target: Tensor, data: Tensor) -> None:
    """Raise unless there is an integer for each example."""
    if not holds_integers(target):
        raise TypeError(f"`target` must hold classes, which are integers, got {target.dtype}")
    check_per_example("target", target, data)


def holds_integers(classes: Tensor) -> bool:
    """Whether the dtype is one of integers."""
    return not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)


def check_per_example(name: str, value: Tensor, data: Tensor) -> None:
    """Raise unless there is one value for each example."""
    if value.shape != data.shape[:1]:
        raise ValueError(
            f"`{name}` must give one value for each example, shape {tuple(data.shape[:1])}, got "
            f"shape {tuple(value.shape)}"
        )


def check_batch(data: object, target: object) -> None:
    """Raise unless these are floating-point data and the class of each example."""
    if not isinstance(data, Tensor) or not isinstance(target, Tensor):
        raise TypeError(
            f"`data` and `target` must be tensors, got {type(data).__name__} and "
            f"{type(target).__name__}"
        )
    if not data.is_floating_point():
        raise TypeError(f"`data` must be of a floating-point dtype, got {data.dtype}")
    if data.ndim < 2:
        raise ValueError(f"`data` must have the shape (N, ...), got {tuple(data.shape)}")
    check_classes(target, data)


def check_ball(ball: object) -> None:
    """Raise unless `ball` is a ball of one of the three norms, without a center."""
    if not isinstance(ball, (LinfBall, L2Ball, L1Ball)):
        raise TypeError(f"`ball` must be a LinfBall, L2Ball or L1Ball, got {ball!r}")
    if ball.center is not None:
        raise ValueError(f"`center` of `ball` must be None, as each example is one, got {ball!r}")


def radius_of(ball: Ball) -> float:
    """The radius of a ball, if it is the same finite number for all examples."""
    check_ball(ball)
    if isinstance(ball.epsilon, Tensor) or not ball.bounded:
        raise ValueError(f"`epsilon` of `ball` must be a finite number, got {ball!r}")
    return float(ball.epsilon)


def classifier(model: Model, target: Tensor, name: str = "target") -> Model:
    """The model with a check of its output: logits of shape (N, K), with all classes of `target`.

    Reads the target once, which synchronizes with the host.
    """
    wide = target.long()  # torch has no minimum of uint16
    lowest, highest = (int(wide.min()), int(wide.max())) if wide.numel() else (0, 0)

    def logits_of(data: Tensor) -> Tensor:
        logits: Any = model(data)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(data):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"`model` must give logits of shape ({len(data)}, K), a row per example, got {got}"
            )
        if logits.shape[1] < 2:
            raise ValueError(
                "`model` must give logits of two classes at least (also where one number would "
                f"do), got shape {tuple(logits.shape)}"
            )
        if lowest < 0 or highest >= logits.shape[1]:
            raise ValueError(
                f"`{name}` must hold classes from 0 to {logits.shape[1] - 1}, got "
                f"{lowest if lowest < 0 else highest}"
            )
        return logits

    return logits_of


def batches(loader: Iterable[Any], device: torch.device | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that hold examples, on the device; None leaves them on their own."""
    for i, batch in enumerate(loader):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"`loader` must give pairs (data, target), got {type(batch).__name__} as batch {i}"
            )
        data, target = batch
        check_batch(data, target)
        if len(data):
            yield as_data(data).to(device or data.device), target.to(device or data.device)


def device_of(model: object) -> torch.device | None:
    """The device of the model's tensors; None if it has none."""
    if not isinstance(model, nn.Module):
        return None
    tensors = (tensor for found in (model.parameters(), model.buffers()) for tensor in found)
    return next((tensor.device for tensor in tensors), None)
