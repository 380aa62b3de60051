"""Verification: what can be told of perturbed data without trusting the solver that made them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.constraints.balls import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations.box import Ball, Range
from rai_toolbox.perturbations.classes import check_logits, check_target, extent
from rai_toolbox.perturbations.gradient_ascent import solving

__all__ = ["Reading", "VerificationReport", "Verdict", "read", "verify"]

NORMS: dict[type[Ball], tuple[str, float]] = {
    LinfBall: ("Linf", inf),
    L2Ball: ("L2", 2.0),
    L1Ball: ("L1", 1.0),
}


@dataclass(frozen=True)
class VerificationReport:
    """What was found wrong with perturbed data: numbers of data, and the largest excesses.

    Two reports add up to that of all their data.

    Parameters
    ----------
    data : int
        How many were examined.
    fooled : int
        Of how many the model gives another class than the target's, from within ball and box.
    outside_ball, outside_box : int
        How many are outside the ball around the original, or outside the range of the data.
    ball_excess, box_excess : float
        The largest distance beyond the radius, and beyond a bound; 0 if there is none.
    not_finite : int
        How many have an infinity or NaN in the perturbed data, in the loss or in the gradient.
    zero_gradient : int
        At how many originals the gradient is exactly 0, that of the odds against the class, which
        does not saturate: the model is flat there.
    not_risen : int
        For how many the cross entropy is not higher than at the original.

    Examples
    --------
    >>> from rai_toolbox.perturbations.verification import VerificationReport
    >>> report = VerificationReport(data=100, fooled=40, zero_gradient=25)
    >>> for line in (report + report).warnings("Linf 0.1"):
    ...     print(line)
    Linf 0.1: the gradient is exactly 0 at 50 of 200 data (25.0%): the model is flat there
    """

    data: int = 0
    fooled: int = 0
    outside_ball: int = 0
    ball_excess: float = 0.0
    outside_box: int = 0
    box_excess: float = 0.0
    not_finite: int = 0
    zero_gradient: int = 0
    not_risen: int = 0

    def __add__(self, other: VerificationReport) -> VerificationReport:
        largest = ("ball_excess", "box_excess")
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return VerificationReport(**{n: max(a, b) if n in largest else a + b for n, a, b in pairs})

    @property
    def feasible(self) -> bool:
        """Whether all data are finite, in the ball and in the box."""
        return self.outside_ball == self.outside_box == self.not_finite == 0

    def warnings(self, of: str = "perturbed data") -> list[str]:
        """One sentence for each kind of trouble; `of` names what was examined."""
        said = [
            (self.outside_ball, f"{{}} are outside the ball, by up to {self.ball_excess:.3g}"),
            (self.outside_box, f"{{}} are outside the data range, by up to {self.box_excess:.3g}"),
            (self.not_finite, "{} have an infinity or NaN in data, loss or gradient"),
            (
                self.zero_gradient,
                "the gradient is exactly 0 at {}: the model is flat there",
            ),
            (self.not_risen, "the loss did not rise for {}"),
        ]
        return [
            f"{of}: {text.format(f'{n} of {self.data} data ({n / self.data:.1%})')}"
            for n, text in said
            if n
        ]

    def to_plain(self) -> dict[str, Any]:
        """The report as a dict of numbers."""
        return asdict(self)


class Reading(NamedTuple):
    """How a model reads data, shape (N,) each: its losses, errors, and where it is flat."""

    losses: Tensor
    misread: Tensor
    zero_gradient: Tensor
    finite: Tensor

    def at(self, rows: Tensor) -> Reading:
        """Some of the data."""
        return Reading(*(values[rows] for values in self))


class Verdict(NamedTuple):
    """What is so of each of the perturbed data, shape (N,) each."""

    ball_excess: Tensor
    box_excess: Tensor
    finite: Tensor
    misread: Tensor
    zero_gradient: Tensor
    risen: Tensor

    @property
    def fooled(self) -> Tensor:
        """Misread, and a point that was allowed: one outside ball or box shows nothing."""
        return self.misread & (self.ball_excess <= 0) & (self.box_excess <= 0)

    def report(self) -> VerificationReport:
        """The numbers of data, and the largest excesses."""
        return VerificationReport(
            data=len(self.misread),
            fooled=_count(self.fooled),
            outside_ball=_count(self.ball_excess > 0),
            ball_excess=_largest(self.ball_excess),
            outside_box=_count(self.box_excess > 0),
            box_excess=_largest(self.box_excess),
            not_finite=_count(~self.finite),
            zero_gradient=_count(self.zero_gradient),
            not_risen=_count(~self.risen & self.finite),
        )


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """``log((1 - p) / p)`` with the softmax p of the target, shape (N,), in float64.

    The cross entropy ``-log p`` rises where this does, but this tells more: it never saturates.
    """
    wide, own = logits.double(), target.unsqueeze(1)
    return wide.scatter(1, own, -inf).logsumexp(1) - wide.gather(1, own).squeeze(1)


def read(
    model: Callable[[Tensor], Tensor], data: Tensor, target: Tensor, *, gradient: bool = True
) -> Reading:
    """How `model`, in eval mode and with frozen weights, reads `data`, each of class `target`."""
    with solving(model), torch.set_grad_enabled(gradient):
        x = data.detach().clone().requires_grad_(gradient)
        logits = model(x)
        check_logits(logits, len(data), extent(target))
        target = target.clone().long()  # which autograd cannot keep if made in inference mode
        losses = log_odds(logits, target)
        finite = losses.detach().isfinite()
        zero = torch.zeros_like(finite)
        if gradient:
            (slope,) = (
                torch.autograd.grad(losses.sum(), x, allow_unused=True)
                if losses.requires_grad
                else (None,)
            )
            slope = torch.zeros_like(x) if slope is None else slope
            finite &= slope.isfinite().flatten(1).all(1)
            zero = (slope == 0).flatten(1).all(1)
    logits = logits.detach()
    # a model that answers NaN does not read: argmax would name the first NaN, maybe rightly
    misread = (logits.argmax(1) != target) | logits.isnan().any(1)
    return Reading(losses.detach(), misread, zero, finite)


def judge(
    data: Tensor,
    perturbed: Tensor,
    before: Reading,
    after: Reading,
    ball: Ball,
    data_range: Range,
) -> Verdict:
    """Compare perturbed data and how they are read with the originals."""
    finite = perturbed.isfinite().flatten(1).all(1)
    return Verdict(
        ball_excess=beyond_ball(data, perturbed, ball),
        box_excess=beyond_range(perturbed, data_range),
        finite=finite & before.finite & after.finite,
        misread=after.misread & finite,
        zero_gradient=before.zero_gradient & before.finite,
        risen=after.losses > before.losses,
    )


def verify(
    model: Callable[[Tensor], Tensor],
    data: Tensor,
    target: Tensor,
    perturbed: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
) -> VerificationReport:
    """Examine perturbed data of any origin: ball and box anew in float64, losses by fresh calls.

    An excess counts as soon as it is more than the rounding of the float64 arithmetic that finds
    it; elementwise bounds count as rounded to the dtype of the data.

    Parameters
    ----------
    model : Callable
        Gives logits of shape (N, K). A module is in eval mode with frozen weights meanwhile.
    data, perturbed : Tensor, shape (N, ...)
        The originals and what became of them.
    target : Tensor, shape (N,)
        The right classes.
    ball : LinfBall or L2Ball or L1Ball
        Without a center: it is around each original.
    data_range : (float or Tensor, float or Tensor), optional
        The bounds of all data; None for no bounds.

    Returns
    -------
    VerificationReport

    Raises
    ------
    ValueError
        If shapes do not fit, a class is not one of the model's, or the ball has a center.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations.verification import verify
    >>> data, target = torch.tensor([[0.2, 0.1], [0.3, 0.4]]), torch.tensor([0, 1])
    >>> perturbed = torch.tensor([[0.1, 0.2], [0.5, 0.4]])
    >>> report = verify(torch.nn.Identity(), data, target, perturbed, ball=LinfBall(0.125))
    >>> report.fooled, report.outside_ball, round(report.ball_excess, 6)
    (1, 1, 0.075)
    """
    check_ball(ball)
    check_batch(data, target)
    if perturbed.shape != data.shape or not perturbed.is_floating_point():
        raise ValueError(
            f"`perturbed` must be floating-point data of shape {tuple(data.shape)}, got "
            f"{perturbed.dtype} of shape {tuple(perturbed.shape)}"
        )
    before = read(model, data, target)
    after = read(model, perturbed, target, gradient=False)
    return judge(data, perturbed, before, after, ball, data_range).report()


def beyond_ball(data: Tensor, perturbed: Tensor, ball: Ball) -> Tensor:
    """How much farther than the radius each is from its original, shape (N,); <= 0 inside."""
    order = NORMS[type(ball)][1]
    change = (perturbed.detach().double() - data.detach().double()).flatten(1)
    radius = torch.as_tensor(ball.epsilon, dtype=torch.float64, device=data.device).reshape(-1)
    if order == inf:
        radius = torch.maximum(radius, radius.to(perturbed.dtype).double())
    own_rounding = (change.shape[1] + 2) * 2.0**-53 * radius
    excess = torch.linalg.vector_norm(change, order, dim=1) - radius
    return torch.where(excess <= own_rounding, excess.clamp(max=0), excess)


def beyond_range(data: Tensor, data_range: Range) -> Tensor:
    """How far beyond a bound the farthest element of each is, shape (N,); 0 inside."""
    wide = data.detach().double()
    excess = torch.where(wide.isnan(), wide, 0.0)
    if data_range is not None:
        low, high = (torch.as_tensor(b, device=data.device).to(data.dtype) for b in data_range)
        excess = torch.maximum(torch.maximum(low.double() - wide, wide - high.double()), excess)
    rows = excess.flatten(1)
    return rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def check_ball(ball: object) -> None:
    """Raise unless `ball` is a ball of one of the three norms, without a center."""
    if type(ball) not in NORMS:
        raise TypeError(f"`ball` must be a LinfBall, L2Ball or L1Ball, got {ball!r}")
    if ball.center is not None:  # type: ignore[attr-defined]
        raise ValueError(f"`center` of `ball` must be None, as each datum is one, got {ball!r}")


def check_batch(data: object, target: object) -> None:
    """Raise unless these are floating-point data and the index of a class for each of them."""
    if not isinstance(data, Tensor) or not isinstance(target, Tensor):
        raise TypeError(
            f"`data` and `target` must be tensors, got {type(data).__name__} and "
            f"{type(target).__name__}"
        )
    if not data.is_floating_point():
        raise TypeError(
            "`data` must be floating-point, such as images / 255 for those of torch.uint8, got "
            f"{data.dtype}"
        )
    if data.ndim < 2:
        raise ValueError(f"`data` must have the shape (N, ...), got {tuple(data.shape)}")
    check_target(target, data)


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _largest(excess: Tensor) -> float:
    found = excess[excess.isfinite() & (excess > 0)]
    return float(found.max()) if found.numel() else 0.0
