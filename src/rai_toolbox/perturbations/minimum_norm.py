"""The smallest perturbation of each example that fools a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.checks import check_count, check_number
from rai_toolbox.constraints.balls import BALLS, Ball
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range, as_classes, as_data, classifier, wrong
from rai_toolbox.perturbations.losses import gradient_of, is_fooled, margin_loss
from rai_toolbox.perturbations.rivals import nearest_rivals
from rai_toolbox.perturbations.solve import NotFiniteWarning, solving

_DUAL = {inf: 1.0, 2: 2.0, 1: inf}
_TOWARD_NEAREST = partial(attack, rivals=partial(nearest_rivals, number=2))
"""The default solver; with the second nearest class, as models are not linear."""

_HALVINGS = 12  # of the line to an example; each costs a forward pass
_SMALLEST = 1e-6  # of the largest radius: where the search begins on a decision boundary


class MinimumNorm(NamedTuple):
    """What `minimum_norm_attack` found.

    Attributes
    ----------
    data : Tensor, shape (N, ...)
        The perturbed data; the example itself where nothing fools, or where it fools as it is.
    radius : Tensor, shape (N,)
        Their distance from the data, in float64: 0 where the example itself fools; inf where
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
    ball: type[Ball],
    data_range: Range = (0.0, 1.0),
    steps: int = 40,
    search_steps: int = 12,
    tolerance: float = 1e-3,
    largest: float | None = None,
    targeted: bool = False,
    mask: Tensor | None = None,
    solver: Callable[..., Any] | None = None,
) -> MinimumNorm:
    r"""Find the smallest perturbation of each example that fools the model.

    .. math::
        \min_\delta \|\delta\| \quad \text{s.t. the model is fooled by } x + \delta, \;
        \text{lower} \leq x + \delta \leq \text{upper}

    Bisection over the radius of each example, at each of which `solver` is called. The first radius
    is the one that fools the linearized model. What is found is moved toward its example, on a
    straight line, as far as it still fools. A radius at which the solver fails counts as one at
    which nothing fools, so the result is as good as the solver. With an exact solver and enough
    search steps, it exceeds the smallest radius by at most the fraction `tolerance`; the default
    solver is exact on a linear model. On other models ``partial(attack, rivals=9)``, a run toward
    each of nine classes, may find less, at about three times the cost.

    Parameters
    ----------
    model : callable
        From data to logits, shape (N, K).
    data : Tensor, shape (N, ...)
        Within `data_range`.
    target : Tensor, shape (N,)
        The right classes; with `targeted` the classes to predict.
    ball : type of LinfBall, L2Ball or L1Ball
        The norm.
    data_range : tuple of float or Tensor, optional
        Lower and upper bound of all data; None for no bounds.
    steps : int
        Number of steps of the solver at each radius.
    search_steps : int
        Largest number of radii. Once one has fooled, each further one halves the interval.
    tolerance : float
        The search ends for an example when its interval is this fraction of the radius.
    largest : float, optional
        The largest radius to try. By default what the data range allows, which must be finite.
    targeted : bool
        Whether the model is fooled if it predicts `target`.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    solver : callable, optional
        `attack`, a partial of it, or another function whose result has an attribute `data`. It is
        called on the examples that are still searched, with `ball`, `data_range`, `steps` and
        ``stop_once_fooled=True``, and with `targeted` and `mask` if they are given. By default
        ``partial(attack, rivals=partial(nearest_rivals, number=2))``, or `attack` if targeted.

    Returns
    -------
    MinimumNorm

    Raises
    ------
    TypeError
        If `ball` is another class.
    ValueError
        If a number is outside its range, data are outside theirs, targets are not classes, or
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
    if ball not in BALLS.values():
        raise wrong("ball", "be the class LinfBall, L2Ball or L1Ball", ball, TypeError)
    check_count("steps", steps, 1)
    check_count("search_steps", search_steps, 1)
    if not 0 < check_number("tolerance", tolerance) < 1:
        raise wrong("tolerance", "be > 0 and < 1", tolerance)
    check_number("largest", 0 if largest is None else largest, 0)
    solver = solver or (attack if targeted else _TOWARD_NEAREST)
    options: dict[str, Any] = {"targeted": True} if targeted else {}
    call: Callable[..., Any] = partial(solver, steps=steps, stop_once_fooled=True, **options)
    with solving(model) as model, torch.no_grad():
        data = as_data(data)
        allowed = FeasibleSet.around(data, ball(0.0), data_range, mask)
        limit = _limit(allowed, ball.p, largest)
        target = as_classes(target, data)
        checked = classifier(model, target)
        best, fooled = data.clone(), is_fooled(checked(data), target, targeted)
        lower, upper = torch.zeros_like(limit), torch.where(fooled, 0.0, inf).to(limit)
        first = _linear_radius(checked, allowed, target, ball.p) * (1 + tolerance)
        first = first.clamp(limit * _SMALLEST, limit)
        for number in range(search_steps):
            rows = (lower < limit.minimum((1 - tolerance) * upper)).nonzero().squeeze(1)
            if not len(rows):
                break
            # The middle of the interval; as long as nothing has fooled, twice the last radius.
            beyond = torch.where(lower > 0, 2 * lower, first)
            radius = torch.where(upper.isfinite(), (lower + upper) / 2, beyond).minimum(limit)[rows]
            part = allowed.rows(rows)
            masked = {} if part.mask is None else {"mask": part.mask}
            settings = {"ball": ball(radius), "data_range": part.bounds, **masked}
            with warnings.catch_warnings():
                if number > 0:  # the first radius has said it
                    warnings.simplefilter("ignore", NotFiniteWarning)
                found = call(model, part.data, target[rows], **settings).data
            success = is_fooled(checked(found), target[rows], targeted)
            hit, missed = rows[success], rows[~success]
            lower[missed] = radius[~success]
            if len(hit):
                near = _nearest_fooling(checked, data[hit], found[success], target[hit], targeted)
                length = _norm(near.double() - data[hit].double(), ball.p)
                closer = length < upper[hit]
                best[hit[closer]], upper[hit[closer]] = near[closer], length[closer]
        fooled = is_fooled(checked(best), target, targeted)
        best[~fooled], upper[~fooled] = data[~fooled], 0.0
        fooled = is_fooled(checked(best), target, targeted)  # which may depend on the batch
    return MinimumNorm(best, torch.where(fooled, upper, inf), fooled)


def _norm(x: Tensor, p: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.double().flatten(1), p, dim=1)
    return norm


def _limit(allowed: FeasibleSet, p: float, largest: float | None) -> Tensor:
    """The largest radius to try for each example: at most the one that reaches all of the range."""
    lower, upper = allowed.bounds or (allowed.data - inf, allowed.data + inf)
    reach = torch.maximum(allowed.data - lower, upper - allowed.data)
    limit = _norm(reach, p) * (1 + 1e-9)  # the rounding of a sum
    if largest is None and not bool(limit.isfinite().all()):
        raise wrong("largest", "be given if `data_range` leaves a side open", largest)
    return limit if largest is None else limit.clamp(max=largest)


def _linear_radius(model: Model, allowed: FeasibleSet, target: Tensor, p: float) -> Tensor:
    """The radius that fools the linearized model, if there were no data range."""
    with torch.enable_grad():
        x = allowed.data.detach().clone().requires_grad_()
        margin = margin_loss(model(x), target)
        gradient = gradient_of(margin, x).nan_to_num(0.0, 0.0, 0.0)
    if allowed.mask is not None:
        gradient = gradient * allowed.mask
    radius = margin.detach().double().abs() / _norm(gradient, _DUAL[p])
    return radius.nan_to_num(nan=inf, posinf=inf)


def _nearest_fooling(
    model: Model, data: Tensor, found: Tensor, target: Tensor, targeted: bool
) -> Tensor:
    """The nearest point on the line to each example that still fools, by bisection."""
    near, far = (torch.full((len(data),), t, device=data.device).double() for t in (0.0, 1.0))
    best, column = found, (-1, *(1,) * (data.ndim - 1))
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        # In float64, so that no entry leaves the interval from data to found.
        point = torch.lerp(data.double(), found.double(), middle.view(column))
        point = point.clamp(torch.minimum(data, found), torch.maximum(data, found)).to(data.dtype)
        logits = model(point)
        margin = margin_loss(logits, target)
        # By more than the rounding in a batch of another size.
        slack = 16 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
        fools = torch.gt(-margin if targeted else margin, slack)
        near, far = torch.where(fools, near, middle), torch.where(fools, middle, far)
        best = torch.where(fools.view(column), point, best)
    return best
