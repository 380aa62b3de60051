"""Random search in windows of the data: an attack by calls of the model alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.constraints.kernels.rounding import as_wide
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.losses import Criterion, Rule, margin_loss
from rai_toolbox.perturbations.solve import Attacked, Objective, solving
from rai_toolbox.perturbations.windows import Windows, window_share


def square_attack(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    queries: int = 5000,
    start: Tensor | None = None,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    targeted: bool = False,
    mask: Tensor | None = None,
    samples: int = 1,
    generator: Generator | None = None,
    levels: int | None = None,
) -> Attacked:
    r"""Search at random for perturbed data that fool a classifier, without gradients (Square).

    Each query changes a window of each example that is not fooled yet, and is kept if that raises
    the loss; as long as no query has changed the loss, each is kept. Windows are squares of images,
    shape (N, ..., H, W), at random places; runs of series, shape (N, C, L); and random subsets of
    the features of tables, shape (N, d), as their order means nothing. Of the places that an
    example has, a window takes 80 % at first; after 10, 50, 200, 500, 1,000, 2,000, 4,000, 6,000
    and 8,000 of 10,000 queries half as many, and proportionally for another number of queries.

    In an Linf ball the window goes to the ends of the ball, with one random sign per channel; in a
    table with one per feature. The search starts with columns of random signs. In L2 and L1 balls
    the window takes over the norm of another one, in the form of two hills of opposite signs; in L1
    the exact projection then leaves few entries. It starts with a mosaic of such patterns.

    Only the model's output is used, so models without gradients, or with misleading ones, can be
    attacked. It is also a check of `attack`: if this finds more, the gradients are misleading.

    Parameters
    ----------
    model : callable
        From data of shape (N, ...) to logits, shape (N, K), or to an object or dict with `logits`.
        It needs no gradients: ``lambda x: torch.from_numpy(predict(x.numpy()))`` will do.
    data : Tensor, shape (N, ...)
        Of a floating-point dtype, within `data_range`.
    target : Tensor
        The right classes, shape (N,); with `targeted` the classes that the model is to predict.
    ball : LinfBall or L2Ball or L1Ball
        Without a center. Its epsilon is a number, or has one value per example, shape (N,).
    data_range : pair of float or Tensor, or None
        Lower and upper bound of all data, in their unit; a tensor broadcasts against the data. None
        for no bounds.
    queries : int
        Number of queries for each example, >= 0, besides one of the start and one of the result.
    start : Tensor, optional
        Where to start, in the shape of the data, such as the result of another attack; the windows
        then begin with 5 %. By default the search starts at the data.
    criterion, fooled : callable, optional
        As in `attack`. By default `margin_loss` and `is_fooled`.
    targeted : bool
        Minimize the loss for `target` instead.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    samples : int
        Number of evaluations per query, for random models.
    generator : torch.Generator, optional
        For all random numbers.
    levels : int, optional
        Search on a grid only, such as that of 8-bit images with 256; as in `attack`.

    Returns
    -------
    Attacked
        With a `zero_gradient` that is False everywhere.

    Raises
    ------
    TypeError, ValueError
        As `attack`.

    References
    ----------
    Andriushchenko, Croce, Flammarion, Hein (2020), "Square Attack"; Croce, Hein (2021), "Mind the
    box", for L1 balls.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations import square_attack
    >>> data, target = torch.full((1, 4), 0.5), torch.tensor([0])
    >>> model = lambda x: (x @ torch.tensor([[9.0, -9], [9, -9], [-9, 9], [9, -9]])).round()
    >>> ball, generator = LinfBall(0.2), torch.Generator().manual_seed(0)
    >>> square_attack(model, data, target, ball=ball, queries=99, generator=generator).data
    tensor([[0.3000, 0.3000, 0.7000, 0.3000]])
    """
    check_count("queries", queries, 0)
    check_count("samples", samples, 1)
    inputs.check_generator(generator)
    classes = inputs.expects_classes(criterion, fooled)
    criterion = losses.criterion_of(criterion, margin_loss, targeted)
    success_of = losses.fooled_rule(fooled, targeted, required=False)
    sign = 1.0 if targeted else -1.0
    with solving(model) as model, torch.no_grad():
        data = inputs.as_data(data)
        target = inputs.as_target(target, data, classes)
        allowed = FeasibleSet.around(data, ball, data_range, mask, levels)
        model = inputs.checked(model, target, classes)
        objective = Objective(model, criterion, sign, samples=samples, success=success_of)

        windows = Windows(data.shape[1:], ball.p, generator)
        skipped = 0 if start is None else max(queries // 9, 1)  # the queries with large windows
        found = data.clone() if start is None else _placed(start, allowed)
        cost, success = objective.evaluate(found, target)
        inputs.check_per_example("criterion", cost, data)
        # The examples that are not fooled: their numbers, sets, best points, costs and targets.
        rows = torch.arange(len(data), device=data.device)
        part, points, goal, calls = allowed, found.clone(), target, 1
        constant = torch.ones_like(success)  # where every query had the same loss
        for query in range(queries):
            if bool(success.any()):
                found[rows] = points
                left = (~success).nonzero().squeeze(1)
                rows, points, cost, goal = rows[left], points[left], cost[left], goal[left]
                part, constant = part.rows(left), constant[left]
            if not len(rows):
                break
            radius = as_wide(part.ball.epsilon, points).reshape(-1, 1, 1)
            change = (points.double() - part.data.double()).to(radius.dtype)
            if start is None and query == 0:
                change = windows.first(change, radius)
            else:
                share = window_share(query + skipped, queries + skipped)
                change = windows.next(change, radius, share)
            others = part.nearest(change)
            other_cost, success = objective.evaluate(others, goal)
            # Where the output is constant the search wanders. Elsewhere an equal loss is no reason:
            # on rounded data a move of too many entries that do not count undoes the sparse ones.
            constant = constant & (other_cost == cost)
            better = success | constant | (other_cost < cost) | (cost.isnan() & ~other_cost.isnan())
            column = better.view(-1, *(1,) * (data.ndim - 1))
            points, cost = (
                torch.where(column, others, points),
                torch.where(better, other_cost, cost),
            )
            calls += samples
        found[rows] = points
        # Each example's best was found in another batch, on which a model may depend.
        cost, success = objective.evaluate(found, target)
    none = torch.zeros_like(success)
    return Attacked(found, sign * cost, success, none, calls + samples)


def _placed(start: Tensor, allowed: FeasibleSet) -> Tensor:
    """The points to start at, projected."""
    if start.shape != allowed.data.shape:
        rule = f"have the shape of the data, {tuple(allowed.data.shape)}"
        raise wrong("start", rule, tuple(start.shape))
    return allowed.feasible(start.detach().to(allowed.data))
