"""No step waits for a device: on tensors of the device "meta" there are no values to wait for.

Off the CPU the code cannot tell one device from another. `Intersection` reads a number in each
turn, to find out when it is done, and line searches read the losses: neither is here.
"""

from functools import partial

import pytest
import torch
from constraints.cases import CASES
from engine_cases import FRANK_WOLFE, WITH_INNER
from torch.optim import SGD, AdamW

from rai_toolbox import optim
from rai_toolbox.constraints import Birkhoff, BoundedBall, L1Ball, L2Ball, LinfBall, SpectralBall
from rai_toolbox.optim import APGD, PGD, ExponentiatedGradient, FrankWolfe, Scion


def has_tensors(plain):
    if isinstance(plain, dict):
        return any(map(has_tensors, plain.values()))
    return isinstance(plain, torch.Tensor)


ITERATE = {"Intersection", "Birkhoff", "Transport"}  # until they converge, as documented
SETS = {
    str(case): case
    for case in CASES
    if case.kind not in ITERATE and not has_tensors(case.constraint().to_plain())
}


def two_steps(make, shape=(6, 5)):
    param = torch.empty(shape, device="meta", requires_grad=True)
    optimizer = make([param])
    for _ in range(2):
        param.grad = torch.empty_like(param)
        if isinstance(optimizer, APGD):
            optimizer.observe_(torch.empty(shape[0], device="meta"))
        optimizer.step()
    return param


def test_a_read_is_an_error():
    class Reading(optim.ParamTransformingOptimizer):
        def _post_step_transform_(self, param, optim_group):
            param.clamp_(max=param.mean().item())

    with pytest.raises(RuntimeError, match="meta"):
        two_steps(partial(Reading, lr=0.1))


@pytest.mark.parametrize("inner", [SGD, AdamW])
@pytest.mark.parametrize("name", WITH_INNER)
def test_wrappers(name, inner):
    two_steps(partial(WITH_INNER[name], InnerOpt=inner, lr=0.1))


@pytest.mark.parametrize("name", FRANK_WOLFE)
def test_frank_wolfe(name):
    two_steps(FRANK_WOLFE[name])


@pytest.mark.parametrize("name", SETS)
def test_sets(name):
    SETS[name].constraint().project_(torch.empty(SETS[name].shape, device="meta"))


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.1), L1Ball(0.1)], ids=repr)
@pytest.mark.parametrize("solver", [partial(PGD, lr=0.1), partial(APGD, steps=10), FrankWolfe])
def test_solvers(solver, ball):
    two_steps(partial(solver, constraint=BoundedBall(ball, -0.5, 0.5)))


def test_exponentiated_gradient():
    two_steps(partial(ExponentiatedGradient, lr=0.1))
    two_steps(partial(ExponentiatedGradient, lr=0.1, constraint=Birkhoff(), param_ndim=2), (3, 3))


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": True}, {"unconstrained": True, "weight_decay": 0.1}], ids=str
)
def test_scion(settings):
    two_steps(partial(Scion, constraint=SpectralBall(1.0), lr=0.1, **settings), (4, 3))
