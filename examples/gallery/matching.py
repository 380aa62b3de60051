"""
Matching two shapes by a doubly stochastic matrix
=================================================

Which points of two copies of a shape correspond, if one copy is rotated, reflected,
noisy and in another order? The distances between points do not change much, so match
those: minimize the mismatch of the distance matrices over the
:py:class:`~rai_toolbox.constraints.Birkhoff` polytope, whose corners are the
permutations. The oracle of :py:class:`~rai_toolbox.optim.FrankWolfe` is an assignment
problem.
"""

import matplotlib.pyplot as plt
import torch

from rai_toolbox.constraints import Birkhoff
from rai_toolbox.optim import FrankWolfe

torch.manual_seed(0)
turn = torch.linspace(0, 1, 41)[:-1].double() * 2 * torch.pi
size = (
    1 + 0.3 * torch.cos(2 * turn) + 0.25 * torch.sin(3 * turn) + 0.2 * torch.cos(turn)
)
shape = torch.stack([size * turn.cos(), size * turn.sin()], dim=1)
order = torch.randperm(len(shape))
flip = torch.tensor(
    [[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64
)  # rotates and reflects
other = (shape @ flip)[order] + 0.01 * torch.randn(len(shape), 2).double()
ours, theirs = torch.cdist(shape, shape), torch.cdist(other, other)


def mismatch(p):
    """``|ours P - P theirs|^2 / 2``: convex in P, near 0 for the right permutation."""
    return (ours @ p - p @ theirs).square().sum() / 2


# %%

plan = torch.full((40, 40), 1 / 40, dtype=torch.float64, requires_grad=True)
optim = FrankWolfe([plan], constraint=Birkhoff(), param_ndim=2, line_search=True)


def closure():
    optim.zero_grad()
    loss = mismatch(plan)
    loss.backward()
    return loss


losses = [optim.step(closure).item() for _ in range(200)]
plan = plan.detach()
matched = Birkhoff().lmo(-plan[None])[0].argmax(1)  # the nearest permutation
right = (order[matched] == torch.arange(40)).double().mean().item()
print(f"mismatch {losses[0]:.2f} -> {losses[-1]:.3f}")
print(f"sums of rows and columns: {plan.sum(1).min():.6f} to {plan.sum(0).max():.6f}")
print(f"points matched correctly: {right:.0%}")

# %%

moved = other + torch.tensor([3.2, 0.0]).double()
plt.figure(figsize=(7, 3.5), layout="constrained")
for a, b in zip(shape, moved[matched], strict=True):
    plt.plot(*torch.stack([a, b]).T, color="lightgray", linewidth=0.8)
plt.scatter(*shape.T, c=turn, cmap="hsv")
plt.scatter(*moved[matched].T, c=turn, cmap="hsv")
plt.axis("equal")
plt.axis("off")
plt.show()
