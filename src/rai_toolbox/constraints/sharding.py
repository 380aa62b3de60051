"""Sets of tensors that are divided between ranks: the only file about DTensors.

What a set couples must be whole on some rank. Where it is, as with elementwise sets or with sets of
rows on shards of rows, each rank acts on its own shard and nothing is sent. Otherwise the tensor is
redistributed and brought back: along another dim if there is one, so that no rank holds all of it.

`torch.distributed.tensor`, which takes long to import, is there if there is a DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    import torch.distributed.tensor

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes of tensors that are not sharded."""


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, of which each rank has a part."""
    return type(x) not in PLAIN and hasattr(x, "placements")


def on_shards_(x: Any, coupled: Iterable[int], act_: Callable[[Any], Tensor]) -> Tensor:
    """Let ``act_(whole)`` change a sharded x in place, along whose dims `coupled` it is whole.

    `whole` is x, or x redistributed; `act_` returns what becomes of its local tensor, which it may
    write to.
    """
    whole = with_whole(x, coupled)
    local = act_(whole)
    if whole is not x or torch.is_grad_enabled():
        changed = _joined(local, whole.device_mesh, whole.placements, whole)
        x.copy_(changed.redistribute(placements=x.placements))
    return x


def with_whole(x: Any, coupled: Iterable[int]) -> Any:
    """A sharded x, or the same numbers divided along other dims than those in `coupled`."""
    tensor, coupled = torch.distributed.tensor, set(coupled)
    others = [dim for dim, size in enumerate(x.shape) if size > 1 and dim not in coupled]
    everywhere = tensor.Replicate()
    elsewhere = tensor.Shard(others[0]) if others else everywhere
    placements = tuple(
        everywhere if p.is_partial() else elsewhere if getattr(p, "dim", None) in coupled else p
        for p in x.placements
    )
    return x if placements == x.placements else x.redistribute(placements=placements)


def local_of(x: Any) -> Tensor:
    """The part of a sharded x that this rank has, to be written to."""
    local: Tensor = x.to_local()
    return local.clone() if torch.is_grad_enabled() else local


def local_part(scale: Any, x: Any) -> Tensor:
    """The part of a sharded `scale`, which broadcasts against x, for this rank's part of x.

    If a dim has fewer entries than there are ranks, torch refuses to multiply the two DTensors.
    """
    return scale.redistribute(placements=_divided_as(scale.shape, x)).to_local()


def beside(setting: Any, x: Any) -> Any:
    """A setting, which broadcasts against x, as what computes with x; nothing is sent."""
    if not (isinstance(setting, Tensor) and is_sharded(x)):
        return setting
    aligned = setting.reshape((1,) * (x.ndim - setting.ndim) + setting.shape)
    return _divided(aligned, x, _divided_as(aligned.shape, x))


def complete(x: Any) -> Tensor:
    """All of x on each rank: for small tensors, such as a sum, of which `float` reads a part."""
    return x.full_tensor() if is_sharded(x) else x


def check_view(x: Any, shape: Sequence[int]) -> None:
    """Raise if x is sharded such that its shards are no shards of x in another shape."""
    if not is_sharded(x) or tuple(x.shape) == tuple(shape):
        return
    try:
        if x.numel() == 0:  # torch would search for the dims of such a view endlessly
            raise RuntimeError
        x.detach().view(shape)
    except RuntimeError:
        raise ValueError(
            f"`param_ndim` must leave shards as they are, but the shape {tuple(x.shape)} with the "
            f"placements {x.placements} is no batch of shape {tuple(shape)} without gathering "
            "it; use param_ndim=-1, or shard a dim evenly, or one of a sub-tensor"
        ) from None


# The methods of a set. A set has `coupled_dims(ndim)`, `_whole_dims(shape)` and `_map(change)`, see
# `Constraint`.


def _project_(method: Any, constraint: Any, x: Tensor) -> Tensor:
    return on_shards_(
        x,
        constraint._whole_dims(x.shape),
        lambda whole: method(_for_shard(constraint, whole), local_of(whole)),
    )


def _lmo(method: Any, constraint: Any, gradient: Any) -> Any:
    def answer_(part: Any, local: Tensor) -> Tensor:
        return local.copy_(method(part, local))

    return _project_(answer_, constraint, gradient.detach().clone())


def _violation(method: Any, constraint: Any, x: Tensor) -> Tensor:
    """A plain tensor, the same on each rank: it is small, and x may be one of many."""
    whole = with_whole(x.detach(), constraint._whole_dims(x.shape))
    found: Tensor = method(_for_shard(constraint, whole), whole.to_local()).unsqueeze(-1)
    kept = [dim for dim in range(x.ndim) if dim not in constraint.coupled_dims(x.ndim)]
    parts, placements = 1, []
    for size, p in zip(whole.device_mesh.shape, whole.placements, strict=True):
        if p.is_replicate() or (p.dim in kept and kept.index(p.dim) == p.dim):
            placements.append(p)
        elif p.dim in kept:
            placements.append(torch.distributed.tensor.Shard(kept.index(p.dim)))
        else:  # each rank has some entries of all sub-tensors: the largest value counts
            placements.append(torch.distributed.tensor.Shard(len(kept)))
            parts *= size
    like = torch.empty((*(x.shape[dim] for dim in kept), parts), device="meta")
    return complete(_joined(found, whole.device_mesh, placements, like)).amax(-1)


def _sample_(method: Any, constraint: Any, x: Any, generator: Generator | None = None) -> Tensor:
    """Each rank draws all and keeps its part, so that it is what one process would draw."""
    drawn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    method(constraint, drawn, generator)
    return x.copy_(_divided(drawn, x, x.placements))


ON_SHARDS = {"project_": _project_, "lmo": _lmo, "violation": _violation, "sample_": _sample_}
"""What each method of a set does with a sharded batch."""


def _for_shard(constraint: Any, whole: Any) -> Any:
    """The set with its tensor settings divided as the batch is."""

    def part(_: str, setting: Tensor) -> Tensor:
        aligned = setting.reshape((1,) * (whole.ndim - setting.ndim) + setting.shape)
        placements = _divided_as(aligned.shape, whole)
        if all(p.is_replicate() for p in placements):
            return setting
        return _divided(aligned, whole, placements).to_local()

    return constraint._map(part)


# Small things about DTensors


def _divided_as(shape: Sequence[int], whole: Any) -> list[Any]:
    """Placements for what broadcasts against `whole`, which divide it alike."""
    everywhere = torch.distributed.tensor.Replicate()
    return [
        p if not p.is_replicate() and shape[p.dim] > 1 else everywhere for p in whole.placements
    ]


def _joined(local: Tensor, mesh: Any, placements: Sequence[Any], like: Tensor) -> Any:
    """A DTensor of the local tensors of all ranks, in the shape and strides of `like`."""
    return torch.distributed.tensor.DTensor.from_local(
        local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _divided(x: Tensor, like: Any, placements: Sequence[Any]) -> Any:
    """What every rank has all of, divided between the ranks; nothing is sent."""
    everywhere = [torch.distributed.tensor.Replicate()] * like.device_mesh.ndim
    return _joined(x, like.device_mesh, everywhere, x).redistribute(placements=placements)
