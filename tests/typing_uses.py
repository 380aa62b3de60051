"""Typical uses, for the type checker: strict mypy accepts this file. It is not run.

What must be an error stands beside a `type: ignore` with its code; strict mypy complains of one
that is not needed, so that these are tests too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from typing_extensions import assert_type

from rai_toolbox import evaluating, freeze, frozen, negate, to_batch
from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    FrankWolfe,
    L1FrankWolfe,
    L1NormedGradientOptim,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    L2FrankWolfe,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfFrankWolfe,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    Scion,
    SignedGradientOptim,
    TopQGradientOptimizer,
)

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
x = torch.zeros(3, 4, requires_grad=True)
generator = torch.Generator()


# --- parameters, in all the ways of torch ---------------------------------------------------------

ClampedParameterOptimizer(model.parameters(), lr=1.0, clamp_min=-1.0, clamp_max=3.0)
ClampedParameterOptimizer(params=[x], clamp_max=3)
ClampedParameterOptimizer(model.named_parameters(), AdamW, clamp_min=-1.0, weight_decay=0.1)
ClampedParameterOptimizer((p for p in [x]), clamp_min=None, clamp_max=1.0)
L2ProjectedOptim(
    [
        {"params": model[0].parameters(), "epsilon": 1.0},
        {"params": [x], "epsilon": 2.0, "lr": 0.1, "param_ndim": None},
    ],
    SGD,
    momentum=0.9,
)

# --- the inner optimizer: class, partial, instance ------------------------------------------------

SignedGradientOptim([x], Adam, betas=(0.9, 0.99))
SignedGradientOptim([x], partial(Adam, lr=0.1), grad_scale=2.0, grad_bias=0.1)
SignedGradientOptim(None, SGD([x], lr=0.1))
SignedGradientOptim(InnerOpt=SGD([x], lr=0.1), defaults={"mine": 1.0})
SignedGradientOptim([x], "SGD")  # type: ignore[arg-type]
SignedGradientOptim([x], SGD, 2.0)  # type: ignore[call-arg]

# --- all of the named optimizers ------------------------------------------------------------------

ClampedGradientOptimizer([x], clamp_min=-1.0, param_ndim=None, grad_scale=2.0)
L1NormedGradientOptim([x], param_ndim=1, div_by_zero_eps=1e-12)
order: float = L2NormedGradientOptim([x], defaults=None).p
L2ProjectedOptim([x], epsilon=1.0, grad_bias=0.0)
LinfProjectedOptim([x], Adam, epsilon=8 / 255, lr=1e-2)
TopQGradientOptimizer([x], q=0.5, dq=0.1, generator=generator)
L1qNormedGradientOptim([x], q=0.5, dq=0.1, generator=generator, grad_scale=2.0)
FrankWolfe([x], lr=0.5, lmo_scaling_factor=2.0, use_default_lr_schedule=False)
FrankWolfe(model.named_parameters(), lr=torch.tensor(2.0))
Scion([x], constraint=L2Ball(1.0), lr=0.1, coefficients=Scion.POLAR_EXPRESS)
Scion([x], constraint=L2Ball(1.0))  # type: ignore[call-arg]
L1FrankWolfe([x], epsilon=1.0)
L2FrankWolfe(model.parameters(), epsilon=1.0, lr=1.0, param_ndim=None)
LinfFrankWolfe([{"params": [x], "epsilon": 1.0}])
L1qFrankWolfe([x], q=0.5, epsilon=1.0, dq=0.2, generator=generator)

L2ProjectedOptim([x], epsilon="1")  # type: ignore[arg-type]
TopQGradientOptimizer([x], q=0.5, generator=0)  # type: ignore[arg-type]
L1FrankWolfe([x], epsilon=1.0, grad_scale=2.0)  # type: ignore[call-arg]
ClampedParameterOptimizer([x], param_ndim=1.5, clamp_max=1.0)  # type: ignore[arg-type]

# --- chains ---------------------------------------------------------------------------------------

chain = ChainedParamTransformingOptimizer(
    partial(TopQGradientOptimizer, q=0.33),
    SignedGradientOptim,
    partial(ClampedParameterOptimizer, clamp_max=2.8),
    params=[{"params": [x], "0.q": 0.5}],
    InnerOpt=Adam,
    param_ndim=None,
    lr=1.0,
)
chain.param_groups[0]["q"] = 0.1
ChainedParamTransformingOptimizer(
    partial(ChainedParamTransformingOptimizer, SignedGradientOptim), InnerOpt=SGD([x])
)

# --- steps, closures, groups, state ---------------------------------------------------------------


def closure() -> float:
    loss = model(x).square().sum()
    loss.backward()
    return float(loss)


optimizer: Optimizer = L2ProjectedOptim(model.parameters(), epsilon=1.0, lr=0.1)
constrained = L2ProjectedOptim(model.parameters(), epsilon=1.0, lr=0.1)
assert_type(constrained.step(), None)
assert_type(constrained.step(closure), float)
assert_type(FrankWolfe([x]).step(), None)
assert_type(FrankWolfe([x]).step(closure), float)
constrained.zero_grad(set_to_none=False)
constrained.add_param_group({"params": [x], "epsilon": 2.0})
for group in constrained.param_groups:
    group["epsilon"] *= 0.5
assert_type(constrained.inner_opt, Optimizer)
assert_type(constrained.param_groups, list[dict[str, Any]])
assert_type(constrained.defaults, dict[str, Any])
constrained.load_state_dict(constrained.state_dict())
constrained.load_state_dict(state_dict=torch.load("state.pt", weights_only=True))
handle = constrained.register_step_post_hook(lambda opt, args, kwargs: None)
handle.remove()

# --- schedulers and trainers take it for an optimizer ---------------------------------------------

scheduler: LRScheduler = LambdaLR(constrained, lambda epoch: 0.5**epoch)
scheduler = OneCycleLR(chain, max_lr=0.1, total_steps=10)
scaler = torch.amp.GradScaler("cpu")
scaler.scale(model(x).sum()).backward()
scaler.unscale_(constrained)
scaler.step(constrained)


def train(opt: Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()


train(constrained, 3)
train(chain, 3)
train(FrankWolfe([x]), 3)

# --- subclasses -----------------------------------------------------------------------------------


class UnitRows(ParamTransformingOptimizer):
    """Both hooks, in the spelling of the documentation."""

    def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        assert param.grad is not None
        param.grad /= optim_group["grad_scale"]

    def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        param.div_(param.norm(dim=1, keepdim=True))


class Keywords(SignedGradientOptim):
    """A named class, and the other spelling, which the hook's declared signature does not cover."""

    def _pre_step_transform_(  # type: ignore[override]
        self, param: Tensor, **kwargs: Any
    ) -> None:
        super()._pre_step_transform_(param, **kwargs)


