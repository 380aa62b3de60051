"""Warps against exact turns and shifts, against scipy, and as what an attack chooses."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.cli.digits import load_digits
from rai_toolbox.constraints import BoundedBall, L2Ball, LinfBall
from rai_toolbox.optim import ProjectedOptimizer
from rai_toolbox.optim.pgd import PGD
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.models.warp import AffineWarp, affine_maps, warp
from rai_toolbox.perturbations.solvers import gradient_ascent, random_restart

NONE = {"rotation": 0.0, "translation": 0.0, "scale": 0.0, "shear": 0.0}
AMOUNTS = ["rotation", "right", "down", "scale", "shear"]


def images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def set_to(model, *amounts):
    with torch.no_grad():
        model.amounts.copy_(torch.tensor(amounts))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_amounts_of_zero_give_the_data_back_bit_for_bit_and_have_a_gradient(dtype, padding_mode):
    data = images(3, 2, 7, 5, dtype=dtype)
    model = AffineWarp(data, padding_mode=padding_mode)
    seen = model(data)
    assert seen.dtype == dtype and torch.equal(seen, data)
    (seen.float() * images(3, 2, 7, 5, seed=1)).sum().backward()
    gradient = model.amounts.grad
    assert gradient[:, :4].abs().min() > 0 and not gradient[:, 4].any()  # no shear by default


def test_only_what_is_not_moved_stays_bit_for_bit():
    data = images(2, 1, 6, 6)
    model = AffineWarp(data)
    with torch.no_grad():
        model.amounts[1, 1] = 0.3
    seen = model(data).detach()
    assert torch.equal(seen[0], data[0]) and not torch.allclose(seen[1], data[1], atol=0.01)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_quarter_turns_are_exact_and_counter_clockwise(turns):
    data = images(2, 3, 8, 8, dtype=torch.float64)
    model = AffineWarp(data, nn.init.ones_, **{**NONE, "rotation": 90.0})
    with torch.no_grad():
        model.amounts.mul_(turns)
    torch.testing.assert_close(model(data).detach(), torch.rot90(data, turns, (2, 3)))


def test_shifts_by_whole_pixels_go_right_and_down():
    data = images(1, 1, 4, 8, dtype=torch.float64)
    model = AffineWarp(data, **{**NONE, "translation": 0.25})
    seen = set_to(model, [0.0, 1.0, -1.0, 0.0, 0.0])(data).detach()
    expected = torch.zeros_like(data)
    expected[:, :, :-1, 2:] = data[:, :, 1:, :-2]
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("size", [(9, 9), (12, 7), (5, 11)])
@pytest.mark.parametrize("seed", range(3))
def test_any_warp_is_that_of_scipy(size, seed):
    limits = {"rotation": 40.0, "translation": 0.2, "scale": 0.5, "shear": 0.3}
    data = images(2, 1, *size, dtype=torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model = AffineWarp(data, nn.init.uniform_, a=-1.0, b=1.0, generator=generator, **limits)
    seen = model(data).detach()
    for row, amount in enumerate(model.amounts.tolist()):
        # (down, right) of pixels, as scipy has it: out = forward @ (in - middle) + middle + shift
        angle, middle = math.radians(amount[0] * 40.0), (np.array(size) - 1) / 2
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        shear = np.array([[1.0, 0.0], [amount[4] * 0.3, 1.0]])
        forward = 1.5 ** amount[3] * turn @ shear
        shift = 0.2 * np.array([amount[2] * size[0], amount[1] * size[1]])
        back = np.linalg.inv(forward)
        offset = middle - back @ (middle + shift)
        image = data[row, 0].numpy()
        expected = affine_transform(image, back, offset, order=1, mode="grid-constant")
        np.testing.assert_allclose(seen[row, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("fill", [0.3, 1.0, -0.7])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
def test_no_pixel_leaves_the_range_of_its_image(fill, padding_mode):
    data = torch.full((64, 1, 9, 9), fill)
    generator = torch.Generator().manual_seed(0)
    model = AffineWarp(
        data, nn.init.uniform_, a=-1.0, b=1.0, generator=generator, padding_mode=padding_mode
    )
    seen = model(data).detach()
    low, high = (min(fill, 0.0), max(fill, 0.0)) if padding_mode == "zeros" else (fill, fill)
    low, high = torch.tensor([low, high]).tolist()
    assert low <= seen.min().item() and seen.max().item() <= high


def test_the_gradient_is_that_of_differences():
    data = images(2, 1, 6, 5, dtype=torch.float64)
    limits = {"rotation": 20.0, "translation": 0.1, "scale": 0.2, "shear": 0.1}
    start = images(2, 5, dtype=torch.float64, seed=3) - 0.5

    def of(amounts):
        units = amounts * amounts.new_tensor([20.0, 0.1, 0.1, math.log(1.2), 0.1])
        columns = list(units.unbind(1))
        columns[3] = columns[3].exp()
        return warp(data, affine_maps(data.shape, *columns))

    # eps small enough to stay between two pixels, where interpolation is smooth
    assert torch.autograd.gradcheck(of, start.requires_grad_(), eps=1e-7, atol=1e-5)
    model = AffineWarp(data, **limits)
    with torch.no_grad():
        model.amounts.copy_(start)
    torch.testing.assert_close(model(data), of(start))


def test_settings_are_in_the_units_of_the_limits():
    limits = {"rotation": 20.0, "translation": 0.1, "scale": 1.0, "shear": 0.5}
    model = set_to(AffineWarp((1, 1, 4, 4), **limits), [0.5, 1.0, -1.0, -1.0, 0.5])
    found = {name: round(value.item(), 6) for name, value in model.settings().items()}
    assert found == dict(zip(AMOUNTS, [10.0, 0.1, -0.1, 0.5, 0.25], strict=True))


def test_it_starts_anew_from_what_its_function_fills_in():
    data = images(3, 1, 4, 4)
    model = AffineWarp(data, nn.init.uniform_, a=0.5, b=1.0)
    first = model.amounts.detach().clone()
    model.reset_parameters()
    assert (model.amounts >= 0.5).all() and not torch.equal(model.amounts, first)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, r"`rotation` must be >= 0, got -1", {"rotation": -1.0}),
        (ValueError, r"`scale` must be finite, got inf", {"scale": math.inf}),
        (TypeError, r"`shear` must be a number, got '1'", {"shear": "1"}),
        (ValueError, r"`padding_mode` must be one of .*'constant'", {"padding_mode": "constant"}),
        (TypeError, r"`init_fn` must be given with its arguments", {"a": 1.0}),
    ],
)
def test_wrong_settings_are_refused(error, message, make):
    with pytest.raises(error, match=message):
        AffineWarp(images(2, 1, 4, 4), **make)


def test_wrong_data_are_refused():
    with pytest.raises(ValueError, match=r"`data` must have the dims \(N, C, H, W\), got \(2, 3\)"):
        AffineWarp(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`data_or_shape` must have the dims"):
        AffineWarp((2, 3))
    with pytest.raises(
        TypeError, match="`data` must be of a floating-point dtype .* got torch.uint8"
    ):
        AffineWarp(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`data` must have 2 rows, one per row of amounts, got 3"):
        AffineWarp((2, 1, 4, 4))(images(3, 1, 4, 4))


def test_an_optimizer_finds_the_turn_that_moves_a_bar_under_a_reader():
    """The reader sums the pixels of a row; the image has a bar that is turned away from it."""
    data = torch.zeros(1, 1, 21, 21)
    data[:, :, 10, 3:18] = 1.0
    slanted = AffineWarp(data, nn.init.ones_, **{**NONE, "rotation": 25.0})(data).detach()
    model = AffineWarp(slanted, **{**NONE, "rotation": 60.0})
    optimizer = ProjectedOptimizer(
        model.parameters(), torch.optim.Adam, constraint=LinfBall(1.0), lr=0.02, maximize=True
    )
    for _ in range(100):
        optimizer.zero_grad()
        model(slanted)[:, :, 10].sum().backward()
        optimizer.step()
    assert model.settings()["rotation"].item() == pytest.approx(-25.0, abs=2.0)


@pytest.fixture(scope="module")
def reader():
    """A small net that reads digits, and digits that it reads right."""
    train, test = load_digits()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    for _ in range(2):
        for images, labels in DataLoader(TensorDataset(*train), 100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    right = net(test.images).argmax(1) == test.labels
    return net, test.images[right][:60], test.labels[right][:60]


@pytest.mark.slow
def test_the_worst_turn_of_digits_is_that_of_a_grid(reader):
    net, images, labels = reader
    turns = {**NONE, "rotation": 40.0}
    start = partial(nn.init.uniform_, a=-1.0, b=1.0, generator=torch.Generator().manual_seed(0))
    found, losses = random_restart(gradient_ascent, 3)(
        model=net,
        data=images,
        target=labels,
        perturbation_model=partial(AffineWarp, init_fn=start, **turns),
        optimizer=partial(PGD, constraint=LinfBall(1.0), lr=0.1),
        criterion=margin_loss,
        steps=20,
        use_best=True,
    )
    on_grid = []
    for amount in torch.linspace(-1, 1, 41):
        model = AffineWarp(images, nn.init.constant_, val=float(amount), **turns)
        on_grid.append(margin_loss(net(model(images)), labels).detach())
    best = torch.stack(on_grid).amax(0)
    torch.testing.assert_close(margin_loss(net(found), labels), losses)
    assert (losses >= best - 0.3).float().mean() > 0.9
    assert ((losses > 0).sum() >= 0.95 * (best > 0).sum()) and (best > 0).sum() > 5


@pytest.mark.slow
def test_what_is_found_over_random_turns_fools_more_of_them(reader):
    net, images, labels = reader
    images, labels = images[:20], labels[:20]

    class Turned(nn.Module):
        def forward(self, data):
            turn = AffineWarp(data, nn.init.uniform_, a=-1.0, b=1.0, rotation=30.0)
            return net(turn.requires_grad_(False)(data))

    def solve(samples):
        torch.manual_seed(0)
        box = BoundedBall(L2Ball(1.5), -images, 1 - images)
        found, _ = gradient_ascent(
            model=Turned(),
            data=images,
            target=labels,
            optimizer=partial(PGD, constraint=box, lr=0.3),
            steps=15,
            samples=samples,
        )
        torch.manual_seed(1)
        with torch.no_grad():
            return torch.stack([Turned()(found).argmax(1) != labels for _ in range(20)])

    plain = margin_loss(net(images), labels).detach()
    assert (plain < 0).all()
    assert solve(8).float().mean() > solve(1).float().mean() > 0.2
