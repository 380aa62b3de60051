"""Small modules under each of torch's distributed engines, and the same in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

STEPS, FEW_STEPS = 20, 3


class Bag(nn.Module):
    """Parameters of given shapes. Its loss pulls each element to a number, for itself."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.held = nn.ParameterList(
            nn.Parameter(0.4 * torch.randn(tuple(shape), generator=generator)) for shape in shapes
        )

    def forward(self, towards: float) -> Tensor:
        return sum(((p - towards) ** 2).sum() for p in self.held)


def divided_(module: nn.Module, mesh: DeviceMesh, dim: int) -> nn.Module:
    """Each parameter as tensor parallelism has it; a vector by its only dim."""
    for holder in module.modules():
        for name, p in list(holder.named_parameters(recurse=False)):
            shard = Shard(min(dim, p.ndim - 1))
            held = distribute_tensor(p.detach(), mesh, [shard], src_data_rank=None)
            holder.register_parameter(name, nn.Parameter(held))
            # as torch makes a gradient whole where there are more ranks than columns
            holder.get_parameter(name).register_hook(
                lambda grad, shard=shard: grad.redistribute(placements=[shard])
            )
    return module


def fsdp(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (world(),)))


def ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def columns(module: nn.Module) -> nn.Module:
    return divided_(module, init_device_mesh("cpu", (world(),)), 1)


def rows(module: nn.Module) -> nn.Module:
    return divided_(module, init_device_mesh("cpu", (world(),)), 0)


def both(dim: int, module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(divided_(module, mesh["tp"], dim), mesh=mesh["dp"])


def world() -> int:
    return torch.distributed.get_world_size()


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def trained(
    module: nn.Module,
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    first: int = 0,
    last: int = STEPS,
) -> torch.optim.Optimizer:
    opt = make(list(module.parameters()))
    train(module, opt, first, last)
    return opt


def train(module: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    for k in range(first, last):
        opt.zero_grad()
        module((-1.0) ** k * 0.75 + 0.25).backward()
        opt.step()
