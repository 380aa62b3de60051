"""
Non-negative matrix factorization
=================================

Parts that compose all digits: non-negative W and H of rank 4 that minimize ``|X - W
H|^2 / 2``. The problem is not convex, so five starting points are solved as one batch,
and scikit-learn starts from the same ones.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF

from rai_toolbox.constraints import NonNegative
from rai_toolbox.optim import ProjectedOptimizer

images = torch.tensor(load_digits().data).float() / 16
random = torch.Generator().manual_seed(0)
size = (images.mean() / 4).sqrt()
W = (size * torch.randn(5, 1797, 4, generator=random).abs()).requires_grad_()
H = (size * torch.randn(5, 4, 64, generator=random).abs()).requires_grad_()
starts = [
    (w.double().numpy(), h.double().numpy())
    for w, h in zip(W.detach(), H.detach(), strict=True)
]

optim = ProjectedOptimizer(
    [W, H], torch.optim.Adam, lr=0.1, betas=(0.9, 0.99), constraint=NonNegative()
)
schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.03 ** (1 / 500))
for _ in range(500):
    optim.zero_grad()
    objectives = (images - W @ H).square().sum((1, 2)) / 2
    objectives.sum().backward()
    optim.step()
    schedule.step()

# %%
# Each start converges to one of two local minima, in both packages, though not always
# to the same one. The best of five agree.

theirs = []
for w, h in starts:
    peer = NMF(4, init="custom", tol=1e-8, max_iter=20_000)
    peer.fit_transform(images.double().numpy(), W=w.copy(), H=h.copy())
    theirs.append(peer.reconstruction_err_**2 / 2)
print("rai_toolbox: ", [round(v, 1) for v in objectives.tolist()])
print("scikit-learn:", [round(float(v), 1) for v in theirs])
print("smallest entries:", W.min().item(), H.min().item())

# %%

figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), layout="constrained")
for ax, part in zip(axes, H[objectives.argmin()].detach(), strict=True):
    ax.imshow(part.view(8, 8), cmap="gray_r")
    ax.axis("off")
plt.show()
