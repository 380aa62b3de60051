"""Verification: perturbed data are judged without trusting the solver that made them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.checks import wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.box import Box
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.feasible_set import norms_of
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import (
    Criterion,
    Rule,
    criterion_of,
    fooled_rule,
    gradient_of,
    refuses_gradients,
)
from rai_toolbox.perturbations.solve import solving


@dataclass(frozen=True)
class VerificationReport:
    """What is wrong with perturbed data: numbers of examples, and the largest excesses.

    The sum of two reports is the report of all their examples.

    Parameters
    ----------
    data : int
        Number of examples.
    fooled : int
        Number for which the model predicts another class than the target, or what the rule
        `correct` refuses, inside ball and range.
    outside_ball, outside_box : int
        Numbers outside the ball around the original, by more than rounding, as NaN is, and outside
        the range of the data.
    ball_excess, box_excess : float
        The largest distance beyond the radius, and beyond a bound; 0 if there is none.
    not_finite : int
        Number with an infinity or NaN in the perturbed data, in the loss, or in the gradient at the
        original, whose entries count as 0 in attacks. With a rule `correct`, the loss is the
        `criterion`; without one it counts as finite.
    zero_gradient : int
        Number of originals at which the gradient of the log odds against the class is exactly 0.
        As log odds do not saturate, the model is constant there. With a rule, that of `criterion`.
    not_risen : int
        Number for which the cross entropy, or the `criterion`, is not higher than at the original.
    underused : int
        Number that is not fooled, although the loss is higher than at the original, by a
        change of less than half of the radius. It is a fault if these are most of those that are
        not fooled: the solver's steps are too few or too short, or the ball is wider than the range
        of the data.

    Examples
    --------
    >>> from rai_toolbox.perturbations import VerificationReport
    >>> report = VerificationReport(data=100, fooled=40, zero_gradient=25)
    >>> for line in (report + report).warnings("Linf 0.1"):
    ...     print(line)
    Linf 0.1: the gradient is exactly 0 at 50 of 200 examples (25.0%): the model is flat there
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
    underused: int = 0

    def __add__(self, other: VerificationReport) -> VerificationReport:
        largest = ("ball_excess", "box_excess")
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return VerificationReport(**{n: max(a, b) if n in largest else a + b for n, a, b in pairs})

    @property
    def feasible(self) -> bool:
        """Whether all data are finite, in the ball and in the range."""
        return self.outside_ball == self.outside_box == 0

    def warnings(self, of: str = "perturbed data") -> list[str]:
        """One sentence for each kind of fault; `of` names the data."""
        # A few examples may be at their worst so near; most of those that withstand are not.
        underused = self.underused if 2 * self.underused > self.data - self.fooled else 0
        faults = [
            (self.outside_ball, f"{{}} are outside the ball, by up to {self.ball_excess:.3g}"),
            (self.outside_box, f"{{}} are outside the data range, by up to {self.box_excess:.3g}"),
            (self.not_finite, "{} have an infinity or NaN in data, loss or gradient"),
            (self.zero_gradient, "the gradient is exactly 0 at {}: the model is flat there"),
            (self.not_risen, "the loss did not rise for {}"),
            (underused, "{} withstand within half of the radius: take more or longer steps"),
        ]
        return [
            f"{of}: {text.format(f'{n} of {self.data} examples ({n / self.data:.1%})')}"
            for n, text in faults
            if n
        ]

    def to_plain(self) -> dict[str, Any]:
        """The report as a dict of numbers."""
        return asdict(self)


class Prediction(NamedTuple):
    """Data, shape (N, ...), and what a model predicts for each example, shape (N,) each.

    Losses are NaN where no loss is known. `predicted` is the class; with a rule the output, or
    whether that is wrong if it has not one entry per example.
    """

    data: Tensor
    losses: Tensor
    predicted: Tensor
    misclassified: Tensor
    zero_gradient: Tensor
    finite: Tensor

    def rows(self, rows: Tensor) -> Prediction:
        """The prediction for some of the examples."""
        return Prediction(*(values[rows] for values in self))


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """``log((1 - p) / p)`` with the softmax p of the target, shape (N,), in float64.

    It increases with the cross entropy ``-log p``, and does not saturate.
    """
    wide, own = logits.double(), target.unsqueeze(1)
    return wide.scatter(1, own, -inf).logsumexp(1) - wide.gather(1, own).squeeze(1)


