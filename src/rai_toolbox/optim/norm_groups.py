"""Parameter groups of a module for norm-constrained training: a norm ball for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from math import prod, sqrt
from typing import Any

from torch import Tensor, nn

from rai_toolbox.checks import check_positive, check_type, wrong
from rai_toolbox.constraints.balls import L2Ball, LinfBall
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.spectral import SpectralBall
from rai_toolbox.optim.wrapper import Group

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rms_scale(rows: int, columns: int) -> float:
    """``sqrt(rows / columns)``: a map of that norm keeps the root mean square of its input."""
    return sqrt(rows / columns)


def norm_groups(
    module: nn.Module,
    radius: float = 1.0,
    *,
    head: str | None = None,
    head_radius: float | None = None,
    scale: Callable[[int, int], float] = rms_scale,
    verbose: bool = True,
) -> list[Group]:
    """Return the parameter groups of a module for `Scion`: to each layer the ball of its norm.

    As Pethick et al. (2025) propose, for m outputs and k inputs:

    - the weight of a layer, (m, k): ``SpectralBall(radius * scale(m, k))``;
    - that of a convolution: the same with ``flatten=1``, where k counts the entries of a kernel;
    - that of the head: ``LinfBall(head_radius / k)``;
    - an embedding: ``L2Ball(radius * sqrt(k))`` for each row;
    - a bias, and all else of less than 2 dims or without elements: ``L2Ball(radius * sqrt(size))``.

    Parameters whose sets are equal are in one group. The radii bound the Lipschitz constant of the
    module: choose them so that the start is not far outside.

    Parameters
    ----------
    module : nn.Module
        Parameters that modules share are in one group. Frozen ones are in groups, too.
    radius : float
        Multiplies the norms of all but the head, > 0.
    head : str, optional
        The name of the head's weight; by default that of the last `nn.Linear`, if there is one,
        also where it shares the weight of an embedding. Empty for none.
    head_radius : float, optional
        By default `radius`.
    scale : callable
        The radius of a matrix by its rows m and columns k; by default ``sqrt(m / k)``. Muon's is
        ``lambda m, k: sqrt(max(1, m / k))``.
    verbose : bool
        Print the set of each parameter.

    Returns
    -------
    list of dict
        The `params` of an optimizer.

    Raises
    ------
    TypeError, ValueError
        If a radius is not > 0, or no parameter has the name of the head.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.optim import Scion, norm_groups
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, 9, 3), torch.nn.Flatten(), torch.nn.Linear(9, 4)
    ... )
    >>> optim = Scion(norm_groups(model, 2.0, head_radius=9.0), lr=0.1)
    0.weight (9, 1, 3, 3) SpectralBall(epsilon=2.0, flatten=1)
    0.bias   (9,)         L2Ball(epsilon=6.0)
    2.weight (4, 9)       LinfBall(epsilon=1.0)
    2.bias   (4,)         L2Ball(epsilon=4.0)
    """
    check_type("module", module, nn.Module, "be a torch.nn.Module")
    check_positive("radius", radius)
    head_radius = radius if head_radius is None else check_positive("head_radius", head_radius)
    named: dict[str, Tensor] = dict(module.named_parameters())
    head = _last_linear(module, named) if head is None else head
    if head and head not in named:
        raise wrong("head", f"be one of {list(named)}", repr(head))
    owners: dict[Tensor, nn.Module] = {
        p: owner for owner in module.modules() for p in owner.parameters(recurse=False)
    }
    if not named:
        raise ValueError(f"`module` must have parameters, got {module!r}")
    groups: dict[Any, Group] = {}
    for name, param in named.items():
        if name == head and param.numel() > 0:
            ball: Constraint = LinfBall(head_radius / prod(param.shape[1:]))
            settings: dict[str, Any] = {"constraint": ball, "param_ndim": None}
        else:
            settings = _settings(param, owners[param], radius, scale)
        group = groups.setdefault(tuple(settings.values()), {"params": [], **settings})
        group["params"].append((name, param))
    if verbose:
        _print(groups.values(), list(named))
    return list(groups.values())


def _last_linear(module: nn.Module, named: dict[str, Tensor]) -> str:
    """The name of the weight of the last linear layer, which an embedding may share."""
    last = None
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            last = layer.weight
    return next((name for name, param in named.items() if param is last), "")


def _settings(
    param: Tensor, owner: nn.Module, radius: float, scale: Callable[[int, int], float]
) -> dict[str, Any]:
    """The set of a parameter that is not the head's weight, and its sub-tensors."""
    if param.ndim < 2 or param.numel() == 0:
        return {"constraint": L2Ball(radius * sqrt(param.numel())), "param_ndim": None}
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return {"constraint": L2Ball(radius * sqrt(param.shape[1])), "param_ndim": 1}
    size = param.shape[0], prod(param.shape[1:])
    if isinstance(owner, _TRANSPOSED):  # its first dim is that of the inputs
        size = size[::-1]
    flatten = 1 if param.ndim > 2 else None
    return {"constraint": SpectralBall(radius * scale(*size), flatten=flatten), "param_ndim": None}


def _print(groups: Iterable[Group], names: list[str]) -> None:
    """A line for each parameter: name, shape and set."""
    rows = {
        name: (str(tuple(param.shape)), _shown(group["constraint"]))
        for group in groups
        for name, param in group["params"]
    }
    widths = max(map(len, names)), max(len(shape) for shape, _ in rows.values())
    for name in names:
        shape, constraint = rows[name]
        print(f"{name:{widths[0]}} {shape:{widths[1]}} {constraint}")  # noqa: T201 (asked for)


def _shown(constraint: Constraint) -> str:
    """A set with the settings that are not their defaults."""
    given = [
        f"{field.name}={value}"
        for field in fields(constraint)
        if (value := getattr(constraint, field.name)) is not field.default
    ]
    return f"{type(constraint).__name__}({', '.join(given)})"
