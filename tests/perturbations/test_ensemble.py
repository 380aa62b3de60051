"""Attacks in turn: each on the survivors of those before, with a record of who fooled whom."""

import sys
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from test_attack import check_inside
from test_square import BALLS, N, a_problem, seeded
from torch import nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations import (
    evaluate_robustness,
    fab_attack,
    minimum_norm_attack,
    verify,
)
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.differences import difference_attack
from rai_toolbox.perturbations.ensemble import BLACK_BOX, ensemble, short_ensemble, standard
from rai_toolbox.perturbations.evaluation.fingerprint import described, fingerprint
from rai_toolbox.perturbations.journal import Journal
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.solvers import ZeroGradientWarning
from rai_toolbox.perturbations.square import square_attack


def counting(net):
    sizes = []

    def counted(data):
        sizes.append(len(data))
        return net(data)

    return counted, sizes


def in_numpy(net):
    weight, bias = (p.detach().numpy() for p in net[1].parameters())
    last, shift = (p.detach().numpy() for p in net[3].parameters())

    def predict(x):
        import numpy as np

        hidden = np.tanh(x.numpy().reshape(len(x), -1) @ weight.T + bias)
        return torch.from_numpy(hidden @ last.T + shift)

    return predict


@pytest.fixture
def brief(monkeypatch):
    """The standard ensemble with small budgets."""
    for name, number in {"_STEPS": 12, "_QUERIES": 30, "_SAMPLES": 2, "_TARGETS": 2}.items():
        monkeypatch.setattr(sys.modules[standard.__module__], name, number)


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm_name)
@pytest.mark.parametrize("version", ["standard", "rand", "short"])
def test_the_report_is_of_what_is_returned(brief, ball, version):
    net, x, y = a_problem()
    y[0] = (y[0] + 1) % 4
    counted, sizes = counting(net)
    run = partial(short_ensemble, steps=12) if version == "short" else standard(version)
    found = run(counted, x, y, ball=ball, generator=seeded())
    check_inside(found.data, x, type(ball), ball.epsilon)
    logits = net(found.data)
    assert torch.equal(found.fooled, logits.argmax(1) != y)
    assert torch.equal(found.losses, margin_loss(logits, y))
    names = found.fooled_by
    assert [name is not None for name in names[1:]] == found.fooled[1:].tolist()
    assert names[0] is None and found.fooled[0] and torch.equal(found.data[0], x[0])
    assert set(names) - {None} <= set(found.calls) and len(found.calls) > 1
    # Besides what attacks call: all at the start and the end, one for its gradient, and survivors.
    assert found.model_calls == len(sizes)
    assert sum(found.calls.values()) <= sum(sizes) - 2 * N - 1
    again = run(net, x, y, ball=ball, generator=seeded())
    assert torch.equal(again.data, found.data) and again.fooled_by == names


def test_each_attack_gets_the_survivors_with_their_settings():
    x = torch.rand(N, 3, generator=seeded())
    y = torch.zeros(N).long()
    seen = []

    def fooling(number, model, data, target, **settings):
        seen.append((data, target, settings))
        moved = data.clone()
        moved[:number, 0] = 2.0  # which is class 1
        return SimpleNamespace(data=moved)

    radii, upper = 3 + torch.arange(N).double() / 9, torch.tensor([2.0, 3.0, 4.0])
    generator = seeded()
    found = ensemble(
        lambda x: torch.stack([torch.ones(len(x)), x[:, 0]], 1),
        x,
        y,
        attacks={"first": partial(fooling, 3), "second": partial(fooling, 1), "third": attack},
        ball=L2Ball(radii),
        data_range=(-1.0, upper),
        mask=torch.arange(3) < 1,
        steps=0,
        generator=generator,
    )
    assert found.fooled_by == ["first"] * 3 + ["second"] + [None] * (N - 4)
    for left, (data, target, settings) in zip((0, 3), seen, strict=True):
        assert torch.equal(data, x[left:]) and torch.equal(target, y[left:])
        assert torch.equal(settings["ball"].epsilon.flatten(), radii[left:])
        assert torch.equal(settings["data_range"][1], upper.expand(len(data), 3))
        assert settings["mask"].shape == data.shape and settings["generator"] is generator
    assert found.calls == {"first": 0, "second": 0, "third": 2 * (N - 4)}


