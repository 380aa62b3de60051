"""Hugging Face Accelerate: `prepare` takes a constrained optimizer like any other.

accelerate launch --cpu examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.constraints import MaxNorm
from rai_toolbox.optim import ProjectedOptimizer, constrain

if __name__ == "__main__":
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = torch.randn(256, 4)
    loader = DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), batch_size=16)
    model: nn.Module = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    groups = constrain(model, {"*": MaxNorm(1.0)}, skip_bias_and_norm=True)
    optim = ProjectedOptimizer(groups, torch.optim.Adam, lr=0.02)
    model, optim, loader = accelerator.prepare(model, optim, loader)
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optim.step()
                optim.zero_grad()
    net = accelerator.unwrap_model(model)
    norms = [layer.weight.detach().norm(dim=1).max().item() for layer in (net[0], net[2])]
    assert max(norms) <= 1.0, norms
    accelerator.print(f"largest norms of rows: {norms}")
