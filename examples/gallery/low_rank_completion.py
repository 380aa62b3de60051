"""
Completing a low-rank matrix
============================

Recover a matrix of rank 3 from a third of its entries: minimize the squared error on
them over a :py:class:`~rai_toolbox.constraints.NuclearBall`.
:py:class:`~rai_toolbox.optim.FrankWolfe` needs no projection, only one leading pair of
singular vectors per step, and reports how far it can be from the minimum.
"""

import matplotlib.pyplot as plt
import torch

from rai_toolbox.constraints import NuclearBall
from rai_toolbox.optim import FrankWolfe

torch.manual_seed(0)
truth = torch.randn(60, 3) @ torch.randn(3, 40)
known = torch.rand(60, 40) < 0.35
radius = torch.linalg.matrix_norm(truth, "nuc").item()

x = torch.zeros(60, 40, requires_grad=True)
optim = FrankWolfe([x], constraint=NuclearBall(radius), param_ndim=2, smoothness=1.0)
losses, gaps = [], []
for _ in range(400):
    optim.zero_grad()
    loss = (x - truth)[known].square().sum() / 2
    loss.backward()
    losses.append(loss.item())
    gaps.append(sum(optim.gap()).item())
    optim.step()

# %%
# The gap is an upper bound of ``loss - minimum`` for a convex loss: a reason to stop
# that needs no reference.

x = x.detach()
error = ((x - truth)[~known].norm() / truth[~known].norm()).item()
nuclear = torch.linalg.matrix_norm(x.double(), "nuc").item()
print(f"loss {losses[0]:.1f} -> {losses[-1]:.2f}, gap {gaps[-1]:.2f}")
print(f"relative error on the unknown entries: {error:.1%}")
print(f"nuclear norm {nuclear:.3f} <= {radius:.3f}")

# %%

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
limits = {"cmap": "RdBu", "vmin": -4, "vmax": 4}
left.imshow(torch.where(known, truth, torch.nan).T, **limits)
left.set_title("known entries")
middle.imshow(x.T, **limits)
middle.set_title("completed")
right.semilogy(losses, label="loss")
right.semilogy(gaps, label="gap")
right.legend()
plt.show()
