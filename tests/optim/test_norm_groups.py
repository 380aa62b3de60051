"""Each layer gets the ball of its norm."""

from math import sqrt

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import L2Ball, LinfBall, SpectralBall
from rai_toolbox.optim import Scion, norm_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(2, 6, (1, 3))
        self.up = nn.ConvTranspose1d(8, 2, 1, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)


def sets_of(groups):
    return {
        name: (group["constraint"], group["param_ndim"])
        for group in groups
        for name, _ in group["params"]
    }


def test_by_the_kind_of_layer(capsys):
    assert sets_of(norm_groups(Net(), 2.0, head_radius=20.0)) == {
        "words.weight": (L2Ball(4.0), 1),
        "conv.weight": (SpectralBall(2.0, flatten=1), None),
        "conv.bias": (L2Ball(2 * sqrt(6)), None),
        "up.weight": (SpectralBall(1.0, flatten=1), None),
        "attention.in_proj_weight": (SpectralBall(2 * sqrt(3)), None),
        "attention.out_proj.weight": (SpectralBall(2.0), None),
        "norm.weight": (L2Ball(4.0), None),
        "norm.bias": (L2Ball(4.0), None),
        "head.weight": (LinfBall(5.0), None),
        "head.bias": (L2Ball(2 * sqrt(5)), None),
    }
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["words.weight", "(7,", "4)", "L2Ball(epsilon=4.0)"]


def test_equal_sets_share_a_group_and_the_scale_is_an_argument(capsys):
    model = nn.Sequential(nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1))
    scales = []

    def muon(m, k):
        scales.append((m, k))
        return sqrt(max(1, m / k))

    groups = norm_groups(model, scale=muon, head="", verbose=False)
    assert capsys.readouterr().out == ""
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["0.weight"],
        ["0.bias", "1.bias", "2.bias"],
        ["1.weight", "2.weight", "3.weight"],
        ["3.bias"],
    ]
    assert groups[0]["constraint"] == SpectralBall(2.0)
    assert scales == [(12, 3), (12, 12), (12, 12), (1, 12)]


def test_the_head_may_share_the_weight_of_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    assert sets_of(norm_groups(model, head_radius=20.0, verbose=False)) == {
        "0.weight": (LinfBall(5.0), None),
        "1.weight": (SpectralBall(1.0), None),
        "1.bias": (L2Ball(2.0), None),
    }


def test_layers_without_inputs_or_outputs_have_sets_too():
    with pytest.warns(UserWarning, match="zero-element"):
        net = nn.Sequential(nn.Linear(2, 0), nn.Linear(0, 3), nn.Linear(3, 2), nn.Linear(0, 2))
    groups = norm_groups(net, verbose=False)
    optim = Scion(groups, lr=0.5)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optim.step()
    assert sum(optim.violation()) == 0
    found = {name: group["constraint"] for group in groups for name, _ in group["params"]}
    assert found["1.weight"] == found["3.weight"] == L2Ball(0.0)
    assert found["2.weight"] == SpectralBall(sqrt(2 / 3))


def test_scion_trains_in_these_sets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    optim = Scion(norm_groups(model, head_radius=30.0, verbose=False), lr=0.03)
    x = torch.randn(48, 2, 6)
    y = (x[:, 0].sum(1) > 0).long() + (x[:, 1, 0] > 1).long()
    losses = []
    for _ in range(80):
        optim.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optim.step()
        assert sum(optim.violation()) == 0
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((nn.Linear(2, 2), 0.0), "`radius` must be > 0"),
        ((nn.ReLU(),), "`module` must have parameters"),
        ((3,), "`module` must be a torch.nn.Module"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        norm_groups(*args)
    with pytest.raises(ValueError, match=r"`head` must be one of \['weight', 'bias'\], got 'hed'"):
        norm_groups(nn.Linear(2, 2), head="hed")
