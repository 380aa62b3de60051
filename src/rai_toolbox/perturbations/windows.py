"""Changes of small windows of data, which a search without gradients proposes.

Data are seen as (N, C, L): channels, and places in each. A window is k places of each example, the
same in all channels.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import inf

import torch
from torch import Generator, Tensor

from rai_toolbox.constraints.sampling import uniform

# How steeply patterns fall: in an L1 ball a few entries are to have most of the norm.
_IMAGE_FALLS, _TABLE_FALLS = {2.0: 2, 1.0: 4}, {2.0: 0, 1.0: 4}
_FIRST_SHARE = 0.8
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


def window_share(query: int, queries: int) -> float:
    """The share of all places that a window has: it is halved nine times, ever more seldom."""
    return float(_FIRST_SHARE / 2 ** bisect_left(_HALVED_AFTER, 10_000 * query // queries))


@dataclass(frozen=True)
class Windows:
    """The windows of data of one shape: squares of images, runs of series, any entries of a table.

    Parameters
    ----------
    shape : torch.Size
        Of one example: (d,), (C, L) or (..., H, W).
    p : float
        Order of the norm of the ball.
    generator : torch.Generator, optional
    """

    shape: torch.Size
    p: float
    generator: Generator | None

    @property
    def height(self) -> int:
        """The number of rows of an image; 1 for other data."""
        return self.shape[-2] if len(self.shape) > 2 else 1

    @property
    def width(self) -> int:
        """The number of places in a row."""
        return self.shape[-1]

    @property
    def is_table(self) -> bool:
        """Whether neighbors in an example have nothing in common."""
        return len(self.shape) == 1

    def first(self, data: Tensor, radius: Tensor) -> Tensor:
        """The changes to begin with: columns of one sign; in L2 and L1 a mosaic of patterns."""
        rows = self._rows(data)
        if self.p == inf:
            columns = self._signs(rows[:, :, : self.width])
            change = (radius * columns).repeat(1, 1, self.height)
        else:
            side = max(min(self.height, self.width) // 5, 1)
            down, along = self.height // side, self.width // side
            signs = self._signs(rows[:, :, : down * along]).unflatten(2, (down, along))
            mosaic = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
            mosaic = mosaic * _pattern(side, side, self.p, data.device).repeat(down, along)
            below, right = self.height - down * side, self.width - along * side
            around = (right // 2, right - right // 2, below // 2, below - below // 2)
            most = 4 * radius if self.p == 1 else radius  # (the projection leaves the centers)
            change = self._filled(torch.nn.functional.pad(mosaic, around).flatten(2), most)
        return change.view(data.shape)

    def next(self, change: Tensor, radius: Tensor, share: float) -> Tensor:
        """Other changes: a window goes to the ends of an Linf ball, by one sign in each channel.

        In L2 and L1 a window takes over what another one had, in the form of a pattern.
        """
        rows = self._rows(change)
        size = self._size(share)
        window = self._window(rows, *size)
        own = window if self.is_table else window[:, :1]  # what has a sign of its own
        signs = self._signs(rows.gather(2, own.unsqueeze(1).expand(-1, rows.shape[1], -1)))
        if self.p == inf:
            new = _put(rows, window, radius * signs)
        else:
            if self.is_table:
                terms = _terms(size[1], _TABLE_FALLS[self.p])
                pattern = (terms / _norm(terms, self.p, (0,))).to(rows.device)
            else:
                pattern = _pattern(*size, self.p, rows.device)
                if size[0] == size[1] and bool(self._draw(pattern[:1, :1]) < 0.5):
                    pattern = pattern.T
            other = self._window(rows, *size)
            new = self._moved(rows, window, other, pattern.flatten() * signs, radius)
        return new.view(change.shape)

    def _moved(
        self, rows: Tensor, window: Tensor, other: Tensor, pattern: Tensor, radius: Tensor
    ) -> Tensor:
        """The changes when the norm of two windows, and what is unused, goes to the first one."""
        p, channels = self.p, rows.shape[1]
        left = _put(_put(rows, other, 0.0), window, 0.0)
        unused = (radius**p - _norm(rows, p, (1, 2)) ** p).clamp(min=0)
        had, rest = (_norm(each, p, (2,)) ** p for each in (rows, left))
        freed = (had - rest).clamp(min=0)
        old = rows.gather(2, window.unsqueeze(1).expand(-1, channels, -1))
        new = _scaled(pattern + _scaled(old, 1.0, p, (2,)), 1.0, p, (2,))
        new = new * (unused / channels + freed) ** (1 / p)
        if p == 1:  # more than the ball has: the projection drops the smallest ones
            return _put(left, window, channels * new)
        return self._filled(_put(left, window, new), radius)

    def _filled(self, rows: Tensor, radius: Tensor) -> Tensor:
        return _scaled(rows, radius, self.p, (1, 2))

    def _size(self, share: float) -> tuple[int, int]:
        """Height and width of a window: in L2 and L1 odd ones, as patterns have a center."""
        if self.height == 1:
            return 1, max(round(share * self.width), 1)
        side = max(round((share * self.height * self.width) ** 0.5), 1)
        if self.p != inf:
            side = max(side, 3) // 2 * 2 + 1
        return min(side, self.height), min(side, self.width)

    def _window(self, rows: Tensor, height: int, width: int) -> Tensor:
        """Places of a random window of each example, shape (N, k)."""
        if self.is_table:
            return self._draw(rows[:, 0]).topk(width, dim=1).indices
        top, left = (
            (self._draw(rows[:, :1, 0]) * (most + 1)).long()
            for most in (self.height - height, self.width - width)
        )
        down = top + torch.arange(height, device=rows.device)
        along = left + torch.arange(width, device=rows.device)
        return (down.unsqueeze(2) * self.width + along.unsqueeze(1)).flatten(1)

    def _rows(self, data: Tensor) -> Tensor:
        return data.reshape(len(data), -1, self.height * self.width)

    def _signs(self, like: Tensor) -> Tensor:
        return torch.where(self._draw(like) < 0.5, -1.0, 1.0).to(like)

    def _draw(self, like: Tensor) -> Tensor:
        return uniform(like, self.generator)


def _put(rows: Tensor, window: Tensor, values: Tensor | float) -> Tensor:
    """The rows with other values in a window: one of each channel, or one of each place."""
    index = window.unsqueeze(1).expand(-1, rows.shape[1], -1)
    return rows.scatter(2, index, torch.as_tensor(values).to(rows).expand(index.shape))


def _norm(x: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, p, dim=dims, keepdim=True)


def _scaled(x: Tensor, size: Tensor | float, p: float, dims: tuple[int, ...]) -> Tensor:
    """x with norms of that size; zeros stay zeros."""
    norm = _norm(x, p, dims)
    return x * (size / norm.where(norm > 0, 1.0))


def _pattern(height: int, width: int, p: float, device: torch.device) -> Tensor:
    """Two hills of opposite signs beside each other, of norm 1, shape (height, width)."""
    if height == 1 and width > 1:
        return _pattern(width, 1, p, device).T
    upper, lower = _hill(height // 2, width, p), _hill(height - height // 2, width, p)
    both = torch.cat([upper, -lower])
    return (both / _norm(both, p, (0, 1))).to(device)


def _hill(height: int, width: int, p: float) -> Tensor:
    """Sums of terms over the squares around the center that hold a point, of norm 1."""
    down = (torch.arange(height) - height // 2).abs()
    along = (torch.arange(width) - width // 2).abs()
    squares = max(height, width) // 2 + 1
    sums = _terms(squares, _IMAGE_FALLS[p]).flip(0).cumsum(0).flip(0)
    hill = sums[torch.maximum(down.unsqueeze(1), along)]
    return hill / _norm(hill, p, (0, 1)) if height else hill


def _terms(number: int, power: int) -> Tensor:
    """1, 1/2^power, 1/3^power, ..., of this number."""
    return torch.arange(1, number + 1, dtype=torch.float64).pow(-power).float()
