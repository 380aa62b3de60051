"""
Adversarial training
====================

A net becomes robust by training on the data that it classifies worst:
:py:func:`~rai_toolbox.perturbations.attack` in the training loop. The attack leaves no
trace in the net, neither gradients nor another mode, so the loop is any loop with one
more line.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rai_toolbox.constraints import LinfBall
from rai_toolbox.optim import PGD
from rai_toolbox.perturbations import attack, cross_entropy, evaluate_robustness

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
ball = LinfBall(0.1)
PGD_5 = {
    "ball": ball,
    "optimizer": PGD,
    "steps": 5,
    "criterion": cross_entropy,
    "random_start": True,
}


def train(robust, epochs=15):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    adam = torch.optim.Adam(net.parameters(), lr=0.005)
    for _ in range(epochs):
        for rows in torch.randperm(1500).split(100):
            x, y = images[rows], labels[rows]
            if robust:  # PGD from a random start (Madry et al., 2018)
                x = attack(net, x, y, **PGD_5).data
            adam.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            adam.step()
    return net


# %%
# Robust accuracy at several radii, of the plain net and of the robust one:

test = [(images[1500:], labels[1500:])]
balls = [LinfBall(r) for r in (0.025, 0.05, 0.1, 0.15)]
reports = {
    name: evaluate_robustness(
        train(robust), test, balls=balls, steps=30, progress=False
    )
    for name, robust in [("plain", False), ("robust", True)]
}
for name, report in reports.items():
    print(name)
    print(report)

# %%

plt.figure(figsize=(6, 3.5), layout="constrained")
for name, report in reports.items():
    accuracies = [report.clean_accuracy, *map(report.robust_accuracy, balls)]
    plt.plot(
        [0, *(b.epsilon for b in balls)], accuracies, ".-", label=f"{name} training"
    )
plt.xlabel("radius of the Linf ball")
plt.ylabel("accuracy")
plt.ylim(0, 1)
plt.legend()
plt.show()
