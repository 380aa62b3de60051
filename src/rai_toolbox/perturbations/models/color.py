"""Color changes of images: brightness, contrast, saturation and gamma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.checks import check_setting, wrong
from rai_toolbox.perturbations.inputs import bounds_of
from rai_toolbox.perturbations.models.base import ImagePerturbation


def shift_color(
    data: Tensor, *settings: Tensor, data_range: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Change images (N, C, H, W) by brightness, contrast, saturation and gamma, and clamp them.

    The settings have one value per image, shape (N,). Each change is added to the image, so that a
    change of 0 leaves it as it is, bit for bit.
    """
    low, high = data_range
    width = high - low
    brightness, contrast, saturation, gamma = (value[:, None, None, None] for value in settings)
    wide = data.to(torch.promote_types(data.dtype, brightness.dtype))
    share = ((wide - low) / width).clamp(min=torch.finfo(wide.dtype).tiny, max=1.0)
    # share ** gamma - share, exactly 0 at gamma = 1
    wide = wide + width * share * torch.expm1((gamma - 1) * share.log())
    wide = wide + (contrast - 1) * (wide - wide.mean((1, 2, 3), keepdim=True))
    wide = wide + (saturation - 1) * (wide - wide.mean(1, keepdim=True))
    return (wide + brightness * width).clamp(low, high).to(data.dtype)


class ColorShift(ImagePerturbation):
    r"""Change brightness, contrast, saturation and gamma of each image.

    A pixel that is at the fraction :math:`x \in [0, 1]` of the data range changes in four steps

    .. math::
        x \leftarrow x^{(1 + g)^{a_3}}, \quad
        x \leftarrow m + (1 + c)^{a_1} (x - m), \quad
        x \leftarrow \bar x + (1 + s)^{a_2} (x - \bar x), \quad
        x \leftarrow \min(\max(x + b a_0, 0), 1)

    where m is the mean of the image and :math:`\bar x` that of the channels of the pixel, a is the
    image's row of the parameter `amounts`, shape (N, 4), whose set is ``LinfBall(1.0)``, and b, c,
    s and g are the limits. Amounts of 0 return the data, bit for bit. Data must be, and results
    are, in the data range. For a gray image (C = 1) saturation has no effect.

    Parameters
    ----------
    data_or_shape, init_fn, device, dtype
        See `AffineWarp`.
    brightness : float
        The largest number added to all pixels, as a fraction of the data range.
    contrast, saturation, gamma : float
        Amounts in [-1, 1] give factors, or exponents, from 1 / (1 + limit) to 1 + limit.
    data_range : tuple of float
        The least and the largest value of a pixel.

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
    perturbations", for brightness and contrast.

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
        for bound in data_range:
            check_setting("data_range", bound)
        if not data_range[0] < data_range[1]:
            raise wrong("data_range", "have a lower end below its upper", data_range)
        if isinstance(data_or_shape, Tensor):
            bounds_of(data_or_shape, data_range)  # which checks the data
        limits = dict(brightness=brightness, contrast=contrast, saturation=saturation, gamma=gamma)
        super().__init__(data_or_shape, limits, init_fn, device, dtype, init_fn_kwargs)
        self.data_range = data_range

    def forward(self, data: Tensor) -> Tensor:
        """Change images, shape (N, C, H, W), whose pixels are in the data range."""
        return shift_color(data, *self._settings_for(data), data_range=self.data_range)
