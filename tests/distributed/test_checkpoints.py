"""Checkpoints of sharded training: saved on 2 ranks, gone on with on 1, 2 and 4."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from engines import Bag, fsdp, train, whole
from ranks import on_ranks, outcomes
from tiers import slow_but
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch_versions import shards_on_cpu

from rai_toolbox import constraints as sets
from rai_toolbox.optim import FrankWolfe, ProjectedOptimizer, TopQGradientOptimizer

pytestmark = shards_on_cpu

SHAPES = [(6, 4), (5, 3), (5,)]
SAVED, END = 4, 8

OPTIMIZERS = {
    "projected": lambda params, seed: ProjectedOptimizer(
        params,
        torch.optim.Adam,
        lr=0.05,
        constraint=sets.L2Ball(torch.tensor(0.7)),
        param_ndim=None,
        every=3,  # counted, so that a resumed run must know where it was
    ),
    "drawing": lambda params, seed: TopQGradientOptimizer(
        params,
        torch.optim.Adam,
        lr=0.05,
        q=0.5,
        dq=0.5,
        param_ndim=None,
        generator=torch.Generator().manual_seed(seed),
    ),
    "frank_wolfe": lambda params, seed: FrankWolfe(
        params, constraint=sets.L1Ball(0.7), param_ndim=None, momentum=0.5
    ),
}
FORMS = {
    "plain": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def made(name, seed):
    module = fsdp(Bag(SHAPES))
    return module, OPTIMIZERS[name](list(module.parameters()), seed)


def states(module, opt, options):
    return {
        "module": get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, opt, options=options),
    }


def uninterrupted(name):
    module, opt = made(name, seed=1)
    train(module, opt, 0, END)
    return [whole(p) for p in module.parameters()]


def save(name, options, path):
    module, opt = made(name, seed=1)
    train(module, opt, 0, SAVED)
    dcp.save(states(module, opt, options), checkpoint_id=path)


def resumed(name, options, path):
    module, opt = made(name, seed=2)
    into = states(module, opt, options)
    dcp.load(into, checkpoint_id=path)
    set_model_state_dict(module, into["module"])
    set_optimizer_state_dict(module, opt, into["optimizer"], options=options)
    train(module, opt, SAVED, END)
    return [whole(p) for p in module.parameters()]


@pytest.mark.parametrize("ranks", slow_but([(1, 2), (4,)], single=True))
@pytest.mark.parametrize("form", slow_but(FORMS, "plain"))
@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, "drawing"))
def test_saved_on_2_ranks_and_gone_on_with_on_any_number(name, form, ranks, tmp_path):
    (expected,) = on_ranks(1, uninterrupted, name)
    on_ranks(2, save, name, FORMS[form], tmp_path)
    for k in ranks:
        for values in on_ranks(k, resumed, name, FORMS[form], tmp_path):
            for got, one in zip(values, expected, strict=True):
                torch.testing.assert_close(got, one, rtol=0, atol=1e-6)


# --- a write that is killed ---------------------------------------------------------------------


class Killed(dcp.FileSystemWriter):
    """Dies with a part of its files written."""

    def write_data(self, plan, planner):
        super().write_data(plan, planner)
        os._exit(9)


def killed_while_saving(name, path):
    module, opt = made(name, seed=1)
    train(module, opt, 0, SAVED)
    dcp.save(states(module, opt, FORMS["plain"]), checkpoint_id=Path(path, "first"))
    train(module, opt, SAVED, SAVED + 2)
    writer = Killed if torch.distributed.get_rank() == 1 else dcp.FileSystemWriter
    where = Path(path, "second")
    dcp.save(states(module, opt, FORMS["plain"]), storage_writer=writer(where))


def last_complete(path):
    """As the docs have it: the metadata is written last, when all ranks have written theirs."""
    return max(
        (at.parent for at in Path(path).glob("*/.metadata")), key=lambda at: at.stat().st_mtime
    )


@pytest.mark.slow
def test_a_killed_write_leaves_the_last_checkpoint_as_it_was(tmp_path):
    name = "projected"
    found = outcomes(2, killed_while_saving, name, tmp_path, timeout=40.0)
    assert [o.exit_code for o in found] == [1, 9]  # the other one ends on its own, with an error
    assert any((tmp_path / "second").iterdir())  # it had begun
    assert last_complete(tmp_path) == tmp_path / "first"
    (expected,) = on_ranks(1, uninterrupted, name)
    for values in on_ranks(2, resumed, name, FORMS["plain"], last_complete(tmp_path)):
        assert all(map(partial(torch.allclose, rtol=0, atol=1e-6), values, expected))


# --- a rank that fails in a step ----------------------------------------------------------------


def die():
    os._exit(7)


def fail():
    raise ArithmeticError("on purpose")


def failing_in_a_step(how, name, path):
    module, opt = made(name, seed=1)
    train(module, opt, 0, SAVED)
    dcp.save(states(module, opt, FORMS["plain"]), checkpoint_id=Path(path, "first"))
    train(module, opt, SAVED, SAVED + 1)
    if torch.distributed.get_rank() == 1:  # when its parameters have moved, but not been projected
        opt.inner_opt.register_step_post_hook(lambda *_: how())
    train(module, opt, SAVED + 1, END)


@pytest.mark.slow
@pytest.mark.parametrize("how", [die, fail])
def test_a_rank_that_fails_in_a_step_ends_the_others_and_training_goes_on(how, tmp_path):
    name = "projected"
    first, second = outcomes(2, failing_in_a_step, how, name, tmp_path, timeout=40.0)
    assert first.error is not None and first.exit_code == 1  # on its own: nobody killed it
    assert "on purpose" in second.error if how is fail else second.exit_code == 7
    (expected,) = on_ranks(1, uninterrupted, name)
    for k in (2, 4):
        for values in on_ranks(k, resumed, name, FORMS["plain"], last_complete(tmp_path)):
            assert all(map(partial(torch.allclose, rtol=0, atol=1e-6), values, expected))
