"""The attack: the worst perturbed data in a ball around each example and within a range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.optim.apgd import APGD
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.best_of import BestOf
from rai_toolbox.perturbations.feasible_set import Change, FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import Criterion, Rule, margin_loss
from rai_toolbox.perturbations.rivals import ChooseClasses, rival_classes
from rai_toolbox.perturbations.solve import Attacked, Objective, solve, solving
from rai_toolbox.perturbations.solvers import warn_of_zero_gradient


def attack(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    optimizer: Callable[..., Any] | None = None,
    steps: int = 100,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    targeted: bool = False,
    restarts: int = 1,
    rivals: int | ChooseClasses | None = None,
    random_start: bool = False,
    mask: Tensor | None = None,
    stop_once_fooled: bool = False,
    samples: int = 1,
    generator: Generator | None = None,
    levels: int | None = None,
) -> Attacked:
    r"""Find adversarial examples: perturbed data, in a ball around each example, of a large loss.

    .. math::
        \max_{x'} \; L(f(x'), y) \quad \text{subject to} \quad \|x' - x\| \leq \epsilon, \;
        \text{lower} \leq x' \leq \text{upper}

    This is `gradient_ascent` with the exact projection onto ball and range together. Each example
    keeps its best iterate: one that fools the model, and among these the one of the largest loss.

    Parameters
    ----------
    model : callable
        From data of shape (N, ...) to logits, shape (N, K), or to an object or dict with `logits`.
        With a `criterion` to anything, which it is called with.
    data : Tensor, shape (N, ...)
        Of a floating-point dtype, within `data_range`.
    target : Tensor
        The right classes, shape (N,); with `targeted` the classes that the model is to predict.
        With a `criterion` of any dtype and of shape (N, ...).
    ball : LinfBall or L2Ball or L1Ball
        Without a center. Its epsilon is a number, or has one value per example, shape (N,).
    data_range : pair of float or Tensor, or None
        Lower and upper bound of all data, in their unit; a tensor broadcasts against the data. None
        for no bounds.
    optimizer : Optimizer class or functools.partial of one, optional
        Called with the parameters, `constraint`, and `steps` if it requires it. By default `APGD`
        (Croce & Hein, 2020). A step of `PGD` without `lr` goes 2.5 of the largest radius / steps.
        `ProjectedOptimizer` requires `lr`.
    steps : int
        Number of steps of each run, >= 0.
    criterion : callable, optional
        The loss of each example, such as `cross_entropy` or `dlr_loss`. By default `margin_loss`
        with its smooth gradient, which does not saturate, and on most models finds more.
    fooled : callable, optional
        Called with the model's output and the target, returns a bool for each example: whether the
        attack has succeeded. By default `is_fooled` for classes; for other targets no example
        counts as fooled.
    targeted : bool
        Minimize the loss for `target` instead.
    restarts : int
        Number of runs, >= 1. The first starts at the data, all others at random points of the set.
    rivals : int or callable, optional
        Each restart makes one run toward each of this number of the most likely other classes, or
        toward each of those that a callable such as `nearest_rivals` chooses. The criterion is
        called with `rival`, one class per example: use `margin_loss`, `dlr_loss`, `cross_entropy`,
        or your own. The run with the largest loss toward its rival counts. With the margin, all
        K - 1 rivals find the exact worst case of a linear model. Not with `targeted`, which has one
        class to reach.
    random_start : bool
        Whether the first run starts at a random point, too.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    stop_once_fooled : bool
        Whether to stop the steps and runs of an example as soon as it is fooled.
    samples : int
        Number of evaluations per gradient, for random models.
    generator : torch.Generator, optional
        For the random starts.
    levels : int, optional
        Restrict the search to a grid of this number of evenly spaced values in `data_range`, ends
        included: 256 for 8-bit images. The data must be on the grid. Its values count as rounded to
        the dtype: a radius of 8/255 contains only some changes by 8 levels, 8.5/255 contains all.

    Returns
    -------
    Attacked

    Raises
    ------
    TypeError
        If data or target have the wrong dtype, `optimizer` has no argument `constraint` or lacks
        `lr`, or `criterion` has no argument `rival` where there are `rivals`.
    ValueError
        If data are outside their range, not finite or not on the grid, targets are not classes and
        there is no criterion, the criterion does not give one loss per example, or another argument
        breaks its rule.

    Warns
    -----
    ZeroGradientWarning
        If some examples were not attacked, because every run started at a zero gradient.
    UserWarning
        If the ball is wider than the data range, which may mean another unit; or if entries of the
        first gradient are not finite, which count as 0 at every step.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.optim import FrankWolfe
    >>> from rai_toolbox.perturbations import attack
    >>> model = torch.nn.Identity()  # predicts the largest entry
    >>> x, y = torch.tensor([[0.7, 0.4, 0.3], [0.9, 0.0, 0.1]]), torch.tensor([0, 0])
    >>> found = attack(model, x, y, ball=L2Ball(0.5), optimizer=FrankWolfe, steps=9, rivals=2)
    >>> found.fooled, (found.data - x).norm(dim=1)
    (tensor([ True, False]), tensor([0.5000, 0.5000]))
    """
    check_count("steps", steps, 0)
    check_count("restarts", restarts, 1)
    check_count("samples", samples, 1)
    inputs.check_generator(generator)
    classes = inputs.expects_classes(criterion if rivals is None else None, fooled)
    criterion = losses.criterion_of(criterion, partial(margin_loss, smooth=True), targeted)
    make_optimizer = _optimizer_maker(optimizer or APGD, steps, ball)
    sign = 1.0 if targeted else -1.0
    success = losses.fooled_rule(fooled, targeted, required=False, classes=bool(classes))
    with solving(model) as model:
        data = inputs.as_data(data)
        target = inputs.as_target(target, data, classes)
        allowed = FeasibleSet.around(data, ball, data_range, mask, levels)
        model = inputs.checked(model, target, classes)
        objective = Objective(model, criterion, sign, samples=samples, success=success)
        goals, run_objective = [target], objective
        if rivals is not None:
            if targeted:
                raise wrong("rivals", "be None with `targeted`, whose target is the rival", rivals)
            others = rival_classes(rivals, model, allowed, target)
            goals = [torch.stack([target, rival], 1) for rival in others.unbind(1)]
            run_objective = _toward_rivals(objective, others)
        calls, part, rows = int(rivals is not None), allowed, None
        best: Any = None
        for restart, of_all in product(range(restarts), goals):
            if stop_once_fooled and best is not None:
                rows = best.rows_without_success()
                if not len(rows):
                    break
                part = allowed.rows(rows)
            perturbation, constraint = Change(part), part.of_perturbations()
            if restart or random_start:
                constraint.sample_(perturbation.delta.detach(), generator)
            optim = make_optimizer([perturbation.delta], constraint=constraint) if steps else None
            goal, stop = of_all if rows is None else of_all[rows], stop_once_fooled
            found = solve(run_objective, part.data, goal, perturbation, optim, steps, stop=stop)
            calls += found.model_calls
            perturbed, cost, zero = found.data, sign * found.losses, found.zero_gradient
            if best is None:
                best, zero_gradient = BestOf(cost, found.fooled, [perturbed]), zero
                continue
            if rows is not None:
                perturbed = data.index_copy(0, rows, perturbed)
                zero = zero_gradient.index_copy(0, rows, zero)
            best.update_(cost, found.fooled, [perturbed], rows)
            zero_gradient = zero_gradient & zero

        perturbed = allowed.project(best.tensors[0])
        # Each example's best was found in another batch, on which a model may depend.
        cost, succeeded = objective.evaluate(perturbed, target)
    warn_of_zero_gradient(zero_gradient & ~succeeded)
    return Attacked(perturbed, sign * cost, succeeded, zero_gradient, calls + samples)


def _toward_rivals(objective: Objective, classes: Tensor) -> Objective:
    """The objective of a run: its target has a row (target, rival) for each example."""

    def criterion(logits: Tensor, pairs: Tensor) -> Tensor:
        return objective.criterion(logits, pairs[:, 0], rival=pairs[:, 1])  # type: ignore[call-arg]

    def success(logits: Tensor, pairs: Tensor) -> Tensor:
        assert objective.success is not None
        return objective.success(logits, pairs[:, 0])

    loss = objective.criterion
    call = loss.forward if isinstance(loss, nn.Module) else loss
    if inputs.takes(call, "rival") != (True, False):
        rule = "take `rival` where there are `rivals`, as an option, as margin_loss does"
        raise wrong("criterion", rule, loss, TypeError)
    model = inputs.checked(objective.model, classes, name="rivals")
    return replace(objective, model=model, criterion=criterion, success=success)


def _optimizer_maker(given: Callable[..., Any], steps: int, ball: Ball) -> Callable[..., Any]:
    """The optimizer class, which gets `steps` if it requires that; `PGD` a step of its own."""
    if not callable(given):
        raise wrong("optimizer", "make an optimizer", given, TypeError)
    if not inputs.takes(given, "constraint")[0]:
        rule = "take `constraint`, as PGD, APGD, FrankWolfe and ProjectedOptimizer do"
        raise wrong("optimizer", rule, given, TypeError)
    _, required = inputs.takes(given, "steps")
    made, settings = getattr(given, "func", given), getattr(given, "keywords", {})
    is_pgd = isinstance(made, type) and issubclass(made, PGD)
    if is_pgd and inputs.lacks_lr(given) and "InnerOpt" not in settings:
        epsilon = getattr(ball, "epsilon", 0.0)
        radii = epsilon.flatten().tolist() if isinstance(epsilon, Tensor) else [epsilon]
        given = partial(given, lr=2.5 * max(radii, default=0.0) / max(steps, 1))
    inputs.check_lr(given)
    return partial(given, steps=steps) if required else given
