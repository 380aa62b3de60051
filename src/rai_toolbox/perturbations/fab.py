"""Fast adaptive boundary: an attack that follows the decision boundary toward each example."""

from __future__ import annotations

from itertools import product
from math import inf

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.kernels.box_hyperplane import moved_to_sum
from rai_toolbox.constraints.kernels.rounding import as_wide
from rai_toolbox.perturbations import inputs
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import gradient_of, is_fooled, margin_loss, most_likely_rivals
from rai_toolbox.perturbations.rivals import ChooseClasses, rival_classes
from rai_toolbox.perturbations.solve import Attacked, solving
from rai_toolbox.perturbations.solvers import warn_of_zero_gradient

# The figures of the paper: the steps beyond the boundary, back to the data, and the pull to them.
_BEYOND, _BACK, _PULL = 1.05, 0.9, 0.1
_BARELY_BEYOND = 1.0005  # of the last step: what is found is to be nearest
DUAL = {inf: 1.0, 2: 2.0, 1: inf}


def fab_attack(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    steps: int = 100,
    targeted: bool = False,
    restarts: int = 1,
    rivals: int | ChooseClasses | None = None,
    mask: Tensor | None = None,
    stop_once_fooled: bool = False,
    generator: Generator | None = None,
    levels: int | None = None,
) -> Attacked:
    r"""Find the nearest perturbed data that fool a classifier, and keep what is in the ball (FAB).

    Each step linearizes the margins of the other classes over the target, and chooses the class
    whose decision boundary is nearest. It goes to the points of this hyperplane, within the data
    range, that are nearest to the iterate and to the example, in the norm of the ball,

    .. math::
        x' \leftarrow P\big((1 - \alpha) (x' + \eta d') + \alpha (x + \eta d)\big)

    with the steps d' and d to these, and ``alpha = min(|d'| / (|d'| + |d|), .1)``, ``eta = 1.05``.
    Where that fools the model, it is kept if it is nearest, and the iterate goes back to ``x + .9
    (x' - x)``. The last step goes from the example to the hyperplane at the best point, which is
    exact for a linear model. A run ends at once if all its first gradients are 0. No step size
    depends on the radius: so the search also finds smallest radii, as the `solver` of
    `minimum_norm_attack`.

    Parameters
    ----------
    model : callable
        From data of shape (N, ...) to logits, shape (N, K), or to an object or dict with `logits`.
    data : Tensor, shape (N, ...)
        Of a floating-point dtype, within `data_range`.
    target : Tensor of int, shape (N,)
        The right classes; with `targeted` the classes that the model is to predict.
    ball : LinfBall or L2Ball or L1Ball
        Without a center. Its epsilon is a number, or has one value per example, shape (N,).
    data_range : pair of float or Tensor, or None
        Lower and upper bound of all data, in their unit; a tensor broadcasts against the data. None
        for no bounds.
    steps : int
        Number of steps of each run, >= 1. Each calls the model twice, and differentiates it once
        for each class that it chooses from.
    targeted : bool
        Search for `target` instead.
    restarts : int
        Number of runs, >= 1. The first starts at the data, all others at random points of half the
        radius.
    rivals : int or callable, optional
        Each restart makes one run toward each of this number of the most likely other classes, or
        of those that a callable chooses, as in `attack` (targeted FAB). By default there is one
        run, in which each step chooses among all classes. Not with `targeted`.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    stop_once_fooled : bool
        Whether an example that is fooled within the ball gets no further runs; a run ends once all
        its examples are.
    generator : torch.Generator, optional
        For the random starts.
    levels : int, optional
        Search on a grid only, such as that of 8-bit images with 256; as in `attack`.

    Returns
    -------
    Attacked
        Its losses are margins. Where nothing in the ball fools, the nearest that does, projected.

    Raises
    ------
    TypeError, ValueError
        As `attack`.

    Warns
    -----
    ZeroGradientWarning
        If some examples were not attacked, because every run started at a zero gradient.

    References
    ----------
    Croce, Hein (2020), "Minimally distorted adversarial examples with a fast adaptive boundary
    attack".

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import fab_attack
    >>> data, target = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> model = lambda x: torch.stack([2.5 - 3 * x[:, 0], 4 * x[:, 1]], 1)  # a distance of .5
    >>> fab_attack(model, data, target, ball=L2Ball(1.0), steps=5).data.round(decimals=2)
    tensor([[0.3000, 0.4000]])
    """
    check_count("steps", steps, 1)
    check_count("restarts", restarts, 1)
    inputs.check_generator(generator)
    if targeted and rivals is not None:
        raise wrong("rivals", "be None with `targeted`, whose target is the rival", rivals)
    with solving(model) as model, torch.no_grad():
        data = inputs.as_data(data)
        target = inputs.as_target(target, data, classes=True)
        allowed = FeasibleSet.around(data, ball, data_range, mask, levels)
        model = inputs.checked(model, target)
        if targeted:
            runs, calls = [target.unsqueeze(1)], 0
        elif rivals is None:
            logits = model(data)
            runs, calls = [most_likely_rivals(logits, target, logits.shape[1] - 1)], 1
        else:
            runs, calls = list(rival_classes(rivals, model, allowed, target).split(1, dim=1)), 1
        found, zero_gradient = data.clone(), torch.ones_like(target, dtype=torch.bool)
        length = torch.full(target.shape, inf, dtype=torch.float64, device=data.device)
        radius = as_wide(allowed.ball.epsilon, length).reshape(-1).expand(length.shape)
        rows = torch.arange(len(data), device=data.device)
        for restart, classes in product(range(restarts), runs):
            if stop_once_fooled:
                rows = (length > radius).nonzero().squeeze(1)
            if not len(rows):
                break
            part = allowed.rows(rows)
            search = _Search(model, part, target[rows], classes[rows], targeted, length[rows])
            if restart:
                change = part.of_perturbations().sample_(torch.zeros_like(part.data), generator)
                search.points = search.placed(part.data + change / 2)
            stop = radius[rows] if stop_once_fooled else None
            zero_gradient[rows] &= search.run(steps, stop)
            nearer = search.length < length[rows]
            nearer |= length[rows].isinf()  # the last iterate will do
            found[rows[nearer]] = search.found[nearer]
            length[rows] = search.length
            calls += search.calls
        found = allowed.feasible(found)
        logits = model(found)
        fooled, margins = is_fooled(logits, target, targeted), margin_loss(logits, target)
    warn_of_zero_gradient(zero_gradient & ~fooled)
    return Attacked(found, margins, fooled, zero_gradient, calls + 1)