def test_radii_of_each_example_masks_and_grids_reach_all_attacks(brief):
    net, x, y = a_problem((1, 4, 5))
    x, mask = (x * 255).round() / 255, torch.rand(1, 4, 5, generator=seeded()) < 0.8
    radii = torch.linspace(0.1, 0.6, N).double()
    found = standard()(net, x, y, ball=L2Ball(radii), mask=mask, levels=256, generator=seeded())
    check_inside(found.data, x, L2Ball, radii)
    assert torch.equal(found.data[:, ~mask], x[:, ~mask])
    assert torch.equal((found.data * 255).round() / 255, found.data)
    assert all(found.calls.values()) and not found.fooled.all()


def test_where_gradients_are_0_or_none_the_black_box_is_left():
    net, x, y = a_problem()
    blind = {"ball": LinfBall(0.05), "generator": seeded()}
    with pytest.warns(ZeroGradientWarning):
        found = short_ensemble(in_numpy(net), x, y, steps=60, **blind)
    assert found.fooled.any() and set(found.fooled_by) <= {None, *BLACK_BOX}
    assert found.zero_gradient.all() and found.calls["APGD"] == 0 < found.calls["Diff"]
    with pytest.warns(ZeroGradientWarning):
        alone = {"APGD": attack, "Square": partial(square_attack, queries=60)}
        found = ensemble(in_numpy(net), x, y, attacks=alone, **blind)
    assert set(found.fooled_by) == {"Square", None} and found.calls["APGD"] == 0

    def flat(x):
        return net((8 * x).round() / 8)

    with pytest.warns(ZeroGradientWarning):
        found = short_ensemble(flat, x, flat(x).argmax(1), ball=LinfBall(1e-6), steps=4)
    assert found.zero_gradient.all()


def test_examples_without_gradients_get_other_attacks():
    net, x, y = a_problem()

    def half(x):  # of the examples has gradients
        return torch.where(x[:, :1] < x0, net((8 * x).round() / 8), net(x))

    x0 = x[:, 0].median()
    x[:, 0] = torch.where(x[:, 0] < x0, 0.0, 1.0)
    with pytest.warns(ZeroGradientWarning):
        found = short_ensemble(half, x, half(x).argmax(1), ball=L2Ball(0.4), generator=seeded())
    for number, name in enumerate(found.fooled_by):
        assert name is None or (x[number, 0] == 0) == (name in ("BPDA-CE", "BPDA"))
    assert found.fooled[x[:, 0] == 0].any() and found.fooled[x[:, 0] == 1].any()


def test_where_the_black_box_finds_more_all_survivors_are_attacked_again():
    seen = []

    def nothing(model, data, target, start=None, **settings):
        seen.append((len(data), start))
        return SimpleNamespace(data=data)

    def square(model, data, target, **settings):
        moved = data.clone()
        moved[:2, 0] = 1.0  # which is class 1
        return SimpleNamespace(data=moved)

    def evaluated(**attacks):
        seen.clear()
        x = torch.zeros(N, 1)
        more = {"again": nothing}
        given = {"attacks": {"APGD": nothing, **attacks}, "if_masked": more, "ball": LinfBall(1.0)}
        model = torch.nn.Linear(1, 2)
        with torch.no_grad():
            (
                model.weight.copy_(torch.tensor([[0.0], [1.0]])),
                model.bias.copy_(torch.tensor([0.5, 0])),
            )
        return ensemble(model, x, torch.zeros(N).long(), **given)

    assert "again" not in evaluated().calls and seen == [(N, None)]
    assert evaluated(Square=square).calls["again"] == 0
    (first, none), (last, start) = seen
    assert (first, none, last, start.shape) == (N, None, N - 2, (N - 2, 1))
    with pytest.raises(ValueError, match="`if_masked` must have other names than `attacks`"):
        evaluated(again=nothing)


