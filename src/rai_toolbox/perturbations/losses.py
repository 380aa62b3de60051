"""Losses of each example, which attacks maximize, and the predicate that an example is fooled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rai_toolbox.checks import wrong
from rai_toolbox.perturbations.inputs import are_classes, are_logits, is_index, logits_of

Criterion = Callable[[Any, Tensor], Tensor]
"""From the output of a model and the target to the loss of each example, shape (N,)."""
Rule = Callable[[Any, Tensor], Tensor]
"""From the output of a model and the target to a bool for each example, shape (N,)."""


def cross_entropy(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """Cross entropy of each example, ``-log softmax(logits)[target]``.

    It saturates where a model is very confident; `margin_loss` does not. Toward a rival it is
    ``log softmax(logits)[rival]``, and the target has no effect.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class to predict, instead of any class but the target.

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import cross_entropy
    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    logits = logits_of(logits)
    if not is_index(target.dtype) and not (
        target.is_floating_point() and target.shape == logits.shape
    ):
        rule = "hold classes, or their probabilities (for other targets pass `criterion`)"
        raise wrong("target", rule, f"{target.dtype} of shape {tuple(target.shape)}", TypeError)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if rival is not None:
        return -functional.cross_entropy(wide, rival, reduction="none")
    return functional.cross_entropy(wide, target, reduction="none")


def margin_loss(
    logits: Tensor, target: Tensor, rival: Tensor | None = None, *, smooth: bool = False
) -> Tensor:
    """The margin of the best other class over the target; above 0 the example is fooled.

    ``max_{j != y} z_j - z_y`` (Carlini & Wagner, 2017). It does not saturate at any scale of the
    logits. Toward a rival t it is ``z_t - z_y``. On a linear model that is linear, so an attack
    finds its exact maximum over a convex set, and the largest of all rivals is the worst margin.

    The best other class at the data is often not the one that an attack reaches first. With
    `smooth` the value is the same, but the gradient that of ``sum_{j != y} w_j z_j - z_y`` with the
    constant weights ``w = softmax(z / |margin|)``: it includes all classes about as near as the
    best one, and fewer of them as the margin approaches 0.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 2.
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class to predict, instead of the best other one.
    smooth : bool
        Whether the gradient is that of a mean of the other classes. Not with `rival`.

    Returns
    -------
    Tensor, shape (N,)

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import margin_loss
    >>> margin_loss(torch.tensor([[5.0, 2.0, 3.0], [1.0, 4.0, 0.0]]), torch.tensor([0, 0]))
    tensor([-2.,  3.])
    """
    logits = logits_of(logits)
    # Of half-precision logits in float32, so that losses of nearby points differ.
    wide, own = logits.to(torch.promote_types(logits.dtype, torch.float32)), target.unsqueeze(1)
    if rival is not None:
        return (wide.gather(1, rival.unsqueeze(1)) - wide.gather(1, own)).squeeze(1)
    seen = wide.detach() if smooth else wide
    others = seen.scatter(1, own, -torch.inf)
    largest = others.amax(1, keepdim=True)
    margin = largest - seen.gather(1, own)
    if not smooth:
        return margin.squeeze(1)
    unit = margin.abs().clamp(min=torch.finfo(wide.dtype).tiny)
    weights = ((others - largest) / unit).softmax(1).scatter(1, own, -1.0)
    mean = (weights * wide.where(weights != 0, 0.0)).sum(1)  # (a logit may be -inf)
    return margin.squeeze(1) + (mean - mean.detach())


