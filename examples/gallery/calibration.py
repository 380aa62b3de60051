"""
A monotone calibration curve
============================

From a score to a probability that never decreases: one height for each score, with the
heights in the set :py:class:`~rai_toolbox.constraints.Monotone`. With a squared loss
this is isotonic regression, for which scikit-learn has a special algorithm. Here the
loss could be any other.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.isotonic import IsotonicRegression

from rai_toolbox.constraints import Monotone
from rai_toolbox.optim import ProjectedOptimizer

features, healthy = load_breast_cancer(return_X_y=True)
scores, place = torch.tensor(-features[:, 1]).unique(
    return_inverse=True
)  # minus the texture
target = torch.tensor(healthy).double()

heights = torch.full((len(scores),), 0.5, dtype=torch.float64, requires_grad=True)
optim = ProjectedOptimizer(
    [heights], torch.optim.Adam, lr=0.1, constraint=Monotone(), param_ndim=None
)
schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 1e-2 ** (1 / 400))
for _ in range(400):
    optim.zero_grad()
    (heights[place] - target).square().mean().backward()
    optim.step()
    schedule.step()

isotonic = torch.tensor(IsotonicRegression().fit_transform(scores[place], target))
difference = (heights[place] - isotonic).abs().max().item()
print(f"largest difference from scikit-learn: {difference:.1e}")
print("violation:", optim.violation()[0].item())

# %%

plt.figure(figsize=(6, 3.5), layout="constrained")
plt.plot(
    -features[:, 1],
    target + 0.04 * torch.randn(len(target)),
    ".",
    alpha=0.3,
    label="data",
)
plt.step(scores, heights.detach(), where="mid", color="black", label="P(healthy)")
plt.xlabel("minus the texture")
plt.legend()
plt.show()
