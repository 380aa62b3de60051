"""Several attacks in turn, each on what withstood those before: the standard ones, or a few."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from rai_toolbox.checks import check_count, check_type, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.best_of import BestOf
from rai_toolbox.perturbations.differences import difference_attack
from rai_toolbox.perturbations.fab import fab_attack
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, Range
from rai_toolbox.perturbations.journal import Journal
from rai_toolbox.perturbations.losses import Criterion, Rule, cross_entropy, dlr_loss, margin_loss
from rai_toolbox.perturbations.rivals import nearest_rivals
from rai_toolbox.perturbations.solve import Objective, solving
from rai_toolbox.perturbations.solvers import ZeroGradientWarning, warn_of_zero_gradient
from rai_toolbox.perturbations.square import square_attack
from rai_toolbox.perturbations.straight_through import rounds, through_attack

Attacks = Mapping[str, Callable[..., Any]]

WITHOUT_GRADIENTS = (square_attack, difference_attack)
BLACK_BOX = ("Square", "Diff", "Diff-near", "Search")
"""Attacks of ensembles that need no gradients: where they find more, these mislead."""

_STEPS, _TARGETS, _QUERIES, _SAMPLES = 100, 9, 5000, 20  # of the published standard


class Ensembled(NamedTuple):
    """What an ensemble found for each example: the fields of `Attacked`, and whose success it is.

    Attributes
    ----------
    data, losses, fooled, zero_gradient, model_calls
        As in `Attacked`; losses are margins, or those of the criterion. `zero_gradient` is also
        True where the model has no gradient.
    fooled_by : list of str or None
        The attack that fooled each example; None where none did, or the example is fooled as it is.
    calls : dict
        For each attack, the number of examples that the model was called with; for those against
        masked gradients, if they ran.
    """

    data: Tensor
    losses: Tensor
    fooled: Tensor
    zero_gradient: Tensor
    model_calls: int
    fooled_by: list[str | None]
    calls: dict[str, int]


def ensemble(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    attacks: Attacks,
    if_masked: Attacks | None = None,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    steps: int | None = None,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    mask: Tensor | None = None,
    generator: Generator | None = None,
    levels: int | None = None,
    journal: Journal | None = None,
) -> Ensembled:
    """Run several attacks in turn, each on the examples that withstood those before.

    A model without gradients, such as one in NumPy, is attacked by `square_attack` only.

    Parameters
    ----------
    model, data, target, ball, data_range, mask, levels
        As in `attack`.
    attacks : mapping
        From names to attacks: `attack`, `square_attack`, `fab_attack`, partials of them, or other
        functions with these arguments, whose result has an attribute `data`, which is projected
        onto ball and range, and does not count where it is NaN. If one named "Square"
        finds more than those before, a `RobustnessReport` calls its figure unreliable.
    if_masked : mapping, optional
        Attacks for masked gradients. They run instead of `attacks` on examples whose gradients are
        0 at the data and at a random point of the set; those without gradients only where each one
        with gradients of its own found these to be 0, too. They run on all that withstood, if
        "Square" found more than the others. One that takes `start` gets the best points so far.
    steps, criterion, fooled : optional
        If given, passed to the attacks; steps only to those that take it.
    generator : torch.Generator, optional
        For all random numbers.
    journal : Journal, optional
        Called for each attack; can resume a run that was interrupted between two attacks.

    Returns
    -------
    Ensembled

    Raises
    ------
    TypeError
        If an attack does not take another argument that is given.
    ValueError
        If there is no attack, or as `attack`.

    Warns
    -----
    ZeroGradientWarning
        If some examples had a gradient of 0 in all attacks that use it, and none fooled them.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations import attack, ensemble, square_attack
    >>> data, target = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> both = {"gradients": attack, "none": square_attack}
    >>> found = ensemble(lambda x: x, data, target, attacks=both, ball=LinfBall(0.2), steps=5)
    >>> found.fooled_by
    ['gradients', None]
    """
    check_type("attacks", attacks, Mapping, "be a dict of names and attacks")
    if not attacks:
        raise wrong("attacks", "be one at least", "none")
    twice = sorted(set(attacks) & set(if_masked or {}))
    if twice:
        raise wrong("if_masked", "have other names than `attacks`", repr(twice[0]))
    inputs.check_generator(generator)
    every = {**attacks, **(if_masked or {})}
    given = {"criterion": criterion, "fooled": fooled, "levels": levels, "generator": generator}
    options = {name: option for name, option in given.items() if option is not None}
    for name, run in every.items():
        missing = [option for option in options if not inputs.takes(run, option)[0]]
        if missing:
            raise wrong("attacks", f"take `{missing[0]}` where it is given", repr(name), TypeError)
    classes = inputs.expects_classes(criterion, fooled)
    criterion = losses.criterion_of(criterion, margin_loss, targeted=False)
    rule = losses.fooled_rule(fooled, required=False)
    with solving(model) as model, torch.no_grad():
        data = inputs.as_data(data)
        target = inputs.as_target(target, data, classes)
        allowed = FeasibleSet.around(data, ball, data_range, mask, levels)
        checked = inputs.checked(model, target, classes)
        objective = Objective(checked, criterion, success=rule)
        cost, success = objective.evaluate(data, target)
        best = BestOf(cost, success, [data])
        zero_gradient, has_gradient = ~success, losses.has_gradient(model, data)
        fooled_by: list[str | None] = [None] * len(data)
        calls, model_calls = dict.fromkeys(attacks, 0), 3  # at the start, and one at the end
        masked = torch.full_like(success, not has_gradient)
        if if_masked is not None and has_gradient:
            masked = _without_gradient(objective, allowed, target, generator)
            model_calls += 2
        # Whose gradients the attacks of `if_masked` find to be 0, too.
        still_masked = masked.clone()
        journal, done = journal or Journal(), list[str]()
        earlier = journal.earlier()
        if earlier:
            best = BestOf(earlier["cost"], earlier["success"], [earlier["data"]])
            zero_gradient, masked = earlier["zero_gradient"], earlier["masked"]
            still_masked = earlier.get("unseen", masked)  # (files of 0.2 have none)
            fooled_by, calls, done = earlier["fooled_by"], earlier["calls"], earlier["done"]
            model_calls = earlier["model_calls"]
        for name, run in every.items():
            if name in done:
                continue
            uses_gradient = getattr(run, "func", run) not in WITHOUT_GRADIENTS
            left = ~best.success
            if if_masked is None:
                left &= ~masked | (not uses_gradient)
            elif name in attacks:
                left &= ~masked
            elif "Square" not in fooled_by:
                left &= masked if uses_gradient else still_masked
            rows = left.nonzero().squeeze(1)
            if not len(rows):
                continue
            journal.begin(name, len(rows))
            part, counted = allowed.rows(rows), _Counted(model)
            settings: dict[str, Any] = {"ball": part.ball, "data_range": part.data_range}
            if part.mask is not None:
                settings["mask"] = part.mask
            if steps is not None and inputs.takes(run, "steps")[0]:
                settings["steps"] = steps
            if name not in attacks and inputs.takes(run, "start")[0]:
                settings["start"] = best.tensors[0][rows]
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore", ZeroGradientWarning)  # there is one at the end
                # (copies, as an attack may work in place)
                found = run(counted, part.data.clone(), target[rows], **settings, **options)
            points = part.feasible(inputs.found_by("attacks", found, part.data))
            cost, success = objective.evaluate(points, target[rows])
            best.update_(cost, success, [data.index_copy(0, rows, points)], rows)
            for row in rows[best.success[rows]].tolist():
                fooled_by[row] = name
            if uses_gradient:
                zero = zero_gradient if name in attacks else still_masked
                zero[rows] &= getattr(found, "zero_gradient", torch.tensor(False))
            calls[name] = counted.examples
            model_calls += counted.calls + 1
            done.append(name)
            journal.keep(
                {"cost": best.cost, "success": best.success, "data": best.tensors[0]}
                | {"zero_gradient": zero_gradient, "masked": masked, "unseen": still_masked}
                | {"model_calls": model_calls, "fooled_by": fooled_by, "calls": calls, "done": done}
            )
        # Each example's best was found in another batch, on which a model may depend.
        perturbed = best.tensors[0]
        cost, success = objective.evaluate(perturbed, target)
    warn_of_zero_gradient(zero_gradient & ~success)
    return Ensembled(perturbed, -cost, success, zero_gradient, model_calls, fooled_by, calls)


def standard(version: str = "standard") -> Callable[..., Ensembled]:
    """The standard ensemble for published robust accuracies (AutoAttack), as a solver.

    APGD on the cross entropy; APGD on the DLR loss toward each of the nine most likely classes;
    FAB toward each of these; Square. Each one runs on the examples that withstood those before, for
    100 steps from a random start, or 5000 queries. With fewer than four classes the margin takes
    the place of the DLR loss, and with fewer than ten there is a run toward each other one.

    Parameters
    ----------
    version : str
        "standard", or "rand" for random models: APGD on the cross entropy and the DLR loss, with
        gradients that are means over 20 evaluations.

    Returns
    -------
    callable
        A partial of `ensemble`, for `evaluate_robustness`, or to be called as `attack`.

    Raises
    ------
    ValueError
        If there is no such version.

    References
    ----------
    Croce, Hein (2020), "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks".

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import evaluate_robustness, standard
    >>> batch = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 0])
    >>> report = evaluate_robustness(
    ...     torch.nn.Identity(), [batch], balls=L2Ball(0.2), solver=standard(), progress=False
    ... )
    >>> print(report.by_attack())
    norm  epsilon  attack    fooled     calls
    L2        0.2  APGD-CE        1       104
    L2        0.2  APGD-T         0       103
    L2        0.2  FAB-T          0       202
    L2        0.2  Square         0      5002
    """
    apgd = partial(attack, steps=_STEPS, random_start=True, stop_once_fooled=True)
    apgd_ce = partial(apgd, criterion=cross_entropy)
    attacks: dict[str, Callable[..., Any]]
    if version == "rand":
        apgd_dlr = partial(apgd, criterion=dlr_or_margin, samples=_SAMPLES)
        attacks = {"APGD-CE": partial(apgd_ce, samples=_SAMPLES), "APGD-DLR": apgd_dlr}
    elif version == "standard":
        targets = partial(likeliest_rivals, number=_TARGETS)
        attacks = {
            "APGD-CE": apgd_ce,
            "APGD-T": partial(apgd, criterion=dlr_or_margin, rivals=targets),
            "FAB-T": partial(fab_attack, steps=_STEPS, stop_once_fooled=True, rivals=targets),
            "Square": partial(square_attack, queries=_QUERIES),
        }
    else:
        raise wrong("version", 'be "standard" or "rand"', repr(version))
    return partial(ensemble, attacks=attacks)


def short_ensemble(
    model: Model,
    data: Tensor,
    target: Tensor,
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    steps: int = 100,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    mask: Tensor | None = None,
    generator: Generator | None = None,
    levels: int | None = None,
    journal: Journal | None = None,
) -> Ensembled:
    """Run the few attacks that `evaluate_robustness` runs by default: quicker than `standard`.

    APGD on the smooth margin; with a third of the steps on the cross entropy, from a random start;
    with a fifth each toward the two classes that are nearest by linearization; and Square with half
    as many queries as steps. With a `criterion` or a rule `fooled`: APGD on it, and Square.

    Where a model rounds (by `torch.round`, `floor`, `ceil`, `trunc`, `sign` and the like), APGD on
    the margin, and outside L1 balls toward classes, follows gradients through the roundings (BPDA),
    which prefer entries that are close to another step. Examples whose gradients are 0 are attacked
    along these, too, on cross entropy ("BPDA-CE") and margin ("BPDA").

    Examples without these gradients are attacked along estimates, which are made of differences
    between the outputs at 64 pairs of points, first distant and then close ones ("Diff" and, in L1
    balls, "Diff-near"), and then by Square from the best point ("Search"). All of this also attacks
    what withstood where Square finds more than the gradients.

    Parameters
    ----------
    model, data, target, ball, data_range, criterion, fooled, mask, generator, levels
        As in `attack`.
    journal : Journal, optional
        As in `ensemble`.
    steps : int
        Number of steps of the first attack, >= 0, by which those of the others are set.

    Returns
    -------
    Ensembled

    Raises
    ------
    TypeError, ValueError
        As `attack`.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import short_ensemble
    >>> data, target = torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([0, 0])
    >>> short_ensemble(lambda x: x, data, target, ball=L2Ball(0.2), steps=20).fooled
    tensor([ True, False])
    """
    check_count("steps", steps, 0)
    own = through = partial(attack, stop_once_fooled=True)  # whose gradients
    has_steps = rounds(model, data)
    if has_steps:
        through = partial(through_attack, stop_once_fooled=True)
    attacks: dict[str, Callable[..., Any]] = {"APGD": partial(through, steps=steps)}
    if_masked: dict[str, Callable[..., Any]] = {}
    if criterion is None and fooled is None:
        # (Rounded up, as an attack without a step sees no gradient.)
        ce = {"criterion": cross_entropy, "steps": -(-steps // 3), "random_start": True}
        attacks["APGD-CE"] = partial(own, **ce)
        toward = own if ball.p == 1 else through  # each finds more there
        rivals = partial(nearest_rivals, number=2, among=5)
        attacks["APGD-T"] = partial(toward, steps=-(-steps // 5), rivals=rivals)
        if has_steps:
            if_masked["BPDA-CE"] = partial(through, **ce)
    if has_steps:
        if_masked["BPDA"] = partial(through, steps=-(-4 * steps // 5))
    # (Saturated models need less than those with steps or without gradients.)
    part = -(-steps // (100 if has_steps is False else 50))
    if ball.p == 1:  # where wide differences find more, and a longer search
        if_masked["Diff"] = partial(difference_attack, steps=part, narrowed=1.0)
        if_masked["Diff-near"] = partial(difference_attack, steps=3 * part, narrowed=0.1)
        if_masked["Search"] = partial(square_attack, queries=100 * part)
    else:
        if_masked["Diff"] = partial(difference_attack, steps=6 * part)
        if_masked["Search"] = partial(square_attack, queries=50 * part)
    found = ensemble(
        model,
        data,
        target,
        attacks=attacks | {"Square": partial(square_attack, queries=-(-steps // 2))},
        if_masked=if_masked,
        ball=ball,
        data_range=data_range,
        criterion=criterion,
        fooled=fooled,
        mask=mask,
        generator=generator,
        levels=levels,
        journal=journal,
    )
    return found._replace(model_calls=found.model_calls + 1)  # of `rounds`


def _without_gradient(
    objective: Objective, allowed: FeasibleSet, target: Tensor, generator: Generator | None
) -> Tensor:
    """Whether the gradient of the loss is 0 at the data and at a random point, shape (N,)."""
    change = allowed.of_perturbations().sample_(torch.zeros_like(allowed.data), generator)
    zero = torch.ones(allowed.data.shape[:1], dtype=torch.bool, device=allowed.data.device)
    for points in (allowed.data, allowed.feasible(allowed.data + change)):
        with torch.enable_grad():
            x = points.detach().clone().requires_grad_()
            loss = objective.criterion(objective.model(x.clone()), target)
            gradient = losses.gradient_of(loss, x)
        zero &= (gradient == 0).flatten(1).all(1)
    return zero


def likeliest_rivals(model: Model, around: FeasibleSet, target: Tensor, *, number: int) -> Tensor:
    """The most likely other classes, all if there are fewer than this number, shape (N, m)."""
    logits = inputs.logits_of(model(around.data))
    return losses.most_likely_rivals(logits, target, min(number, logits.shape[1] - 1))


def dlr_or_margin(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """The DLR loss; the margin where there are too few classes for it."""
    enough = inputs.logits_of(logits).shape[1] >= (3 if rival is None else 4)
    return (dlr_loss if enough else margin_loss)(logits, target, rival)


class _Counted:
    """A model that counts its calls, and the examples that it was called with."""

    def __init__(self, model: Model) -> None:
        self.model, self.calls, self.examples = model, 0, 0

    def __call__(self, data: Tensor) -> Any:
        self.calls += 1
        self.examples += len(data)
        return self.model(data)
