"""Random numbers for samples: drawn where the generator is, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints.kernels.blocks import wide_dtype


def uniform(like: Tensor, generator: Generator | None) -> Tensor:
    """Uniform on [0, 1), in the shape and on the device of `like`."""
    return _drawn(torch.rand, like, generator)


def normal(like: Tensor, generator: Generator | None) -> Tensor:
    """Standard normal, in the shape and on the device of `like`."""
    return _drawn(torch.randn, like, generator)


def exponential(like: Tensor, generator: Generator | None) -> Tensor:
    """Exponential of rate 1, in the shape and on the device of `like`."""
    return -torch.log1p(-uniform(like, generator))


def _drawn(draw: Callable[..., Tensor], like: Tensor, generator: Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    drawn = draw(like.shape, generator=generator, dtype=wide_dtype(like), device=device)
    return drawn.to(like.device)
