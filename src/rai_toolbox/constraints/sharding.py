"""Sets of tensors that are divided between ranks: the one place that knows of DTensors.

What a set couples must be whole somewhere. Where it is, as with elementwise sets or with sets of
rows on shards of rows, each rank acts on its own shard and nothing is sent. Else the tensor is
redistributed: along another dim where there is one, so that no rank holds all of it, and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from rai_toolbox.constraints.base import Constraint

_PLAIN = (Tensor, torch.nn.Parameter)
_Word = TypeVar("_Word", bound=Callable[..., Any])


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, which each rank has a part of."""
    return type(x) not in _PLAIN and hasattr(x, "placements")


def on_shards_(x: Tensor, coupled: Iterable[int], act_: Callable[[Any], Tensor]) -> Tensor:
    """Let ``act_(whole)`` change a sharded x in place, along whose dims `coupled` it is whole.

    `whole` is x, or x redistributed; `act_` returns what becomes of its local tensor, which it may
    write to.
    """
    whole = with_whole(x, coupled)
    local = act_(whole)
    if whole is not x or torch.is_grad_enabled():
        x.copy_(_like(local, whole).redistribute(placements=_placements(x)))
    return x


def with_whole(x: Any, coupled: Iterable[int]) -> Any:
    """A sharded x, or the same numbers divided along other dims than those in `coupled`."""
    from torch.distributed.tensor import Placement, Replicate, Shard

    coupled = set(coupled)
    free = [dim for dim, size in enumerate(x.shape) if size > 1 and dim not in coupled]
    elsewhere: Placement = Shard(free[0]) if free else Replicate()
    placements = tuple(
        Replicate() if p.is_partial() else elsewhere if _dim(p) in coupled else p
        for p in x.placements
    )
    return x if placements == x.placements else x.redistribute(placements=placements)


def local_of(x: Any) -> Tensor:
    """The part of a sharded x that this rank has, to be written to."""
    local: Tensor = x.to_local()
    return local.clone() if torch.is_grad_enabled() else local


def beside(scale: Any, x: Any) -> Tensor:
    """The part of a sharded `scale`, which broadcasts against x, that is for this rank's part of x.

    Where a dim has fewer entries than there are ranks, torch takes no such pair of DTensors.
    """
    from torch.distributed.tensor import Replicate

    placements = [
        p if not p.is_replicate() and scale.shape[p.dim] > 1 else Replicate() for p in x.placements
    ]
    local: Tensor = scale.redistribute(placements=placements).to_local()
    return local


def complete(x: Any) -> Tensor:
    """All of x on each rank: for what is small, such as a sum, which `float` takes a part of."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[no-any-return]


def check_view(x: Tensor, shape: Sequence[int]) -> None:
    """Raise if x is sharded such that its shards are no shards of x in another shape."""
    if not is_sharded(x) or tuple(x.shape) == tuple(shape):
        return
    try:
        if x.numel() == 0:  # torch would look for the dims of such a view for ever
            raise RuntimeError
        x.detach().view(shape)
    except RuntimeError:
        raise ValueError(
            f"`param_ndim` must leave shards as they are, but the shape {tuple(x.shape)} with the "
            f"placements {_placements(x)} is no batch of shape {tuple(shape)} without gathering "
            "it; use param_ndim=-1, or shard a dim evenly, or one of a sub-tensor"
        ) from None


# The words of a set


def by_shards(word: _Word) -> _Word:
    """A word of a set that acts on shards where its batch is sharded."""
    act = _ACTS[word.__name__]

    @functools.wraps(word)
    def of_any(self: Constraint, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_sharded(x):
            return word(self, x, *args, **kwargs)
        # (a batch of that shape without its memory)
        self._check_batch(torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape))
        return act(word, self, x, *args, **kwargs)

    return cast(_Word, of_any)


def _project_(word: Any, constraint: Constraint, x: Tensor) -> Tensor:
    return on_shards_(
        x, _coupled(constraint, x), lambda whole: word(_seen(constraint, whole), local_of(whole))
    )


def _lmo(word: Any, constraint: Constraint, gradient: Any) -> Any:
    whole = with_whole(gradient, _coupled(constraint, gradient))
    answer = _like(word(_seen(constraint, whole), whole.to_local()), whole)
    return answer.redistribute(placements=gradient.placements)


def _violation(word: Any, constraint: Constraint, x: Tensor) -> Tensor:
    """A plain tensor, the same on each rank: it is small, and x may be one of many."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = with_whole(x.detach(), _coupled(constraint, x))
    found: Tensor = word(_seen(constraint, whole), whole.to_local()).unsqueeze(-1)
    mesh = whole.device_mesh
    kept = [dim for dim in range(x.ndim) if dim not in constraint.coupled_dims(x.ndim)]
    placements: list[Any] = []
    parts = 1
    for size, p in zip(mesh.shape, whole.placements, strict=True):
        if p.is_replicate():
            placements.append(Replicate())
        elif _dim(p) in kept:
            moved = kept.index(p.dim)
            placements.append(p if moved == p.dim else Shard(moved))
        else:  # each rank has seen some entries of all sub-tensors: their largest counts
            placements.append(Shard(len(kept)))
            parts *= size
    shape = torch.Size([*(x.shape[dim] for dim in kept), parts])
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        found, mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return complete(spread).amax(-1)


