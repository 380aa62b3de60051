"""One perturbation for all data, by an ordinary training loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import length_hint
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from rai_toolbox.checks import check_count
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.extras import Bar
from rai_toolbox.extras import progress as progress_bar
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.perturbations.active import check_per_datum
from rai_toolbox.perturbations.additive import AdditivePerturbation
from rai_toolbox.perturbations.box import Range
from rai_toolbox.perturbations.gradient_ascent import Model, as_data, solving
from rai_toolbox.perturbations.losses import Criterion, cross_entropy, is_fooled

__all__ = ["UniversalPerturbation", "universal_perturbation"]

Batches = Iterable[tuple[Tensor, Tensor]]

_STEP = 0.1  # of the radius, at first


class UniversalPerturbation(NamedTuple):
    """What `universal_perturbation` found.

    Attributes
    ----------
    delta : Tensor, shape (...)
        The perturbation, of the shape of one datum, in its ball.
    fooled_before, fooled_after : float
        The share of the data that fool the model, without and with the perturbation.
    """

    delta: Tensor
    fooled_before: float
    fooled_after: float


def universal_perturbation(
    model: Model,
    loader: Batches,
    *,
    ball: LinfBall | L2Ball | L1Ball,
    data_range: Range = (0.0, 1.0),
    epochs: int = 5,
    optimizer: Callable[..., Optimizer] | None = None,
    criterion: Criterion | None = None,
    targeted: bool = False,
    progress: bool = True,
) -> UniversalPerturbation:
    r"""Find one perturbation that fools a model on as many data of a loader as it can.

    .. math::
        \max_{\|\delta\| \leq \epsilon} \; \mathbb{E}_{x, y} \,
        \ell(f(\mathrm{clip}(x + \delta)), y)

    The parameter `delta` of an `AdditivePerturbation`, which starts at 0, is projected onto its
    ball after each step. There is no delta but 0 that keeps all data in the data range: this one
    keeps to the ball, and perturbed data are clipped to the range before the model sees them.

    Parameters
    ----------
    model : callable
        Gives logits, shape (N, K). A module is in eval mode with frozen weights meanwhile.
    loader : iterable of (data, target)
        Batches, such as a DataLoader; it is gone through ``epochs + 2`` times. They are moved to
        the device of the model.
    ball : LinfBall, L2Ball or L1Ball
        The set of delta, with a number for `epsilon`.
    data_range : tuple of float or Tensor, optional
        The bounds that perturbed data are clipped to; None for none.
    epochs : int
        How often to go through the data.
    optimizer : callable, optional
        Called as ``optimizer(params, constraint=ball, param_ndim=None)``:
        ``partial(ProjectedOptimizer, InnerOpt=torch.optim.Adam, lr=0.01)``, or another such. By
        default `PGD` with a step of a tenth of `epsilon`, which falls to 0 linearly.
    criterion : callable, optional
        The loss of each datum, whose mean over a batch is to rise. By default `cross_entropy`,
        to which data count that are almost fooled; `margin_loss` has a gradient also where the
        model is so sure that cross entropy rounds to 0.
    targeted : bool
        Whether the loss is to fall, and the model to say `target`.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    UniversalPerturbation

    Raises
    ------
    TypeError
        If `loader` can be gone through once only.
    ValueError
        If it has no data, or `epsilon` is not a number.

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
        raise TypeError(f"`loader` must be iterable more than once, got {loader!r}")
    if not isinstance(ball, (LinfBall, L2Ball, L1Ball)):
        raise TypeError(f"`ball` must be a LinfBall, L2Ball or L1Ball, got {ball!r}")
    if isinstance(ball.epsilon, Tensor) or not ball.bounded:
        raise ValueError(f"`epsilon` of `ball` must be a finite number, got {ball!r}")
    criterion = cross_entropy if criterion is None else criterion
    device = _device(model)

    total = (epochs + 2) * length_hint(loader)
    with solving(model), progress_bar("universal perturbation", total, shown=progress) as bar:
        passes = partial(_batches, loader, device, bar)
        fooled, total, batches = torch.zeros((), device=device), 0, 0
        for data, target in passes():
            fooled = fooled + _fooled(model, data, target, targeted)
            total, batches = total + len(data), batches + 1
        if total == 0:
            raise ValueError("`loader` must have data, got none")
        before = float(fooled) / total

        perturbation = AdditivePerturbation(data, delta_ndim=-1)
        seen = partial(_seen, model, perturbation, data_range)
        if optimizer is None:
            step = _STEP * float(ball.epsilon)
            made: Optimizer = PGD([perturbation.delta], constraint=ball, param_ndim=None, lr=step)
            schedule = LinearLR(made, 1.0, 0.0, epochs * batches)
        else:
            made, schedule = optimizer([perturbation.delta], constraint=ball, param_ndim=None), None
        for _ in range(epochs):
            for data, target in passes():
                made.zero_grad()
                loss = criterion(seen(data), target)
                check_per_datum("criterion", loss, data, "a universal perturbation")
                (loss if targeted else -loss).mean().backward()
                made.step()
                if schedule is not None:
                    schedule.step()

        fooled, total = torch.zeros((), device=device), 0
        for data, target in passes():
            fooled = fooled + _fooled(seen, data, target, targeted)
            total += len(data)
    return UniversalPerturbation(perturbation.delta.detach(), before, float(fooled) / total)


def _seen(
    model: Model, perturbation: AdditivePerturbation, data_range: Range, data: Tensor
) -> Tensor:
    """What the model gives for perturbed data, clipped to their range."""
    perturbed = perturbation(data)
    if data_range is not None:
        low, high = (torch.as_tensor(bound, device=data.device) for bound in data_range)
        perturbed = perturbed.clamp(low.to(data.dtype), high.to(data.dtype))
    return model(perturbed)


@torch.no_grad()
def _fooled(model: Model, data: Tensor, target: Tensor, targeted: bool) -> Tensor:
    return is_fooled(model(data), target, targeted).sum()


def _batches(
    loader: Batches, device: torch.device | None, bar: Bar
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the data that are there, on the device."""
    for data, target in loader:
        if len(data):
            yield as_data(data).to(device), target.to(device)
        bar.update()


def _device(model: Model) -> torch.device | None:
    """That of the model, if it has one."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), None)
