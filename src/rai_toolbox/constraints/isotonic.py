"""Monotone sequences: entries that never fall, or never rise."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from rai_toolbox.autograd import with_value
from rai_toolbox.checks import check_type
from rai_toolbox.constraints.base import Constraint


@dataclass(frozen=True, eq=False, repr=False)
class Monotone(Constraint):
    """Entries of each sub-tensor never decrease, or never increase, in the order of their indices.

    ``{x : x_1 <= x_2 <= ... <= x_n}``, or with ``>=``. The projection is isotonic regression: it
    averages blocks of neighbors. It merges the solutions of halves, from pairs up, with prefix
    sums and binary search (the pooling of Ayer et al., 1955, in the order of merge sort), which
    costs O(n log(n)^2) for n entries. The set is a cone, unbounded: it has no `lmo`. The violation
    is the largest step against the order.

    Parameters
    ----------
    increasing : bool
        True if the entries must not decrease, False if they must not increase.
    dim : int or tuple of int, optional
        Along which dims of the batch a sequence lies; by default all but the first.

    Raises
    ------
    TypeError
        If `increasing` is not a bool.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import Monotone
    >>> Monotone().project_(torch.tensor([[1.0, 3.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
    tensor([[1.0000, 2.5000, 2.5000, 4.0000],
            [2.5000, 2.5000, 2.5000, 2.5000]])
    """

    increasing: bool = True
    dim: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    def _check_settings(self) -> None:
        check_type("increasing", self.increasing, bool, "be a bool")

    def _excess(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        falls = x[:, :-1] - x[:, 1:] if self.increasing else x[:, 1:] - x[:, :-1]
        return pad(falls, (1, 0)).amax(1)  # at least 0, also for a single entry

    def _nearest(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # Sums of large numbers may overflow: a power of two keeps all but the last bits of
        # subnormal numbers.
        factor = torch.where(self._largest(x.detach()) > 2.0**900, 2.0**-100, 1.0)
        factor = factor if self.increasing else -factor
        return isotonic(x * factor) / factor


def isotonic(x: Tensor) -> Tensor:
    """The nearest non-decreasing sequence to each row of a float64 (N, n) tensor, differentiable.

    Each level joins neighboring blocks, left L and right R, for which the solutions l and r are
    known. The solution for both is ``min(l, v)`` on L and ``max(r, v)`` on R, with the v for which
    ``sum_L max(l - v, 0) = sum_R max(v - r, 0)``: it pools, at their mean v, the entries of l that
    are above v and those of r that are below. Proof: s is the solution for x iff it never falls,
    and the sums of x - s over the first k entries are >= 0 for all k, and = 0 where s rises after
    the k-th entry and for k = n (these are the optimality conditions: x - s is in the polar of
    the cone, and orthogonal to s). l and r fulfill them. In L, going from l to min(l, v) adds
    sums of max(l - v, 0) >= 0, which are 0 up to the pooled end of L, before which the new
    sequence rises only where l does; likewise in R, counted from its end; and at the end of R
    the two sums cancel, by the choice of v. So all of the conditions hold for the whole.

    The result never falls whatever the error of v: min(l, v) <= v <= max(r, v), and both sides
    never fall. What is not pooled keeps its bits.
    """
    size = x.shape[1]
    largest = x.detach().amax(1, keepdim=True)  # which is not below any v, so never pooled
    y, half = x, 1
    while half < size:
        missing = -y.shape[1] % (2 * half)
        if missing:
            y = torch.cat([y, largest.expand(-1, missing)], 1)
        y = _joined(y.reshape(-1, 2, half)).view(len(x), -1)
        half *= 2
    return y[:, :size]


def _joined(halves: Tensor) -> Tensor:
    """The solution for each pair of solutions, of shape (pairs, 2, half)."""
    left, right = halves.detach().unbind(1)
    v = _level(left, right)
    pooled = torch.stack([left > v, right < v], 1)
    v = v.unsqueeze(1)
    if torch.is_grad_enabled():  # v as the mean of what it pools, without its search
        count = pooled.sum((1, 2), keepdim=True).clamp(min=1)
        v = with_value(v, torch.where(pooled, halves, 0.0).sum((1, 2), keepdim=True) / count)
    return torch.where(pooled, v, halves)


@torch.no_grad()
def _level(left: Tensor, right: Tensor) -> Tensor:
    """The v of each pair of non-decreasing rows; the first of `right` where nothing is pooled."""
    # v is between the first entry of the right half and the last one of the left half. Sums of
    # distances from the former, of entries between the two only, have terms of one sign: nothing
    # cancels, and no entry that is not pooled, however large, costs precision.
    base = right[:, :1]
    high = (left.flip(1) - base).clamp_(min=0.0)  # falls, starting from where the halves meet
    low = torch.minimum(right - base, high[:, :1])  # rises, starting from there
    sum_high, sum_low = (pad(part.cumsum(1), (1, 0)) for part in (high, low))
    number = torch.arange(1, left.shape[1] + 1, device=left.device)
    # v is above an entry of `low` if more is above that entry than below it,
    greater = torch.searchsorted(-high, -low)
    is_below = sum_high.gather(1, greater) - greater * low > number * low - sum_low[:, 1:]
    below = is_below.sum(1, keepdim=True)
    sum_below = sum_low.gather(1, below)
    # and below an entry of `high` if the mean is with which that entry is pooled.
    above = ((below + number) * high > sum_high[:, 1:] + sum_below).sum(1, keepdim=True)
    total = sum_high.gather(1, above) + sum_below
    return base + total / (above + below).clamp(min=1)