def _sample_(
    word: Any, constraint: Constraint, x: Tensor, generator: Generator | None = None
) -> Tensor:
    """Each rank draws all, and keeps its part: so that it is what one process would draw."""
    drawn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    word(constraint, drawn, generator)
    return x.copy_(_divided(drawn, x, _placements(x)))


_ACTS = {"project_": _project_, "lmo": _lmo, "violation": _violation, "sample_": _sample_}
WORDS = tuple(_ACTS)


def _coupled(constraint: Constraint, x: Tensor) -> Iterable[int]:
    if any(_has_rows_of_its_own(member, x) for member in _members(constraint)):
        return range(x.ndim)
    return () if constraint.elementwise else constraint.coupled_dims(x.ndim)


def _has_rows_of_its_own(constraint: Constraint, x: Tensor) -> bool:
    """Whether a set has a setting for each row of x that does not broadcast against x."""
    if _broadcasts(constraint):
        return False
    settings: list[Tensor] = []
    for member in _members(constraint):
        member._map(lambda _, setting: settings.append(setting) or setting)  # type: ignore[func-returns-value]
    return any(setting.ndim > 0 and len(setting) == len(x) > 1 for setting in settings)


def _broadcasts(constraint: Constraint) -> bool:
    from rai_toolbox.constraints.base import Constraint

    return constraint.elementwise or type(constraint)._map is Constraint._map


def _members(constraint: Constraint) -> Iterator[Constraint]:
    """The set, and the sets that it is made of."""
    from rai_toolbox.constraints.base import Constraint

    yield constraint
    for field in fields(constraint):
        value = getattr(constraint, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Constraint):
                yield from _members(part)


def _seen(constraint: Constraint, whole: Any) -> Constraint:
    """The set as a shard sees it: its tensor settings are divided as the batch is."""
    if all(p.is_replicate() for p in whole.placements) or not _broadcasts(constraint):
        return constraint
    changed = {}
    for field in fields(constraint):
        value = getattr(constraint, field.name)
        part = _part(value, whole)
        if part is not value:
            changed[field.name] = part
    return constraint._replaced(changed)


def _part(value: Any, whole: Any) -> Any:
    from torch.distributed.tensor import Replicate

    from rai_toolbox.constraints.base import Constraint

    if isinstance(value, Constraint):
        return _seen(value, whole)
    if isinstance(value, tuple):
        parts = tuple(_part(each, whole) for each in value)
        return parts if any(p is not v for p, v in zip(parts, value, strict=True)) else value
    if not isinstance(value, Tensor):
        return value
    aligned = value.reshape((1,) * (whole.ndim - value.ndim) + value.shape)
    placements = [
        p if not p.is_replicate() and aligned.shape[p.dim] > 1 else Replicate()
        for p in whole.placements
    ]
    if all(p.is_replicate() for p in placements):
        return value
    return _divided(aligned, whole, placements).to_local()


# Small things about DTensors


def _like(local: Tensor, whole: Any) -> DTensor:
    """A DTensor of local tensors that is laid out as another one."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _divided(x: Tensor, like: Any, placements: Sequence[Any]) -> DTensor:
    """What every rank has all of, divided between the ranks; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def _placements(x: Any) -> Any:
    return x.placements


def _dim(placement: Any) -> int | None:
    return getattr(placement, "dim", None)
