"""`compiled` with the optimizers that need no inner one, and with step rules of attacks."""

from functools import partial

import pytest
import torch
import torch._dynamo
from tiers import slow_but
from torch_versions import compiles

from rai_toolbox.constraints import BoundedBall, L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import APGD, PGD, ExponentiatedGradient, FrankWolfe, compiled

pytestmark = compiles

BALLS = [LinfBall(0.1), L2Ball(0.5), L1Ball(1.0)]


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def both_ways(make, steps=4):
    """The parameter after some steps, compiled and eager; the graphs after each step."""
    ends, graphs = [], []
    for backend in ("aot_eager", None):
        generator = torch.Generator().manual_seed(0)
        param = torch.rand(6, 5, generator=generator).requires_grad_()
        optimizer = make([param])
        step = optimizer.step if backend is None else compiled(optimizer, backend=backend)
        for _ in range(steps):
            param.grad = torch.randn(6, 5, generator=generator)
            if isinstance(optimizer, APGD):
                optimizer.observe_(torch.rand(6, generator=generator))
            step()
            graphs.append(getattr(step, "graphs", None))
        ends.append(param.detach())
    return *ends, graphs[:steps]


@pytest.mark.parametrize(
    ("make", "most"),
    slow_but([(partial(PGD, constraint=ball, lr=0.1), 2) for ball in BALLS])
    + slow_but([(partial(FrankWolfe, constraint=ball), 1) for ball in BALLS])
    + [(partial(PGD, constraint=BoundedBall(BALLS[0], -0.5, 0.5), lr=0.1), 2)]
    + [(partial(ExponentiatedGradient, lr=0.1), 1)],
    ids=lambda value: None if isinstance(value, int) else repr(value)[18:80],
)
def test_they_are_compiled_once_and_do_the_same(make, most):
    found, eager, graphs = both_ways(make)
    assert graphs == [0] + [most] * 3
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-6)


def test_adaptive_steps_stay_eager_with_one_warning():
    make = partial(APGD, constraint=BoundedBall(L2Ball(0.5), -0.5, 0.5), steps=10)
    with pytest.warns(UserWarning, match="step of APGD cannot be compiled") as found:
        ours, eager, _ = both_ways(make)
    assert sum(w.category is UserWarning for w in found) == 1
    assert torch.equal(ours, eager)
