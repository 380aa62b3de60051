"""Images in another light: brighter or darker, with more or less contrast, saturation, gamma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting
from rai_toolbox.perturbations.amounts import Amounts

__all__ = ["ColorShift", "shift_color"]


def shift_color(
    data: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    gamma: Tensor,
    *,
    data_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Change images (N, C, H, W) by one value each, shape (N,), of the four; then clamp them.

    Each change is added to the image, so that none leaves it as it is, bit for bit.
    """
    low, high = data_range
    width = high - low
    brightness, contrast, saturation, gamma = (
        value[:, None, None, None] for value in (brightness, contrast, saturation, gamma)
    )
    wide = data.to(torch.promote_types(data.dtype, brightness.dtype))
    share = ((wide - low) / width).clamp(min=torch.finfo(wide.dtype).tiny, max=1.0)
    # share ** gamma - share, without what rounding would leave of it at gamma = 1
    wide = wide + width * share * torch.expm1((gamma - 1) * share.log())
    wide = wide + (contrast - 1) * (wide - wide.mean((1, 2, 3), keepdim=True))
    wide = wide + (saturation - 1) * (wide - wide.mean(1, keepdim=True))
    return (wide + brightness * width).clamp(low, high).to(data.dtype)


class ColorShift(Amounts):
    r"""Change brightness, contrast, saturation and gamma of each image.

    With the share :math:`x \in [0, 1]` of the data range that a pixel has, one after the other

    .. math::
        x \leftarrow x^{(1 + g)^{a_3}}, \quad
        x \leftarrow m + (1 + c)^{a_1} (x - m), \quad
        x \leftarrow \bar x + (1 + s)^{a_2} (x - \bar x), \quad
        x \leftarrow \min(\max(x + b a_0, 0), 1)

    where m is the mean of the image and :math:`\bar x` that of the channels of the pixel, a is a
    row of the parameter `amounts`, shape (N, 4), whose set is ``LinfBall(1.0)``, and b, c, s and g
    are the limits. Amounts of 0 give the data back, bit for bit; all else is in the data range,
    where the data have to be. Of a gray image (C = 1) the saturation does nothing.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        Images, shape (N, C, H, W), or that shape. A tensor gives dtype and device, too.
    init_fn : callable, optional
        ``init_fn(amounts, **init_fn_kwargs)`` fills the amounts in place. By default they are 0.
    brightness : float
        The most that is added to all pixels, as a share of the data range.
    contrast, saturation, gamma : float
        Amounts in [-1, 1] give factors, or exponents, of 1 / (1 + limit) to 1 + limit.
    data_range : tuple of float
        The least and the largest value of a pixel.
    device, dtype : optional
        Of the amounts, in place of the data's.

    Raises
    ------
    TypeError
        If the data are not of a floating-point dtype, or there are `init_fn_kwargs` without an
        `init_fn`.
    ValueError
        If the shape does not have four dims, a limit is negative or not finite, `data_range` is
        empty, or data are given that are not in it.

    References
    ----------
    Hendrycks, Dietterich (2019), "Benchmarking neural network robustness to common corruptions and
    perturbations", whose brightness and contrast these resemble.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import ColorShift
    >>> image = torch.tensor([[[[0.2, 0.4, 0.6]]]])
    >>> shift = ColorShift(image, torch.nn.init.ones_, brightness=0.3, contrast=1.0, gamma=0.0)
    >>> shift(image).detach()
    tensor([[[[0.3000, 0.7000, 1.0000]]]])
    """

    _factors = frozenset({"contrast", "saturation", "gamma"})

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        init_fn: Callable[..., object] | None = None,
        *,
        brightness: float = 0.2,
        contrast: float = 0.3,
        saturation: float = 0.3,
        gamma: float = 0.3,
        data_range: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **init_fn_kwargs: Any,
    ) -> None:
        _check_range(data_range)
        if isinstance(data_or_shape, Tensor):
            _check_inside(data_or_shape, data_range)
        limits = {
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "gamma": gamma,
        }
        super().__init__(data_or_shape, limits, init_fn, device, dtype, init_fn_kwargs)
        self.data_range = data_range

    def forward(self, data: Tensor) -> Tensor:
        """Change images, shape (N, C, H, W), whose pixels are in the data range."""
        return shift_color(data, *self._settings_for(data), data_range=self.data_range)


def _check_range(data_range: tuple[float, float]) -> None:
    for bound in data_range:
        check_setting("data_range", bound)
    low, high = data_range
    if not low < high:
        raise ValueError(f"`data_range` must have a lower end below its upper, got {data_range}")


def _check_inside(data: Tensor, data_range: tuple[float, float]) -> None:
    if data.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(data))
    # As rounded to the dtype of the data, which cannot be closer to a bound than that.
    least, most = torch.tensor(data_range, dtype=data.dtype).tolist()
    if not (least <= low and high <= most):
        raise ValueError(f"`data` must be in `data_range`, {data_range}, got {low} to {high}")
