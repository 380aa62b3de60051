"""What a solver requires of a perturbation model, and the base of the models here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rai_toolbox.perturbations.inputs import FLOATING, wrong


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
