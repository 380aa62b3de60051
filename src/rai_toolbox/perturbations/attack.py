"""The short form: what a classifier reads worst, in a ball around each datum and within a range."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from rai_toolbox.checks import check_count
from rai_toolbox.optim.apgd import APGD
from rai_toolbox.perturbations.active import Success, better, check_per_datum, column
from rai_toolbox.perturbations.additive import AdditivePerturbation, MaskedPerturbation
from rai_toolbox.perturbations.ascent import Ascent, Model, ascend, solving
from rai_toolbox.perturbations.box import Ball, DataSet, Range
from rai_toolbox.perturbations.classes import as_classes, check_logits, extent, is_no_index
from rai_toolbox.perturbations.gradient_ascent import as_data, warn_of_zero_gradient
from rai_toolbox.perturbations.losses import (
    Criterion,
    is_fooled,
    margin_loss,
    most_likely_rivals,
)
from rai_toolbox.perturbations.rivals import Rivals

__all__ = ["Attacked", "attack"]


class Attacked(NamedTuple):
    """What `attack` found for each datum, as the model sees it after all rounding.

    Attributes
    ----------
    data : Tensor, shape (N, ...)
        The perturbed data, exactly in the ball and the range.
    losses : Tensor, shape (N,)
        The criterion there.
    fooled : Tensor of bool, shape (N,)
        Whether the model predicts what the attack wants.
    zero_gradient : Tensor of bool, shape (N,)
        Whether every run found the gradient 0 at its start, so that the datum was not attacked.
    model_calls : int
        How often the model was called, on all data or some.
    """

    data: Tensor
    losses: Tensor
    fooled: Tensor
    zero_gradient: Tensor
    model_calls: int


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
    targeted: bool = False,
    restarts: int = 1,
    rivals: int | Rivals | None = None,
    random_start: bool = False,
    mask: Tensor | None = None,
    stop_once_fooled: bool = False,
    samples: int = 1,
    generator: Generator | None = None,
) -> Attacked:
    r"""Find the data, in a ball around the given ones, that a classifier reads worst.

    .. math::
        \max_{x'} \; L(f(x'), y) \quad \text{subject to} \quad \|x' - x\| \leq \epsilon, \;
        \text{lower} \leq x' \leq \text{upper}

    It is `gradient_ascent` with the exact projection on ball and range together, that keeps of each
    datum the best iterate: one that fools the model, and of these that of the largest loss.

    Parameters
    ----------
    model : callable
        From data of shape (N, ...) to logits, shape (N, K).
    data : Tensor, shape (N, ...)
        Of a floating-point dtype, within `data_range`.
    target : Tensor of int, shape (N,)
        The right classes; with `targeted` those that the model is to predict.
    ball : LinfBall or L2Ball or L1Ball
        Without a center. Its epsilon is a number or one for each datum, shape (N,).
    data_range : pair of float or Tensor, or None
        The least and the largest value of data; None leaves both open.
    optimizer : Optimizer class or functools.partial of one, optional
        Called with the parameters, `constraint` and, if it has that argument, `steps`. By default
        `APGD`.
    steps : int
        Number of steps of each run, >= 0.
    criterion : callable, optional
        The loss of each datum, such as `cross_entropy` or `dlr_loss`. By default `margin_loss`,
        which never saturates.
    targeted : bool
        Minimize the loss for `target`.
    restarts : int
        Number of runs, >= 1: the first starts at the data, all others at random points of the set.
    rivals : int or callable, optional
        Number of runs of each of the restarts, one toward each of so many of the most likely other
        classes; or what chooses the classes, such as `nearest_rivals`. The criterion is called with
        `rival`, the class of each datum, as `margin_loss`, `dlr_loss` and `cross_entropy` can be,
        or one of your own; of the runs, the one of the largest loss toward its rival counts. With
        the margin, all K - 1 rivals find the exact worst case of a linear model. Not with
        `targeted`, whose target is the one class to win.
    random_start : bool
        Start the first run at a random point, too.
    mask : Tensor of bool, optional
        True where data may change; broadcasts against the data.
    stop_once_fooled : bool
        Spend nothing more on a datum that is fooled: neither steps nor runs.
    samples : int
        Number of evaluations of a model that depends on chance for each gradient.
    generator : torch.Generator, optional
        Of the random starts.

    Returns
    -------
    Attacked

    Raises
    ------
    TypeError
        If data or target have the wrong dtype, `optimizer` takes no constraint, or `criterion` no
        rival where there are `rivals`.
    ValueError
        If data are outside their range or not finite, targets are no classes, the criterion does
        not give a loss for each datum, or another argument breaks its rule.

    Warns
    -----
    ZeroGradientWarning
        If some data were not attacked, because every run found the gradient 0 at its start.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.optim import FrankWolfe
    >>> from rai_toolbox.perturbations import attack
    >>> model, x, y = torch.nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> found = attack(model, x, y, ball=L2Ball(0.5), optimizer=FrankWolfe, steps=9, rivals=2)
    >>> bool(((found.data - x).norm(dim=1) <= 0.5).all())
    True
    """
    counts = (("steps", steps, 0), ("restarts", restarts, 1), ("samples", samples, 1))
    for name, value, least in counts:
        check_count(name, value, least)
    with solving(model):
        data = as_data(data)
        target = as_classes(target, data)
        criterion = margin_loss if criterion is None else criterion
        if rivals is not None:
            _check_rivals(rivals, criterion, targeted)
        run = _Run(
            model=_classifier(model, extent(target)),
            optimizer=_optimizer_of(optimizer, steps),
            criterion=criterion,
            mask=mask,
            steps=steps,
            targeted=targeted,
            stop=stop_once_fooled,
            samples=samples,
            generator=generator,
        )
        around = DataSet.around(data, ball, data_range, mask)
        found = _best(run, around, target, restarts, rivals, random_start)
    warn_of_zero_gradient(found.zero_gradient & ~found.fooled)
    return found


class _Run(NamedTuple):
    """What all runs have in common."""

    model: Model
    optimizer: Callable[..., Any]
    criterion: Criterion
    mask: Tensor | None
    steps: int
    targeted: bool
    stop: bool
    samples: int
    generator: Generator | None

    def __call__(
        self,
        around: DataSet,
        target: Tensor,
        rival: Tensor | None,
        rows: Tensor | None,
        random: bool,
    ) -> Ascent:
        """Solve for some rows of the data."""
        mask = self.mask
        if mask is not None:
            mask = mask.to(around.data.device).expand(around.data.shape)
        if rows is not None:
            around, target = around.rows(rows), target[rows]
            mask = None if mask is None else mask[rows]
            rival = None if rival is None else rival[rows]
        perturbation = (
            AdditivePerturbation(around.data)
            if mask is None
            else MaskedPerturbation(around.data, mask)
        )
        constraint = around.of_perturbations()
        if random:
            constraint.sample_(perturbation.delta.detach(), self.generator)
        criterion = self.criterion
        success: Success = partial(is_fooled, targeted=self.targeted)
        if rival is not None:  # beside its target, so that a solver takes the same rows of both
            target, success = torch.stack([target, rival], 1), _fooled_of_pair
            criterion = partial(_of_pairs, criterion)
        return ascend(
            self.model,
            around.data,
            target,
            perturbation,
            self.optimizer([perturbation.delta], constraint=constraint) if self.steps else None,
            [perturbation.delta],
            steps=self.steps,
            criterion=criterion,
            targeted=self.targeted,
            success=success,
            stop=self.stop,
            samples=self.samples,
        )


def _best(
    run: _Run,
    around: DataSet,
    target: Tensor,
    restarts: int,
    rivals: int | Rivals | None,
    start: bool,
) -> Attacked:
    """The best of all runs for each datum, seen once more where rounding has moved it."""
    data, calls = around.data.clone(), 0
    rows: Tensor | None = None
    cost = torch.full(data.shape[:1], torch.nan, device=data.device)
    fooled = torch.zeros(data.shape[:1], dtype=torch.bool, device=data.device)
    flat = torch.ones_like(fooled)
    plan: Iterator[tuple[bool, Tensor | None]]
    if rivals is None:
        plan = ((start or i > 0, None) for i in range(restarts))
    else:
        with torch.no_grad():
            classes = _classes_of(rivals, run.model, around, target)
        run = run._replace(model=_classifier(run.model, extent(classes), "rivals"))
        calls += 1
        plan = ((start or i > 0, c) for i in range(restarts) for c in classes.unbind(1))
    for i, (random, rival) in enumerate(plan):
        if run.stop and i > 0:
            rows = fooled.logical_not().nonzero().squeeze(1)
            if len(rows) == 0:
                break
        found = run(around, target, rival, rows, random)
        calls += found.model_calls
        new_cost = found.losses if run.targeted else -found.losses
        new = (found.data, new_cost, found.success, found.zero_gradient)
        if rows is not None:
            old = (data, cost, fooled, flat)
            new_data, new_cost, new_fooled, new_flat = (
                o.to(n.dtype).index_copy(0, rows, n) for o, n in zip(old, new, strict=True)
            )
        else:
            new_data, new_cost, new_fooled, new_flat = new
        take = better(new_cost, cost, new_fooled, fooled)
        data = torch.where(column(take, data), new_data, data)
        cost = torch.where(take, new_cost, cost.to(new_cost.dtype))
        fooled, flat = fooled | new_fooled, flat & new_flat
    with torch.no_grad():
        placed = around.placed(data)
        # What is known may be of one rival, of chance, or rounded as beside fewer data.
        known = rivals is None and run.samples == 1 and not run.stop
        if known and torch.equal(placed, data):
            return Attacked(data, cost if run.targeted else -cost, fooled, flat, calls)
        logits = [run.model(placed) for _ in range(run.samples)]
        losses = torch.stack([run.criterion(z, target) for z in logits]).mean(0)
        check_per_datum("criterion", losses, placed, "an attack")
        fooled = is_fooled(torch.stack(logits).mean(0), target, run.targeted)
    return Attacked(placed, losses, fooled, flat, calls + run.samples)


def _of_pairs(criterion: Callable[..., Tensor], logits: Tensor, pairs: Tensor) -> Tensor:
    return criterion(logits, pairs[:, 0], rival=pairs[:, 1])


def _fooled_of_pair(logits: Tensor, pairs: Tensor) -> Tensor:
    return is_fooled(logits, pairs[:, 0])


def _check_rivals(rivals: int | Rivals, criterion: Criterion, targeted: bool) -> None:
    if not callable(rivals):
        check_count("rivals", rivals, 1)
    if targeted:
        raise ValueError(
            f"`rivals` must be None with `targeted`, whose target is the rival, got {rivals!r}"
        )
    # (a module's own signature is that of any)
    call = criterion.forward if isinstance(criterion, nn.Module) else criterion
    arguments = inspect.signature(call).parameters
    takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments.values())
    optional = "rival" in arguments and arguments["rival"].default is not inspect.Parameter.empty
    if not (optional or takes_any):
        raise TypeError(
            "`criterion` must take `rival` where there are `rivals`, as an option, as margin_loss, "
            f"dlr_loss and cross_entropy do, got {criterion!r}"
        )


def _classes_of(rivals: int | Rivals, model: Model, around: DataSet, target: Tensor) -> Tensor:
    """The rival classes of each datum, shape (N, m)."""
    if not callable(rivals):
        return most_likely_rivals(model(around.data), target, rivals)
    classes: Any = rivals(model, around, target)
    if not isinstance(classes, Tensor) or is_no_index(classes):
        got = classes.dtype if isinstance(classes, Tensor) else repr(classes)
        raise TypeError(f"`rivals` must give a tensor of classes, which are integers, got {got}")
    fits = classes.ndim == 2 and len(classes) == len(target) and classes.shape[1] > 0
    if not fits or bool((classes.to(target) == target[:, None]).any()):
        raise ValueError(
            f"`rivals` must give classes of shape ({len(target)}, m) that are not the targets, got "
            f"shape {tuple(classes.shape)}"
        )
    return classes.to(target)


def _classifier(model: Model, classes: tuple[int, int], of: str = "target") -> Model:
    """The model, whose output is checked: logits, that have all of some classes."""

    def logits_of(data: Tensor) -> Tensor:
        logits: Tensor = model(data)
        check_logits(logits, len(data), classes, of)
        return logits

    return logits_of


def _optimizer_of(given: Callable[..., Any] | None, steps: int) -> Callable[..., Any]:
    if given is None:
        given = APGD
    if not callable(given):
        raise TypeError(f"`optimizer` must make an optimizer, got {given!r}")
    arguments = inspect.signature(given).parameters
    takes_any = any(a.kind is a.VAR_KEYWORD for a in arguments.values())
    if "constraint" not in arguments and not takes_any:
        raise TypeError(
            "`optimizer` must take `constraint`, as PGD, APGD, FrankWolfe and ProjectedOptimizer "
            f"do, got {given!r}"
        )
    if "steps" in arguments and arguments["steps"].default is inspect.Parameter.empty:
        return partial(given, steps=steps)
    return given
