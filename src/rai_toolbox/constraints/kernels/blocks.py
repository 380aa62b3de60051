"""Wide arithmetic a piece at a time: in cache, and without a wide copy of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from operator import add, attrgetter, le

import torch
from torch import Tensor

from rai_toolbox._torch import foreach_copy_, forward_ad_level, function_transforms_active
from rai_toolbox.batch import view_or_copy
from rai_toolbox.constraints.sharding import PLAIN

BLOCK = 2**16
"""Elements per piece of rows, for each thread; a tensor of more is large."""

MANY = 2**19
"""Elements per piece of rows where many passes over it have many small operators between them."""

GROUP = 2**20
"""Elements of large batches that share small operators; they stay in the last cache."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float64, which holds squares and sums of all narrower numbers."""
    if x.device.type == "mps":  # which has no float64
        return torch.float32
    return torch.float64


def widened(x: Tensor) -> Tensor:
    """`x` in float64, contiguous."""
    return x.to(wide_dtype(x)).contiguous()


def is_plain(x: Tensor) -> bool:
    """Whether it is a tensor on the CPU, of no subclass."""
    return type(x) in PLAIN and x.is_cpu


_ONES = {
    dtype: torch.ones((), dtype=dtype, device="cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def one_like(x: Tensor) -> Tensor:
    """A tensor of one 1 that operators take together with `x`; for the CPU it is there already."""
    is_usual = type(x) in PLAIN and x.is_cpu and not torch.compiler.is_compiling()
    return _ONES[x.dtype] if is_usual and x.dtype in _ONES else x.new_ones(())


def is_eager(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor in eager mode.

    Then reading a value does not synchronize with a device, and large tensors are faster by pieces
    that stay in cache: a compiler would fuse the operators instead.
    """
    return (
        type(x) in PLAIN
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not function_transforms_active()
        and forward_ad_level() < 0
    )


def needs_grad(*values: object) -> bool:
    """Whether autograd records what is done to any of the values, such as x and the settings."""
    return torch.is_grad_enabled() and any(getattr(value, "requires_grad", 0) for value in values)


def can_read(x: Tensor, *settings: float | Tensor) -> bool:
    """Whether a batch has values to be read, and settings are numbers."""
    numbers = not any(isinstance(setting, Tensor) for setting in settings)
    return numbers and x.numel() > 0 and is_eager(x) and not needs_grad(x)


def row_blocks(x: Tensor, size: int | None = None) -> Iterator[slice]:
    """Slices of the first dim of `x`, of about `size` elements but at least one row.

    By default they have `BLOCK` elements per thread.
    """
    height = len(x)
    if is_eager(x) and not needs_grad(x):
        size = torch.get_num_threads() * BLOCK if size is None else size
        height = max(1, size * len(x) // max(1, x.numel()))
    for start in range(0, len(x), max(1, height)):
        yield slice(start, start + height)


def row_halves(x: Tensor) -> tuple[Tensor, ...]:
    """The two halves of the rows of a large tensor, so that temporaries take half the memory."""
    if x.numel() <= BLOCK or len(x) < 2 or not is_eager(x) or needs_grad(x):
        return (x,)
    middle = (len(x) + 1) // 2
    return x[:middle], x[middle:]


class Workspace(dict[tuple[tuple[int, ...], torch.dtype], Tensor]):
    """Tensors on the CPU by shape and dtype, of any values: all of them in the same memory.

    For temporaries that follow each other, because new memory is slow to touch.
    """

    _bytes: Tensor | None = None

    def __missing__(self, key: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
        shape, dtype = key
        size = prod(shape) * dtype.itemsize
        if self._bytes is None or len(self._bytes) < size:
            self.clear()
            self._bytes = None  # (before the next one is there)
            self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        self[key] = self._bytes[:size].view(dtype).view(shape)
        return self[key]


def joined(batches: list[Tensor], size: int) -> list[list[Tensor]]:
    """Rows of the batches, in lists of up to `size` elements of one dtype and length of rows."""
    pieces: list[list[Tensor]] = []
    last: dict[tuple[torch.dtype, int], tuple[list[Tensor], int]] = {}  # and the room left in it
    for x in batches:
        number = x.numel()
        if number == 0:
            continue
        kind = (x.dtype, number // x.shape[0])
        for part in [x] if number <= size else [x[rows] for rows in row_blocks(x, size)]:
            piece, room = last.get(kind, ([], 0))
            if part.numel() > room:
                piece, room = [], size
                pieces.append(piece)
            piece.append(part)
            last[kind] = piece, room - part.numel()
    return pieces


def in_groups(
    tensors: list[Tensor],
    act_: Callable[[Tensor], object],
    shape_of: Callable[[torch.Size], tuple[int, ...]] = tuple,
    act_each_: Callable[[list[Tensor]], object] | None = None,
) -> None:
    """Let `act_` change the rows of each tensor in place, seen as a batch of shape ``shape_of``.

    Small tensors of one shape and dtype are stacked up to `BLOCK` elements: one call then costs
    what it would for one of them. Large ones go by pieces, and to `act_each_` several at a time,
    of one dtype and length of rows. All stay in cache.
    """
    if not tensors:  # (all may be sharded)
        return
    x, alone = tensors[0], len(tensors) == 1
    if alone and (x.numel() <= BLOCK // 2 or not act_each_):
        _in_parts(x, act_, shape_of(x.shape))
        return
    plain = is_eager(x) and not torch.is_grad_enabled()
    joins = plain and not alone
    alike: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    large = []
    for x in tensors:
        size = x.numel()
        if joins and 0 < size <= BLOCK // 2 and is_plain(x):
            alike.setdefault((x.shape, x.dtype), []).append(x)
        elif act_each_ and plain and size > BLOCK // 2 and x.is_contiguous() and is_plain(x):
            large.append(view_or_copy(x, shape_of(x.shape))[0])
        else:
            _in_parts(x, act_, shape_of(x.shape))
    if act_each_ is not None:
        for some in [large] if are_apart(large) else [[x] for x in large]:
            for piece in joined(some, GROUP):
                act_each_(piece)
    for (shape, _), some in alike.items():
        number, batch_shape = BLOCK // shape.numel(), shape_of(shape)
        for start in range(0, len(some), number):
            chunk = some[start : start + number]
            if len(chunk) == 1:
                _in_parts(chunk[0], act_, batch_shape)
            else:
                rows = torch.stack(chunk).contiguous()  # (it keeps channels last)
                act_(rows.view(-1, *batch_shape[1:]))
                foreach_copy_(chunk, rows.unbind())


def are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two tensors share memory: of these, one must see the other's change."""
    starts = list(map(Tensor.data_ptr, tensors))
    if all(map(Tensor.is_contiguous, tensors)):
        ends = list(map(add, starts, map(attrgetter("nbytes"), tensors)))
    else:
        ends = list(map(_end, tensors))
    starts.sort()
    ends.sort()
    return all(map(le, ends, starts[1:]))


def _end(x: Tensor) -> int:
    """The address up to which a tensor lies."""
    if x.is_contiguous():
        return x.data_ptr() + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def _in_parts(x: Tensor, act_: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    batch, copied = view_or_copy(x, shape)
    if x.numel() == 0:
        return
    if x.numel() <= GROUP or not is_eager(x) or needs_grad(x):
        act_(batch)
    else:
        for rows in row_blocks(batch, MANY):
            act_(batch[rows])
    if copied:
        x.copy_(batch.view(x.shape))
