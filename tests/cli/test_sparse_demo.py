"""The linear classifier with weights in L1 balls: the demo reports what it is."""

import json
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from rai_toolbox.cli import sparse
from rai_toolbox.cli.digits import Digits

RADIUS = 0.5


@pytest.fixture(scope="module")
def digits():
    """Noise in which the top row tells the class: a bright pixel in one of ten places."""
    images = 0.5 * torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(100) % 10
    images[range(100), 0, 0, labels] = 1.0
    return Digits(images, labels)


@pytest.fixture(scope="module")
def fits(digits):
    return sparse.fit_each(digits, steps=30, radius=RADIUS)


@pytest.fixture(scope="module")
def report(fits, digits):
    return sparse.to_report(fits, RADIUS, digits)


def residual_by_sorting(weights, grads, radius):
    """``|W - P(W - g)|``, each row projected as in Duchi et al. (2008), by sorting."""
    moved = weights - grads
    found = []
    for row in moved:
        sizes = row.abs().sort(descending=True).values
        levels = (sizes.cumsum(0) - radius) / torch.arange(1, len(row) + 1)
        level = levels[sizes > levels][-1].clamp(min=0)
        found.append(row.sign() * (row.abs() - level).clamp(min=0))
    return (weights - torch.stack(found)).norm().item()


@pytest.mark.parametrize("name", list(sparse.MAPPINGS))
def test_loss_and_residual_are_those_of_the_final_weights(name, fits, report, digits):
    fit, run = fits[name], report["runs"][name]
    x, labels = digits.images.flatten(1).double(), digits.labels
    weights = fit.weights().double().requires_grad_()
    loss = cross_entropy(x @ weights.T + fit.net[1].bias.detach().double(), labels)
    (grads,) = torch.autograd.grad(loss, weights)
    assert run["loss"] == pytest.approx(loss.item(), rel=1e-5)
    residual = residual_by_sorting(weights.detach(), grads, RADIUS)
    assert run["kkt_residual"] == pytest.approx(residual, rel=1e-3)
    assert weights.abs().sum(1).max() <= RADIUS
    assert run["share_of_weights_zero"] == (weights == 0).double().mean()
    assert len(fit.residuals) == 31


def test_all_but_the_gradient_mapping_is_equal(fits, digits):
    default, plain = fits.values()
    assert default.residuals[0] == plain.residuals[0]
    assert not torch.equal(default.weights(), plain.weights())
    default, plain = sparse.fit_each(digits, steps=3, radius=1e6).values()  # out of reach
    assert torch.equal(default.weights(), plain.weights())
    assert default.residuals == plain.residuals


def test_it_repeats_and_draws_no_random_numbers(fits, digits):
    state = torch.get_rng_state()
    again = sparse.fit_each(digits, steps=30, radius=RADIUS)
    assert torch.equal(torch.get_rng_state(), state)
    for name, fit in fits.items():
        assert torch.equal(again[name].weights(), fit.weights())
        assert again[name].residuals == fit.residuals


def test_the_violation_is_measured_not_assumed(digits, monkeypatch):
    late = partial(sparse.ProjectedOptimizer, every=1000)
    monkeypatch.setattr(sparse, "ProjectedOptimizer", late)
    fits = sparse.fit_each(digits, steps=3, radius=RADIUS)
    report = sparse.to_report(fits, RADIUS, digits)
    assert min(fit.violation for fit in fits.values()) > 1
    assert {name: run["largest_violation"] for name, run in report["runs"].items()} == {
        name: fit.violation for name, fit in fits.items()
    }


def test_a_violation_that_heals_is_not_forgotten(digits, monkeypatch):
    second = partial(sparse.ProjectedOptimizer, every=2)
    monkeypatch.setattr(sparse, "ProjectedOptimizer", second)
    for fit in sparse.fit_each(digits, steps=4, radius=RADIUS).values():
        assert fit.weights().abs().double().sum(1).max() <= RADIUS
        assert fit.violation > 1


def test_the_report_is_plain_data_and_says_what_was_done(report):
    assert json.loads(json.dumps(report)) == report
    assert report["settings"] == {
        "constraint": "L1Ball",
        "radius": RADIUS,
        "optimizer": "Adam",
        "steps": 30,
        "lr": 0.1,
        "lr_decay": 0.01,
        "small": 0.01,
    }
    assert [run["largest_violation"] for run in report["runs"].values()] == [0, 0]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 3 / 8), (0.01, 4 / 8), (0.5, 6 / 8)])
def test_small_is_relative_to_the_largest_of_the_class(share, expected):
    weights = torch.tensor([[0.0, -0.001, 0.04, -1.0], [0.0, 0.0, 0.04, 0.02]])
    assert sparse._share_at_most(weights, share) == expected
