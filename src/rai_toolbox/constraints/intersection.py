"""The intersection of convex sets: the nearest point that is in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_number
from rai_toolbox.constraints.constraint import Constraint
from rai_toolbox.constraints.rounding import resolution

_TURN = 10  # cycles between two looks at how far it got, each of which waits for the device
_NOISE = 64 * torch.finfo(torch.float64).eps
_SLOWEST = 1e-4  # least share of the distance that a cycle is taken to go; noise looks like none


@dataclass(frozen=True, eq=False, init=False)
class Intersection(Constraint):
    """Every sub-tensor in all of several convex sets.

    ``{x : x in C_1, ..., x in C_k}``, by Dykstra's algorithm (Boyle and Dykstra, 1986): it
    projects onto the sets in turn, each time first taking back what the last projection onto that
    set has changed. It converges linearly for polyhedra, slowly where sets meet at a small angle,
    and is done when a bound of the moves that are left is small (all corrections count, as of
    Birgin and Raydan, 2005). A sub-tensor in all sets costs one `violation` of each of them.

    A result is in the last set as that set's own projection is before rounding, and in the others
    to within `tolerance` and the rounding of their entries, which is what counts as inside here.
    It is the nearest point to within `tolerance`, too. Autograd goes through all the cycles.

    This is the only set that waits for its device: it reads one number every ten cycles.

    Parameters
    ----------
    *sets : Constraint
        Convex sets. Put the one that has to hold most strictly last.
    tolerance : float
        The accuracy, relative to the largest magnitude in the sub-tensor.
    max_iterations : int
        The largest number of cycles. A projection that needs more raises a RuntimeError that
        tells how far outside each set it ended, and writes nothing.

    Raises
    ------
    ValueError
        If there is no set, one is not convex, or a number is out of its range.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Box, Hyperplane, Intersection
    >>> portfolio = Intersection(Hyperplane(1.0, 1.0), Box(0.0, 0.5))
    >>> portfolio.project_(torch.tensor([[0.9, 0.3, -0.4]]))
    tensor([[0.5000, 0.5000, 0.0000]])
    """

    sets: tuple[Constraint, ...]
    tolerance: float
    max_iterations: int

    def __init__(
        self, *sets: Constraint, tolerance: float = 1e-9, max_iterations: int = 10_000
    ) -> None:
        object.__setattr__(self, "sets", sets)
        object.__setattr__(self, "tolerance", tolerance)
        object.__setattr__(self, "max_iterations", max_iterations)
        self.__post_init__()

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Constraint:
        return cls(*settings.pop("sets", ()), **settings)

    @property
    def bounded(self) -> bool:
        """Whether one of the sets is bounded."""
        return any(member.bounded for member in self.sets)

    def _check_settings(self) -> None:
        if not self.sets:
            raise ValueError("`sets` must be at least one constraint, got none")
        for member in self.sets:
            if not isinstance(member, Constraint):
                raise TypeError(f"`sets` must be constraints, got {member!r}")
            if not member.convex:
                raise ValueError(f"`sets` must be convex, got {member!r}")
        if not 0 < check_number("tolerance", self.tolerance) < 1:
            raise ValueError(f"`tolerance` must be in (0, 1), got {self.tolerance!r}")
        if not isinstance(self.max_iterations, Integral) or isinstance(self.max_iterations, bool):
            raise TypeError(f"`max_iterations` must be an int, got {self.max_iterations!r}")
        if self.max_iterations < 1:
            raise ValueError(f"`max_iterations` must be >= 1, got {self.max_iterations!r}")

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        for member in self.sets:
            member._check_batch(x)

    def to(self, *args: Any, **kwargs: Any) -> Intersection:  # noqa: D102
        return Intersection(
            *(member.to(*args, **kwargs) for member in self.sets),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )

    def _parts(self, x: Tensor) -> Iterator[tuple[Tensor, Intersection]]:
        # All at once: nothing may be written unless all converge, and members have blocks of
        # their own. They see the shape of the batch, which rows do not have.
        if x.numel():
            seen = copy(self)
            object.__setattr__(seen, "_shape", x.shape[1:])
            yield x, seen

    def _batch(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), *self.__dict__["_shape"])

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        batch = self._batch(x.to(dtype))
        worst = torch.stack([member.violation(batch) for member in self.sets]).amax(0)
        sizes = x.abs()
        entries = sizes.shape[1]
        rounding = resolution(sizes.sum(1), entries, entries, dtype)
        return (worst - self.tolerance * sizes.amax(1) - rounding).clamp(min=0.0)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        member = next(member for member in self.sets if member.bounded)
        drawn = member.sample_(self._batch(torch.empty_like(like)), generator)
        return self._projected(drawn.view(like.shape))

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Dykstra's algorithm on each row, until it is done for all of them.

        Where sets meet at a small angle, or bend far from `x`, very many cycles push in nearly
        the same direction. So each turn of cycles starts with a stride in the direction of the
        last push, which is taken back if the moves at the end of the turn have not become
        smaller. Any pushes are a right start: the sum of `y` and of them is what counts.

        Where `x` is far off, float64 leaves an error relative to `x` in a result that is small.
        Such a row starts anew from what it got: projections do not expand, so that the error
        of the nearest point stays one relative to `x`, and that of feasibility vanishes.
        """
        done = self._inside(x, dtype)
        if bool(done.all()):
            return x
        with_origin = self._inside(torch.zeros_like(x), dtype)
        none = [torch.zeros_like(x)] * len(self.sets)
        start = y = kept = result = x
        pushes = kept_pushes = none
        jumped = torch.zeros_like(done)
        strides = none
        stride = torch.full_like(x[:, 0], _TURN)
        for _ in range(0, self.max_iterations, _TURN):
            end, end_pushes, last_push, left, moved = self._turn(y, pushes)
            back = jumped & (_along(last_push, strides) < 0)
            far = _size(start)
            # a cone's apex would be approached forever, each time a little nearer
            vanishing = with_origin & (torch.maximum(_size(end), left) <= self.tolerance * far)
            end = _where(vanishing, torch.zeros_like(end), end)
            settled = (left <= self.tolerance * _size(end)) | (moved <= _NOISE * far) | vanishing
            settled = settled & ~back
            found = settled & self._inside(end, dtype) & ~done
            result, done = _where(found, end, result), done | found
            if bool(done.all()):
                return result
            kept = _where(back, kept, end)
            kept_pushes = [_where(back, *both) for both in zip(kept_pushes, end_pushes, strict=True)]
            start = _where(settled, kept, start)
            kept_pushes = [_where(settled, zero, push) for zero, push in zip(none, kept_pushes, strict=True)]
            stride = torch.where(back, stride / 8, torch.where(jumped, 4 * stride, stride))
            stride = torch.where(settled, _TURN, stride)
            plain = back | settled
            jumped = ~plain
            strides = [_where(plain, zero, stride.unsqueeze(1) * push) for zero, push in zip(none, last_push, strict=True)]
            pushes = [push + more for push, more in zip(kept_pushes, strides, strict=True)]
            y = kept - sum(strides)
        raise RuntimeError(self._failure(end[~done].detach()))

    def _turn(self, y: Tensor, pushes: list[Tensor]):
        for count in range(_TURN):
            if count == _TURN // 2:
                middle, half = pushes, moved
            y, pushes, moved = self._cycle(y, pushes)
        last = [(after - push).detach() / (_TURN - _TURN // 2) for after, push in zip(pushes, middle, strict=True)]
        return y, pushes, last, _left(half, moved), moved

    def _cycle(self, y: Tensor, pushes: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """One projection onto each set in turn; also how much all of them have moved each row."""
        moved = y.new_zeros(len(y))
        after = []
        for member, push in zip(self.sets, pushes, strict=True):
            pushed = y + push
            near = member.project(self._batch(pushed)).view(y.shape)
            moved = moved + _size(near - y)
            after.append(pushed - near)
            y = near
        return y, after, moved

    def _inside(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self._excess(y.detach().to(dtype).to(y.dtype), dtype) <= 0

    def _failure(self, y: Tensor) -> str:
        outside = ", ".join(
            f"{float(member.violation(self._batch(y)).amax()):.3g} outside {type(member).__name__}"
            for member in self.sets
        )
        return (
            "`sets` must have a point in common, which Dykstra's algorithm finds within "
            f"max_iterations={self.max_iterations}; {len(y)} sub-tensors ended up to {outside}"
        )


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.unsqueeze(1), a, b)


def _along(a, b):
    return sum((x * y).sum(1) for x, y in zip(a, b, strict=True))


def _size(rows: Tensor) -> Tensor:
    return rows.detach().abs().amax(1)


def _left(first: Tensor, last: Tensor) -> Tensor:
    """What moves are left in all, if they go on to shrink as from the first to the last one."""
    rate = (last / first) ** (1 / (_TURN - _TURN // 2))
    return torch.where(last > 0, last / (1 - rate).clamp(min=_SLOWEST), 0.0)
