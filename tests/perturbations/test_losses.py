"""Losses of each example against plain loops, and what an attack can rely on."""

import math

import pytest
import torch

from rai_toolbox.perturbations.losses import (
    cross_entropy,
    dlr_loss,
    is_fooled,
    margin_loss,
    most_likely_rivals,
    rival_margin,
    targeted_dlr_loss,
)


@pytest.fixture
def logits():
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def target():
    return torch.randint(5, (40,), generator=torch.Generator().manual_seed(1))


def by_loops(name, z, y):
    others = sorted((v for j, v in enumerate(z) if j != y), reverse=True)
    ranked = sorted(z, reverse=True)
    if name == "margin":
        return others[0] - z[y]
    if name == "targeted dlr":
        return (others[0] - z[y]) / (ranked[0] - (ranked[2] + ranked[3]) / 2)
    if name == "dlr":
        return (others[0] - z[y]) / (ranked[0] - ranked[2])
    return math.log(sum(map(math.exp, z))) - z[y]


LOSSES = {
    "margin": margin_loss,
    "dlr": dlr_loss,
    "targeted dlr": targeted_dlr_loss,
    "cross entropy": cross_entropy,
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_that_of_a_loop_over_the_data(name, logits, target):
    expected = [by_loops(name, z, y) for z, y in zip(logits.tolist(), target.tolist(), strict=True)]
    found = LOSSES[name](logits, target)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_smooth_margin_has_the_gradient_of_a_mean_of_the_other_classes(logits, target):
    logits[0, :3] = torch.tensor([-torch.inf, 1.0, 1.0])  # masked, and (1 is the target) a tie
    target[0] = 1
    z = logits.requires_grad_()
    margin = margin_loss(z, target, smooth=True)
    assert torch.equal(margin, margin_loss(z, target))
    (found,) = torch.autograd.grad(margin.sum(), z)
    for row, y, m, slope in zip(z.tolist(), target.tolist(), margin.tolist(), found, strict=True):
        best = max(v for j, v in enumerate(row) if j != y)
        parts = [
            0.0 if j == y else math.exp((v - best) / abs(m)) if m else float(v == best)
            for j, v in enumerate(row)
        ]
        expected = torch.tensor(parts, dtype=torch.float64) / sum(parts)
        expected[y] = -1.0
        torch.testing.assert_close(slope, expected)


def toward_by_loops(name, z, y, t):
    ranked = sorted(z, reverse=True)
    if name == "cross entropy":
        return z[t] - math.log(sum(map(math.exp, z)))
    gap = 1 if name == "margin" else ranked[0] - (ranked[2] + ranked[3]) / 2
    return (z[t] - z[y]) / gap


@pytest.mark.parametrize("name", ["margin", "dlr", "cross entropy"])
def test_each_loss_toward_a_rival_is_that_of_a_loop(name, logits, target):
    rival = (target + torch.arange(40) % 4 + 1) % 5
    rows = zip(logits.tolist(), target.tolist(), rival.tolist(), strict=True)
    expected = torch.tensor([toward_by_loops(name, *row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](logits, target, rival), expected)


@pytest.mark.parametrize("name", ["margin", "dlr", "targeted dlr"])
def test_the_sign_tells_who_is_fooled(name, logits, target):
    assert torch.equal(LOSSES[name](logits, target) > 0, is_fooled(logits, target))
    assert torch.equal(LOSSES[name](logits, target) < 0, is_fooled(logits, target, targeted=True))


def test_dlr_does_not_change_with_shift_and_scale(logits, target):
    torch.testing.assert_close(dlr_loss(7 * logits + 3, target), dlr_loss(logits, target))


def test_only_the_targeted_dlr_lets_the_third_rise():
    z, third = torch.tensor([[5.0, 4.0, 3.0, 1.0]]), torch.tensor([2])

    def slope(loss):
        x = z.clone().requires_grad_()
        loss(x, third).sum().backward()
        return x.grad[0, 2].item()

    assert slope(dlr_loss) == 0
    assert slope(targeted_dlr_loss) < 0


def test_dlr_of_equal_logits_is_zero_with_a_finite_gradient():
    z = torch.ones(1, 4, requires_grad=True)
    loss = dlr_loss(z, torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == 0 and z.grad.isfinite().all()


def test_the_margin_never_saturates():
    # where softmax has no digits left, cross entropy is flat
    z = torch.tensor([[200.0, 0.0, -1.0]], requires_grad=True)
    cross_entropy(z, torch.tensor([0])).backward()
    assert not z.grad.any()
    z.grad = None
    margin_loss(z, torch.tensor([0])).backward()
    assert z.grad.tolist() == [[-1.0, 1.0, 0.0]]


def test_the_largest_rival_margin_is_the_margin(logits, target):
    rivals = most_likely_rivals(logits, target, 4)
    margins = torch.stack([rival_margin(r)(logits, target) for r in rivals.unbind(1)])
    assert torch.equal(margins[0], margin_loss(logits, target))
    assert (margins[:-1] >= margins[1:]).all()  # the likeliest first
    both = torch.cat([rivals, target[:, None]], 1).sort(1).values
    assert torch.equal(both, torch.arange(5).expand(40, 5))  # every other class, once


@pytest.mark.parametrize("loss", LOSSES.values())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_have_losses_in_float32(loss, dtype, logits, target):
    z = logits.to(dtype).requires_grad_()
    found = loss(z, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(z.detach().float(), target))
    found.sum().backward()
    assert z.grad.dtype == dtype


@pytest.mark.parametrize("m", [0, 5, -1])
def test_the_number_of_rivals_has_a_range(m, logits, target):
    with pytest.raises(ValueError, match=f"`m` must be from 1 to 4, .* got {m}"):
        most_likely_rivals(logits, target, m)


def toward_class_1(logits, target):
    return dlr_loss(logits, target, torch.ones_like(target))


@pytest.mark.parametrize(
    ("loss", "least"), [(dlr_loss, 3), (targeted_dlr_loss, 4), (toward_class_1, 4)]
)
def test_dlr_needs_several_classes(loss, least):
    with pytest.raises(ValueError, match=rf"`logits` must have at least {least} classes, got .*"):
        loss(torch.zeros(1, least - 1), torch.tensor([0]))


@pytest.mark.parametrize("row", [[torch.nan] * 3, [1.0, torch.nan, 2.0], [torch.nan, 1.0, 2.0]])
@pytest.mark.parametrize("of", range(3))
def test_of_nan_no_class_is_predicted(row, of):
    logits, target = torch.tensor([row]), torch.tensor([of])
    assert is_fooled(logits, target) and not is_fooled(logits, target, targeted=True)
