"""
Robust accuracy of a Hugging Face style model
=============================================

Models of Transformers return an object with ``logits``, take normalized images, and
come with loaders whose batches are dicts.
:py:func:`~rai_toolbox.perturbations.evaluate_robustness` accepts all of that:
:py:func:`~rai_toolbox.perturbations.classifier` moves the normalization into the model,
so that balls and the range are those of images in [0, 1], and ``keys`` names the
entries of a batch.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations import classifier, evaluate_robustness


@dataclass
class ImageClassifierOutput:
    logits: torch.Tensor


class DigitsForImageClassification(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.net(pixel_values))


# %%
# Train it on normalized images, as usual.

pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
pixels = pixels.float().view(-1, 1, 8, 8) / 16
mean, std = pixels[:1500].mean().item(), pixels[:1500].std().item()
torch.manual_seed(0)
model = DigitsForImageClassification()
adam = torch.optim.Adam(model.parameters(), lr=0.003)
for _ in range(10):
    for rows in torch.randperm(1500).split(50):
        adam.zero_grad()
        logits = model((pixels[rows] - mean) / std).logits
        nn.functional.cross_entropy(logits, labels[rows]).backward()
        adam.step()

# %%
# The model is still in training mode, with dropout; the evaluation puts it in eval mode
# and back.

batches = [
    {"pixel_values": x, "labels": y}
    for x, y in zip(pixels[1500:].split(100), labels[1500:].split(100), strict=True)
]
report = evaluate_robustness(
    classifier(model, mean=mean, std=std),
    batches,
    keys=("pixel_values", "labels"),
    balls=[*map(LinfBall, (0.05, 0.1, 0.2)), *map(L2Ball, (0.25, 0.5, 0.75))],
    steps=30,
    progress=False,
)
print(report)
print("in training mode again:", model.training)

# %%
# The bands are intervals of 95 %. ``report.plot()`` makes a figure for a report, which
# shows the perturbed images, too. Robust accuracy is an upper bound: a stronger attack
# can only lower it.

plt.figure(figsize=(6, 3.5), layout="constrained")
for norm in ("Linf", "L2"):
    rows = [row for row in report.rows() if row.norm == norm]
    radii = [row.epsilon for row in rows]
    plt.fill_between(
        radii, [row.low for row in rows], [row.high for row in rows], alpha=0.2
    )
    plt.plot(radii, [row.robust_accuracy for row in rows], ".-", label=norm)
plt.axhline(report.clean_accuracy, color="gray", linestyle="--", label="clean")
plt.xlabel("radius")
plt.ylabel("robust accuracy")
plt.ylim(0, 1)
plt.legend()
plt.show()
