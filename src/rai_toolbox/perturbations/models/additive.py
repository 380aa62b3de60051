"""Data plus a perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rai_toolbox.batch import sub_ndim
from rai_toolbox.checks import wrong
from rai_toolbox.perturbations.inputs import without_history
from rai_toolbox.perturbations.models.base import InitializedModel


class AdditivePerturbation(InitializedModel):
    """Add the parameter `delta` to data: ``forward(data) = data + delta``.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        The shape of the data. A tensor also sets dtype and device of delta.
    init_fn : callable, optional
        Called as ``init_fn(delta, **init_fn_kwargs)`` to fill delta in place. By default it is 0.
    device, dtype : optional
        Of delta. By default those of the data, or torch's defaults.
    delta_ndim : int, optional
        Number of trailing dims of the data that delta has; a negative number is added to the number
        of dims. With -1, data of shape (N, C, H, W) share one delta of shape (C, H, W). By default
        delta has the shape of the data.
    **init_fn_kwargs
        Keyword arguments of `init_fn`.

    Raises
    ------
    TypeError
        If there are `init_fn_kwargs` without `init_fn`, or the dtype is not a floating-point one.
    ValueError
        If `delta_ndim` exceeds the number of dims.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import AdditivePerturbation
    >>> shift = AdditivePerturbation((2, 3), torch.nn.init.constant_, delta_ndim=-1, val=0.5)
    >>> shift(torch.zeros(2, 3)).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    delta: nn.Parameter

    _parameter = "delta"

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        init_fn: Callable[..., Any] | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        delta_ndim: int | None = None,
        **init_fn_kwargs: Any,
    ) -> None:
        shape = tuple(getattr(data_or_shape, "shape", data_or_shape))
        shared = len(shape) - sub_ndim(len(shape), delta_ndim, "delta_ndim")
        super().__init__(data_or_shape, shape[shared:], init_fn, device, dtype, init_fn_kwargs)
        self.per_datum = delta_ndim is None and len(shape) > 0

    def forward(self, data: Tensor) -> Tensor:
        """Perturb the data.

        Parameters
        ----------
        data : Tensor
            Its shape broadcasts with that of delta.

        Returns
        -------
        Tensor
        """
        return data + self.delta

    def extra_repr(self) -> str:
        """The shape of delta, for `repr`."""
        return f"delta: {tuple(self.delta.shape)}"


class MaskedPerturbation(AdditivePerturbation):
    """Add a perturbation to selected entries only: ``forward(data) = data + delta * mask``.

    All other entries of delta have gradient 0, so that no optimizer spends a step on them.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        See `AdditivePerturbation`.
    mask : Tensor of bool
        True where data may change; its shape broadcasts with that of delta.

    Raises
    ------
    TypeError
        If `mask` does not hold bools.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import MaskedPerturbation
    >>> first = MaskedPerturbation(torch.zeros(1, 2), torch.tensor([True, False]))
    >>> _ = torch.nn.init.ones_(first.delta)
    >>> first(torch.zeros(1, 2)).tolist()
    [[1.0, 0.0]]
    """

    mask: Tensor

    @torch.inference_mode(False)
    def __init__(self, data_or_shape: Tensor | Sequence[int], mask: Tensor) -> None:
        check_mask(mask)
        super().__init__(data_or_shape)
        self.register_buffer("mask", without_history(mask))

    def forward(self, data: Tensor) -> Tensor:
        """See `AdditivePerturbation.forward`."""
        return data + self.delta * self.mask


def check_mask(mask: object) -> None:
    """Raise unless `mask` is a tensor of bools."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise wrong("mask", "be a tensor of bools", got, TypeError)