def wrong_by(correct: Rule | None) -> Rule:
    """The rule of who is fooled: whoever is not correct by another rule, or by the class."""
    if correct is None:
        return fooled_rule(None)
    right = fooled_rule(correct, name="correct")
    return lambda output, target: ~right(output, target)


def predict(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    correct: Rule | None = None,
    criterion: Criterion | None = None,
    gradient: bool = True,
) -> Prediction:
    """Call `model`, in eval mode and with frozen weights, and compare with the target."""
    loss = log_odds if correct is None else criterion
    with solving(model) as model, torch.set_grad_enabled(gradient):
        x = data.detach().clone().requires_grad_(gradient)
        checked = inputs.checked(model, target, classes=correct is None)
        try:
            output = checked(x)
        except RuntimeError as error:
            if not (gradient and refuses_gradients(error)):
                raise
            output = checked(data.detach())
        target = target.clone()  # as autograd cannot keep one made in inference mode
        target = target.long() if inputs.are_classes(target) else target
        if loss is None:
            losses = torch.full(x.shape[:1], nan, dtype=x.dtype, device=x.device)
        else:
            losses = loss(output, target)
            inputs.check_per_example("criterion", losses, x)
        slope = gradient_of(losses, x)
    with torch.no_grad():
        misclassified = wrong_by(correct)(output, target)
        predicted = output.argmax(1) if correct is None else output
    if not isinstance(predicted, Tensor) or predicted.shape[:1] != data.shape[:1]:
        predicted = misclassified
    losses, is_known = losses.detach(), loss is not None
    finite = (losses.isfinite() | (not is_known)) & slope.isfinite().flatten(1).all(1)
    zero_gradient = (slope == 0).flatten(1).all(1) & finite & (gradient and is_known)
    return Prediction(data, losses, predicted.detach(), misclassified, zero_gradient, finite)


def compare(
    before: Prediction, after: Prediction, ball: Ball, data_range: Range
) -> tuple[VerificationReport, Tensor]:
    """Compare perturbed data with the originals: the report, and whether each is fooled.

    A point outside ball or range fools nobody.
    """
    data, perturbed = before.data, after.data
    in_data = perturbed.isfinite().flatten(1).all(1)
    ball_excess = beyond_ball(data, perturbed, ball)
    box_excess = beyond_range(perturbed, data_range)
    fooled = after.misclassified & in_data & (ball_excess <= 0) & (box_excess <= 0)
    finite = in_data & before.finite & after.finite
    risen = finite & (after.losses > before.losses)
    little_used = beyond_ball(data, perturbed, replace(ball, epsilon=ball.epsilon / 2)) < 0
    report = VerificationReport(
        data=len(data),
        fooled=int(fooled.sum()),
        outside_ball=int((~(ball_excess <= 0)).sum()),  # NaN, too
        ball_excess=_largest(ball_excess),
        outside_box=int((box_excess > 0).sum()),
        box_excess=_largest(box_excess),
        not_finite=int((~finite).sum()),
        zero_gradient=int(before.zero_gradient.sum()),
        not_risen=int((finite & (after.losses <= before.losses)).sum()),
        underused=int((risen & ~after.misclassified & little_used).sum()),
    )
    return report, fooled


