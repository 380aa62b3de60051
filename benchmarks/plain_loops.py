"""The loops that one would write by hand in place of each optimizer or set: the yardstick of speed.

They take one tensor at a time, in its own dtype, and take no care of overflow or rounding. Rows are
the first dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from projections import textbook_l1, textbook_simplex
from torch import Tensor
from torch.linalg import vector_norm

Change = Callable[[Tensor], object]

KEPT = 0.1  # the share of entries that top-q keeps
_TINY = 1e-30  # instead of 0 as a divisor


def _norms(x: Tensor, p: float = 2) -> Tensor:
    return vector_norm(x, p, tuple(range(1, x.ndim)), keepdim=True).clamp_(min=_TINY)


def clamp(x: Tensor) -> None:
    x.clamp_(-1.0, 1.0)


def sign(x: Tensor) -> None:
    x.sign_()


def unit_l1(x: Tensor) -> None:
    x.div_(_norms(x, 1))


def unit_l2(x: Tensor) -> None:
    x.div_(_norms(x))


def l2_ball(epsilon: float) -> Change:
    def project(x: Tensor) -> None:
        x.mul_((epsilon / _norms(x)).clamp_(max=1.0))

    return project


def top_q(x: Tensor) -> None:
    rows = x.view(len(x), -1)
    at = rows.abs().topk(round(KEPT * rows.shape[1]), dim=1).indices
    largest = rows.gather(1, at)
    rows.zero_().scatter_(1, at, largest)


def top_q_clamp(x: Tensor) -> None:
    top_q(x)
    clamp(x)


def l1q(x: Tensor) -> None:
    top_q(x)
    sign(x)
    unit_l1(x)


def largest_sign(x: Tensor) -> None:
    rows = x.view(len(x), -1)
    at = rows.abs().argmax(1, keepdim=True)
    largest = rows.gather(1, at).sign_()
    rows.zero_().scatter_(1, at, largest)


def sorted_l1(epsilon: float) -> Change:
    def project(x: Tensor) -> None:
        x.copy_(textbook_l1(x / epsilon) * epsilon)

    return project


def sorted_simplex(x: Tensor) -> None:
    x.copy_(textbook_simplex(x))


def step_by_hand(
    inner: torch.optim.Optimizer,
    params: Iterable[Tensor],
    before: Change | None,
    after: Change | None,
) -> Callable[[], None]:
    """A step of `inner`, with loops over gradients before it and parameters after it."""
    params = list(params)

    @torch.no_grad()
    def step() -> None:
        if before is not None:
            for param in params:
                before(param.grad)  # type: ignore[arg-type]
        inner.step()
        if after is not None:
            for param in params:
                after(param)

    return step
