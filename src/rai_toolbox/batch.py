"""Views of tensors as batches of N sub-tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from rai_toolbox.checks import wrong


def check_param_ndim(param_ndim: object, name: str = "param_ndim") -> None:
    """Raise unless `param_ndim` is an int, which a bool is not, or None."""
    is_int = isinstance(param_ndim, int) and not isinstance(param_ndim, bool)
    if param_ndim is not None and not is_int:
        raise TypeError(f"`{name}` must be an int or None, got {param_ndim!r}")


def sub_ndim(ndim: int, param_ndim: int | None, name: str = "param_ndim") -> int:
    """Number of trailing dims, of a tensor with `ndim` dims, that make one sub-tensor."""
    check_param_ndim(param_ndim, name)
    if param_ndim is None:
        return ndim
    if abs(param_ndim) > ndim:
        rule = f"be None or lie in [-{ndim}, {ndim}] for a tensor with {ndim} dims"
        if ndim == 0:
            rule = "be None for a tensor with 0 dims"
        raise wrong(name, rule, param_ndim)
    return param_ndim if param_ndim >= 0 else ndim + param_ndim


def batch_shape(shape: Sequence[int], param_ndim: int | None) -> tuple[int, ...]:
    """Shape `(N, d0, ...)` of the batch view of a tensor; at least 2-D."""
    if param_ndim == -1 and len(shape) > 1 and type(param_ndim) is int:  # as it is, mostly
        return tuple(shape)
    split = len(shape) - sub_ndim(len(shape), param_ndim)
    return (prod(shape[:split]), *(shape[split:] or (1,)))


def view_or_copy(tensor: Tensor, shape: Sequence[int]) -> tuple[Tensor, bool]:
    """`tensor` in another shape, and whether it is a copy, as its strides allow no view."""
    if tensor.shape == shape:
        return tensor, False
    if torch.compiler.is_compiling() and not tensor.is_contiguous():
        return tensor.reshape(shape), True  # (a view that fails would fail the compiler)
    try:
        return tensor.view(shape), False
    except RuntimeError:
        return tensor.reshape(shape), True


def to_batch(tensor: Tensor, param_ndim: int | None) -> Tensor:
    """View a tensor as a stack of N sub-tensors with `param_ndim` dims each.

    Parameters
    ----------
    tensor : Tensor, shape (...)
        Any strides. The result is a view wherever the strides allow one, else a copy.
    param_ndim : int or None
        ``k > 0``: the last k dims are the sub-tensor, all dims before them are flattened to N.
        ``0``: each element is a sub-tensor. ``k < 0``: `tensor.ndim + k` dims, so -1 means all
        but the first. ``None``: the whole tensor is one sub-tensor.

    Returns
    -------
    Tensor, shape (N, d0, ...)
        Always at least 2-D.

    Raises
    ------
    ValueError
        If ``abs(param_ndim) > tensor.ndim``.
    TypeError
        If `param_ndim` is not an int or None.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox import to_batch
    >>> x = torch.zeros(3, 5, 2)
    >>> [tuple(to_batch(x, k).shape) for k in (0, 1, -1, None)]
    [(30, 1), (15, 2), (3, 5, 2), (1, 3, 5, 2)]
    """
    return view_or_copy(tensor, batch_shape(tensor.shape, param_ndim))[0]
