"""PyTorch Lightning: a constrained optimizer comes out of `configure_optimizers`.

python examples/with_lightning.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.constraints import MaxNorm
from rai_toolbox.optim import ProjectedOptimizer, constrain


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        data, target = batch
        return nn.functional.cross_entropy(self.net(data), target)

    def configure_optimizers(self) -> tuple[list, list]:
        groups = constrain(self, {"net.*": MaxNorm(1.0)}, skip_bias_and_norm=True)
        optim = ProjectedOptimizer(groups, torch.optim.Adam, lr=0.02)
        return [optim], [torch.optim.lr_scheduler.CosineAnnealingLR(optim, 3)]


if __name__ == "__main__":
    torch.manual_seed(0)
    data = torch.randn(256, 4)
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), batch_size=16))
    norms = [
        layer.weight.detach().norm(dim=1).max().item() for layer in (model.net[0], model.net[2])
    ]
    assert max(norms) <= 1.0, norms
    print(f"largest norms of rows: {norms}")
