"""What optimizers tell of themselves is the same on each rank, and that of one process."""

from functools import partial

import pytest
import torch
from engines import Bag, columns, ddp, fsdp, whole
from ranks import on_ranks
from tiers import slow_but
from torch_versions import shards_on_cpu

from rai_toolbox import constraints as sets
from rai_toolbox.optim import FrankWolfe, ProjectedOptimizer

pytestmark = shards_on_cpu

SHAPES = [(6, 4), (5, 3), (5,)]


def alone(module):
    return module


def told(engine):
    module = engine(Bag(SHAPES))
    params = list(module.parameters())
    module(0.2).backward()
    settings = {"constraint": sets.L1Ball(0.7), "param_ndim": None}
    projected = ProjectedOptimizer(params, torch.optim.Adam, **settings)
    by_rows = ProjectedOptimizer(params[:2], constraint=sets.L2Ball(0.7))
    found = [FrankWolfe(params, **settings).gap()]
    for opt in (projected, by_rows):
        words = (opt.violation, opt.kkt_residual, opt.active_fraction, opt.frank_wolfe_gap)
        found += [word() for word in words]
    assert all(type(value) is torch.Tensor for values in found for value in values)
    return found


@pytest.mark.parametrize("engine", slow_but([fsdp, columns, ddp], columns))
def test_diagnosis(engine):
    (expected,) = on_ranks(1, told, alone)
    for found in on_ranks(2, told, engine):
        for got, one in zip(found, expected, strict=True):
            torch.testing.assert_close(got, one)


def searched(engine):
    module = engine(Bag(SHAPES))
    params = list(module.parameters())
    opt = FrankWolfe(params, constraint=sets.L2Ball(0.7), param_ndim=None, line_search=True)

    def closure():
        opt.zero_grad()
        loss = module(0.2)
        loss.backward()
        return loss

    for _ in range(8):
        opt.step(closure)
    return [whole(p) for p in params]


@pytest.mark.parametrize("engine", slow_but([fsdp, columns, ddp], fsdp))
def test_line_search(engine):
    (expected,) = on_ranks(1, searched, alone)
    for values in on_ranks(2, searched, engine):
        assert all(map(partial(torch.allclose, rtol=0, atol=1e-6), values, expected))
