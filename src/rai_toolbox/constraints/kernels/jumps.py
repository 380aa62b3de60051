"""Jumps that shorten a slow iteration: to where its changes cancel, and along those that do not."""

from __future__ import annotations

import torch
from torch import Tensor

_MEMORY = 5  # secants that are kept
_RANK = 1e-9  # relative size of secants that are too much alike
_MODELED = 0.2  # relative size of what secants leave of a change that they explain
_SHORTEST, _LONGEST = 0.5, 1e12  # strides, in units of a change
_LONGER, _SHORTER = 4.0, 32.0


class Jumps:
    """The jumps of each row of iterates of shape (k, rows, n).

    A secant is a step between two iterates and the turn of the change that came with it. Where
    secants explain the last change, the jump is the step at which it would vanish (Anderson, 1965).
    What they leave of it is drift, which goes on until something new is met: the jump follows it by
    a stride that grows while jumps succeed.
    """

    def __init__(self, like: Tensor) -> None:
        self._last = self._change = torch.zeros_like(like)
        self._secants: list[tuple[Tensor, Tensor]] = []
        self._stride = like.new_full((like.shape[1],), _SHORTEST)
        self._explained = torch.zeros_like(self._stride, dtype=torch.bool)
        self._mixed = ~self._explained  # whether a drift is what secants leave, or all of a change

    def next(
        self, iterate: Tensor, change: Tensor, noise: Tensor, failed: Tensor, restarts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The iterate to go on from; which rows have jumped to it.

        Parameters
        ----------
        iterate : Tensor, shape (k, rows, n)
            Where the iteration is.
        change : Tensor, shape (k, rows, n)
            The change that has led there; without a gradient.
        noise : Tensor, shape (rows,)
            What a turn has to be larger than.
        failed, restarts : Tensor of bool, shape (rows,)
            Rows whose last jump is taken back, and rows that start again from zeros.
        """
        forget = failed | restarts
        step, turn = iterate - self._last, change - self._change
        known = ~forget & (_length(self._change) > 0) & (_length(turn) > noise)
        past = [(_rows(~forget, s), _rows(~forget, t)) for s, t in self._secants[1 - _MEMORY :]]
        if not iterate.requires_grad:
            past.append(_orthogonal(past, _rows(known, step), _rows(known, turn)))
        self._secants = past
        self._last = _rows(~restarts, torch.where(_as_rows(failed), self._last, iterate))
        self._change = _rows(~restarts, torch.where(_as_rows(failed), self._change, change))

        too_long = failed & ~self._explained
        self._mixed = self._mixed ^ too_long
        stride = torch.where(self._explained, self._stride, _LONGER * self._stride)
        stride = torch.where(too_long, self._stride / _SHORTER, stride)
        stays = restarts | (stride < _SHORTEST)
        self._stride = torch.where(stays, _SHORTEST, stride.clamp(max=_LONGEST))

        jump, drift = torch.zeros_like(iterate), self._change
        for s, t in self._secants:
            share = _dot(t, drift)
            jump, drift = jump - share * s, drift - share * t
        self._explained = _length(drift) <= _MODELED * _length(self._change)
        mixed = jump + _rows(~self._explained, _as_rows(self._stride) * drift)
        along = _as_rows(self._stride) * self._change
        jump = _rows(~stays, torch.where(_as_rows(self._explained | self._mixed), mixed, along))
        return self._last + jump, _length(jump.detach()) > 0


def _orthogonal(
    secants: list[tuple[Tensor, Tensor]], step: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor]:
    """A secant whose turn is of length 1 and orthogonal to others; zeros if they span it."""
    length = _length(turn)
    for s, t in secants * 2:  # twice, as once leaves rounding errors
        share = _dot(t, turn)
        step, turn = step - share * s, turn - share * t
    left = _length(turn)
    new = left > _RANK * length
    unit = _as_rows(torch.where(new, left, 1.0))
    return _rows(new, step / unit), _rows(new, turn / unit)


def _as_rows(values: Tensor) -> Tensor:
    return values.unsqueeze(1)


def _rows(chosen: Tensor, x: Tensor) -> Tensor:
    return torch.where(_as_rows(chosen), x, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _as_rows((a * b).sum((0, 2)))


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(0, 2))
