"""Universal perturbations: one for all data, by an ordinary training loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rai_toolbox.checks import check_count, wrong
from rai_toolbox.constraints.balls import Ball
from rai_toolbox.extras import progress as progress_bar
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.perturbations import inputs, losses
from rai_toolbox.perturbations.inputs import Model, Range, check_lr, logits_of
from rai_toolbox.perturbations.losses import Criterion, Rule, cross_entropy
from rai_toolbox.perturbations.models.additive import AdditivePerturbation
from rai_toolbox.perturbations.solve import solving, warn_of_not_finite

_STEP, _LAST, _RISE = 0.2, 0.005, 0.01  # of the radius, the first and the last; of all the rise


class UniversalPerturbation(NamedTuple):
    """What `universal_perturbation` found.

    Attributes
    ----------
    delta : Tensor, shape (...)
        The perturbation, in its ball; it has the shape of one example.
    fooled_before, fooled_after : float
        The fraction of examples that fool the model, without and with the perturbation.
    """

    delta: Tensor
    fooled_before: float
    fooled_after: float


def universal_perturbation(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    ball: Ball,
    data_range: Range = (0.0, 1.0),
    epochs: int = 50,
    optimizer: Callable[..., Optimizer] | None = None,
    criterion: Criterion | None = None,
    fooled: Rule | None = None,
    targeted: bool = False,
    progress: bool = True,
) -> UniversalPerturbation:
    r"""Find one perturbation that fools a model on as many examples of a loader as possible.

    .. math::
        \max_{\|\delta\| \leq \epsilon} \; \mathbb{E}_{x, y} \,
        \ell(f(\mathrm{clip}(x + \delta)), y)

    The parameter `delta` of an `AdditivePerturbation`, which starts at 0, is projected onto its
    ball after each step. Perturbed data are clipped to their range before the model is called, as
    no delta but 0 keeps all data in the range.

    Parameters
    ----------
    model : callable
        From data to logits, shape (N, K), or to an object or dict with `logits`. During the
        search a module is in eval mode and its weights are frozen. With a `criterion`, any output.
    loader : iterable of (data, target)
        Batches, such as a DataLoader, which is iterated at most ``epochs + 2`` times. They are
        moved to the device of the model.
    ball : LinfBall, L2Ball or L1Ball
        The set of delta; its `epsilon` is a number.
    data_range : tuple of float or Tensor, optional
        The bounds to which perturbed data are clipped; a tensor broadcasts against the data. None
        for no bounds.
    epochs : int
        Largest number of passes over the data. With the default optimizer the search ends when its
        step is less than .005 of `epsilon`.
    optimizer : callable, optional
        Called as ``optimizer(params, constraint=ball, param_ndim=None)``:
        for example ``partial(ProjectedOptimizer, InnerOpt=torch.optim.Adam, lr=0.01)``. By default
        `PGD` with a step of a fifth of `epsilon`, halved after each pass whose loss has risen by
        less than a hundredth of all the rise so far.
    criterion : callable, optional
        The loss of each example, whose mean over a batch is maximized. By default `cross_entropy`.
        `margin_loss` has a gradient also where the cross entropy rounds to 0.
    fooled : callable, optional
        As in `attack`: which examples count as fooled.
    targeted : bool
        Whether the loss is minimized, so that the model predicts `target`.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    UniversalPerturbation

    Raises
    ------
    TypeError
        If `loader` can be iterated once only, or `optimizer` has no `lr` where that is a length.
    ValueError
        If it has no examples, or `epsilon` is not a number.

    References
    ----------
    Moosavi-Dezfooli, Fawzi, Fawzi, Frossard (2017), "Universal adversarial perturbations"; Shafahi,
    Najibi, Xu, Dickerson, Davis, Goldstein (2020), "Universal adversarial training".

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import LinfBall
    >>> from rai_toolbox.perturbations import universal_perturbation
    >>> data = torch.tensor([[0.5, 0.4], [0.6, 0.3], [0.2, 0.5]])
    >>> batches = [(data, torch.tensor([0, 0, 1]))]
    >>> found = universal_perturbation(
    ...     torch.nn.Identity(), batches, ball=LinfBall(0.2), epochs=20, progress=False
    ... )
    >>> found.delta, found.fooled_before, round(found.fooled_after, 2)
    (tensor([-0.2000,  0.2000]), 0.0, 0.67)
    """
    check_count("epochs", epochs, 1)
    if isinstance(loader, Iterator):
        raise wrong("loader", "be iterable more than once", loader, TypeError)
    radius = inputs.radius_of(ball)
    maker = partial(PGD, lr=_STEP * radius) if optimizer is None else optimizer
    check_lr(maker)
    classes = inputs.expects_classes(criterion, fooled)
    rule = losses.fooled_rule(fooled, targeted, required=False)
    criterion = losses.criterion_of(criterion, cross_entropy, targeted)
    title, work = "universal perturbation", (epochs + 2) * length_hint(loader)
    with solving(model) as model, progress_bar(title, work, shown=progress) as bar:
        ends = [inputs.without_history(torch.as_tensor(x)) for x in data_range or (-inf, inf)]

        def epoch() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in inputs.batches(loader, inputs.device_of(model), classes):
                yield batch
                bar.update()

        def as_finite(gradient: Tensor) -> Tensor:
            not_finite.append((~gradient.isfinite()).sum())
            return gradient.nan_to_num(0.0, 0.0, 0.0)

        def perturbed_model(data: Tensor) -> Any:
            perturbed = perturbation(data).clamp(*(end.to(data) for end in ends))
            if perturbed.requires_grad:
                perturbed.register_hook(as_finite)  # of each example, before their sum
            return logits_of(model(perturbed))

        @torch.no_grad()
        def is_fooled(called: Model, data: Tensor, target: Tensor) -> Tensor:
            checked = inputs.checked(called, target, classes)
            return rule(checked(data), target)

        before = []
        for data, target in epoch():
            before.append(is_fooled(model, data, target))
        if not before:
            raise wrong("loader", "have data", "none")
        perturbation = AdditivePerturbation(data, delta_ndim=-1)
        made = maker([perturbation.delta], constraint=ball, param_ndim=None)
        gains, not_finite = list[Any](), list[Tensor]()
        for number in range(epochs):
            gains.append(0.0)
            for data, target in epoch():
                made.zero_grad()
                loss = criterion(perturbed_model(data), target)
                inputs.check_per_example("criterion", loss, data)
                cost = loss if targeted else -loss
                cost.mean().backward(inputs=[perturbation.delta])
                made.step()
                gains[-1] -= cost.detach().nan_to_num(0.0, 0.0, 0.0).sum()
            if number == 0:
                warn_of_not_finite(torch.stack(not_finite).sum())
            not_finite.clear()
            rise = gains[-1] - max(gains[:-1], default=-inf)
            if optimizer is None and rise <= _RISE * (max(gains) - gains[0]):
                made.param_groups[0]["lr"] /= 2
                if made.param_groups[0]["lr"] <= _LAST * radius:
                    break
        after = [is_fooled(perturbed_model, *batch) for batch in epoch()]
    fractions = [torch.cat(fooled).double().mean().item() for fooled in (before, after)]
    return UniversalPerturbation(perturbation.delta.detach(), *fractions)
