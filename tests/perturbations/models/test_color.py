"""Color shifts against formulas written out, their identity, their range and their gradient."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import LinfBall
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.models.color import ColorShift, shift_color
from rai_toolbox.perturbations.solvers import gradient_ascent

NONE = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "gamma": 0.0}


def images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def at(data, *amounts, **limits):
    model = ColorShift(data, **{**NONE, **limits})
    with torch.no_grad():
        model.amounts.copy_(torch.tensor(amounts))
    return model(data).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_amounts_of_zero_give_the_data_back_bit_for_bit_and_have_a_gradient(dtype, data_range):
    low, high = data_range
    data = (images(3, 3, 7, 5, dtype=torch.float64) * (high - low) + low).to(dtype)
    data[0, 0, 0, :2] = torch.tensor(data_range, dtype=dtype)
    model = ColorShift(data, data_range=data_range)
    seen = model(data)
    assert seen.dtype == dtype and torch.equal(seen, data)
    (seen.float() * images(3, 3, 7, 5, seed=1)).sum().backward()
    assert model.amounts.grad.isfinite().all() and model.amounts.grad.abs().min() > 0


def test_brightness_is_a_share_of_the_range():
    data = images(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    seen = at(data, [1.0, 0, 0, 0], [-0.5, 0, 0, 0], brightness=0.2, data_range=(-1.0, 1.0))
    expected = torch.stack([data[0] + 0.4, data[1] - 0.2]).clamp(-1, 1)
    torch.testing.assert_close(seen, expected)


def test_contrast_is_a_factor_about_the_mean_of_the_image():
    data = images(2, 1, 4, 4, dtype=torch.float64)
    seen = at(data, [0, -1.0, 0, 0], [0, -0.5, 0, 0], contrast=1.0)
    for row, factor in enumerate([0.5, math.sqrt(0.5)]):
        mean = data[row].mean()
        torch.testing.assert_close(seen[row], mean + factor * (data[row] - mean))


def test_saturation_is_a_factor_about_gray():
    data = images(1, 3, 4, 4, dtype=torch.float64)
    gray = data.mean(1, keepdim=True)
    seen = at(data, [0, 0, -1.0, 0], saturation=3.0)
    torch.testing.assert_close(seen, gray + (data - gray) / 4)
    monochrome = data[:, :1]
    assert torch.equal(at(monochrome, [0, 0, 1.0, 0], saturation=3.0), monochrome)


@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_gamma_is_an_exponent_of_the_share(data_range):
    low, high = data_range
    share = images(2, 3, 4, 4, dtype=torch.float64)
    share[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    data = low + (high - low) * share
    seen = at(data, [0, 0, 0, 1.0], [0, 0, 0, -1.0], gamma=1.0, data_range=data_range)
    expected = low + (high - low) * torch.stack([share[0].square(), share[1].sqrt()])
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_pixels_stay_in_the_range(dtype):
    data = images(64, 3, 5, 5).to(dtype)
    generator = torch.Generator().manual_seed(0)
    model = ColorShift(data, nn.init.uniform_, a=-1.0, b=1.0, generator=generator, brightness=0.7)
    seen = model(data).detach()
    assert seen.min() == 0 and seen.max() == 1 and not seen.isnan().any()


def test_the_gradient_is_that_of_differences():
    data = images(2, 3, 3, 3, dtype=torch.float64)
    values = torch.tensor(
        [[0.02, 1.1, 0.8, 1.3], [-0.03, 0.9, 1.2, 0.7]], dtype=torch.float64, requires_grad=True
    )
    middle = 0.3 + 0.4 * data  # far enough from the ends, where the clamp has a kink

    def of(v):
        return shift_color(middle, *v.unbind(1), data_range=(0.0, 1.0))

    assert torch.autograd.gradcheck(of, values)


def test_settings_are_in_the_units_of_the_limits():
    model = ColorShift((1, 3, 4, 4), brightness=0.2, contrast=1.0, saturation=3.0, gamma=0.0)
    with torch.no_grad():
        model.amounts.copy_(torch.tensor([[0.5, -1.0, 0.5, 1.0]]))
    found = {name: round(value.item(), 6) for name, value in model.settings().items()}
    assert found == {"brightness": 0.1, "contrast": 0.5, "saturation": 2.0, "gamma": 1.0}


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, r"`brightness` must be >= 0, got -1", {"brightness": -1.0}),
        (ValueError, r"`gamma` must be finite, got inf", {"gamma": math.inf}),
        (ValueError, r"`data_range` must have a lower end below", {"data_range": (1.0, 0.0)}),
        (ValueError, r"`data_range` must be finite, got inf", {"data_range": (0.0, math.inf)}),
        (ValueError, r"`data` must be within `data_range`, \[0, 0.5\]", {"data_range": (0.0, 0.5)}),
        (TypeError, r"`init_fn` must be given with its arguments", {"a": 1.0}),
    ],
)
def test_wrong_settings_are_refused(error, message, make):
    with pytest.raises(error, match=message):
        ColorShift(images(2, 3, 4, 4), **make)


def test_the_light_in_which_a_linear_reader_errs_is_found():
    """Where the score is linear in the one amount, the worst one is an end of its interval."""
    data = 0.4 + 0.2 * images(6, 3, 4, 4, dtype=torch.float64)
    weight = images(3, 4, 4, dtype=torch.float64, seed=2) - 0.5

    def model(x):
        score = (x * weight).flatten(1).sum(1)
        return torch.stack([score, -score], dim=1)

    target = model(data).argmax(1)
    light = partial(ColorShift, brightness=0.1, contrast=0.0, saturation=0.0, gamma=0.0)
    perturbation = light(data)
    found, losses = gradient_ascent(
        model=model,
        data=data,
        target=target,
        perturbation_model=perturbation,
        optimizer=partial(PGD, constraint=LinfBall(1.0), lr=0.3)(perturbation.parameters()),
        criterion=margin_loss,
        steps=5,
        use_best=True,
    )
    sign = -torch.where(target == 0, 1.0, -1.0) * weight.sum().sign()
    torch.testing.assert_close(found, data + 0.1 * sign.view(-1, 1, 1, 1))
    assert torch.equal(perturbation(data).detach(), found)  # written back
    torch.testing.assert_close(losses, margin_loss(model(found), target))
