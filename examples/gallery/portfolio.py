"""
A portfolio with a budget
=========================

Minimize the variance of a portfolio minus its expected return, with weights that sum to
1 and at most 20 % in each asset: a :py:class:`~rai_toolbox.constraints.BoxSection`.
:py:class:`~rai_toolbox.optim.ProjectedLBFGS` solves it to many digits; SLSQP of scipy
finds the same portfolios.
"""

import matplotlib.pyplot as plt
import torch
from scipy.optimize import minimize

from rai_toolbox.constraints import BoxSection
from rai_toolbox.optim import ProjectedLBFGS

torch.manual_seed(0)
factors = torch.randn(20, 4, dtype=torch.float64) * 0.1
covariance = factors @ factors.T + torch.diag(torch.linspace(0.01, 0.06, 20).double())
returns = torch.linspace(0.02, 0.12, 20).double() + 0.02 * torch.randn(20).double()
budget = BoxSection(weight=1.0, total=1.0, lower=0.0, upper=0.2)


def objective(w, appetite):
    return w @ covariance @ w / 2 - appetite * (returns @ w)


def solve(appetite):
    w = torch.full((20,), 1 / 20, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([w], constraint=budget, param_ndim=None, max_iter=200)

    def closure():
        optim.zero_grad()
        value = objective(w, appetite)
        value.backward()
        return value

    optim.step(closure)
    return w.detach()


# %%
# One portfolio for each appetite for return. scipy's solution is not lower than ours.

appetites = torch.linspace(0, 0.5, 9).tolist()
weights = torch.stack([solve(appetite) for appetite in appetites])
differences = []
for w, appetite in zip(weights, appetites, strict=True):
    theirs = minimize(
        lambda v, a=appetite: objective(torch.from_numpy(v), a).item(),
        [1 / 20] * 20,
        jac=lambda v, a=appetite: (
            covariance @ torch.from_numpy(v) - a * returns
        ).numpy(),
        method="SLSQP",
        bounds=[(0, 0.2)] * 20,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
        options={"ftol": 1e-12},
    )
    differences.append(objective(w, appetite).item() - theirs.fun)
violations = budget.violation(weights)
print(f"objective minus scipy's: {min(differences):.1e} to {max(differences):.1e}")
print(f"sums: {weights.sum(1).min():.12f} to {weights.sum(1).max():.12f}")
print("assets at 0 %:", (weights == 0).sum(1).tolist())
print("assets at 20 %:", (weights == 0.2).sum(1).tolist())

# %%

plt.figure(figsize=(7, 3.5), layout="constrained")
plt.stackplot(appetites, weights.T)
plt.xlabel("appetite for return")
plt.ylabel("weights of 20 assets")
plt.show()
