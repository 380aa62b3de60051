"""Random starts: uniform in a norm ball of each sub-tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, default_generator

from rai_toolbox.batch import to_batch
from rai_toolbox.checks import check_positive
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall


def uniform_like_l1_n_ball_(
    x: Tensor,
    epsilon: float = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = default_generator,
) -> Tensor:
    """Fill x in place with points drawn uniformly from the L1 ball of each sub-tensor.

    Exponential variables divided by their sum plus one more are uniform in the simplex (Devroye,
    1986); signs are independent.

    Parameters
    ----------
    x : Tensor, shape (N, ...)
        Of a floating-point dtype; its values are not read.
    epsilon : float
        Radius, > 0.
    param_ndim : int or None
        Number of trailing dims of a sub-tensor, see `rai_toolbox.to_batch`.
    generator : torch.Generator
        On any device.

    Returns
    -------
    Tensor
        `x`, of its shape.

    Raises
    ------
    ValueError
        If `epsilon` is not a finite number > 0, or `param_ndim` does not fit x.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import uniform_like_l1_n_ball_
    >>> x = uniform_like_l1_n_ball_(torch.empty(4, 9), 2.0, generator=torch.manual_seed(0))
    >>> x.abs().sum(1)
    tensor([1.8678, 1.7477, 1.6216, 1.9026])
    """
    return _fill_(x, L1Ball, epsilon, param_ndim, generator)


def uniform_like_l2_n_ball_(
    x: Tensor,
    epsilon: float = 1.0,
    param_ndim: int | None = -1,
    generator: Generator = default_generator,
) -> Tensor:
    """Fill x in place with points drawn uniformly from the L2 ball of each sub-tensor.

    The direction of normal variables, at the radius ``epsilon u^(1/n)`` with u uniform (Muller,
    1959). See `uniform_like_l1_n_ball_` for the arguments and errors.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import uniform_like_l2_n_ball_
    >>> x = uniform_like_l2_n_ball_(torch.empty(4, 9), 2.0, generator=torch.manual_seed(0))
    >>> x.norm(dim=1)
    tensor([1.9933, 1.9247, 1.8344, 1.9817])
    """
    return _fill_(x, L2Ball, epsilon, param_ndim, generator)


def uniform_like_linf_n_ball_(
    x: Tensor,
    epsilon: float = 1.0,
    param_ndim: int | None = None,
    generator: Generator = default_generator,
) -> Tensor:
    """Fill x in place with numbers drawn uniformly from [-epsilon, epsilon].

    See `uniform_like_l1_n_ball_` for the arguments and errors; `param_ndim` has no effect here.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.perturbations import uniform_like_linf_n_ball_
    >>> x = uniform_like_linf_n_ball_(torch.empty(4, 9), 2.0, generator=torch.manual_seed(0))
    >>> x.abs().amax(1)
    tensor([1.8802, 1.2928, 1.5611, 1.6700])
    """
    return _fill_(x, LinfBall, epsilon, param_ndim, generator)


@torch.no_grad()
def _fill_(
    x: Tensor, ball: Any, epsilon: float, param_ndim: int | None, generator: Generator
) -> Tensor:
    check_positive("epsilon", epsilon)
    batch = to_batch(x.detach(), param_ndim)
    return x.copy_(ball(epsilon).sample_(batch, generator).view(x.shape))  # if it was no view
