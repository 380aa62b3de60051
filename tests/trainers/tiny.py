"""A tiny real task for the trainers: which of two classes a point belongs to."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.constraints import L2Ball, MaxNorm, NonNegative
from rai_toolbox.optim import ProjectedOptimizer, constrain
from rai_toolbox.perturbations import attack

BOUND = 0.5


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def data(n=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def loader():
    return DataLoader(data(), batch_size=8)


def optimizer(model, **settings):
    rules = {"*0.weight": MaxNorm(BOUND), "*2.weight": NonNegative()}
    settings = {"InnerOpt": torch.optim.Adam, "lr": 0.05, **settings}
    return ProjectedOptimizer(constrain(model, rules), **settings)


def is_feasible(model):
    first, last = (p for name, p in model.named_parameters() if name.endswith("weight"))
    return bool((first.double().norm(dim=1) <= BOUND).all() and (last >= 0).all())


def worst(model, x, y):
    """The data as a classifier likes them least, within a ball."""
    return attack(model, x, y, ball=L2Ball(0.3), data_range=None, steps=3).data


def by_hand(accumulate=1, clip=None, epochs=1, adversarial=False):
    """The same training as a plain loop."""
    model = net()
    opt = optimizer(model)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 3, 0.5)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader(), 1):
            x = worst(model, x, y) if adversarial else x
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
            if i % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                schedule.step()
                opt.zero_grad()
    return model


def same(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
