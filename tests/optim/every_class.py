"""Every optimizer class, beside a slow and obvious reference: numpy, one sub-tensor at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rai_toolbox import optim
from rai_toolbox.constraints import Box, L2Ball

Row = np.ndarray


def same(row: Row) -> Row:
    return row


def sign(row: Row) -> Row:
    return np.array([x / abs(x) if x else x for x in row], row.dtype)


def unit(p: int) -> Callable[[Row], Row]:
    def normalize(row: Row) -> Row:
        length = sum(abs(x) ** p for x in row) ** (1 / p)
        return row / length if length else row

    return normalize


def top(q: float) -> Callable[[Row], Row]:
    def keep(row: Row) -> Row:
        ranked = sorted(range(len(row)), key=lambda i: -abs(row[i]))
        kept = ranked[: round((1 - q) * len(row))]
        return np.array([x if i in kept else 0 for i, x in enumerate(row)], row.dtype)

    return keep


def largest_sign(row: Row) -> Row:
    largest = max(range(len(row)), key=lambda i: abs(row[i]), default=None)
    return sign(np.array([x if i == largest else 0 for i, x in enumerate(row)], row.dtype))


def clamp(lower: float, upper: float) -> Callable[[Row], Row]:
    return lambda row: np.array([min(max(x, lower), upper) for x in row], row.dtype)


def ball(epsilon: float) -> Callable[[Row], Row]:
    def project(row: Row) -> Row:
        length = sum(abs(x) ** 2 for x in row) ** 0.5
        return row * (epsilon / length) if length > epsilon else row

    return project


def times(factor: float) -> Callable[[Row], Row]:
    return lambda row: factor * row


@dataclass(frozen=True)
class Case:
    """One class of optimizers, and what it does to a sub-tensor."""

    cls: type[torch.optim.Optimizer]
    settings: dict = field(default_factory=dict)
    direction: Sequence[Callable[[Row], Row]] = ()
    project: Callable[[Row], Row] = same
    members: Sequence[object] = ()
    elementwise: bool = False  # any param_ndim will do, also on a 0-d tensor
    keeps_zero: bool = False  # its direction is elementwise and leaves 0 as it is
    real_only: bool = False

    @property
    def frank_wolfe(self) -> bool:
        return "FrankWolfe" in self.cls.__name__

    @property
    def has_sub_tensors(self) -> bool:
        return self.cls is not optim.FrankWolfe

    def make(self, params, cls=None, **settings):
        """The optimizer, whose inner one is SGD with lr=1 except for Frank-Wolfe classes."""
        settings = {**self.settings, **({} if self.frank_wolfe else {"lr": 1.0}), **settings}
        if self.members:
            return (cls or self.cls)(*self.members, params=params, **settings)
        return (cls or self.cls)(params, **settings)

    def turned(self, row: Row, scale: float = 1.0, bias: float = 0.0) -> Row:
        """The gradient of a sub-tensor as the inner optimizer should see it."""
        for transform in self.direction:
            row = transform(row)
        return row * scale + bias

    def moved(self, param: Row, grad: Row, step: int) -> Row:
        """A sub-tensor after step 0, 1, ... with an already transformed gradient."""
        if not self.frank_wolfe:
            return self.project(param - grad)
        a = 2 / (2 + step)
        return (1 - a) * param - a * grad * self.settings.get("lmo_scaling_factor", 1.0)


_CLAMP = {"clamp_min": -0.4, "clamp_max": 0.7}

CASES = {
    "Param": Case(optim.ParamTransformingOptimizer, keeps_zero=True),
    "ClampedParameter": Case(
        optim.ClampedParameterOptimizer,
        _CLAMP,
        project=clamp(-0.4, 0.7),
        elementwise=True,
        keeps_zero=True,
        real_only=True,
    ),
    "ClampedGradient": Case(
        optim.ClampedGradientOptimizer,
        _CLAMP,
        [clamp(-0.4, 0.7)],
        elementwise=True,
        keeps_zero=True,
        real_only=True,
    ),
    "Signed": Case(optim.SignedGradientOptim, {}, [sign], elementwise=True, keeps_zero=True),
    "L1Normed": Case(optim.L1NormedGradientOptim, {}, [unit(1)]),
    "L2Normed": Case(optim.L2NormedGradientOptim, {}, [unit(2)]),
    "L2Projected": Case(optim.L2ProjectedOptim, {"epsilon": 0.9}, [unit(2)], ball(0.9)),
    "LinfProjected": Case(
        optim.LinfProjectedOptim,
        {"epsilon": 0.6},
        [sign],
        clamp(-0.6, 0.6),
        elementwise=True,
        keeps_zero=True,
        real_only=True,
    ),
    "TopQ": Case(optim.TopQGradientOptimizer, {"q": 0.6}, [top(0.6)]),
    "L1qNormed": Case(optim.L1qNormedGradientOptim, {"q": 0.6}, [top(0.6), sign, unit(1)]),
    "Chained": Case(
        optim.ChainedParamTransformingOptimizer,
        direction=[top(0.6), unit(2), clamp(-0.4, 0.7)],
        project=lambda row: clamp(-0.4, 0.7)(ball(0.9)(row)),
        members=(
            partial(optim.TopQGradientOptimizer, q=0.6),
            partial(optim.L2ProjectedOptim, epsilon=0.9),
            partial(optim.ClampedGradientOptimizer, **_CLAMP),
            partial(optim.ClampedParameterOptimizer, **_CLAMP),
        ),
        real_only=True,
    ),
    "Projected": Case(
        optim.ProjectedOptimizer,
        {"constraint": L2Ball(0.9)},
        project=ball(0.9),
        keeps_zero=True,
        real_only=True,
    ),
    "ProjectedBox": Case(
        optim.ProjectedOptimizer,
        {"constraint": Box(-0.4, 0.7)},
        project=clamp(-0.4, 0.7),
        elementwise=True,
        keeps_zero=True,
        real_only=True,
    ),
    "FrankWolfe": Case(optim.FrankWolfe, {"lmo_scaling_factor": 0.9}, keeps_zero=True),
    "L1FrankWolfe": Case(optim.L1FrankWolfe, {"epsilon": 0.9}, [largest_sign, times(0.9)]),
    "L2FrankWolfe": Case(optim.L2FrankWolfe, {"epsilon": 0.9}, [unit(2), times(0.9)]),
    "LinfFrankWolfe": Case(
        optim.LinfFrankWolfe,
        {"epsilon": 0.9},
        [sign, times(0.9)],
        elementwise=True,
        keeps_zero=True,
    ),
    "L1qFrankWolfe": Case(
        optim.L1qFrankWolfe,
        {"q": 0.6, "epsilon": 0.9},
        [top(0.6), sign, unit(1), times(0.9)],
    ),
}
TRANSFORMING = [name for name, case in CASES.items() if case.has_sub_tensors]


def bridged(cls: type) -> type:
    """A user's subclass that overrides both hooks, only to call what is there already."""

    class Bridged(cls):
        def _pre_step_transform_(self, param, optim_group):
            super()._pre_step_transform_(param, optim_group=optim_group)

        def _post_step_transform_(self, param, optim_group):
            super()._post_step_transform_(param, optim_group=optim_group)

    return Bridged


def leaf(data: Tensor, grad: Tensor | None = None) -> Tensor:
    """A parameter of its own, with a gradient that is kept as it is, strides included."""
    param = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype).copy_(data)
    param = param.requires_grad_()
    param.grad = grad
    return param


def distinct(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Numbers whose magnitudes all differ, in each dtype for up to 2^8 of them, so without ties.

    Every seventh one is 0. The scale is to be a power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    n = int(np.prod(shape))
    x = (1 + torch.randperm(n, generator=generator)).double()
    x *= 1 - 2 * torch.randint(0, 2, (n,), generator=generator)
    x[::7] = 0
    return (x * scale).reshape(shape).to(dtype)
