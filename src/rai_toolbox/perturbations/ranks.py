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
    """Processes that do the same, but for the part of each; one alone if there is no group."""

    group: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: ProcessGroup | None) -> Ranks:
        """All ranks of a group.

        Raises
        ------
        ValueError
            If this process is none of them.
        """
        if group is None:
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"`group` must be one of this process, rank {dist.get_rank()}")
        return cls(group, rank, dist.get_world_size(group))

    def gathered(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on each rank; where it raises on one of them, all ranks raise.

        So that no rank waits for another one that will not come.
        """
        if self.size == 1:
            return [act()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = act()
        except Exception as raised:
            error = raised
        said = None if error is None else f"{type(error).__name__}: {error}"
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (value, said), group=self.group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"rank {rank} of {self.size} failed with {text}")
        return [found for found, _ in told]
