"""Perturbations of images that a few bounded numbers per image describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log1p
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rai_toolbox.checks import check_finite
from rai_toolbox.perturbations.inputs import FLOATING, wrong
from rai_toolbox.perturbations.models.base import InitializedModel


class ImagePerturbation(InitializedModel):
    """Base of the perturbations of images by k numbers per image.

    The parameter `amounts`, shape (N, k), is in units of the limits of its columns. So its set is
    ``LinfBall(1.0)`` for any limits, and one learning rate fits all columns. The optimizer keeps it
    there: `forward` does not clamp it, which would stop the gradient.
    """

    amounts: nn.Parameter
    per_datum = True

    _parameter = "amounts"
    _factors: ClassVar[frozenset[str]] = frozenset()
    """Columns that multiply: amount a at limit l stands for ``(1 + l) ** a`` instead of ``a l``."""

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        limits: Mapping[str, float],
        init_fn: Callable[..., object] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        init_fn_kwargs: Mapping[str, Any],
    ) -> None:
        limits = {name: check_finite(name, limit) for name, limit in limits.items()}
        if isinstance(data_or_shape, Tensor):
            _check_images(data_or_shape)
        shape = tuple(getattr(data_or_shape, "shape", data_or_shape))
        if len(shape) != 4:
            raise wrong("data_or_shape", "have the dims (N, C, H, W)", shape)
        shape = shape[0], len(limits)
        super().__init__(data_or_shape, shape, init_fn, device, dtype, init_fn_kwargs)
        self.limits = limits

    def settings(self) -> dict[str, Tensor]:
        """The values that the amounts stand for, by the names of their limits; shape (N,) each."""
        amounts = self.amounts.to(torch.promote_types(self.amounts.dtype, torch.float32))
        columns = zip(self.limits.items(), amounts.unbind(1), strict=True)
        return {
            name: (column * log1p(limit)).exp() if name in self._factors else column * limit
            for (name, limit), column in columns
        }

    def extra_repr(self) -> str:
        """The number of images and the limits, for `repr`."""
        limits = (f"{name}={limit:g}" for name, limit in self.limits.items())
        return ", ".join([str(len(self.amounts)), *limits])

    def _settings_for(self, data: Tensor) -> tuple[Tensor, ...]:
        """The settings of each of these images."""
        _check_images(data)
        rows = len(self.amounts)
        if len(data) != rows:
            raise wrong("data", f"have {rows} rows, one per row of amounts", len(data))
        return tuple(self.settings().values())


def _check_images(data: Tensor) -> None:
    if data.ndim != 4:
        raise wrong("data", "have the dims (N, C, H, W)", tuple(data.shape))
    if not data.is_floating_point():
        raise wrong("data", FLOATING, data.dtype, TypeError)
