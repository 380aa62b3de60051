"""The smallest perturbation of each example that fools a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rai_toolbox.checks import check_count, check_number, wrong
from rai_toolbox.constraints.balls import BALLS, Ball
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.fab import DUAL, fab_attack
from rai_toolbox.perturbations.feasible_set import FeasibleSet, norms_of
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import Criterion, Rule, gradient_of, margin_loss
from rai_toolbox.perturbations.rivals import nearest_rivals
from rai_toolbox.perturbations.solve import NotFiniteWarning, solving

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
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    targeted: bool = False,
    mask: Tensor | None = None,
    levels: int | None = None,
    solver: Callable[..., Any] | None = None,
) -> MinimumNorm:
    r"""Find the smallest perturbation of each example that fools the model.

    .. math::
        \min_\delta \|\delta\| \quad \text{s.t. the model is fooled by } x + \delta, \;
        \text{lower} \leq x + \delta \leq \text{upper}

    The radius of each example is found by bisection, with one call of `solver` per radius. The
    search starts at the radius that fools the linearized model. Each perturbed example found is
    then moved toward the original, on a straight line, as far as it still fools the model. If the
    solver finds nothing at a radius, that radius counts as safe: the result is only as good as the
    solver. With an exact solver and enough
    search steps, it exceeds the smallest radius by at most the fraction `tolerance`; the default
    solver is exact on a linear model. On other models ``partial(attack, rivals=9)``, a run toward
    each of nine classes, may find less, at about three times the cost.

    Parameters
    ----------
    model : callable
        From data to logits, shape (N, K), or to an object or dict with `logits`. With `criterion`
        and `fooled` to anything, which they are called with.
    data : Tensor, shape (N, ...)
        Within `data_range`.
    target : Tensor
        The right classes, shape (N,); with `targeted` the classes to predict. With `criterion` and
        `fooled` of any dtype and of shape (N, ...).
    ball : type of LinfBall, L2Ball or L1Ball
        The norm.
    data_range : tuple of float or Tensor, optional
        Lower and upper bound of all data, in their unit; a tensor broadcasts against the data. None
        for no bounds.
    steps : int
        Number of steps of the solver at each radius.
    search_steps : int
        Largest number of radii. Once one has fooled, each further one halves the interval.
    tolerance : float
        The search ends for an example when its interval is this fraction of the radius.
    largest : float, optional
        The largest radius to try. By default what the data range allows, which must be finite.
    criterion : callable, optional
        The loss of each example that the solver maximizes. By default that of `attack`.
    fooled : callable, optional
        From the model's output and the target to a bool for each example, if targets are not
        classes. The search then begins at the largest radius.
    targeted : bool
        Whether the model is fooled if it predicts `target`.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    levels : int, optional
        As in `attack`: what is found is on a grid, such as that of 8-bit images with 256.
    solver : callable, optional
        `attack`, a partial of it, or another function whose result has an attribute `data`. It is
        called on the examples that are still searched, with `ball`, `data_range`, `steps` and
        ``stop_once_fooled=True``, and with `criterion`, `fooled`, `targeted`, `mask` and `levels`
        if they are given. By default ``partial(attack, rivals=partial(nearest_rivals, number=2))``,
        or `attack` with a criterion or if targeted. `fab_attack`, or a partial of it, finds nearest
        points by itself: it is called once, with the largest radius, and needs some 100 steps.

    Returns
    -------
    MinimumNorm

    Raises
    ------
    TypeError
        If `ball` is another class.
    ValueError
        If a number is outside its range, data are outside theirs or not on the grid, targets are
        not classes and no rule is given, or neither `largest` nor the data range bounds the search.

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
    if solver is not None:
        inputs.check_solver(solver)
    solver = solver or (_TOWARD_NEAREST if criterion is None and not targeted else attack)
    options: dict[str, Any] = {"criterion": criterion, "fooled": fooled, "levels": levels}
    options = {name: option for name, option in options.items() if option is not None}
    options |= {"targeted": True} if targeted else {}
    in_one_call = getattr(solver, "func", solver) is fab_attack
    if in_one_call:
        search_steps = 1
    else:
        options["stop_once_fooled"] = True
    call: Callable[..., Any] = partial(solver, steps=steps, **options)
    rule = losses.fooled_rule(fooled, targeted)
    with solving(model) as model, torch.no_grad():
        data = inputs.as_data(data)
        allowed = FeasibleSet.around(data, ball(0.0), data_range, mask, levels)
        limit = _limit(allowed, ball.p, largest)
        classes = fooled is None and inputs.expects_classes(criterion, fooled)
        target = inputs.as_target(target, data, classes)
        checked = inputs.checked(model, target, classes)
        best, success = data.clone(), rule(checked(data), target)
        firsts = best.clone()  # what fooled first, mostly by more than a little
        lower, upper = torch.zeros_like(limit), torch.where(success, 0.0, inf).to(limit)
        first = limit
        if fooled is None and not in_one_call:
            first = _linear_radius(checked, allowed, target, ball.p) * (1 + tolerance)
            first = first.clamp(limit * _SMALLEST, limit)
        surely = partial(_surely_fooled, targeted=targeted) if fooled is None else rule
        for number in range(search_steps):
            rows = (lower < limit.minimum((1 - tolerance) * upper)).nonzero().squeeze(1)
            if not len(rows):
                break
            # The middle of the interval; as long as nothing has fooled, twice the last radius.
            beyond = torch.where(lower > 0, 2 * lower, first)
            radius = torch.where(upper.isfinite(), (lower + upper) / 2, beyond).minimum(limit)[rows]
            part = allowed.rows(rows)
            masked = {} if part.mask is None else {"mask": part.mask}
            settings = {"ball": ball(radius), "data_range": part.data_range, **masked}
            with warnings.catch_warnings():
                if number > 0:  # the first radius has said it
                    warnings.simplefilter("ignore", NotFiniteWarning)
                found = call(model, part.data, target[rows], **settings).data
            success = rule(checked(found), target[rows])
            hit, missed = rows[success], rows[~success]
            lower[missed] = radius[~success]
            if len(hit):
                far = found[success]
                near = _nearest_fooling(checked, surely, part.rows(success), far, target[hit])
                is_first = upper[hit].isinf()
                firsts[hit[is_first]] = far[is_first]
                length = norms_of(near.double() - data[hit].double(), ball.p)
                closer = length < upper[hit]
                best[hit[closer]], upper[hit[closer]] = near[closer], length[closer]
        # Who is fooled may depend on the rest of the batch, if by rounding only.
        success = rule(checked(best), target)
        if bool((upper.isfinite() & ~success).any()):
            again = _nearest_fooling(checked, surely, allowed, firsts, target)
            best[~success] = again[~success]
            upper[~success] = norms_of(best.double() - data.double(), ball.p)[~success]
            success = rule(checked(best), target)
        best[~success], upper[~success] = data[~success], 0.0
        success = rule(checked(best), target)
    return MinimumNorm(best, torch.where(success, upper, inf), success)


