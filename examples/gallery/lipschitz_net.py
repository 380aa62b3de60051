"""
A network with a Lipschitz bound, and its certificate
=====================================================

A linear layer multiplies distances by at most its largest singular value, and a ReLU by
at most 1. Two layers with weights in a
:py:class:`~rai_toolbox.constraints.SpectralBall` of radius 2 therefore have a Lipschitz
constant of at most 4, for all inputs.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rai_toolbox.constraints import L2Ball, SpectralBall
from rai_toolbox.optim import ProjectedOptimizer, constrain
from rai_toolbox.perturbations import attack

images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

# %%
# A pattern of ``constrain`` may be a type of module. ``param_ndim=2`` makes a weight
# one matrix.

bounded = {"constraint": SpectralBall(2.0), "param_ndim": 2}
groups = constrain(net, {nn.Linear: bounded}, skip_bias_and_norm=True)
optim = ProjectedOptimizer(groups, torch.optim.Adam, lr=0.01)
for batch in torch.randint(1300, (200, 128)):
    optim.zero_grad()
    nn.functional.cross_entropy(net(images[batch]), digits[batch]).backward()
    optim.step()
norms = [
    torch.linalg.matrix_norm(net[i].weight.detach().double(), 2).item() for i in (0, 2)
]
bound = norms[0] * norms[1]
print(f"singular values {norms[0]:.4f} and {norms[1]:.4f}, Lipschitz bound {bound:.4f}")

# %%
# The difference of two logits changes by at most ``sqrt(2)`` times the bound per unit
# of distance. So no change of an image by less than its margin divided by that can
# change the prediction. The certificate is a lower bound of the robust accuracy, and an
# attack gives an upper bound.

x, y = images[1300:], digits[1300:]
with torch.no_grad():
    logits = net(x)
best, second = logits.topk(2).values.unbind(1)
radius = torch.where(logits.argmax(1) == y, (best - second) / (2**0.5 * bound), 0)
radii = torch.linspace(0.05, 0.6, 6)
certified = [(radius > r).float().mean().item() for r in radii]
attacked = [
    (~attack(net, x, y, ball=L2Ball(r), steps=30).fooled).float().mean() for r in radii
]
for r, lower, upper in zip(radii, certified, attacked, strict=True):
    print(f"radius {r:.2f}: certified {lower:.1%} <= robust accuracy <= {upper:.1%}")

# %%

plt.figure(figsize=(6, 3.5), layout="constrained")
plt.fill_between(
    radii, certified, attacked, alpha=0.2, label="robust accuracy is in here"
)
plt.plot(radii, attacked, ".-", label="under attack")
plt.plot(radii, certified, ".-", label="certified")
plt.xlabel("radius of the L2 ball")
plt.ylim(0, 1)
plt.legend()
plt.show()
