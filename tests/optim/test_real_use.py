"""Fits to real data beside other solvers, by more inner optimizers than the gallery of examples."""

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import scale
from tiers import slow_but
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

from rai_toolbox.constraints import L1Ball, Monotone, Simplex
from rai_toolbox.optim import ProjectedOptimizer

ADAPTIVE = {
    Adam: {"lr": 0.03},
    AdamW: {"lr": 0.03, "weight_decay": 0.0},
    NAdam: {"lr": 0.03},
    RAdam: {"lr": 0.1},
    RMSprop: {"lr": 0.01},
    Adagrad: {"lr": 0.1},
}
MOMENTUM = {"momentum": 0.95, "nesterov": True}


def minimize(loss, optim, steps, end=1e-3):
    """Step with a falling rate; return the KKT residuals at the end."""
    schedule = ExponentialLR(optim, end ** (1 / steps))
    for _ in range(steps):
        optim.zero_grad()
        loss().backward()
        optim.step()
        schedule.step()
    optim.zero_grad()
    loss().backward()
    return [float(residual) for residual in optim.kkt_residual()]


def in_float64(values):
    return torch.as_tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def likelihood():
    """Of the digits 0 to 9 in images of which only four digits are."""
    images, digits = load_digits(return_X_y=True)
    old, new = slice(0, 900), [i for i in range(900, len(digits)) if digits[i] in (0, 1, 3, 8)]
    classifier = LogisticRegression().fit(images[old] / 16, digits[old])
    frequency = torch.tensor(digits[old]).bincount() / 900
    return in_float64(classifier.predict_proba(images[new] / 16)) / frequency


@pytest.fixture(scope="module")
def shares_by_em(likelihood):
    shares = torch.full((10,), 0.1, dtype=torch.float64)
    for _ in range(5000):
        joint = likelihood * shares
        shares = (joint / joint.sum(1, keepdim=True)).mean(0)
    return shares


def fit_shares(likelihood, inner, settings, **wrapping):
    shares = torch.full((10,), 0.1, dtype=torch.float64, requires_grad=True)
    optim = ProjectedOptimizer(
        [shares], inner, constraint=Simplex(), param_ndim=None, **settings, **wrapping
    )
    residual = minimize(lambda: -(likelihood @ shares).log().mean(), optim, 400)
    assert optim.violation() == [0]
    return shares.detach(), residual[0]


@pytest.mark.parametrize("inner", slow_but([SGD, *ADAPTIVE], SGD, Adam))
def test_mixture_weights_are_those_of_em(inner, likelihood, shares_by_em):
    settings = ADAPTIVE.get(inner, {"lr": 0.1})
    shares, residual = fit_shares(likelihood, inner, settings, averaging=0.0)
    torch.testing.assert_close(shares, shares_by_em, atol=1e-6, rtol=0)
    assert residual < 1e-6


@pytest.mark.parametrize(
    "inner", slow_but([Adam, NAdam, RMSprop, Adagrad])
)  # RAdam warms up as SGD
def test_mixture_weights_without_the_gradient_mapping_do_not_leave_the_start(inner, likelihood):
    shares, residual = fit_shares(likelihood, inner, ADAPTIVE[inner], gradient_mapping=False)
    assert (shares - 0.1).abs().max() < 1e-3
    assert residual > 0.1


@pytest.mark.parametrize(
    ("inner", "settings", "increasing"),
    slow_but(
        [
            (SGD, {"lr": 50.0, "momentum": 0.9}, True),
            (SGD, {"lr": 50.0, "momentum": 0.9}, False),
            (Adam, {"lr": 0.1}, True),
        ]
    ),
)
def test_monotone_calibration_is_isotonic_regression(inner, settings, increasing):
    features, healthy = load_breast_cancer(return_X_y=True)
    scores, place = in_float64(features[:, 1]).unique(return_inverse=True)
    target = in_float64(healthy if not increasing else 1 - healthy)
    expected = IsotonicRegression(increasing=increasing).fit_transform(scores[place], target)

    heights = torch.full((len(scores),), 0.5, dtype=torch.float64, requires_grad=True)
    optim = ProjectedOptimizer(
        [heights], inner, constraint=Monotone(increasing), param_ndim=None, **settings
    )
    minimize(lambda: (heights[place] - target).square().mean(), optim, 300, end=1e-2)
    torch.testing.assert_close(heights[place].detach(), in_float64(expected), atol=1e-4, rtol=0)
    assert optim.violation() == [0]


@pytest.fixture(scope="module")
def lasso():
    """Inputs, target, and the penalized solution: weights and intercept."""
    features, healthy = load_breast_cancer(return_X_y=True)
    inputs = scale(features)
    peer = LogisticRegression(l1_ratio=1, C=0.1, solver="saga", tol=1e-10, max_iter=100_000)
    peer.fit(inputs, healthy)
    return *map(in_float64, (inputs, healthy, peer.coef_[0])), in_float64(peer.intercept_[0])


def fit_lasso(lasso, inner, settings, steps, end):
    """The loss less that of the penalized solution; the weights."""
    inputs, target, expected, offset = lasso
    weight = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss(weight, bias):
        logits = inputs @ weight + bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)

    ball = L1Ball(float(expected.abs().sum()))
    groups = [{"params": weight, "constraint": ball}, {"params": bias, "constraint": None}]
    optim = ProjectedOptimizer(groups, inner, param_ndim=None, **settings)
    minimize(lambda: loss(weight, bias), optim, steps, end)
    assert optim.violation() == [0, 0]
    weight, bias = weight.detach(), bias.detach()
    return float(loss(weight, bias) - loss(expected, offset)), weight


@pytest.mark.slow
def test_l1_ball_gives_the_penalized_solution(lasso):
    excess, weight = fit_lasso(lasso, SGD, {"lr": 0.3, **MOMENTUM}, 1500, end=1.0)
    expected = lasso[2]
    assert abs(excess) < 1e-8
    assert torch.equal(weight != 0, expected != 0)
    torch.testing.assert_close(weight, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_l1_ball_with_adam_comes_near_and_without_the_mapping_does_not(lasso):
    # The features are nearly dependent: an adaptive optimizer takes long for the last digits.
    settings = {"lr": 0.3}
    assert abs(fit_lasso(lasso, Adam, settings, 1000, end=1e-3)[0]) < 1e-3
    plain = {**settings, "gradient_mapping": False}
    assert fit_lasso(lasso, Adam, plain, 400, end=1e-3)[0] > 5e-3
