"""The processes that share the work of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rai_toolbox.checks import wrong

T = TypeVar("T")


class Ranks:
    """The ranks of a process group; without a group, this process alone.

    Raises
    ------
    ValueError
        If this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise wrong("group", "be one of this process", f"rank {dist.get_rank()}")

    def gather(self, act: Callable[[], T]) -> list[T]:
        """What `act` returns on each rank. If it raises on one, all ranks raise.

        So no rank waits for another one that has failed.
        """
        if self.size == 1:
            return [act()]
        found: list[Any] = [None] * self.size
        try:
            result = act(), None
        except Exception as error:
            failed = None, f"{type(error).__name__}: {error}"
            dist.all_gather_object(found, failed, group=self.group)
            raise
        dist.all_gather_object(found, result, group=self.group)
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise RuntimeError(f"rank {rank} of {self.size} failed with {failure}")
        return [value for value, _ in found]
