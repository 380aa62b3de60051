"""Classifiers of raw data: what they compute, and how attacks treat them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations import attack, classifier, evaluate_robustness
from rai_toolbox.perturbations.evaluation.fingerprint import fingerprint
from rai_toolbox.perturbations.inputs import device_of

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def images():
    return torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (MEAN, STD),
        (0.5, STD),
        (MEAN, 0.25),
        (0.5, 2),
        (torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(3, 1, 1).double()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_are_normalized_per_channel(mean, std, dtype):
    x = images().to(dtype)
    first, second = (
        torch.as_tensor(setting).to(dtype).expand(1, 3, 1, 1)
        if not isinstance(setting, list)
        else torch.tensor(setting).to(dtype).view(1, 3, 1, 1)
        for setting in (mean, std)
    )
    expected = (x - first) / second
    for model in (nn.Identity(), lambda data: data):
        found = classifier(model, mean=mean, std=std)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_features_are_channels():
    x = torch.rand(5, 3)
    expected = (x - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(classifier(nn.Identity(), MEAN, STD)(x), expected)


def test_ball_and_range_are_those_of_the_raw_data():
    net, x = a_net().eval(), images()
    model = classifier(net, mean=MEAN, std=STD)
    y = model(x).argmax(1)
    found = attack(model, x, y, ball=LinfBall(0.1), steps=5)
    assert found.data.min() >= 0 and found.data.max() <= 1
    assert (found.data - x).abs().max() <= 0.1 + 1e-7
    mean, std = (torch.tensor(setting).view(3, 1, 1) for setting in (MEAN, STD))
    by_hand = attack(lambda data: net((data - mean) / std), x, y, ball=LinfBall(0.1), steps=5)
    assert torch.equal(found.data, by_hand.data)


def with_logits(net):
    return lambda data: SimpleNamespace(logits=net(data))


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: net.forward, with_logits])
def test_the_wrapped_model_is_in_eval_mode_meanwhile(wrap):
    x = images()
    net = a_net().eval()
    y = classifier(net, MEAN, STD)(x).argmax(1)
    expected = attack(classifier(net, MEAN, STD), x, y, ball=L2Ball(0.3), steps=5)
    net = a_net().train()
    net[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = attack(classifier(wrap(net), MEAN, STD), x, y, ball=L2Ball(0.3), steps=5)
    assert torch.equal(found.data, expected.data)
    assert [part.training for part in net] == [False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_hidden_model_is_met_with_a_warning():
    hidden = type("Hidden", (), {"net": a_net()})  # classes are not searched
    model = classifier(lambda data: hidden.net(data), MEAN, STD)
    with pytest.warns(UserWarning, match="hides a Sequential in training mode"):
        attack(model, images(), torch.zeros(10).long(), ball=L2Ball(0.3), steps=2)


def test_a_module_stays_one():
    net = a_net()
    model = classifier(net, MEAN, STD)
    assert model.train() is model and net.training and not model.eval()[1].training
    assert len(list(model.parameters())) == len(list(net.parameters()))
    assert {"0.mean", "0.std", "1.1.weight"} <= set(model.state_dict())
    assert device_of(model.to("meta")) == torch.device("meta") == model[0].mean.device


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: net.forward])
def test_mean_and_std_are_part_of_what_an_evaluation_knows_of_a_model(wrap):
    net = wrap(a_net())
    found = [classifier(net, MEAN, STD), classifier(net, MEAN, 1.0), classifier(net, 0.0, STD)]
    assert len({fingerprint(model) for model in found}) == 3


def test_an_evaluation():
    net, x = a_net().eval(), images()
    model = classifier(with_logits(net), 0.5, 0.25)
    y = model(x).logits.argmax(1)
    run = partial(evaluate_robustness, loader=[(x, y)], balls=L2Ball(0.1), steps=3, progress=False)
    assert run(model) == run(classifier(net, 0.5, 0.25))


def test_tensors_are_copied():
    mean = torch.tensor(MEAN)
    model = classifier(nn.Identity(), mean, STD)
    mean.zero_()
    assert model[0].mean.tolist() == torch.tensor(MEAN).tolist()


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"std": 0.0}, ValueError, r"`std` must be > 0, got \[0.0\]"),
        ({"std": [0.5, -1.0, 0.5]}, ValueError, r"`std` must be > 0, got \[0.5, -1.0, 0.5\]"),
        ({"std": float("inf")}, ValueError, "`std` must be finite"),
        ({"mean": float("nan")}, ValueError, "`mean` must not be NaN"),
        ({"mean": "imagenet"}, TypeError, "`mean` must hold numbers, got imagenet"),
        (
            {"mean": [0.5, 0.5]},
            ValueError,
            "`mean` and `std` must have the same shape, got 2 and 3",
        ),
        ({"mean": []}, ValueError, r"`mean` must be a number or have the shape \(C,\), got shape"),
        ({"mean": torch.ones(2, 3)}, ValueError, r"the shape \(C,\), got shape \(2, 3\)"),
        ({"model": None}, TypeError, "`model` must be a module or function, got None"),
        ({"model": nn.Linear}, TypeError, "`model` must be a module or function, got <class"),
    ],
)
def test_wrong_settings_are_refused(settings, error, said):
    with pytest.raises(error, match=said):
        classifier(**{"model": nn.Identity(), "mean": MEAN, "std": STD, **settings})


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (3,), (2, 2)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"`mean` must be a number or have one value per channel"):
        classifier(nn.Identity(), MEAN, 1.0)(torch.rand(shape))
