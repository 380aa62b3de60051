"""Sharded training: by FSDP, of both kinds, and what the ranks say to each other meanwhile.

The ranks are threads of this process. That one step of a DTensor is the step of the whole is
tested with the other kinds of parameters.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from engine_cases import WRAPPERS, new_gradients, tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms
from torch.testing._internal.two_tensor import TwoTensor
from torch_versions import shards_on_cpu

from rai_toolbox.constraints import L2Ball
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedOptimizer

RANKS = 2


def on_each_rank(function):
    """What `function(mesh)` returns on each of the ranks."""
    results = {}

    @spawn_threads_and_init_comms(world_size=RANKS)
    def run(_):
        results[dist.get_rank()] = function(init_device_mesh("cpu", (RANKS,)))

    run(None)
    return [results[rank] for rank in range(RANKS)]


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


def trained(name, **settings):
    module = net()
    train(module, WRAPPERS[name](module.parameters(), lr=0.3, **settings))
    return [p.detach() for p in module.parameters()]


@shards_on_cpu
@pytest.mark.parametrize(
    "name", ["ClampedParameter", "LinfProjected", "L2Projected", "L1Normed", "L2FrankWolfe"]
)
@pytest.mark.parametrize("param_ndim", [-1, None])
def test_a_training_by_fully_shard_is_that_of_one_process(name, param_ndim):
    def run(mesh):
        module = net()
        fully_shard(module, mesh=mesh)
        opt = WRAPPERS[name](module.parameters(), lr=0.3, param_ndim=param_ndim)
        assert all(type(p) is DTensor for p in opt.param_groups[0]["params"])
        train(module, opt)
        return [p.detach().full_tensor() for p in module.parameters()]

    expected = trained(name, param_ndim=param_ndim)
    for of_rank in on_each_rank(run):
        torch.testing.assert_close(of_rank, expected)


ELEMENTWISE = [
    "ProjectedBox",
    "ClampedParameter",
    "ClampedGradient",
    "Signed",
    "LinfProjected",
    "LinfFrankWolfe",
]
wrapped = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_training_by_fsdp_of_the_first_kind_is_that_of_one_process(name):
    def run(mesh):
        module = wrapped(net())
        train(module, WRAPPERS[name](module.parameters(), lr=0.3))
        with FullyShardedDataParallel.summon_full_params(module):
            return [p.detach().clone() for p in module.parameters()]

    expected = trained(name)
    for of_rank in on_each_rank(run):
        torch.testing.assert_close(of_rank, expected)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in ELEMENTWISE])
def test_what_needs_rows_is_refused_where_fsdp_has_flattened_them(name):
    # FSDP of the first kind shows 1-D pieces during a step: rows of other things.
    def run(mesh):
        with pytest.raises(ValueError, match="parameter .*0.weight.*FullyShardedDataParallel"):
            WRAPPERS[name](wrapped(net()).named_parameters())

    on_each_rank(run)


@pytest.mark.parametrize("name", sorted(WRAPPERS.keys() - {"Param"}))
def test_where_sub_tensors_are_whole_the_ranks_do_not_talk(name):
    def run(mesh):
        p = nn.Parameter(distribute_tensor(tensors((4, 6))[0].detach(), mesh, [Shard(0)]))
        p.grad = distribute_tensor(tensors((4, 6), seed=1)[0].detach(), mesh, [Shard(0)])
        opt = WRAPPERS[name]([p], lr=0.3, param_ndim=1)
        with CommDebugMode() as talk:
            opt.step()
        return talk.get_total_counts()

    assert on_each_rank(run) == [0, 0]


@shards_on_cpu
@pytest.mark.parametrize("dim", [0, 1])
def test_the_step_of_the_gradient_mapping_in_balls_with_centers_of_their_own(dim):
    radii = torch.tensor([[0.5], [1.0], [2.0], [0.1]])

    def end(shard):
        p, g = (shard(tensors((4, 6), seed=seed)[0].detach() + 9) for seed in (0, 1))
        param = nn.Parameter(p)
        ball = L2Ball(radii, center=9.0)
        opt = ProjectedOptimizer([param], torch.optim.Adam, lr=0.3, constraint=ball)
        for _ in range(3):
            param.grad = g.clone()
            opt.step()
        return param.detach()

    def run(mesh):
        return end(lambda x: distribute_tensor(x, mesh, [Shard(dim)])).full_tensor()

    whole = end(lambda x: x)
    for of_rank in on_each_rank(run):
        torch.testing.assert_close(of_rank, whole)


@shards_on_cpu
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("low", [-0.5, torch.linspace(-0.9, 0.0, 6)])
def test_bounds_that_are_tensors_are_divided_as_the_parameters_are(low, dim):
    def end(shard):
        param = nn.Parameter(shard(tensors((4, 6))[0].detach()))
        high = torch.linspace(0.1, 0.4, 4).unsqueeze(1)
        opt = ClampedParameterOptimizer([param], lr=0.3, clamp_min=low, clamp_max=high)
        for seed in range(3):
            param.grad = shard(tensors((4, 6), seed=seed)[0].detach())
            opt.step()
        return param.detach()

    def run(mesh):
        return end(lambda x: distribute_tensor(x, mesh, [Shard(dim)])).full_tensor()

    whole = end(lambda x: x)
    for of_rank in on_each_rank(run):
        torch.testing.assert_close(of_rank, whole)


def test_the_measure_of_talk_sees_it():
    def run(mesh):
        x = distribute_tensor(tensors((4, 6))[0].detach(), mesh, [Shard(0)])
        with CommDebugMode() as talk:
            x.full_tensor()
        return talk.get_total_counts()

    assert on_each_rank(run) == [1, 1]


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_tensor_without_storage_of_its_own_beside_a_plain_one(make):
    # As sharded, quantized and nested ones are. Foreach operators refuse lists of both kinds.
    plain, alone = tensors((3, 4))[0], tensors((3, 4))[0]
    pair = nn.Parameter(TwoTensor(plain.detach().clone(), plain.detach().clone()))
    opt, reference = make([pair, plain], lr=0.3), make([alone], lr=0.3)
    for k in range(2):
        new_gradients([plain], k)
        alone.grad = plain.grad.clone()
        pair.grad = TwoTensor(plain.grad.clone(), plain.grad.clone())
        opt.step()
        reference.step()
    for got in (pair.a, pair.b, plain):
        torch.testing.assert_close(got, alone)
