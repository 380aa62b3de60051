"""The processes that share the work of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks(NamedTuple):
    """The ranks of a process group; without a group, this process alone."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: ProcessGroup | None) -> Ranks:
        """The ranks of a group.

        Raises
        ------
        ValueError
            If this process is not one of them.
        """
        if group is None:
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"`group` must be one of this process, rank {dist.get_rank()}")
        return cls(group, rank, dist.get_world_size(group))

    def gather(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on each rank. If it raises on one, all ranks raise.

        So no rank waits for another one that has failed.
        """
        if self.size == 1:
            return [act()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = act()
        except Exception as raised:
            error = raised
        text = None if error is None else f"{type(error).__name__}: {error}"
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (value, text), group=self.group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise RuntimeError(f"rank {rank} of {self.size} failed with {text}")
        return [value for value, _ in found]
