"""The same values in other strides, and comparison bit for bit whatever the strides are."""

import torch
from torch import Tensor


def _stored_in_order(x: Tensor, order: list[int]) -> Tensor:
    """A copy of x whose dims lie in memory in this order, the last one densest."""
    back = [order.index(dim) for dim in range(x.ndim)]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _transposed(x: Tensor) -> Tensor:
    dims = list(range(x.ndim))
    return _stored_in_order(x, dims[:-2] + dims[-2:][::-1])


def _reversed(x: Tensor) -> Tensor:
    return _stored_in_order(x, list(range(x.ndim))[::-1])


def _channels_last(x: Tensor) -> Tensor:
    dims = list(range(x.ndim))
    return _stored_in_order(x, dims[:1] + dims[2:] + dims[1:2])


def _narrowed(x: Tensor) -> Tensor:
    """Inside a wider tensor: rows are dense, with a gap between them."""
    if x.ndim == 0:
        return x.new_full((3,), -7)[1].copy_(x)
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), -7)
    return wider[..., 2 : 2 + x.shape[-1]].copy_(x)


def _sliced(x: Tensor) -> Tensor:
    """Every second element along every dim."""
    wider = x.new_full([2 * size for size in x.shape], -7)
    return wider[(slice(None, None, 2),) * x.ndim].copy_(x)


# Each gives a copy of a tensor, in a storage of its own.
LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "transposed": _transposed,
    "reversed": _reversed,
    "channels_last": _channels_last,
    "narrowed": _narrowed,
    "sliced": _sliced,
}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors have the same dtype, shape and bits: -0.0 is not 0.0."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    # a copy, because one element may have any stride
    x = x.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    return x.reshape(-1).view(torch.uint8)