def verify(
    model: Model,
    data: Tensor,
    target: Tensor,
    perturbed: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    criterion: Criterion | None = None,
    correct: Rule | None = None,
) -> VerificationReport:
    """Examine perturbed data of any origin: ball and range in float64, losses by new calls.

    An excess counts if it is more than rounding in the dtype of the data can explain: of the data,
    of their sum with a perturbation, and of a projection onto the ball. So points of other solvers
    count as inside, and 8-bit pixels k/255 moved to (k+8)/255 at the radius 8/255. What `attack`
    returns is inside without this allowance. Elementwise bounds count as rounded to the dtype.

    Parameters
    ----------
    model : Callable
        From data to logits, shape (N, K), or to an object or dict with `logits`. A module is in
        eval mode with frozen weights meanwhile.
    data, perturbed : Tensor, shape (N, ...)
        The originals and the perturbed data.
    target : Tensor
        The right classes, shape (N,); with `correct` of any dtype and of shape (N, ...).
    ball : LinfBall or L2Ball or L1Ball
        Without a center: it is around each original.
    data_range : (float or Tensor, float or Tensor), optional
        Lower and upper bound of all data, in their unit; a tensor broadcasts against the data. None
        for no bounds.
    criterion : Callable, optional
        With `correct`, the loss of each example that should have increased.
    correct : Callable, optional
        From the model's output and the target to a bool for each example, if targets are not
        classes: whether the prediction is right.

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
    >>> from rai_toolbox.perturbations import verify
    >>> data, target = torch.tensor([[0.2, 0.1], [0.3, 0.4]]), torch.tensor([0, 1])
    >>> perturbed = torch.tensor([[0.1, 0.2], [0.5, 0.4]])
    >>> report = verify(torch.nn.Identity(), data, target, perturbed, ball=LinfBall(0.125))
    >>> report.fooled, report.outside_ball, round(report.ball_excess, 6)
    (1, 1, 0.075)
    """
    inputs.check_ball(ball)
    criterion_of(criterion, log_odds, targeted=False)
    inputs.check_batch(data, target, classes=correct is None)
    if not isinstance(perturbed, Tensor):
        got = f"{type(perturbed).__name__} (use `torch.from_numpy`)"
        raise wrong("perturbed", "be a tensor", got, TypeError)
    if perturbed.shape != data.shape or not perturbed.is_floating_point():
        got = f"{perturbed.dtype} of shape {tuple(perturbed.shape)}"
        raise wrong("perturbed", f"be floating-point data of shape {tuple(data.shape)}", got)
    judge = partial(predict, model, correct=correct, criterion=criterion)
    before = judge(data, target)
    after = judge(perturbed, target, gradient=False)
    return compare(before, after, ball, data_range)[0]


def beyond_ball(data: Tensor, perturbed: Tensor, ball: Ball) -> Tensor:
    """The distance of each example from its original beyond the radius, shape (N,); <= 0 inside.

    An example is inside if a change within the ball can have been rounded to it: an element of the
    data, or of the sum, that is rounded to x moves by at most ``u |x|``, where u is half the
    spacing of numbers at 1. So the element's change can have been smaller by the sum of both. The
    radius is rounded, too. In L1 and L2 a solver also rounds its projection: the norm by ``sqrt(n)
    u`` of itself, if summed in blocks, and three more results by u each.
    """
    size, info = data[:1].numel(), torch.finfo(data.dtype)
    x, y = (tensor.detach().double().flatten(1) for tensor in (data, perturbed))
    change, unit = (y - x).abs(), info.eps / 2
    least = (change - unit * (x.abs() + y.abs() + 2 * info.tiny)).clamp(min=0)
    radius = torch.as_tensor(ball.epsilon, dtype=torch.float64, device=data.device).reshape(-1)
    rounding = (size + 2) * 2.0**-53  # of the float64 arithmetic here
    if ball.p != inf:  # (sums of half precision are in float32)
        rounding += 3 * unit + size**0.5 * min(unit, 2.0**-24)
    allowed = torch.maximum(radius, radius.clamp(max=info.max).to(data.dtype)) * (1 + rounding)
    inside = norms_of(least, ball.p) <= allowed
    excess = norms_of(change, ball.p) - radius
    return torch.where(inside, excess.clamp(max=0), excess)


def beyond_range(data: Tensor, data_range: Range) -> Tensor:
    """The largest distance of an element of each example beyond a bound, shape (N,); 0 inside."""
    if data_range is None:
        return torch.zeros(len(data), dtype=torch.float64, device=data.device)
    return Box(*data_range).to(data.device).violation(data)


def _largest(excess: Tensor) -> float:
    found = excess[excess.isfinite() & (excess > 0)]
    return float(found.max()) if found.numel() else 0.0
