"""The smallest perturbation of each datum that fools a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.checks import check_count, check_number
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations.active import column
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.box import DataSet, Range
from rai_toolbox.perturbations.classes import as_classes, check_logits, extent
from rai_toolbox.perturbations.gradient_ascent import Model, as_data, solving
from rai_toolbox.perturbations.losses import is_fooled, margin_loss
from rai_toolbox.perturbations.rivals import nearest_rivals

__all__ = ["MinimumNorm", "minimum_norm_attack"]

_ORDERS: dict[type, float] = {LinfBall: inf, L2Ball: 2, L1Ball: 1}
_DUAL = {inf: 1, 2: 2, 1: inf}
_RIVALS = 2  # the second in line, where the model is not linear
_HALVINGS = 12  # of a line: each costs a forward
_LEAST = 1e-6  # of the largest radius: where to begin on a boundary


class MinimumNorm(NamedTuple):
    """What `minimum_norm_attack` found.

    Attributes
    ----------
    data : Tensor, shape (N, ...)
        The perturbed data; the datum itself where nothing fools, or nothing is needed to.
    radius : Tensor, shape (N,)
        Their distance from the data, in float64: 0 where the datum itself fools; inf where
        nothing was found.
    fooled : Tensor, shape (N,)
        Whether the model, called with `data`, is fooled.
    """

    data: Tensor
    radius: Tensor
    fooled: Tensor


def minimum_norm_attack(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: type[LinfBall] | type[L2Ball] | type[L1Ball],
    data_range: Range = (0.0, 1.0),
    steps: int = 40,
    search_steps: int = 12,
    tolerance: float = 1e-3,
    largest: float | None = None,
    targeted: bool = False,
    mask: Tensor | None = None,
    solver: Callable[..., Any] | None = None,
) -> MinimumNorm:
    r"""Find the smallest radius at which each datum can be perturbed to fool the model.

    .. math::
        \min_\delta \|\delta\| \quad \text{s.t. the model is fooled by } x + \delta, \;
        \text{lower} \leq x + \delta \leq \text{upper}

    It is a bisection over the radius, each datum's own, which `solver` is called at; the first one
    is where a linear model would be fooled, and what is found is drawn as near to its datum as
    fools, on a straight line. A radius at which the solver fails counts as one at which nothing
    fools: the result is as good as the solver. With an exact one it exceeds the least radius by at
    most the share `tolerance`, if there are steps enough; that of the default is so on a linear
    model. On other models ``partial(attack, rivals=9)``, a run toward each of ten classes, may find
    less, at some three times the cost.

    Parameters
    ----------
    model : callable
        Gives logits, shape (N, K).
    data : Tensor, shape (N, ...)
        Within `data_range`.
    target : Tensor, shape (N,)
        The true classes; the wanted ones if targeted.
    ball : type of LinfBall, L2Ball or L1Ball
        Whose radius is searched for.
    data_range : tuple of float or Tensor, optional
        The bounds of perturbed data; None for none.
    steps : int
        Steps of the solver, for each radius.
    search_steps : int
        Radii tried, at most; every one halves what is left, once one has fooled.
    tolerance : float
        The share of the radius at which the search ends for a datum.
    largest : float, optional
        The largest radius to try. By default all that the data range has, which must be finite.
    targeted : bool
        Whether to be fooled means to say `target`.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    solver : callable, optional
        `attack`, a partial of it, or another that returns something with `data`. It is called on
        the data that are still searched for, with `ball`, `data_range`, `steps` and
        ``stop_once_fooled=True``, and with `targeted` and `mask` if they are given. By default
        ``partial(attack, rivals=partial(nearest_rivals, number=2))``, or `attack` if targeted.

    Returns
    -------
    MinimumNorm

    Raises
    ------
    TypeError
        If `ball` is no such class.
    ValueError
        If a number is out of its range, data are outside of theirs, targets are no classes, or
        neither `largest` nor the data range bounds the search.

    References
    ----------
    Carlini, Wagner (2017), "Towards evaluating the robustness of neural networks", for the
    bisection; Brendel, Rauber, Bethge (2018), "Decision-based adversarial attacks", for the line.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import minimum_norm_attack
    >>> data, target = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    >>> model = lambda x: x @ torch.tensor([[0.6, 0.0], [0.8, 0.0]])  # 5 away from class 1
    >>> found = minimum_norm_attack(
    ...     model, data, target, ball=L2Ball, data_range=None, largest=100.0
    ... )
    >>> found.radius.round(decimals=2)
    tensor([5.], dtype=torch.float64)
    """
    order = _ORDERS.get(ball)
    if order is None:
        raise TypeError(f"`ball` must be the class LinfBall, L2Ball or L1Ball, got {ball!r}")
    check_count("steps", steps, 1)
    check_count("search_steps", search_steps, 1)
    if not 0 < check_number("tolerance", tolerance) < 1:
        raise ValueError(f"`tolerance` must be > 0 and < 1, got {tolerance!r}")
    if largest is not None and check_number("largest", largest) < 0:
        raise ValueError(f"`largest` must be >= 0, got {largest!r}")

    call: Callable[..., Any]
    if targeted:
        call = partial(solver or attack, steps=steps, targeted=True)
    else:
        call = partial(
            solver or partial(attack, rivals=partial(nearest_rivals, number=_RIVALS)), steps=steps
        )
    with solving(model), torch.no_grad():
        data = as_data(data)
        around = DataSet.around(data, ball(0.0), data_range, mask)
        limit = _limit(around, order, largest)
        target = as_classes(target, data)
        logits = model(data)
        check_logits(logits, len(data), extent(target))
        best, fooled = data.clone(), is_fooled(logits, target, targeted)
        lower, upper = torch.zeros_like(limit), torch.where(fooled, 0.0, inf).to(limit)
        first = _linear_radius(model, data, target, mask, order) * (1 + tolerance)
        first = first.clamp(limit * _LEAST, limit)
        for _ in range(search_steps):
            done = (upper - lower <= tolerance * upper) & upper.isfinite()
            rows = (~done & (lower < limit)).nonzero().squeeze(1)
            if not len(rows):
                break
            radius = _next_radius(lower[rows], upper[rows], first[rows], limit[rows])
            found = _solved(call, model, around, target, radius, rows, mask)
            success = is_fooled(model(found), target[rows], targeted)
            hit, missed = rows[success], rows[~success]
            lower[missed] = torch.maximum(lower[missed], radius[~success])
            if len(hit):
                near = _drawn_near(model, data[hit], found[success], target[hit], targeted)
                length = _distance(near, data[hit], order)
                closer = length < upper[hit]
                best[hit[closer]], upper[hit[closer]] = near[closer], length[closer]
        fooled = is_fooled(model(best), target, targeted)
        best = torch.where(column(fooled, data), best, data)
    return MinimumNorm(best, torch.where(fooled, upper, inf), fooled)


def _limit(around: DataSet, order: float, largest: float | None) -> Tensor:
    """The largest radius to try for each datum: at most what takes it anywhere in the range."""
    if around.lower is None or around.upper is None:
        reach = torch.full_like(around.data, inf)
    else:
        reach = torch.maximum(around.data - around.lower, around.upper - around.data)
    limit: Tensor = torch.linalg.vector_norm(reach.double().flatten(1), order, dim=1)
    if largest is None and not bool(limit.isfinite().all()):
        raise ValueError("`largest` must be given if `data_range` leaves a side open, got None")
    # by as much more as a sum of so many may be off
    limit = limit * (1 + 1e-9)
    return limit if largest is None else limit.clamp(max=largest)


def _next_radius(lower: Tensor, upper: Tensor, first: Tensor, limit: Tensor) -> Tensor:
    """The middle of the bracket; as long as nothing has fooled, the double of the last radius."""
    beyond = torch.where(lower > 0, 2 * lower, first)
    return torch.where(upper.isfinite(), (lower + upper) / 2, beyond).minimum(limit)


def _linear_radius(
    model: Model, data: Tensor, target: Tensor, mask: Tensor | None, order: float
) -> Tensor:
    """The distance at which the model would be fooled if it were linear, with no data range."""
    with torch.enable_grad():
        seen = data.detach().clone().requires_grad_()
        margin = margin_loss(model(seen), target)
        if not margin.requires_grad:
            return torch.full((len(data),), inf, dtype=torch.float64, device=data.device)
        (slope,) = torch.autograd.grad(margin.sum(), seen)
    if mask is not None:
        slope = slope * mask
    steep = torch.linalg.vector_norm(slope.double().flatten(1), _DUAL[order], dim=1)
    radius: Tensor = margin.detach().double().abs() / steep
    return radius.nan_to_num(nan=inf, posinf=inf)


def _drawn_near(
    model: Model, data: Tensor, found: Tensor, target: Tensor, targeted: bool
) -> Tensor:
    """The point on the line to each datum, as near to it as it can be and still fools."""
    near, far = (torch.full((len(data),), t, device=data.device).double() for t in (0.0, 1.0))
    best = found
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        share = column(middle, data)
        # By way of float64, so that no entry leaves the interval from datum to found.
        point = torch.lerp(data.double(), found.double(), share)
        point = point.clamp(torch.minimum(data, found), torch.maximum(data, found)).to(data.dtype)
        fools = _surely_fooled(model(point), target, targeted)
        near, far = torch.where(fools, near, middle), torch.where(fools, middle, far)
        best = torch.where(column(fools, data), point, best)
    return best


def _surely_fooled(logits: Tensor, target: Tensor, targeted: bool) -> Tensor:
    """Fooled by more than what another batch size changes by rounding."""
    slack = 16 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    margin = margin_loss(logits, target)
    return torch.gt(-margin if targeted else margin, slack)


def _distance(x: Tensor, y: Tensor, order: float) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm((x.double() - y.double()).flatten(1), order, dim=1)
    return distance


def _solved(
    solver: Callable[..., Any],
    model: Model,
    around: DataSet,
    target: Tensor,
    radius: Tensor,
    rows: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """What the solver makes of some of the data at radii of their own."""
    there = around.rows(rows)
    masked = {} if mask is None else {"mask": mask.expand(around.data.shape)[rows]}
    found: Tensor = solver(
        model,
        there.data,
        target[rows],
        ball=replace(there.ball, epsilon=radius),
        data_range=None if there.lower is None else (there.lower, there.upper),
        stop_once_fooled=True,
        **masked,
    ).data
    return found
