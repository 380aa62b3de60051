"""Constrained training of a sharded model, with checkpoints: on CPUs by gloo, or on GPUs as is.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rai_toolbox.constraints import MaxNorm, NonNegative
from rai_toolbox.optim import ProjectedOptimizer, constrain


def main(folder: str | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()  # nccl or gloo, whichever the device takes
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)  # the same parameters on each rank
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 2)).to(device)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=init_device_mesh(device, (dist.get_world_size(),)))

    groups = constrain(model, {"0.weight": MaxNorm(0.5), "2.weight": NonNegative()})
    optim = ProjectedOptimizer(groups, torch.optim.Adam, lr=0.02)
    torch.manual_seed(1 + rank)  # other data on each rank
    losses = []
    for _ in range(60):
        data = torch.randn(64, 16, device=device)
        loss = nn.functional.cross_entropy(model(data), (data[:, 0] > 0).long())
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.detach())

    violations = [float(v) for v in optim.violation()]  # of all shards, on each rank
    assert violations == [0.0] * len(groups), violations
    assert losses[-1] < 0.7 * losses[0]
    if folder is not None:
        where = Path(folder)
    else:
        shared = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(shared)
        where = Path(str(shared[0]))
    states = dict(zip(("model", "optim"), get_state_dict(model, optim), strict=True))
    dcp.save(states, checkpoint_id=where / "last")
    dcp.load(states, checkpoint_id=where / "last")
    set_state_dict(model, optim, model_state_dict=states["model"], optim_state_dict=states["optim"])
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, violations {violations}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2] or [None])