def _limit(allowed: FeasibleSet, p: float, largest: float | None) -> Tensor:
    """The largest radius to try for each example: at most the one that reaches all of the range."""
    lower, upper = allowed.bounds or (allowed.data - inf, allowed.data + inf)
    reach = torch.maximum(allowed.data - lower, upper - allowed.data)
    limit = norms_of(reach, p) * (1 + 1e-9)  # the rounding of a sum
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
    radius = margin.detach().double().abs() / norms_of(gradient, DUAL[p])
    return radius.nan_to_num(nan=inf, posinf=inf)


def _nearest_fooling(
    model: Model, fools: Rule, around: FeasibleSet, found: Tensor, target: Tensor
) -> Tensor:
    """The nearest point on the line to each example that still fools, by bisection."""
    data = around.data
    near, far = (torch.full((len(data),), t, device=data.device).double() for t in (0.0, 1.0))
    best, column = found, (-1, *(1,) * (data.ndim - 1))
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        # In float64, so that no entry leaves the interval from data to found.
        point = torch.lerp(data.double(), found.double(), middle.view(column))
        if around.levels is not None:
            point = around.grid.nearest(point)
        point = point.clamp(torch.minimum(data, found), torch.maximum(data, found)).to(data.dtype)
        fooled = fools(model(point), target)
        near, far = torch.where(fooled, near, middle), torch.where(fooled, middle, far)
        best = torch.where(fooled.view(column), point, best)
    return best


def _surely_fooled(logits: Tensor, target: Tensor, targeted: bool) -> Tensor:
    """Whether classes are predicted wrong by more than the rounding in a batch of another size."""
    margin = margin_loss(logits, target)
    slack = 16 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    return torch.gt(-margin if targeted else margin, slack)
