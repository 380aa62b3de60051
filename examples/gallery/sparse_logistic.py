"""
Sparse logistic regression
==========================

The lasso in its original form (Tibshirani, 1996): minimize the loss over the weights in
an :py:class:`~rai_toolbox.constraints.L1Ball`. scikit-learn solves the penalized form.
If the radius is the L1 norm of its solution, both problems have the same solution. The
intercept is unconstrained.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import scale
from torch.nn.functional import binary_cross_entropy_with_logits

from rai_toolbox.constraints import L1Ball
from rai_toolbox.optim import ProjectedOptimizer

features, healthy = load_breast_cancer(return_X_y=True)
inputs, target = torch.tensor(scale(features)), torch.tensor(healthy).double()
peer = LogisticRegression(l1_ratio=1, C=0.1, solver="saga", tol=1e-10, max_iter=100_000)
peer.fit(inputs.numpy(), healthy)
expected, offset = torch.tensor(peer.coef_[0]), torch.tensor(peer.intercept_[0])


def loss(weight, bias):
    return binary_cross_entropy_with_logits(inputs @ weight + bias, target)


# %%
# Parameter groups are plain dicts; each has a constraint, or None.

weight = torch.zeros(30, dtype=torch.float64, requires_grad=True)
bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
optim = ProjectedOptimizer(
    [
        {"params": weight, "constraint": L1Ball(float(expected.abs().sum()))},
        {"params": bias, "constraint": None},
    ],
    torch.optim.SGD,
    param_ndim=None,
    lr=0.3,
    momentum=0.95,
    nesterov=True,
)
losses = []
for _ in range(1500):
    optim.zero_grad()
    value = loss(weight, bias)
    value.backward()
    optim.step()
    losses.append(value.item())
print(f"loss {loss(weight, bias):.6f}, scikit-learn {loss(expected, offset):.6f}")
print("nonzero:                ", weight.nonzero().flatten().tolist())
print("nonzero in scikit-learn:", expected.nonzero().flatten().tolist())

# %%

plt.figure(figsize=(7, 3), layout="constrained")
plt.stem(weight.detach(), basefmt="lightgray", label="constrained")
plt.plot(expected, "x", color="tab:red", label="scikit-learn, penalized")
plt.xlabel("feature")
plt.ylabel("weight")
plt.legend()
plt.show()
