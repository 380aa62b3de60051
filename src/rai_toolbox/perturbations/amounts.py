"""What perturbations have in common that a few numbers per datum describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log1p
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rai_toolbox.checks import check_finite

__all__ = ["Amounts"]


class Amounts(nn.Module):
    """Base of perturbations of images that a few amounts per datum describe.

    The parameter `amounts`, shape (N, k), is in units of the limits of its columns: its set is
    ``LinfBall(1.0)`` whatever they are, and one learning rate does for all. The optimizer keeps it
    there; a forward does not clamp, which would stop the gradient.
    """

    per_datum = True

    _factors: ClassVar[frozenset[str]] = frozenset()  # of limit l, and amount a: (1 + l) ** a

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        limits: Mapping[str, float],
        init_fn: Callable[..., object] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        init_fn_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if init_fn is None and init_fn_kwargs:
            raise TypeError(f"`init_fn` must be given with its arguments, got {init_fn_kwargs!r}")
        self.limits = {name: check_finite(name, limit) for name, limit in limits.items()}
        if isinstance(data_or_shape, Tensor):
            _check_images(data_or_shape)
            device = data_or_shape.device if device is None else device
            dtype = data_or_shape.dtype if dtype is None else dtype
            shape: Sequence[int] = data_or_shape.shape
        else:
            shape = tuple(data_or_shape)
        if len(shape) != 4:
            raise ValueError(f"`data_or_shape` must have the dims (N, C, H, W), got {tuple(shape)}")
        zeros = torch.zeros(shape[0], len(self.limits), device=device, dtype=dtype)
        self.amounts = nn.Parameter(zeros)
        self._init_fn, self._init_fn_kwargs = init_fn, init_fn_kwargs
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Go back to where the amounts start: 0, or what `init_fn` fills in."""
        self.amounts.zero_()
        if self._init_fn is not None:
            self._init_fn(self.amounts, **self._init_fn_kwargs)

    def settings(self) -> dict[str, Tensor]:
        """What the amounts stand for, by the names of their limits; shape (N,) each."""
        amounts = self.amounts.to(torch.promote_types(self.amounts.dtype, torch.float32))
        columns = zip(self.limits.items(), amounts.unbind(1), strict=True)
        return {
            name: (column * log1p(limit)).exp() if name in self._factors else column * limit
            for (name, limit), column in columns
        }

    def extra_repr(self) -> str:
        """The number of data, and the limits."""
        limits = (f"{name}={limit:g}" for name, limit in self.limits.items())
        return ", ".join([str(len(self.amounts)), *limits])

    def _settings_for(self, data: Tensor) -> tuple[Tensor, ...]:
        """The settings of each of these data."""
        _check_images(data)
        rows = len(self.amounts)
        if len(data) != rows:
            raise ValueError(
                f"`data` must have {rows} rows, one per row of amounts, got {len(data)}"
            )
        return tuple(self.settings().values())


def _check_images(data: Tensor) -> None:
    if data.ndim != 4:
        raise ValueError(f"`data` must have the dims (N, C, H, W), got {tuple(data.shape)}")
    if not data.is_floating_point():
        raise TypeError(f"`data` must be of a floating-point dtype, got {data.dtype}")
