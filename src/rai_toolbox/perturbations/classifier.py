"""Classifiers of raw data: the normalization is part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rai_toolbox.checks import check_setting, wrong
from rai_toolbox.perturbations.inputs import Model


def classifier(
    model: Model, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor
) -> Model:
    """Make a classifier of raw data from one of normalized data: ``model((data - mean) / std)``.

    Ball and range of an attack are then those of the raw data, such as images in [0, 1].

    Parameters
    ----------
    model : callable
        From normalized data, shape (N, C, ...), to anything.
    mean, std : float, sequence of float or Tensor
        A number, or one per channel, shape (C,). All of `std` is > 0.

    Returns
    -------
    callable
        A module if `model` is one: a `torch.nn.Sequential` of both, with `mean` and `std` as
        buffers.

    Raises
    ------
    TypeError
        If `model` is not callable, or mean or std are not numbers.
    ValueError
        If std is not > 0 or a number is not finite; when called, if the number of channels differs.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import classifier
    >>> model = classifier(torch.nn.Flatten(), mean=[0.5, 0.25], std=[0.5, 0.25])
    >>> model(torch.ones(1, 2, 1, 1))
    tensor([[1., 3.]])
    """
    if not callable(model) or isinstance(model, type):
        raise wrong("model", "be a module or function", model, TypeError)
    mean, std = _per_channel("mean", mean), _per_channel("std", std)
    if not bool((std > 0).all()):
        raise wrong("std", "be > 0", std.tolist())
    if mean.numel() != std.numel() and 1 not in (mean.numel(), std.numel()):
        raise wrong("mean` and `std", "have the same shape", f"{mean.numel()} and {std.numel()}")
    if isinstance(model, nn.Module):
        return nn.Sequential(_Normalization(mean, std), model)
    return partial(_call_normalized, model, mean=mean, std=std)


class _Normalization(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, data: Tensor) -> Tensor:
        return _normalized(data, self.mean, self.std)


def _call_normalized(model: Model, data: Tensor, *, mean: Tensor, std: Tensor) -> Any:
    return model(_normalized(data, mean, std))


def _normalized(data: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(data - mean) / std`` with a value per channel, dim 1."""
    for name, setting in (("mean", mean), ("std", std)):
        if setting.numel() > 1 and data.shape[1:2] != setting.shape:
            rule = f"be a number or have one value per channel of data, shape {tuple(data.shape)}"
            raise wrong(name, rule, f"shape {tuple(setting.shape)}")
    per_channel = (-1, *(1,) * (data.ndim - 2))
    mean, std = (setting.to(data).view(per_channel) for setting in (mean, std))
    return (data - mean) / std


def _per_channel(name: str, given: Any) -> Tensor:
    """A setting as a tensor of shape (C,) or (1,)."""
    try:
        setting = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise wrong(name, "hold numbers", given, TypeError) from None
    if not setting.is_floating_point():
        setting = setting.to(torch.get_default_dtype())
    check_setting(name, setting)
    if setting.numel() == 0 or setting.numel() != max(setting.shape, default=1):
        raise wrong(name, "be a number or have the shape (C,)", f"shape {tuple(setting.shape)}")
    return setting.detach().clone().reshape(-1)
