"""Affine warps of images: rotation, translation, scale and shear, one map per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from rai_toolbox.autograd import with_value
from rai_toolbox.perturbations.models.base import ImagePerturbation

_PADDINGS = ("zeros", "border", "reflection")


def affine_maps(
    size: Sequence[int], degrees: Tensor, right: Tensor, down: Tensor, zoom: Tensor, shear: Tensor
) -> Tensor:
    """The maps from output to input pixels for `affine_grid`, shape (N, 2, 3).

    The content of the image is sheared, zoomed and turned about its center, in pixels, and then
    moved by fractions of width and height.
    """
    height, width = size[-2:]
    angle = torch.deg2rad(degrees)
    sine, cosine, aspect = angle.sin() / zoom, angle.cos() / zoom, height / width
    xx, xy = cosine - shear * sine, (-sine - shear * cosine) * aspect
    yx, yy = sine / aspect, cosine
    right, down = 2 * right, 2 * down  # in `affine_grid`, width and height are 2
    rows = [xx, xy, -(xx * right + xy * down), yx, yy, -(yx * right + yy * down)]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def warp(data: Tensor, maps: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Warp images (N, C, H, W) by `affine_maps`, with bilinear interpolation.

    An identity map returns its image, bit for bit. All pixels stay in the range of their image, to
    which padding with zeros adds 0.
    """
    wide = data.to(maps.dtype)
    grid = affine_grid(maps, list(data.shape), align_corners=False)
    warped = grid_sample(wide, grid, padding_mode=padding_mode, align_corners=False)
    with torch.no_grad():
        # The interpolation weights of a pixel sum up to 1 up to rounding: clamp to the range.
        low, high = (extreme((1, 2, 3), keepdim=True) for extreme in (data.amin, data.amax))
        if padding_mode == "zeros":
            low, high = low.clamp(max=0), high.clamp(min=0)
        identity = (maps == maps.new_tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])).flatten(1).all(1)
        value = warped.to(data.dtype).clamp(low, high)
        value = torch.where(identity[:, None, None, None], data, value)
    return with_value(value, warped.to(data.dtype))


class AffineWarp(ImagePerturbation):
    r"""Turn, move, zoom and shear each image: a perturbation that is not additive.

    The content at p (pixels from the center, y down) moves to

    .. math::
        \rho^{a_3} R(a_0 \phi) \begin{pmatrix} 1 & a_4 k \\ 0 & 1 \end{pmatrix} p
        + \tau \begin{pmatrix} a_1 W \\ a_2 H \end{pmatrix}

    where a is the image's row of the parameter `amounts`, shape (N, 5), whose set is
    ``LinfBall(1.0)``, with the limits :math:`\phi, \tau, k` and :math:`\rho` = 1 + `scale`.
    Interpolation is bilinear. Amounts of 0 return the data, bit for bit. The derivative there is
    one-sided, as for any linear interpolation at a grid point, so start from random amounts. All
    pixels stay in the range of their image.

    Parameters
    ----------
    data_or_shape : Tensor or sequence of int
        Images, shape (N, C, H, W), or that shape. A tensor also sets dtype and device.
    init_fn : callable, optional
        Called as ``init_fn(amounts, **init_fn_kwargs)`` to fill the amounts in place. By default 0.
    rotation : float
        The largest rotation, in degrees; positive amounts turn counter-clockwise.
    translation : float
        The largest shift, as a fraction of width and height; positive amounts move right and down.
    scale : float
        The largest zoom: amounts in [-1, 1] give factors from 1 / (1 + scale) to 1 + scale.
    shear : float
        The largest shift of a row, per row below the center.
    padding_mode : {"zeros", "border", "reflection"}
        Values outside the image, see `torch.nn.functional.grid_sample`.
    device, dtype : optional
        Of the amounts. By default those of the data, or torch's defaults.

    Raises
    ------
    TypeError
        If the data are not of a floating-point dtype, or there are `init_fn_kwargs` without an
        `init_fn`.
    ValueError
        If the shape does not have four dims, a limit is negative or not finite, or `padding_mode`
        is unknown.

    References
    ----------
    Engstrom, Tran, Tsipras, Schmidt, Madry (2019), "Exploring the landscape of spatial robustness".

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import AffineWarp
    >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> turn = AffineWarp(image, torch.nn.init.ones_, rotation=90.0, translation=0.0, scale=0.0)
    >>> turn(image).detach().round(decimals=4)
    tensor([[[[2., 4.],
              [1., 3.]]]])
    """

    _factors = frozenset({"scale"})

    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        init_fn: Callable[..., object] | None = None,
        *,
        rotation: float = 30.0,
        translation: float = 0.1,
        scale: float = 0.1,
        shear: float = 0.0,
        padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **init_fn_kwargs: Any,
    ) -> None:
        if padding_mode not in _PADDINGS:
            raise ValueError(f"`padding_mode` must be one of {_PADDINGS}, got {padding_mode!r}")
        limits = {"rotation": rotation, "right": translation, "down": translation}
        limits |= {"scale": scale, "shear": shear}
        super().__init__(data_or_shape, limits, init_fn, device, dtype, init_fn_kwargs)
        self.padding_mode = padding_mode

    def forward(self, data: Tensor) -> Tensor:
        """Warp images, shape (N, C, H, W)."""
        maps = affine_maps(data.shape, *self._settings_for(data))
        return warp(data, maps.to(torch.promote_types(data.dtype, maps.dtype)), self.padding_mode)
