"""Which other classes an attack runs toward: those that a linear model would be fooled into."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from rai_toolbox.checks import check_count
from rai_toolbox.perturbations.ascent import Model
from rai_toolbox.perturbations.box import DataSet
from rai_toolbox.perturbations.losses import margin_loss, most_likely_rivals

__all__ = ["Rivals", "nearest_rivals"]

Rivals = Callable[[Model, DataSet, Tensor], Tensor]
"""From the model, the set of perturbed data and the target to classes, shape (N, m)."""


def nearest_rivals(
    model: Model, around: DataSet, target: Tensor, *, number: int = 1, among: int = 9
) -> Tensor:
    r"""The other classes with the largest margins that a linear model would have in the set.

    .. math::
        z_j - z_y + \max_\delta \; \langle \nabla (z_j - z_y), \delta \rangle

    over ball and range together, with logits and gradients at the data: exact where the model is
    linear, so that one run toward the first finds the worst case there. Made for the argument
    `rivals` of `attack`, also as ``partial(nearest_rivals, number=2)``.

    Parameters
    ----------
    model : callable
        Gives logits, shape (N, K).
    around : DataSet
        The data, and the set of what they may become.
    target : Tensor of int, shape (N,)
        The right classes.
    number : int
        How many classes, >= 1; all there are if there are fewer.
    among : int
        Among how many of the most likely other classes, >= 1: each takes a backward pass.

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
    inside = around.of_perturbations()
    with torch.enable_grad():
        data = around.data.detach().clone().requires_grad_()
        logits = model(data)
        classes = most_likely_rivals(logits.detach(), target, min(among, logits.shape[1] - 1))
        margins = [margin_loss(logits, target, rival) for rival in classes.unbind(1)]
    worst = []
    for margin in margins:
        slope = torch.zeros_like(data)
        if margin.requires_grad:
            (slope,) = torch.autograd.grad(
                margin, data, torch.ones_like(margin), retain_graph=True, materialize_grads=True
            )
        gain = (slope.double() * inside.lmo(-slope)).flatten(1).sum(1)
        worst.append(margin.detach().double() + gain)
    far = torch.stack(worst, 1).nan_to_num(nan=-inf)
    return classes.gather(1, far.topk(min(number, classes.shape[1]), 1).indices)
