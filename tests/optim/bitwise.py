"""Wrappers that change nothing, and the comparison of optimizers bit for bit."""

import math
from functools import partial

import torch

from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    ParamTransformingOptimizer,
)


class DoNothing(ParamTransformingOptimizer):
    """A user's subclass: it takes the per-tensor path, in both of the documented spellings."""

    def _pre_step_transform_(self, param, optim_group):
        pass

    def _post_step_transform_(self, param, **kwargs):
        pass


def unbounded(params, InnerOpt, **kwargs):
    bounds = {"clamp_min": -math.inf, "clamp_max": math.inf}
    return ClampedParameterOptimizer(params, InnerOpt, **bounds, **kwargs)


def around_an_instance(params, InnerOpt, **kwargs):
    return ClampedParameterOptimizer(None, InnerOpt(params, **kwargs), clamp_max=math.inf)


def chain(params, InnerOpt, **kwargs):
    members = (partial(ClampedGradientOptimizer, clamp_min=-math.inf), DoNothing)
    return ChainedParamTransformingOptimizer(*members, params=params, InnerOpt=InnerOpt, **kwargs)


def bare(params, InnerOpt, **kwargs):
    return InnerOpt(params, **kwargs)


def same_bits(a, b) -> bool:
    """Whether two nested values are equal, their tensors bit for bit (-0.0 is not 0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
            return False
        if a.layout is not torch.strided:
            return same_bits(a.to_dense(), b.to_dense())
        if a.stride() != b.stride() or not torch.equal(a, b):
            return False
        return a.is_complex() or torch.equal(a.signbit(), b.signbit())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


def snapshot(params, optimizer) -> dict:
    """Copies of all that a step may change, in terms of positions instead of tensors."""
    position = {p: i for i, p in enumerate(params)}
    return copied(
        {
            "params": list(params),
            "grads": [p.grad for p in params],
            # whatever is no parameter's state is a KeyError here
            "state": {position[p]: state for p, state in optimizer.state.items()},
            "groups": [
                {**group, "params": [position[p] for p in group["params"]]}
                for group in optimizer.param_groups
            ],
        }
    )


def copied(value):
    """A deep copy of plain data and tensors, many times quicker than `copy.deepcopy`."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def differences(mine: dict, bare: dict) -> list[str]:
    """Where the snapshot of a wrapper differs from that of the bare optimizer.

    The settings of the wrapper, in its groups, are the one thing that it may have besides.
    """
    groups = [
        {name: group[name] for name in group if name in theirs}
        for group, theirs in zip(mine["groups"], bare["groups"], strict=True)
    ]
    mine = {**mine, "groups": groups}
    return [name for name in bare.keys() | mine.keys() if not same_bits(mine[name], bare[name])]
