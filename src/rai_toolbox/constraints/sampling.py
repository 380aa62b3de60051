"""Random numbers for samples: drawn where the generator is, in float64."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints.kernels.blocks import wide_dtype


def uniform(like: Tensor, generator: Generator | None) -> Tensor:
    """Uniform on [0, 1), in the shape and on the device of `like`."""
    device = like.device if generator is None else generator.device
    drawn = torch.empty(like.shape, dtype=wide_dtype(like), device=device)
    return drawn.uniform_(generator=generator).to(like.device)


def normal(like: Tensor, generator: Generator | None) -> Tensor:
    """Standard normal, in the shape and on the device of `like`."""
    device = like.device if generator is None else generator.device
    drawn = torch.empty(like.shape, dtype=wide_dtype(like), device=device)
    return drawn.normal_(generator=generator).to(like.device)


def exponential(like: Tensor, generator: Generator | None) -> Tensor:
    """Exponential of rate 1, in the shape and on the device of `like`."""
    return -torch.log1p(-uniform(like, generator))
