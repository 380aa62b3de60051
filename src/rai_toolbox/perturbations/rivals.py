"""Other classes that an attack runs toward: those with the largest linearized margins."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.perturbations.feasible_set import FeasibleSet
from rai_toolbox.perturbations.inputs import Model, check_classes, logits_of
from rai_toolbox.perturbations.losses import gradient_of, margin_loss, most_likely_rivals

ChooseClasses = Callable[[Model, FeasibleSet, Tensor], Tensor]
"""From the model, the feasible set and the target to classes, shape (N, m)."""


def nearest_rivals(
    model: Model, around: FeasibleSet, target: Tensor, *, number: int = 1, among: int = 9
) -> Tensor:
    r"""The other classes with the largest worst-case margins of the linearized model.

    .. math::
        z_j - z_y + \max_\delta \; \langle \nabla (z_j - z_y), \delta \rangle

    over ball and range together, with logits and gradients at the data. It is exact for a linear
    model: one run toward the first class finds the worst case. For the argument `rivals` of
    `attack`, also as ``partial(nearest_rivals, number=2)``.

    Parameters
    ----------
    model : callable
        From data to logits, shape (N, K).
    around : FeasibleSet
        The data, and the set that perturbed data are in.
    target : Tensor of int, shape (N,)
        The right classes.
    number : int
        Number of classes, >= 1; all of them if there are fewer.
    among : int
        Number of the most likely other classes to choose from, >= 1. Each costs a backward pass.

    Returns
    -------
    Tensor of int, shape (N, m)
        The nearest first.

    Raises
    ------
    TypeError, ValueError
        If `number` or `among` breaks its rule.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import L2Ball
    >>> from rai_toolbox.perturbations import attack, nearest_rivals
    >>> data, target = torch.tensor([[0.5]]), torch.tensor([0])
    >>> model = lambda x: torch.cat([0 * x + 2, x, 2.5 - 5 * x], 1)  # class 1 is likelier than 2
    >>> attack(model, data, target, ball=L2Ball(0.45), steps=5, rivals=1).fooled
    tensor([False])
    >>> attack(model, data, target, ball=L2Ball(0.45), steps=5, rivals=nearest_rivals).fooled
    tensor([True])
    """
    check_count("number", number, 1)
    check_count("among", among, 1)
    allowed = around.of_perturbations()
    with torch.enable_grad():
        data = around.data.detach().clone().requires_grad_()
        logits = logits_of(model(data.clone()))  # as it may work in place
        classes = most_likely_rivals(logits.detach(), target, min(among, logits.shape[1] - 1))
        margins = [margin_loss(logits, target, other) for other in classes.unbind(1)]
    worst = []
    for margin in margins:
        gradient = gradient_of(margin, data).nan_to_num(0.0, 0.0, 0.0)
        gain = (gradient.double() * allowed.lmo(-gradient)).flatten(1).sum(1)
        worst.append(margin.detach().double() + gain)
    margins_in_set = torch.stack(worst, 1).nan_to_num(nan=-inf)
    return classes.gather(1, margins_in_set.topk(min(number, classes.shape[1]), 1).indices)


@torch.no_grad()
def rival_classes(
    rivals: int | ChooseClasses, model: Model, allowed: FeasibleSet, target: Tensor
) -> Tensor:
    """The rival classes of each example, shape (N, m)."""
    if not callable(rivals):
        check_count("rivals", rivals, 1)
        return most_likely_rivals(model(allowed.data), target, rivals, "rivals")
    classes = rivals(model, allowed, target)
    check_classes("rivals", classes)
    fits = classes.ndim == 2 and len(classes) == len(target) and classes.shape[1] > 0
    if not fits or bool((classes.to(target) == target[:, None]).any()):
        rule = f"give classes of shape ({len(target)}, m) that are not the targets"
        raise wrong("rivals", rule, f"shape {tuple(classes.shape)}")
    return classes.to(target)