def test_two_classes_and_rules():
    net, x, _ = a_problem()
    two = partial(lambda x: net(x)[:, :2])
    y = two(x).argmax(1)
    settings = {"ball": L2Ball(0.5), "generator": seeded()}
    assert short_ensemble(two, x, y, steps=8, **settings).fooled.any()
    by_name = standard().keywords["attacks"]
    brief = {name: partial(by_name[name], steps=8) for name in ("APGD-CE", "APGD-T", "FAB-T")}
    assert ensemble(two, x, y, attacks=brief, **settings).fooled.any()
    values = net(x).detach()[:, 0] + 0.01
    found = short_ensemble(
        net,
        x,
        values,
        steps=8,
        criterion=lambda logits, value: (logits[:, 0] - value).abs(),
        fooled=lambda logits, value: (logits[:, 0] - value).abs() > 0.3,
        ball=L2Ball(0.5),
    )
    assert found.fooled.any() and set(found.calls) == {"APGD", "Square"}


def test_solvers_are_told_apart_by_their_settings():
    assert fingerprint(standard()) == fingerprint(standard()) != fingerprint(standard("rand"))
    assert described(standard())["attacks"]["Square"]["queries"] == 5000


def test_published_budgets():
    attacks = standard().keywords["attacks"]
    assert list(attacks) == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert [attacks[name].keywords["steps"] for name in list(attacks)[:3]] == [100] * 3
    assert attacks["APGD-T"].keywords["rivals"].keywords == {"number": 9}
    net, x, y = a_problem()
    toward = attacks["APGD-T"].keywords["rivals"]
    assert toward(net, SimpleNamespace(data=x), y).shape == (N, 3)


BAD = {
    "none": ({"attacks": {}}, ValueError, "`attacks` must be one at least, got none"),
    "rule": (
        {"attacks": {"a": attack, "b": standard().keywords["attacks"]["FAB-T"]}, "fooled": len},
        TypeError,
        "`attacks` must take `fooled` where it is given, got 'b'",
    ),
    "shape": (
        {"attacks": {"a": lambda model, data, target, **_: data[:1]}},
        ValueError,
        "`attacks` must return data of shape",
    ),
    "a list": ({"attacks": [attack]}, TypeError, "`attacks` must be a dict of names and attacks"),
    "class": ({"target": torch.full((N,), 4)}, ValueError, "classes from 0 to 3, got 4"),
    "one class": ({"model": lambda x: x[:, :1]}, ValueError, "of two classes at least"),
}


@pytest.mark.parametrize("levels", [None, 256])
def test_what_is_not_allowed_does_not_count(levels):
    model, data, target = a_problem()
    data = (255 * data).round() / 255

    def outside(model, data, target, levels=None, generator=None, **settings):
        return SimpleNamespace(data=data.add_(1.0))

    def no_numbers(model, data, target, levels=None, generator=None, **settings):
        return SimpleNamespace(data=data * torch.nan)

    attacks = {"outside": outside, "no numbers": no_numbers, "APGD": partial(attack, steps=5)}
    ball = LinfBall(8 / 255)
    found = ensemble(model, data, target, attacks=attacks, ball=ball, levels=levels)
    assert verify(model, data, target, found.data, ball=ball).feasible
    assert found.fooled.any() and torch.equal(model(found.data).argmax(1) != target, found.fooled)
    assert "no numbers" not in found.fooled_by


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    settings = dict(zip(("model", "data", "target"), a_problem(), strict=True))
    settings |= {"ball": LinfBall(0.1), "attacks": {"a": square_attack}}
    change, error, match = BAD[name]
    with pytest.raises(error, match=match):
        ensemble(**{**settings, **change})
    with pytest.raises(ValueError, match='`version` must be "standard" or "rand", got \'plus\''):
        standard("plus")


