"""What a solver requires of a perturbation model, and the bases of the models here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log1p
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rai_toolbox.checks import check_finite, wrong
from rai_toolbox.perturbations.inputs import FLOATING


@runtime_checkable
class PerturbationModel(Protocol):
    """A parametric change of data: called with data, it returns the perturbed data.

    A solver optimizes its parameters. An attribute `per_datum` that is True promises that each
    parameter has a leading dim that runs over the examples, and that row i of the result depends
    deterministically on row i of the data and of the parameters alone. Then a solver treats the
    rows separately, and writes the best parameters of each example back.

    Examples
    --------
    >>> from rai_toolbox.perturbations import AdditivePerturbation, PerturbationModel
    >>> isinstance(AdditivePerturbation((2, 3)), PerturbationModel)
    True
    """

    def __call__(self, data: Any, /) -> Tensor:
        """Perturb the data."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """The parameters to optimize."""
        ...


class InitializedModel(nn.Module):
    """A module with a parameter that starts at 0, or at what an `init_fn` fills in.

    The subclass names the parameter. Data, if given, set its device and dtype.
    """

    _parameter: ClassVar[str]

    @torch.inference_mode(False)
    def __init__(
        self,
        data_or_shape: Tensor | Sequence[int],
        shape: Sequence[int],
        init_fn: Callable[..., Any] | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
        init_fn_kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if init_fn is None and init_fn_kwargs:
            got = f"None and {', '.join(init_fn_kwargs)}"
            raise wrong("init_fn", "be given with its arguments", got, TypeError)
        like = data_or_shape if isinstance(data_or_shape, Tensor) else torch.empty(0)
        values = like.new_zeros(shape, device=device, dtype=dtype)
        if not (values.is_floating_point() or values.is_complex()):
            raise wrong("dtype", FLOATING, values.dtype, TypeError)
        self._init_fn, self._init_fn_kwargs = init_fn, init_fn_kwargs
        self.register_parameter(self._parameter, nn.Parameter(values))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Put the parameter back to its start; `init_fn` may draw another random one."""
        values = self.get_parameter(self._parameter).detach().zero_()
        if self._init_fn is not None:
            self._init_fn(values, **self._init_fn_kwargs)


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