class WithSetting(L2ProjectedOptim):
    """A setting of its own, by `defaults`."""

    def __init__(
        self,
        params: Any = None,
        InnerOpt: type[Optimizer] | partial[Any] | Optimizer = SGD,
        *,
        foo: float,
        defaults: Mapping[str, Any] | None = None,
        **kw: Any,
    ) -> None:
        super().__init__(params, InnerOpt, defaults={"foo": foo, **(defaults or {})}, **kw)


UnitRows(model.parameters(), Adam, lr=0.1).step()
Keywords([x]).step()
WithSetting([x], foo=1.0, epsilon=2.0).step()
ChainedParamTransformingOptimizer(UnitRows, partial(WithSetting, foo=2.0, epsilon=1.0), params=[x])

# --- helpers --------------------------------------------------------------------------------------


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, target)


gain = negate(loss_of)
assert_type(gain(model(x), torch.zeros(3, dtype=torch.long)), Tensor)
assert_type(to_batch(x, -1), Tensor)
to_batch(x, param_ndim=None)
to_batch(x, 1.5)  # type: ignore[arg-type]

restore = freeze(model, x, optimizer, constrained.param_groups, model.named_parameters())
restore()
with frozen(model), evaluating(model):
    model(x)


@frozen(model)
@evaluating(model)
def predict(data: Tensor) -> Tensor:
    return torch.argmax(model(data), dim=1)


assert_type(predict(x), Tensor)
evaluating(x)  # type: ignore[arg-type]


def batches() -> Iterator[Tensor]:
    yield x


for batch in batches():
    predict(batch)
