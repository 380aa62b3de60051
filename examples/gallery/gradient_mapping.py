"""
Why Adam needs the gradient mapping
===================================

Minimize a quadratic over an L1 ball in two dimensions. "Take a step of Adam, then
project" stops at a wrong point: Adam scales the gradient elementwise, and the ball
couples the elements. :py:class:`~rai_toolbox.optim.ProjectedOptimizer` gives Adam the
gradient mapping instead, and ends at the solution.
"""

import matplotlib.pyplot as plt
import torch

from rai_toolbox.constraints import L1Ball
from rai_toolbox.optim import ProjectedOptimizer

ball = L1Ball(1.0)
center = torch.tensor([0.9, 0.9])
curvature = torch.tensor([4.0, 1.0])


def loss(x):
    return (curvature * (x - center).square()).sum(-1) / 2


def path(**settings):
    """All points of 300 steps of Adam, and the residual at the last one."""
    x = torch.tensor([-0.5, -0.1], requires_grad=True)
    optim = ProjectedOptimizer(
        [x], torch.optim.Adam, lr=0.05, constraint=ball, param_ndim=None, **settings
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.99)
    points = [x.detach().clone()]
    for _ in range(300):
        optim.zero_grad()
        loss(x).backward()
        (residual,) = optim.kkt_residual()
        optim.step()
        schedule.step()
        points.append(x.detach().clone())
    return torch.stack(points), residual.item()


# %%
# :py:meth:`~rai_toolbox.optim.ProjectedOptimizer.kkt_residual` is 0 exactly at the
# stationary points, so it tells the two runs apart without knowing the solution.

mapped, residual = path()
plain, plain_residual = path(gradient_mapping=False)
print(f"gradient mapping: loss {loss(mapped[-1]):.4f}, residual {residual:.1e}")
print(f"step and project: loss {loss(plain[-1]):.4f}, residual {plain_residual:.1e}")

# %%

axis = torch.linspace(-1.3, 1.5, 200)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
plt.figure(figsize=(5, 5), layout="constrained")
plt.contour(axis, axis, loss(grid), levels=20, colors="lightgray")
plt.fill([1, 0, -1, 0], [0, 1, 0, -1], alpha=0.15, label="L1 ball")
plt.plot(*plain.T, "o-", color="tab:orange", label="Adam, then project")
plt.plot(*mapped.T, ".-", color="tab:blue", label="ProjectedOptimizer")
plt.plot(*mapped[-1], "*", color="black", markersize=14, label="solution")
plt.axis("equal")
plt.legend(loc="lower left")
plt.show()
