"""Base of the perturbation models: how their parameter starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rai_toolbox.perturbations.inputs import FLOATING, wrong

__all__ = ["InitializedModel", "shape_and_options"]


class InitializedModel(nn.Module):
    """A module with a parameter that starts at 0, or at what an `init_fn` fills in.

    The subclass names the parameter.
    """

    _parameter: ClassVar[str]

    def __init__(
        self,
        shape: Sequence[int],
        options: Mapping[str, Any],
        init_fn: Callable[..., Any] | None,
        init_fn_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if init_fn is None and init_fn_kwargs:
            got = f"None and {', '.join(init_fn_kwargs)}"
            raise wrong("init_fn", "be given with its arguments", got, TypeError)
        self._init_fn, self._init_fn_kwargs = init_fn, init_fn_kwargs
        self.register_parameter(self._parameter, nn.Parameter(torch.zeros(shape, **options)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put the parameter back to its start; `init_fn` may draw another random one."""
        values = self.get_parameter(self._parameter).detach().zero_()
        if self._init_fn is not None:
            self._init_fn(values, **self._init_fn_kwargs)


def shape_and_options(
    data_or_shape: Tensor | Sequence[int],
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of the data, and device and dtype of the parameters: given, or those of a tensor.

    Raises
    ------
    TypeError
        If the dtype is not a floating-point one.
    """
    if isinstance(data_or_shape, Tensor):
        device = data_or_shape.device if device is None else device
        dtype = data_or_shape.dtype if dtype is None else dtype
        data_or_shape = data_or_shape.shape
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise wrong("dtype", FLOATING, dtype, TypeError)
    return tuple(data_or_shape), {"device": device, "dtype": dtype}
