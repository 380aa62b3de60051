"""
A physical fit inside bounds
============================

Fit a damped oscillation whose decay is not negative and whose frequency is in a known
range. The parameters have different units;
:py:class:`~rai_toolbox.optim.ProjectedLBFGS` needs a few dozen evaluations, and finds
the solution of scipy's method for least squares in bounds.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import least_squares

from rai_toolbox.constraints import Box
from rai_toolbox.optim import ProjectedLBFGS

seconds = torch.linspace(0, 4, 200, dtype=torch.float64)


def model(p):
    amplitude, decay, hertz, phase = p
    return (
        amplitude
        * (-decay * seconds).exp()
        * (2 * torch.pi * hertz * seconds + phase).cos()
    )


truth = torch.tensor([250.0, 0.4, 1.5, 0.3], dtype=torch.float64)
noise = torch.from_numpy(np.random.default_rng(1).standard_normal(200))
measured = model(truth) + 5 * noise

lower = torch.tensor([0.0, 0.0, 1.2, -3.2], dtype=torch.float64)
upper = torch.tensor([torch.inf, 10.0, 1.8, 3.2], dtype=torch.float64)
start = torch.tensor([100.0, 1.0, 1.4, 0.0], dtype=torch.float64)

# %%
# One step with a closure is a whole minimization.

p = start.clone().requires_grad_()
optim = ProjectedLBFGS(
    [p], constraint=Box(lower, upper), param_ndim=None, max_iter=1000
)


def closure():
    optim.zero_grad()
    loss = (model(p) - measured).square().mean()
    loss.backward()
    return loss


optim.step(closure)
p = p.detach()
theirs = least_squares(
    lambda q: (model(torch.from_numpy(q)) - measured).numpy(),
    start.numpy(),
    bounds=(lower.numpy(), upper.numpy()),
    x_scale="jac",
    xtol=1e-12,
)
print(f"status {optim.status!r} after {optim.evaluations} evaluations")
for name, ours, scipys in zip(
    ["amplitude", "decay", "hertz", "phase"], p, theirs.x, strict=True
):
    print(f"{name:9} {ours:10.5f}   scipy {scipys:10.5f}")

# %%

plt.figure(figsize=(7, 3), layout="constrained")
plt.plot(seconds, measured, ".", markersize=3, label="measured")
plt.plot(seconds, model(start), "--", color="gray", label="start")
plt.plot(seconds, model(p), color="black", label="fit")
plt.xlabel("seconds")
plt.legend()
plt.show()
