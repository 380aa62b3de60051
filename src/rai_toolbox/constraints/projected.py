"""A projection as a module: for parametrizations, and as a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rai_toolbox.batch import check_param_ndim, to_batch
from rai_toolbox.checks import check_type
from rai_toolbox.constraints.base import Constraint


class Projected(nn.Module):
    """Project what goes in onto a set; autograd differentiates it.

    With `torch.nn.utils.parametrize` a parameter is what it is by the projection of another one,
    which any optimizer trains, and is in the set at any time. As the last layer of a model the
    outputs are in the set, such as shares of a portfolio.

    The derivative is that of `Constraint.project`: it is 0 across the boundary, so that of a
    gradient outside only what is along the set remains. A start outside the set is projected first.

    Parameters
    ----------
    constraint : Constraint
        The set of each sub-tensor. Its tensor settings move with the module to another device.
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another type; in `forward`, if the input does not fit the set.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.utils import parametrize
    >>> from rai_toolbox.constraints import Projected, Simplex
    >>> layer = torch.nn.Linear(3, 2)
    >>> _ = parametrize.register_parametrization(layer, "weight", Projected(Simplex()))
    >>> layer.weight.sum(1)  # each row is in the simplex
    tensor([1., 1.], grad_fn=<SumBackward1>)
    >>> Projected(Simplex())(torch.tensor([[0.5, 2.1, -3.5]]))
    tensor([[0., 1., 0.]])
    """

    constraint: Constraint
    place: Tensor

    def __init__(self, constraint: Constraint, param_ndim: int | None = -1) -> None:
        super().__init__()
        check_type("constraint", constraint, Constraint, "be a set of rai_toolbox.constraints")
        check_param_ndim(param_ndim)
        self.constraint, self.param_ndim = constraint, param_ndim
        self.register_buffer("place", torch.empty(0), persistent=False)  # where the module is

    def forward(self, x: Tensor) -> Tensor:
        """The nearest point of the set to each sub-tensor of x.

        Parameters
        ----------
        x : Tensor
            Of a real floating-point dtype.

        Returns
        -------
        Tensor
            In the shape of x.
        """
        return self.constraint.project(to_batch(x, self.param_ndim)).reshape(x.shape)

    def right_inverse(self, x: Tensor) -> Tensor:
        """What a parametrization stores of a new value: its projection."""
        return self.forward(x)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.constraint!r}, param_ndim={self.param_ndim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Projected:
        before = self.place.device
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.place.device != before:  # a dtype stays: in half precision it were another set
            self.constraint = self.constraint.to(self.place.device)
        return self
