"""
A sparse autoencoder with a dictionary of unit vectors
======================================================

A sparse autoencoder could decrease its codes, and the penalty on them, by increasing
the weights of the decoder. So each column of the decoder, one atom of the dictionary,
has norm 1: :py:class:`~rai_toolbox.constraints.UnitNorm`.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rai_toolbox.constraints import UnitNorm
from rai_toolbox.optim import ProjectedOptimizer, constrain

torch.manual_seed(0)
images = (
    torch.tensor(load_digits().data).float() / 16
)  # 1797 images of 8 x 8 pixels in [0, 1]
model = nn.ModuleDict({"encoder": nn.Linear(64, 128), "decoder": nn.Linear(128, 64)})

# %%
# :py:func:`~rai_toolbox.optim.constrain` finds the parameter by its name and leaves the
# others unconstrained. ``dim=0`` selects columns.

groups = constrain(model, {"decoder.weight": UnitNorm(dim=0)})
optim = ProjectedOptimizer(groups, torch.optim.Adam, lr=0.01)
optim.make_feasible_()
errors, violations = [], []
for _ in range(20):
    for batch in images[torch.randperm(len(images))].split(128):
        code = model["encoder"](batch).relu()
        error = (model["decoder"](code) - batch).square().sum(1).mean()
        optim.zero_grad()
        (error + 0.1 * code.abs().sum(1).mean()).backward()
        optim.step()
        errors.append(error.item())
        violations.append(optim.violation()[0].item())

norms = model["decoder"].weight.detach().norm(dim=0)
print(f"squared error per image: {errors[0]:.2f} -> {sum(errors[-15:]) / 15:.2f}")
print(f"norms of the atoms: {norms.min():.6f} to {norms.max():.6f}")
print(f"largest violation in {len(violations)} steps: {max(violations)}")

# %%
# The atoms that are used most:

used = model["encoder"](images).relu().mean(0).argsort(descending=True)[:32]
figure, axes = plt.subplots(4, 8, figsize=(8, 4), layout="constrained")
for ax, atom in zip(axes.flat, used, strict=True):
    ax.imshow(
        model["decoder"].weight[:, atom].detach().view(8, 8),
        cmap="RdBu",
        vmin=-0.6,
        vmax=0.6,
    )
    ax.axis("off")
plt.show()
