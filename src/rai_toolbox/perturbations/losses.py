"""Losses of each datum, which an attack maximizes; and when a datum is fooled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Criterion",
    "cross_entropy",
    "dlr_loss",
    "is_fooled",
    "margin_loss",
    "most_likely_rivals",
    "rival_margin",
    "targeted_dlr_loss",
]

Criterion = Callable[[Tensor, Tensor], Tensor]
"""From what a model gives and the target to the loss of each datum, shape (N,)."""

_NARROW = (torch.float16, torch.bfloat16)


def cross_entropy(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """Cross entropy of each datum, ``-log softmax(logits)[target]``.

    It is flat where a model is very sure: there `margin_loss` still has a gradient. Toward a rival
    it is ``log softmax(logits)[rival]``, whatever the target.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class that is to win, instead of any but the target.

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
    loss = functional.cross_entropy(
        _wide(logits), target if rival is None else rival, reduction="none"
    )
    return loss if rival is None else -loss


def margin_loss(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """By how much the best other class beats the target; above 0 the datum is fooled.

    ``max_{j != y} z_j - z_y`` (Carlini & Wagner, 2017). It does not saturate, whatever the scale
    of the logits. Toward a rival t it is ``z_t - z_y``: linear on a linear model, so that its
    maximum over a convex set is found exactly, and the largest over all rivals is the exact worst
    margin.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 2.
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class that is to win, instead of the best other one.

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
    best = _others(logits, target).amax(1) if rival is None else _of_class(logits, rival)
    return best - _of_class(logits, target)


def dlr_loss(logits: Tensor, target: Tensor, rival: Tensor | None = None) -> Tensor:
    """The margin loss in units of the gap from the first to the third logit.

    ``(max_{j != y} z_j - z_y) / (z_(1) - z_(3))`` with the logits in falling order ``z_(1) >=
    z_(2) >= ...`` (Croce & Hein, 2020): it does not change with the scale of the logits, nor with
    a shift of them. It is 0 where the three are equal. It is constant where the target has the
    third logit: `targeted_dlr_loss` is for a target that is to rise. So is the form toward a rival
    t, ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 3; K >= 4 with `rival`.
    target : Tensor of int, shape (N,)
    rival : Tensor of int, shape (N,), optional
        The class that is to win, instead of the best other one.

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
    if rival is not None:
        return _in_units_of(_targeted_gap(logits), margin_loss(logits, target, rival))
    first, _, third = _largest(logits, 3).unbind(1)
    return _in_units_of(first - third, margin_loss(logits, target))


def targeted_dlr_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The loss for an attack to minimize that wants the target to be predicted.

    ``(max_{j != t} z_j - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`` with the logits in falling order
    (Croce & Hein, 2020, with the best other class in place of the right one).

    Parameters
    ----------
    logits : Tensor, shape (N, K)
        With K >= 4.
    target : Tensor of int, shape (N,)
        The classes that are wanted.

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
    return _in_units_of(_targeted_gap(logits), margin_loss(logits, target))


def rival_margin(rival: Tensor) -> Criterion:
    """Make a loss of one rival class for each datum: `margin_loss` toward it, ``z_rival - z_y``.

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

    def of_rival(logits: Tensor, target: Tensor) -> Tensor:
        return margin_loss(logits, target, rival)

    return of_rival


def most_likely_rivals(logits: Tensor, target: Tensor, m: int) -> Tensor:
    """The m classes with the largest logits other than the target, the likeliest first.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    m : int
        From 1 to K - 1.

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
    if not 1 <= m < logits.shape[1]:
        raise ValueError(
            f"`m` must be from 1 to {logits.shape[1] - 1}, the number of other classes, got {m!r}"
        )
    return _others(logits, target).topk(m, dim=1).indices


def is_fooled(logits: Tensor, target: Tensor, targeted: bool = False) -> Tensor:
    """Whether the predicted class, that of the largest logit, is what an attack wants.

    Where there is a NaN among the logits, nothing is predicted: neither the right class nor a
    wanted one.

    Parameters
    ----------
    logits : Tensor, shape (N, K)
    target : Tensor of int, shape (N,)
    targeted : bool
        Whether `target` is the class that the attack wants, instead of the right one.

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
    largest, predicted = logits.max(1)  # NaN where there is one
    nothing = largest.isnan()
    return (predicted == target) & ~nothing if targeted else (predicted != target) | nothing


def _wide(logits: Tensor) -> Tensor:
    """Logits of autocast in float32: the losses of neighbors are to differ."""
    return logits.float() if logits.dtype in _NARROW else logits


def _largest(logits: Tensor, number: int) -> Tensor:
    if logits.shape[1] < number:
        raise ValueError(
            f"`logits` must have at least {number} classes, got shape {tuple(logits.shape)}"
        )
    return _wide(logits).topk(number, dim=1).values


def _targeted_gap(logits: Tensor) -> Tensor:
    first, _, third, fourth = _largest(logits, 4).unbind(1)
    return first - (third + fourth) / 2


def _in_units_of(gap: Tensor, loss: Tensor) -> Tensor:
    return loss / torch.where(gap == 0, 1.0, gap)


def _of_class(logits: Tensor, index: Tensor) -> Tensor:
    return _wide(logits).gather(1, index.unsqueeze(1)).squeeze(1)


def _others(logits: Tensor, target: Tensor) -> Tensor:
    """The logits, with minus infinity in place of the target's."""
    return _wide(logits).scatter(1, target.unsqueeze(1), -torch.inf)
