"""
Weights of a mixture
====================

How frequent is each digit in new data, if the frequencies differ from those of the
training data? With the likelihood ``p(x | k)`` of an image given digit k, the shares w
maximize ``sum_i log(sum_k w_k p(x_i | k))`` over the
:py:class:`~rai_toolbox.constraints.Simplex`. Only four of the digits occur in the new
data here.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from rai_toolbox.constraints import Simplex
from rai_toolbox.optim import ProjectedOptimizer

images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
new = 900 + torch.isin(digits[900:], torch.tensor([0, 1, 3, 8])).nonzero()[:, 0]
classifier = LogisticRegression().fit(images[:900].numpy() / 16, digits[:900].numpy())
posterior = torch.tensor(classifier.predict_proba(images[new].numpy() / 16)).double()
likelihood = posterior / (
    digits[:900].bincount() / 900
)  # up to a factor for each image

shares = torch.full((10,), 0.1, dtype=torch.float64, requires_grad=True)
optim = ProjectedOptimizer(
    [shares], torch.optim.Adam, lr=0.03, constraint=Simplex(), param_ndim=None
)
schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 1e-3 ** (1 / 400))
for _ in range(400):
    optim.zero_grad()
    (-(likelihood @ shares).log().mean()).backward()
    residual = optim.kkt_residual()[0]
    optim.step()
    schedule.step()

# %%
# The result agrees with that of the EM algorithm (Saerens, Latinne and Decaestecker,
# 2002), and is exactly 0 for the digits that do not occur. Counting the predictions of
# the classifier is farther from the truth.

em = torch.full((10,), 0.1, dtype=torch.float64)
for _ in range(5000):
    joint = likelihood * em
    em = (joint / joint.sum(1, keepdim=True)).mean(0)
truth = digits[new].bincount(minlength=10) / len(new)
counted = posterior.argmax(1).bincount(minlength=10) / len(new)
shares = shares.detach()
print(f"residual {residual:.1e}, difference from EM {(shares - em).abs().max():.1e}")
print("digits with a share above 0:", shares.nonzero().flatten().tolist())
print(f"distance from the truth: {(shares - truth).abs().sum():.3f}")
print(f"of counted predictions:  {(counted - truth).abs().sum():.3f}")

# %%

x = torch.arange(10)
plt.figure(figsize=(7, 3), layout="constrained")
for i, (label, values) in enumerate(
    {"truth": truth, "shares": shares, "counted": counted}.items()
):
    plt.bar(x + 0.25 * (i - 1), values, width=0.25, label=label)
plt.xticks(x)
plt.xlabel("digit")
plt.legend()
plt.show()