@pytest.mark.parametrize(
    "run",
    [attack, square_attack, fab_attack, difference_attack, short_ensemble, standard()],
    ids=["attack", "Square", "FAB", "differences", "short", "standard"],
)
def test_what_is_no_generator_is_refused(run):
    with pytest.raises(TypeError, match=r"`generator` must be a torch\.Generator, .* got 3"):
        run(*a_problem(), ball=LinfBall(0.1), generator=3)


@pytest.mark.parametrize("solver", [standard, torch.nn.Linear, "standard", 3])
def test_what_is_no_solver_is_refused(solver):
    net, x, y = a_problem()
    said = "`solver` must " + ("take `ball`" if callable(solver) else "be callable")
    with pytest.raises(TypeError, match=said):
        evaluate_robustness(net, [(x, y)], balls=LinfBall(0.1), solver=solver, progress=False)
    with pytest.raises(TypeError, match=said):
        minimum_norm_attack(net, x, y, ball=LinfBall, solver=solver)
    with pytest.raises(TypeError, match=r"got standard \(are parentheses missing\?\)"):
        evaluate_robustness(net, [(x, y)], balls=LinfBall(0.1), solver=standard, progress=False)


@pytest.fixture(scope="module")
def digits():
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels).float() / 16, torch.tensor(classes)


def trained(x, y, ball):
    """A small net, after the first steps trained on perturbed digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(120):
        is_clean = ball is None or step < 20
        shown = x if is_clean else attack(net, x, y, ball=ball, steps=3).data
        adam.zero_grad()
        nn.functional.cross_entropy(net(shown), y).backward()
        adam.step()
    return net


@pytest.mark.slow
@pytest.mark.parametrize("ball", [None, LinfBall(0.1), L2Ball(0.7)], ids=["plain", "Linf", "L2"])
def test_the_short_one_is_about_as_strong_as_the_standard(digits, ball):
    x, y = digits
    net = trained(x[100:], y[100:], ball)
    x, y = x[:100], y[:100]
    for around in (LinfBall(0.1), L2Ball(0.5), L1Ball(1.2)):
        short, long = (
            run(net, x, y, ball=around, generator=seeded()).fooled.sum()
            for run in (short_ensemble, standard())
        )
        assert short >= long - 1 and 0 < long < 100


@pytest.mark.slow
@pytest.mark.parametrize("ball", [None, LinfBall(0.1), L2Ball(0.7)], ids=["plain", "Linf", "L2"])
def test_masked_models_are_not_overrated_by_the_short_one(digits, ball):
    x, y = digits
    net = trained(x[100:], y[100:], ball)
    x, y = x[:100], y[:100]
    models = [lambda x: net((8 * x).round() / 8), lambda x: (200 * net(x)).softmax(1)]
    for around in (LinfBall(0.1), L2Ball(0.5), L1Ball(1.2)):
        for model in models:
            with pytest.warns(ZeroGradientWarning):
                short, long = (
                    run(model, x, y, ball=around, generator=seeded()).fooled.sum()
                    for run in (short_ensemble, standard())
                )
            assert short >= long - 1


class Kept(Journal):
    """Goes on from a state; keeps the first one."""

    def __init__(self, state=None):
        self.state, self.first = state or {}, None

    def earlier(self):
        return self.state

    def keep(self, state):
        self.first = self.first or deepcopy(state)


def test_states_of_version_0_2_can_be_resumed():
    net, x, y = a_problem((20,))
    settings = {"ball": L2Ball(0.3), "steps": 5, "journal": Kept()}
    whole = short_ensemble(net, x, y, **settings)
    older = settings["journal"].first
    assert len(older["done"]) == 1
    del older["unseen"]
    resumed = short_ensemble(net, x, y, **settings | {"journal": Kept(older)})
    assert len(resumed.calls) == len(whole.calls)
