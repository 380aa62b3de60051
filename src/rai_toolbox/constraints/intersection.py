"""The intersection of convex sets: the nearest point that is in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Generator, Tensor

from rai_toolbox.autograd import readable
from rai_toolbox.checks import check_count, check_number, wrong
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels.jumps import Jumps
from rai_toolbox.constraints.kernels.rounding import resolution

_CYCLES = 4  # between two checks of convergence, each of which synchronizes with the device
_HALF = _CYCLES // 2
_NOISE = 1e-15  # relative rounding error of corrections
_FAR = 1e6  # how far away common points may be, relative to the sub-tensor and to its result
_SLOWEST = 1e-4  # smallest rate of convergence that is assumed; rounding noise looks like 0


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Intersection(Constraint):
    """Every sub-tensor in all of several convex sets.

    ``{x : x in C_1, ..., x in C_k}``, by Dykstra's algorithm (Boyle and Dykstra, 1986): it
    projects onto the sets in turn, and before each projection undoes the change of the previous
    one onto the same set. It stops when the changes of all these corrections are small (Birgin and
    Raydan, 2005). That takes tens of cycles, because extrapolations of the corrections (Anderson,
    1965) replace most of them; hundreds or more where many sets meet at small angles, or a
    sub-tensor is farther away than 1e3 times the size of the sets. A sub-tensor that is in all sets
    costs one `violation` of each of them.

    A result is the nearest point to within about `tolerance`, relative to the largest magnitude
    of the sub-tensor and of the result: for a sub-tensor that is very far away it is a point of
    the set which need not be the nearest, and at an angle t it is as near as float64 can tell,
    about 1e-16 / t^2. What is in all sets to within `tolerance` and the
    rounding of its entries counts as inside, and has the derivative 1, also where an equation has
    no interior; elsewhere autograd goes through all cycles, and keeps them.

    It synchronizes with the host: it reads two bits every four cycles.

    Parameters
    ----------
    *sets : Constraint
        Convex sets. Put the one that must hold most exactly last.
    tolerance : float
        The relative accuracy.
    max_iterations : int
        The largest number of cycles, rounded up to fours. A projection that needs more raises a
        RuntimeError with the violation of each set at its end, and writes nothing. So does one that
        proves, mostly much earlier, that the sets have no points in common within 1e6 times the
        magnitude of the sub-tensor: the messages differ.

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
        self.__dict__.update(sets=sets, tolerance=tolerance, max_iterations=max_iterations)
        self.__post_init__()

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Constraint:
        return cls(*settings.pop("sets", ()), **settings)

    def coupled_dims(self, ndim: int) -> tuple[int, ...]:  # noqa: D102
        return tuple(sorted({dim for member in self.sets for dim in member.coupled_dims(ndim)}))

    def _check_settings(self) -> None:
        if not self.sets:
            raise wrong("sets", "be at least one constraint", "none")
        for member in self.sets:
            if not isinstance(member, Constraint):
                unpacked = "; unpack them: Intersection(*sets)" * isinstance(member, (list, tuple))
                raise wrong("sets", "be constraints", f"{member!r}{unpacked}", TypeError)
            if not member.convex:
                raise wrong("sets", "be convex", member)
        if not 0 < check_number("tolerance", self.tolerance) < 1:
            raise wrong("tolerance", "be in (0, 1)", self.tolerance)
        check_count("max_iterations", self.max_iterations, 1)
        self._derive(bounded=any(member.bounded for member in self.sets))

    def _check_batch(self, x: Tensor) -> None:
        super()._check_batch(x)
        for member in self.sets:
            member._check_batch(x)

    def _whole_dims(self, shape: torch.Size) -> Iterable[int]:
        return {dim for member in self.sets for dim in member._whole_dims(shape)}

    def _blocks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Intersection]]:
        # All at once: nothing may be written unless all converge, and members have blocks of
        # their own. They see the shape of the batch, which rows do not have.
        # Sub-tensors that a member couples are one row.
        coupled = 0 in self.coupled_dims(x.ndim)
        if x.numel():
            rows = readable(x).reshape(1 if coupled else len(x), -1)
            yield x, rows, self._replaced({"_shape": (len(x) if coupled else -1, *x.shape[1:])})

    def _batch(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.__dict__["_shape"])

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        batch = self._batch(x.to(dtype))
        found = [member.violation(batch).reshape(len(x), -1).amax(1) for member in self.sets]
        worst = torch.stack(found).amax(0)
        sizes = x.abs()
        entries = sizes.shape[1]
        rounding = resolution(sizes.sum(1), entries, entries, dtype)
        return (worst - self.tolerance * sizes.amax(1) - rounding).clamp(min=0.0)

    def _sampled(self, like: Tensor, generator: Generator | None) -> Tensor:
        member = next(member for member in self.sets if member.bounded)
        drawn = member.sample_(self._batch(torch.empty_like(like)), generator)
        return self._projected(drawn.view(like.shape))

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Dykstra's algorithm on each row, until it has converged for all of them.

        Where sets meet at a small angle, or `x` is far away, very many cycles change the
        corrections in nearly the same directions. So each round of cycles starts with a jump, which
        is taken back if it has lowered the dual value. Any corrections are a valid start, as the
        algorithm is coordinate ascent on the dual problem: x = y + sum of corrections.

        Where `x` is far away, float64 leaves an error relative to `x` in a result that is small.
        Such a row starts again from its result: projections do not expand distances, so the
        distance to the nearest point stays relative to `x`, and the violation vanishes.
        """
        done = self._inside(x, dtype)
        if bool(done.all()):
            return x
        with_origin = self._inside(torch.zeros_like(x), dtype)
        start = result = x
        corrections = x.new_zeros(len(self.sets), *x.shape)
        jumps, jumped = Jumps(corrections), torch.zeros_like(done)
        least = x.new_full((len(x),), -inf)  # of what no jump has taken back: the dual value,
        error = fastest = -least  # its rounding error, and twice the size of the last change
        for _ in range(0, self.max_iterations, _CYCLES):
            y, half, before, _ = self._cycles(start - sum(corrections), corrections, _HALF)
            y, after, moved, support = self._cycles(y, half, _HALF)
            change, sizes = (after - half).detach(), after.detach().abs()
            largest = torch.maximum(_size(start), sizes.amax((0, 2)))
            noise = _NOISE * sizes.sum((0, 2)) * largest
            offset = (start - y).detach()
            gain = (offset * start.detach()).sum(1) - support
            value = gain - offset.square().sum(1) / 2
            fast = torch.linalg.vector_norm(change, dim=(0, 2))
            # within its rounding error the value decides nothing, but the size of the changes does
            failed = (value < least - error) | ((value <= least + noise) & (fast > fastest))
            failed = failed & jumped
            reach = torch.maximum(_size(start), _size(y))
            # no smaller moves of such corrections are left than those by rounding
            left = torch.where(moved <= _NOISE * largest, moved, _left(before, moved, _HALF))
            # a cone's apex would be approached forever, each time a little nearer
            near_origin = torch.maximum(_size(y), left) <= self.tolerance * reach
            end = _where(near_origin & with_origin, 0.0, y)
            settled = ~failed & (left <= self.tolerance * reach)
            found = settled & self._inside(end, dtype) & ~done
            result, done = _where(found, end, result), done | found
            # all points z of the sets have <offset, z> <= support
            apart = (gain - noise) / torch.linalg.vector_norm(offset, dim=1)
            empty = ~done & (apart > _FAR * reach)
            all_done, any_empty = torch.stack([done.all(), empty.any()]).tolist()
            if all_done:
                return result
            if any_empty:
                none_within = f"there are none within {float(apart[empty].amin()):.3g} of it"
                rule = f"`sets` must have points in common, but {none_within}"
                raise RuntimeError(f"{rule}: {self._ended(end, empty)}")
            start = _where(settled, end, start)
            least = torch.where(settled, -inf, torch.where(failed, least, value))
            error = torch.where(settled, inf, torch.where(failed, error, noise))
            fastest = torch.where(settled, inf, torch.where(failed, fastest, 2 * fast))
            turns = 10 * _NOISE * largest
            corrections, jumped = jumps.next(after, change, turns, failed, settled)
        moves = float(left[~done].amax())
        raise RuntimeError(
            f"`sets` did not converge in max_iterations={self.max_iterations} cycles, which need "
            f"not mean that they have no points in common: {self._ended(end, ~done)}, and the last "
            f"moves suggest up to {moves:.3g} more; a larger max_iterations or `tolerance` may do"
        )

    def _cycles(self, y: Tensor, corrections: Tensor, count: int) -> tuple[Tensor, ...]:
        """Project onto each set in turn, `count` times.

        Also return the corrections, and of the last time the moves and the sum of the support
        functions of the sets at their corrections.
        """
        for _ in range(count):
            after, moved, support = [], y.new_zeros(len(y)), y.new_zeros(len(y))
            for member, correction in zip(self.sets, corrections, strict=True):
                corrected = y + correction
                near = member.project(self._batch(corrected)).view(y.shape)
                moved = moved + _size(near - y)
                after.append(corrected - near)
                support = support + (after[-1] * near).detach().sum(1)
                y = near
            corrections = torch.stack(after)
        return y, corrections, moved, support

    def _inside(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self._excess(y.detach().to(dtype).to(y.dtype), dtype) <= 0

    def _ended(self, y: Tensor, rows: Tensor) -> str:
        """Where rows have ended: how far outside each of the sets, at most."""
        batch = self._batch(y.detach())
        found = [(member, member.violation(batch).reshape(len(y), -1)) for member in self.sets]
        outside = ", ".join(
            f"{float(violation[rows].amax()):.3g} outside {type(member).__name__}"
            for member, violation in found
        )
        return f"{int(rows.sum())} of {len(y)} sub-tensors ended up to {outside}"


def _where(rows: Tensor, a: Tensor | float, b: Tensor) -> Tensor:
    return torch.where(rows.unsqueeze(1), a, b)


def _size(rows: Tensor) -> Tensor:
    return rows.detach().abs().amax(1)


def _left(before: Tensor, last: Tensor, cycles: int) -> Tensor:
    """The sum of all moves that are left, if they go on to shrink at the present rate."""
    rate = (last / before) ** (1 / cycles)
    return torch.where(last > 0, last / (1 - rate).clamp(min=_SLOWEST), 0.0)
