"""
Clipping the critic of a Wasserstein GAN
========================================

Clipping its weights makes the critic of a Wasserstein GAN (Arjovsky, Chintala and
Bottou, 2017) Lipschitz. Clipping the scale of a normalization layer to the same bounds
would nearly disable the layer: ``skip_bias_and_norm=True`` leaves normalization layers
and biases unconstrained.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rai_toolbox.constraints import Box
from rai_toolbox.optim import ProjectedOptimizer, constrain

torch.manual_seed(0)
images = torch.tensor(load_digits().data).float() / 16
critic = nn.Sequential(
    nn.Linear(64, 128), nn.LayerNorm(128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
)
generator = nn.Sequential(
    nn.Linear(16, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid()
)
groups = constrain(critic, {"*": Box(-0.05, 0.05)}, skip_bias_and_norm=True)
for group in groups:
    print(group["constraint"], [name for name, _ in group["params"]])

# %%

of_critic = ProjectedOptimizer(groups, torch.optim.RMSprop, lr=1e-3)
of_generator = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
distances = []
for step in range(2000):
    fake = generator(torch.randn(64, 16))
    if step % 5 < 4:
        real = images[torch.randint(len(images), (64,))]
        of_critic.zero_grad()
        distance = critic(real).mean() - critic(fake.detach()).mean()
        (-distance).backward()
        of_critic.step()
        distances.append(distance.item())
    else:
        of_generator.zero_grad()
        (-critic(fake).mean()).backward()
        of_generator.step()

largest = {name: p.detach().abs().max().item() for name, p in critic.named_parameters()}
for name, value in largest.items():
    print(f"{name}: largest magnitude {value:.4f}")

# %%
# The estimate of the Wasserstein distance over the steps of the critic, and generated
# digits:

figure = plt.figure(figsize=(8, 3), layout="constrained")
left, right = figure.subfigures(1, 2)
left.subplots().plot(distances, linewidth=0.8)
for ax, image in zip(
    right.subplots(3, 6).flat, generator(torch.randn(64, 16)), strict=False
):
    ax.imshow(image.detach().view(8, 8), cmap="gray_r")
    ax.axis("off")
plt.show()
