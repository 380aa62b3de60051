"""Sharded parameters: a step of two ranks is the step of one process.

The ranks are threads of this process, over the process group that torch's own tests use.
"""

import threading
from functools import partial

import pytest
import torch
import torch.distributed as dist
from engine_cases import WRAPPERS, new_gradients, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed import multi_threaded_pg

RANKS = 2


def on_each_rank(function):
    """Run `function(mesh)` on each rank; what it returned, or raise what one of them raised."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg.ProcessLocalGroup.reset()
    multi_threaded_pg._install_threaded_pg()
    store, results, errors = dist.HashStore(), {}, []

    def run(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
            results[rank] = function(init_device_mesh("cpu", (RANKS,)))
        except BaseException as error:
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # ends the other, too
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    multi_threaded_pg._uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    for error in sorted(errors, key=lambda error: isinstance(error, SystemExit)):
        raise error
    return [results[rank] for rank in range(RANKS)]


SHAPES = (5, 6), (4, 4)  # one of them is sharded unevenly
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
PICKING = {
    "TopQ",
    "L1qNormed",
    "Chained",
    "L1FrankWolfe",
    "L1qFrankWolfe",
}  # entries of sub-tensors


def whole(make):
    params = tensors(*SHAPES)
    opt = make(list(zip("ab", params, strict=True)))
    for k in range(2):
        new_gradients(params, k)
        opt.step()
    return [p.detach() for p in params]


def sharded(make, placement):
    def run(mesh):
        def split(x):
            return distribute_tensor(x, mesh, [placement])

        full = [nn.Parameter(x.detach()) for x in tensors(*SHAPES)]
        params = [nn.Parameter(split(p.detach())) for p in full]
        opt = make(list(zip("ab", params, strict=True)))
        for k in range(2):
            new_gradients(full, k)
            for p, q in zip(params, full, strict=True):
                p.grad = split(q.grad)
            opt.step()
            assert all(type(p.grad) is DTensor for p in params)
        return [p.detach().full_tensor() for p in params]

    return on_each_rank(run)


@pytest.mark.parametrize("param_ndim", [-1, None, 0])
@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - PICKING))
def test_a_sharded_step_is_the_step_of_the_whole(name, where, param_ndim):
    make = partial(WRAPPERS[name], lr=0.3, param_ndim=param_ndim)
    for of_rank in sharded(make, PLACEMENTS[where]):
        torch.testing.assert_close(of_rank, whole(make))


@pytest.mark.parametrize("where", ["rows", "replicated"])
@pytest.mark.parametrize("name", sorted(PICKING))
def test_entries_are_picked_where_whole_sub_tensors_are(name, where):
    make = partial(WRAPPERS[name], lr=0.3, param_ndim=1)
    for of_rank in sharded(make, PLACEMENTS[where]):
        torch.testing.assert_close(of_rank, whole(make))


@pytest.mark.parametrize(("where", "param_ndim"), [("rows", None), ("columns", 1), ("columns", 0)])
@pytest.mark.parametrize("name", sorted(PICKING))
def test_entries_of_divided_sub_tensors_are_picked_or_refused(name, where, param_ndim):
    make = partial(WRAPPERS[name], lr=0.3, param_ndim=param_ndim)
    try:
        results = sharded(make, PLACEMENTS[where])
    except ValueError as error:
        assert "parameter 'a'" in str(error)
    else:
        for of_rank in results:
            torch.testing.assert_close(of_rank, whole(make))


@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - {"Param"}))
def test_where_sub_tensors_are_whole_the_ranks_do_not_talk(name):
    def run(mesh):
        x, gradient = (
            distribute_tensor(y.detach(), mesh, [Shard(0)]) for y in tensors((4, 6), (4, 6))
        )
        p = nn.Parameter(x)
        p.grad = gradient
        opt = WRAPPERS[name]([p], lr=0.3, param_ndim=1)
        with CommDebugMode() as talk:
            opt.step()
        return talk.get_total_counts()

    assert on_each_rank(run) == [0, 0]


def test_the_measure_of_talk_sees_it():
    def run(mesh):
        x = distribute_tensor(tensors((4, 6))[0].detach(), mesh, [Shard(0)])
        with CommDebugMode() as talk:
            x.full_tensor()
        return talk.get_total_counts()

    assert on_each_rank(run) == [1, 1]


# --- FSDP --------------------------------------------------------------------------------------


def net():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for p, value in zip(module.parameters(), tensors((4, 3), 4, (2, 4), 2), strict=True):
            p.copy_(value)
    return module


def train(module, opt):
    (data,) = tensors((8, 3), seed=5)
    for _ in range(3):
        module(data.detach()).square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize(
    "name", ["ClampedParameter", "LinfProjected", "L2Projected", "L2FrankWolfe"]
)
def test_a_training_by_fully_shard_is_that_of_one_process(name):
    make = partial(WRAPPERS[name], lr=0.3, param_ndim=None)

    def run(mesh):
        module = net()
        fully_shard(module, mesh=mesh)
        opt = make(module.parameters())
        assert all(type(p) is DTensor for p in opt.param_groups[0]["params"])
        train(module, opt)
        return [p.detach().full_tensor() for p in module.parameters()]

    module = net()
    train(module, make(module.parameters()))
    for of_rank in on_each_rank(run):
        torch.testing.assert_close(of_rank, [p.detach() for p in module.parameters()])


@pytest.mark.parametrize("name", WRAPPERS)
def test_flattened_shards_are_for_elementwise_transforms_only(name):
    # FSDP of the first kind shows 1-D pieces during a step, whose rows nobody knows.
    elementwise = {
        "ClampedParameter",
        "ClampedGradient",
        "Signed",
        "LinfProjected",
        "LinfFrankWolfe",
    }

    def run(mesh):
        module = FullyShardedDataParallel(
            net(), use_orig_params=True, device_id=torch.device("cpu")
        )
        if name in elementwise:
            train(module, WRAPPERS[name](module.named_parameters(), lr=0.3))
            with FullyShardedDataParallel.summon_full_params(module):
                return [p.detach().clone() for p in module.parameters()]
        with pytest.raises(ValueError, match="parameter .*0.weight.*FullyShardedDataParallel"):
            WRAPPERS[name](module.named_parameters())
        return None

    results = on_each_rank(run)
    if name in elementwise:
        module = net()
        train(module, WRAPPERS[name](module.parameters(), lr=0.3))
        for of_rank in results:
            torch.testing.assert_close(of_rank, [p.detach() for p in module.parameters()])