def dlr_loss(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """The margin loss in units of the gap from the first to the third logit.

    ``(max_{j != y} z_j - z_y) / (z_(1) - z_(3))`` with the logits in descending order ``z_(1) >=
    z_(2) >= ...`` (Croce & Hein, 2020). Scaling and shifting the logits does not change it, and it
    is 0 where the three are equal. Where the target has the third logit, it is constant: to raise
    the target, solvers take `targeted_dlr_loss` in its place. The form toward a rival t is ``(z_t -
    z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 3; K >= 4 with `rival`.
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class to predict, instead of the best other one.

    Returns
    -------
    Tensor, shape (N,)

    Raises
    ------
    ValueError
        If there are fewer classes.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import dlr_loss
    >>> dlr_loss(torch.tensor([[5.0, 2.0, 3.0]]), torch.tensor([0]))
    tensor([-0.6667])
    """
    logits = logits_of(logits)
    return _in_gaps(margin_loss(logits, target, rival), logits, 3 if rival is None else 4)


def targeted_dlr_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The DLR loss of a targeted attack, which minimizes it.

    ``(max_{j != t} z_j - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`` with the logits in descending order
    (Croce & Hein, 2020, with the best other class in place of the right one).

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 4.
    target : Tensor of int, shape (N,)
        The classes to predict.

    Returns
    -------
    Tensor, shape (N,)

    Raises
    ------
    ValueError
        If there are fewer than four classes.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import targeted_dlr_loss
    >>> targeted_dlr_loss(torch.tensor([[5.0, 2.0, 3.0, 0.0]]), torch.tensor([2]))
    tensor([0.5000])
    """
    logits = logits_of(logits)
    return _in_gaps(margin_loss(logits, target), logits, 4)


def criterion_of(given: Criterion | None, default: Criterion, targeted: bool) -> Criterion:
    """The loss of a search: the default if none is given, and the targeted form of one."""
    if given is not None and (not callable(given) or isinstance(given, type)):
        rule = "be a function of output and target, such as `margin_loss`, `cross_entropy` or "
        rule += '`dlr_loss`, or a module, such as `torch.nn.MSELoss(reduction="none")`'
        raise wrong("criterion", rule, repr(given), TypeError)
    plain = isinstance(given, partial) and not given.keywords and not given.args
    if targeted and (given.func if plain else given) is dlr_loss:  # type: ignore[union-attr]
        return targeted_dlr_loss
    return default if given is None else given


def rival_margin(rival: Tensor) -> Criterion:
    """Make a loss of one rival class per example: `margin_loss` toward it, ``z_rival - z_y``.

    Parameters
    ----------
    rival : Tensor of int, shape (N,)

    Returns
    -------
    Criterion

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import rival_margin
    >>> rival_margin(torch.tensor([1]))(torch.tensor([[5.0, 2.0, 3.0]]), torch.tensor([0]))
    tensor([-3.])
    """
    return partial(margin_loss, rival=rival)


def most_likely_rivals(logits: Tensor, target: Tensor, m: int, name: str = "m") -> Tensor:
    """The m classes with the largest logits other than the target, the most likely first.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    m : int
        From 1 to K - 1.
    name : str
        What the error calls m.

    Returns
    -------
    Tensor of int, shape (N, m)

    Raises
    ------
    ValueError
        If m is out of its range.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import most_likely_rivals
    >>> most_likely_rivals(torch.tensor([[5.0, 2.0, 3.0]]), torch.tensor([0]), m=2)
    tensor([[2, 1]])
    """
    logits = logits_of(logits)
    if not 1 <= m < logits.shape[1]:
        raise wrong(name, f"be from 1 to {logits.shape[1] - 1}, the number of other classes", m)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf)
    return others.topk(m, dim=1).indices


def is_fooled(logits: Tensor, target: Tensor, targeted: bool = False) -> Tensor:
    """Whether an attack succeeds: the predicted class, of the largest logit, is not the target.

    With a NaN among the logits no class is predicted: neither the right one nor a target to reach.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    targeted : bool
        Whether `target` is the class to predict, instead of the right one.

    Returns
    -------
    Tensor of bool, shape (N,)

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations.losses import is_fooled
    >>> logits, target = torch.tensor([[5.0, 2.0], [1.0, 4.0]]), torch.tensor([0, 0])
    >>> is_fooled(logits, target), is_fooled(logits, target, targeted=True)
    (tensor([False,  True]), tensor([ True, False]))
    """
    logits = logits_of(logits)
    largest, predicted = logits.max(-1)  # NaN where there is one
    none = largest.isnan()
    return (predicted == target) & ~none if targeted else (predicted != target) | none


def fooled_rule(
    given: Rule | None,
    targeted: bool = False,
    required: bool = True,
    name: str = "fooled",
    classes: bool = False,
) -> Rule:
    """The rule that decides which examples are fooled: the given one, or `is_fooled` for classes.

    Without a rule for other targets nobody is fooled, or it raises if a rule is `required`. With
    `classes` the targets are known to be classes.
    """
    if given is None and classes:
        return partial(is_fooled, targeted=targeted)
    if given is None:
        return partial(_is_fooled_class, targeted=targeted, required=required, name=name)
    if not callable(given):
        raise wrong(name, "be a function of output and target", repr(given), TypeError)

    def fooled(output: Any, target: Tensor) -> Tensor:
        found = given(output, target)
        dtype, shape = getattr(found, "dtype", type(found)), tuple(getattr(found, "shape", ()))
        if dtype != torch.bool or shape != target.shape[:1]:
            rule = f"give a bool for each example, shape {tuple(target.shape[:1])}"
            raise wrong(name, rule, f"{dtype} of shape {shape}")
        return found

    return fooled


def _is_fooled_class(
    output: Any, target: Tensor, targeted: bool, required: bool, name: str
) -> Tensor:
    if are_classes(target) and are_logits(output, len(target)):
        return is_fooled(output, target, targeted)
    if required:
        rule = "be given for targets that are not classes: from output and target to a bool "
        raise wrong(name, rule + "for each example", None)
    return torch.zeros(target.shape[:1], dtype=torch.bool, device=target.device)


def rule_of_stack(rule: Rule | None, output: Any, target: Tensor) -> Rule | None:
    """A rule for several outputs, stacked, if it is `is_fooled` of logits, which has no state."""
    own, settings = getattr(rule, "func", rule), getattr(rule, "keywords", {})
    is_known = own is is_fooled or own is _is_fooled_class
    if is_known and are_classes(target) and are_logits(output, len(target)):
        return partial(is_fooled, targeted=settings.get("targeted", False))
    return None


def gradient_of(loss: Tensor, data: Tensor) -> Tensor:
    """The gradient of the sum with respect to the data; 0 if it does not depend on them."""
    if not loss.requires_grad:
        return torch.zeros_like(data)
    ones = torch.ones_like(loss)  # as under `no_grad` the sum would have no gradient
    return torch.autograd.grad(loss, data, ones, retain_graph=True, materialize_grads=True)[0]


def has_gradient(model: Callable[[Tensor], Any], data: Tensor) -> bool:
    """Whether the output depends on the data as autograd sees it, by a call with one example."""
    with torch.enable_grad():
        try:
            output = logits_of(model(data[:1].detach().clone().requires_grad_().clone()))
        except RuntimeError as error:
            if not refuses_gradients(error):
                raise
            return False
    return not isinstance(output, Tensor) or output.requires_grad


def refuses_gradients(error: RuntimeError) -> bool:
    """Whether a model failed as it leaves torch, such as for NumPy, with data that need a gradient.

    (`torch.Tensor.numpy` raises that.)
    """
    return "requires grad" in str(error)


def _in_gaps(loss: Tensor, logits: Tensor, number: int) -> Tensor:
    """A loss in units of the gap from the largest logit to the mean of the third to `number`-th."""
    if logits.shape[1] < number:
        raise wrong("logits", f"have at least {number} classes", f"shape {tuple(logits.shape)}")
    largest = logits.topk(number, dim=1).values.to(loss.dtype)
    gap = largest[:, 0] - largest[:, 2:].mean(1)
    return loss / torch.where(gap == 0, 1.0, gap)
