"""An attack along gradients that are estimated from differences, for models that mask theirs."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.kernels.blocks import BLOCK
from rai_toolbox.constraints.sampling import uniform
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import Criterion, Rule, margin_loss
from rai_toolbox.perturbations.solve import Attacked, solving


def difference_attack(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    steps: int = 8,
    width: float = 3.0,
    narrowed: float = 0.03,
    directions: int = 64,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    mask: Tensor | None = None,
    generator: Generator | None = None,
    levels: int | None = None,
) -> Attacked:
    r"""Run `attack` with gradients that are estimated without autograd.

    .. math::
        g = \sum_i \frac{L(x' + h u_i) - L(x' - h u_i)}{2} \, u_i

    The directions are rows of a Hadamard matrix with random signs, which are orthogonal: as many as
    there are features give the whole gradient of a linear model. Each step takes other ones, and a
    smaller h: wide differences are along the slope of a staircase, narrow ones see which of its
    steps are near.

    Parameters
    ----------
    model, data, target, ball, data_range, steps, criterion, fooled, mask, generator, levels
        As in `attack`; the criterion is `margin_loss` by default.
    width : float
        Of the first h: in units of the radius in an Linf ball; in L2 and L1 balls of the radius
        over the root of the number of features.
    narrowed : float
        The last h, in units of the first.
    directions : int
        Number of directions per step, >= 1; each one takes two evaluations of the model.

    Returns
    -------
    Attacked
    """
    check_count("directions", directions, 1)
    inputs.check_generator(generator)
    classes = inputs.expects_classes(criterion, fooled)
    criterion = losses.criterion_of(criterion, margin_loss, targeted=False)
    rule = losses.fooled_rule(fooled, required=False)
    with solving(model) as model:
        data = inputs.as_data(data)
        target = inputs.as_target(target, data, classes)
        around = FeasibleSet.around(data, ball, data_range, mask, levels)
        model = inputs.checked(model, target, classes)
        orthogonal = _Directions(around, directions, generator)
        # (Without a graph several times the data take no more memory than the data with one.)
        together = min(max(BLOCK // max(data.numel(), 1), 1), 8)
        ones, calls, step = (1,) * (target.ndim - 1), 0, 0

        def with_gradient(points: Tensor, goal: Tensor) -> Tensor:
            """The loss, whose gradient is the estimate."""
            nonlocal calls, step
            x, calls = points.detach(), calls + 1
            with torch.no_grad():
                loss = criterion(model(x.clone()), goal)
            if not points.requires_grad:
                return loss
            estimate = torch.zeros_like(x)
            h, step = width * narrowed ** (step / max(steps - 1, 1)), step + 1
            for changes in orthogonal.next(h, together):
                both = torch.cat([x + changes, x - changes])
                if around.bounds is not None:
                    both = both.clamp(*around.bounds)
                with torch.no_grad():
                    output = model(both.flatten(0, 1))
                    found = criterion(output, goal.repeat(len(both), *ones))
                up, down = found.view(2, len(changes), len(x), *(1,) * (x.ndim - 1))
                estimate += ((up - down) * changes).sum(0)
                calls += 1
            return loss + ((points - x) * estimate).flatten(1).sum(1)

        def success(points: Tensor, goal: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return rule(model(points.detach()), goal)

        found = attack(
            lambda x: x,
            data,
            target,
            criterion=with_gradient,
            fooled=success,
            ball=ball,
            data_range=data_range,
            steps=steps,
            mask=mask,
            levels=levels,
        )
    return found._replace(model_calls=calls, zero_gradient=torch.zeros_like(found.fooled))


class _Directions:
    """Orthogonal directions for each example; those of the next steps are others."""

    def __init__(self, around: FeasibleSet, number: int, generator: Generator | None) -> None:
        data = around.data
        features = data[0].numel() if len(data) else 1
        epsilon = torch.as_tensor(around.ball.epsilon, dtype=data.dtype, device=data.device)
        size = 1.0 if around.ball.p == inf else features**-0.5
        size = size * epsilon * (1.0 if around.mask is None else around.mask)
        self.scaled = torch.where(uniform(data, generator) < 0.5, -size, size).to(data.dtype)
        self.columns = torch.arange(features, device=data.device)
        order = 1 << max(features - 1, 1).bit_length()  # of the matrix: a power of two
        self.shifts = [shift for shift in (32, 16, 8, 4, 2, 1) if order >> shift]
        self.number = min(number, order)
        self.rows = uniform(torch.empty(order), generator).argsort().to(data.device)

    def next(self, width: float, together: int) -> Iterator[Tensor]:
        """The directions of one step, in parts of shape (k, N, ...) with k at most `together`."""
        now, rest = self.rows[: self.number], self.rows[self.number :]
        self.rows = torch.cat([rest, now])
        for rows in now.split(together):
            signs = 1 - 2 * _parity(self.columns & rows.unsqueeze(1), self.shifts)
            yield self.scaled * width * signs.view(-1, 1, *self.scaled.shape[1:])


def _parity(numbers: Tensor, shifts: list[int]) -> Tensor:
    """Whether the number of ones among the bits is odd: the signs of a Hadamard matrix."""
    for shift in shifts:
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1
