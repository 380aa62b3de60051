"""Data plus a perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdditivePerturbation", "MaskedPerturbation"]


class AdditivePerturbation(nn.Module):
    """Add a perturbation, the parameter `delta`, to data: ``forward(data) = data + delta``.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        The shape of the data; a tensor gives its dtype and device, too. Its values are not used.
    init_fn : callable, optional
        Called as ``init_fn(delta, **init_fn_kwargs)`` to fill delta in place; by default it is 0.
    device, dtype : optional
        Those of delta, instead of the data's, or of torch's defaults.
    delta_ndim : int, optional
        Number of trailing dims of the data that delta has; negative: so many fewer. -1 for data of
        shape (N, C, H, W) makes one perturbation of shape (C, H, W) for all of them. By default
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
        super().__init__()
        if init_fn is None and init_fn_kwargs:
            raise TypeError(
                "`init_fn` must be given with keyword arguments for it, got None and "
                f"{', '.join(init_fn_kwargs)}"
            )
        if isinstance(data_or_shape, Tensor):
            shape: Sequence[int] = data_or_shape.shape
            device = data_or_shape.device if device is None else device
            dtype = data_or_shape.dtype if dtype is None else dtype
        else:
            shape = tuple(data_or_shape)
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(
                "`dtype` of a perturbation must be a floating-point one (images of bytes: "
                f"`data.float() / 255`), got {dtype}"
            )
        self.per_datum = delta_ndim is None and len(shape) > 0
        self._init_fn, self._init_fn_kwargs = init_fn, init_fn_kwargs
        shape = shape[len(shape) - _delta_ndim(delta_ndim, len(shape)) :]
        self.delta = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: zeros, which `init_fn` then fills, by chance maybe."""
        values = self.delta.detach()
        values.zero_()
        if self._init_fn is not None:
            self._init_fn(values, **self._init_fn_kwargs)

    def forward(self, data: Tensor) -> Tensor:
        """Perturb the data.

        Parameters
        ----------
        data : Tensor
            Of a shape that broadcasts with that of delta.

        Returns
        -------
        Tensor
        """
        return data + self.delta

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"delta: {tuple(self.delta.shape)}"


class MaskedPerturbation(AdditivePerturbation):
    """Add a perturbation to some of the entries only: ``forward(data) = data + delta * mask``.

    The others have the gradient 0, so that no optimizer spends anything on them.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        See `AdditivePerturbation`.
    mask : Tensor of bool
        True where data may change; of a shape that broadcasts with delta's.

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

    def __init__(self, data_or_shape: Tensor | Sequence[int], mask: Tensor) -> None:
        check_mask(mask)
        super().__init__(data_or_shape)
        self.register_buffer("mask", mask)

    def forward(self, data: Tensor) -> Tensor:
        """See `AdditivePerturbation.forward`."""
        return data + self.delta * self.mask


def check_mask(mask: object) -> None:
    """Raise unless `mask` is a tensor of bools."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(f"`mask` must be a tensor of bools, got {got}")


def _delta_ndim(given: int | None, ndim: int) -> int:
    if given is None:
        return ndim
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"`delta_ndim` must be an int or None, got {given!r}")
    if abs(given) > ndim:
        raise ValueError(
            f"`delta_ndim` must lie in [-{ndim}, {ndim}] for data with {ndim} dims, got {given}"
        )
    return given if given >= 0 else ndim + given