class _Search:
    """One run toward some classes: the iterates, and the nearest points that fool so far."""

    def __init__(
        self,
        model: Model,
        around: FeasibleSet,
        target: Tensor,
        classes: Tensor,
        targeted: bool,
        length: Tensor,
    ) -> None:
        self.model, self.around, self.targeted = model, around, targeted
        self.target, self.classes = target, classes
        self.points, self.found, self.length = around.data, around.data.clone(), length.clone()
        self.calls = 0

    def run(self, steps: int, stop: Tensor | None) -> Tensor:
        """Search until all are found within the radii `stop`; where the first gradient is 0."""
        for step in range(steps):
            if stop is not None and bool((self.length <= stop).all()):
                break
            is_last = step == steps - 1
            if is_last:
                is_found = self._column(self.length.isfinite())
                self.points = torch.where(is_found, self.found, self.points)
            weight, total = self._hyperplane()
            if step == 0:
                zero_gradient = (weight == 0).all(1)
            points = self._next(weight, total, is_last)
            success = is_fooled(self.model(points), self.target, self.targeted)
            self.calls += 2
            change = points.double() - self.around.data.double()
            length = torch.linalg.vector_norm(change.flatten(1), self.around.ball.p, dim=1)
            nearer = success & (length < self.length)
            keep = self._column(nearer | self.length.isinf())
            self.found = torch.where(keep, points, self.found)
            self.length = torch.where(nearer, length, self.length)
            back = self.placed(self.around.data + _BACK * change)
            self.points = torch.where(self._column(success), back, points)
            if step == 0 and bool(zero_gradient.all()):
                break  # as no step would move
        return zero_gradient if self.calls else torch.zeros_like(self.target, dtype=torch.bool)

    def placed(self, points: Tensor) -> Tensor:
        """The points within the bounds, and on the grid if there is one."""
        if self.around.levels is not None:
            points = self.around.grid.nearest(points)
        points = points.to(self.around.data.dtype)
        return points if self.around.bounds is None else points.clamp(*self.around.bounds)

    def _hyperplane(self) -> tuple[Tensor, Tensor]:
        """The linearized decision boundary that is nearest, as ``weight . x = total``."""
        with torch.enable_grad():
            x = self.points.detach().clone().requires_grad_()
            logits = self.model(x)
            if self.targeted:
                margins = [-margin_loss(logits, self.target)]
            else:
                margins = [margin_loss(logits, self.target, c) for c in self.classes.unbind(1)]
        weights = torch.stack([gradient_of(margin, x) for margin in margins], 1)
        weights = weights.nan_to_num(0.0, 0.0, 0.0).double().flatten(2)
        if self.around.mask is not None:
            weights = weights * self.around.mask.flatten(1).unsqueeze(1)
        gaps = torch.stack(margins, 1).detach().double()
        size = torch.linalg.vector_norm(weights, DUAL[self.around.ball.p], dim=2)
        distance = (gaps.abs() / size).nan_to_num(nan=inf)
        nearest = distance.argmin(1, keepdim=True)
        weight = weights.gather(1, nearest.unsqueeze(2).expand(-1, 1, weights.shape[2])).squeeze(1)
        at = (weight * self.points.double().flatten(1)).sum(1, keepdim=True)
        return weight, at - gaps.gather(1, nearest)

    def _next(self, weight: Tensor, total: Tensor, is_last: bool) -> Tensor:
        """The points to evaluate next."""
        p, (lower, upper) = self.around.ball.p, self._bounds()
        x, data = self.points.double().flatten(1), self.around.data.double().flatten(1)
        from_data = moved_to_sum(data, weight, total, lower, upper, p) - data
        if is_last:
            return self.placed((data + _BARELY_BEYOND * from_data).view(self.points.shape))
        from_x = moved_to_sum(x, weight, total, lower, upper, p) - x
        near, far = (
            torch.linalg.vector_norm(each, p, dim=1, keepdim=True) for each in (from_x, from_data)
        )
        share = (near / (near + far)).nan_to_num(0.0).clamp(max=_PULL)
        moved = (1 - share) * (x + _BEYOND * from_x) + share * (data + _BEYOND * from_data)
        return self.placed(moved.view(self.points.shape))

    def _bounds(self) -> tuple[Tensor, Tensor]:
        data = self.around.data
        lower, upper = self.around.bounds or (data - inf, data + inf)
        return lower.double().flatten(1), upper.double().flatten(1)

    def _column(self, rows: Tensor) -> Tensor:
        return rows.view(-1, *(1,) * (self.points.ndim - 1))
