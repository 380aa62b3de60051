"""The processes that share the work of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from rai_toolbox.perturbations.inputs import wrong

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The ranks of a process group; without a group, this process alone.

    Raises
    ------
    ValueError
        If this process is not in the group.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
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
