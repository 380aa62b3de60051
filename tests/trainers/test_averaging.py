"""Averages of weights by `torch.optim.swa_utils`: of a convex set's points, which stay in it."""

import torch
from tiny import is_feasible, loader, net, optimizer
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn


def test_averages_of_feasible_weights_are_feasible():
    model = net()
    opt = optimizer(model)
    mean = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    schedule = SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    for x, y in loader():
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        schedule.step()
        mean.update_parameters(model)
        moving.update_parameters(model)
    update_bn(loader(), mean)
    assert opt.param_groups[0]["lr"] == 0.01
    for averaged in (mean, moving):
        first = averaged.module[0].weight
        assert not torch.equal(first, model[0].weight)
        # convex, but an average is rounded to nearest
        with torch.no_grad():
            for p in averaged.parameters():
                p.mul_(1 - 1e-6)
        assert is_feasible(averaged)
