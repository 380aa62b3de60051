"""What is said of perturbed data is what is so of them, whoever made them."""

import math

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.evaluation.verification import (
    VerificationReport,
    beyond_ball,
    log_odds,
    predict,
    verify,
)

NAN, INF = float("nan"), float("inf")


def reads_larger(x):
    """Logits of two classes that are the two entries: the class is that of the larger one."""
    return x


def verified(data, perturbed, ball, target=0, data_range=(0.0, 1.0), model=reads_larger):
    data = torch.tensor([data])
    found = torch.tensor([perturbed], dtype=data.dtype)
    return verify(model, data, torch.tensor([target]), found, ball=ball, data_range=data_range)


@pytest.mark.parametrize(
    ("ball", "norm"), [(LinfBall, 0.25), (L2Ball, math.hypot(0.25, 0.125)), (L1Ball, 0.375)]
)
def test_the_norm_is_that_of_the_change(ball, norm):
    data, perturbed = [0.5, 0.25], [0.25, 0.375]  # exact in float32
    assert verified(data, perturbed, ball(norm)) == VerificationReport(data=1, fooled=1)
    smaller = verified(data, perturbed, ball(norm - 1e-6))
    assert (smaller.outside_ball, smaller.fooled) == (1, 0)  # outside, it shows nothing
    assert smaller.ball_excess == pytest.approx(1e-6, rel=0.02)
    assert not smaller.feasible


@pytest.mark.parametrize(("perturbed", "excess"), [([1.25, 0.5], 0.25), ([1.0, -0.5], 0.5)])
def test_the_range_is_that_of_the_perturbed_data(perturbed, excess):
    report = verified([0.75, 0.25], perturbed, LinfBall(1.0), data_range=(0.0, 1.0))
    assert (report.outside_box, report.box_excess) == (1, excess)
    assert report.outside_ball == 0
    free = verified([0.75, 0.25], perturbed, LinfBall(1.0), data_range=None)
    assert (free.outside_box, free.box_excess) == (0, 0.0)
    own = torch.tensor([[0.0, -0.5]]), torch.tensor([[1.25, 0.5]])  # of each element
    assert verified([0.75, 0.25], perturbed, LinfBall(1.0), data_range=own).outside_box == 0


def test_bounds_of_elements_count_as_rounded_to_the_dtype():
    at_bound = torch.tensor(0.1).item()
    assert at_bound > 0.1  # as a float32
    report = verified([0.0, 0.0], [at_bound, 0.0], LinfBall(0.1), data_range=(0.0, 0.1))
    assert (report.outside_ball, report.outside_box) == (0, 0)
    above = torch.tensor(0.1).nextafter(torch.tensor(1.0)).item()
    report = verified([0.0, 0.0], [above, 0.0], LinfBall(0.1), data_range=(0.0, 0.1))
    assert (report.outside_ball, report.outside_box) == (1, 1)
    data, target = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0])
    above = torch.full((1, 2), 0.1 + 1e-12, dtype=torch.float64)  # nearer than the next float32
    report = verify(reads_larger, data, target, above, ball=LinfBall(1.0), data_range=(0.0, 0.1))
    assert report.outside_box == 1


# Points that others made: rounding of data and of the sum is no excess

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BYTES = torch.arange(256, dtype=torch.float64)


def excess_without_allowance(data, perturbed, ball):
    change = (perturbed.double() - data.double()).flatten(1)
    return torch.linalg.vector_norm(change, ball.p, dim=1) - ball.epsilon


def examples_of_bytes(number, size, dtype):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, size), generator=generator).double()
    pixels[::2, ::3] = 0  # where the sum is not rounded, but the perturbation is
    toward = torch.randn(number, size, generator=generator, dtype=torch.float64).abs()
    return (pixels / 255).to(dtype), torch.where(pixels < 128, toward, -toward).to(dtype)


def projected_as_in_textbooks(delta, ball):
    """In the dtype of delta, each operation rounded."""
    if ball.p == math.inf:
        return delta.clamp(-ball.epsilon, ball.epsilon)
    norms = torch.linalg.vector_norm(delta, ball.p, dim=1, keepdim=True)
    return delta * (ball.epsilon / norms).clamp(max=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", [LinfBall(0.1), LinfBall(8 / 255), L2Ball(0.3), L1Ball(2.0)])
def test_points_of_textbook_solvers_are_inside(ball, dtype):
    beyond = 0
    for size in (2, 64, 784):
        data, noise = examples_of_bytes(200, size, dtype)
        perturbed = (data + projected_as_in_textbooks(noise, ball)).clamp(0, 1)
        beyond += int((excess_without_allowance(data, perturbed, ball) > 0).sum())
        assert (beyond_ball(data, perturbed, ball) <= 0).all()
    assert beyond > 20  # this tests something


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changed", [1, 8])
def test_steps_on_the_grid_of_bytes_are_inside(changed, dtype):
    data, perturbed = (BYTES[:-changed] / 255), (BYTES[changed:] / 255)
    radius, size = changed / 255, len(data)
    one_by_one = [tensor.to(dtype).unsqueeze(1) for tensor in (data, perturbed)]
    together = [tensor.to(dtype).unsqueeze(0) for tensor in (data, perturbed)]
    for ball in (LinfBall(radius), L2Ball(radius), L1Ball(radius)):
        assert (beyond_ball(*one_by_one, ball) <= 0).all()
        assert (beyond_ball(*reversed(one_by_one), ball) <= 0).all()
    for ball in (LinfBall(radius), L2Ball(radius * size**0.5), L1Ball(radius * size)):
        assert (beyond_ball(*together, ball) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [8 / 255, 0.1, 0.3, 2.7, 3e-5])
def test_the_allowance_is_a_bound_for_every_number_and_not_more(dtype, epsilon):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    data = bits.view(dtype)
    data = data[data.abs() <= 4].unsqueeze(1)  # all of them
    perturbed = data + torch.tensor(epsilon, dtype=dtype)
    ball = LinfBall(epsilon)
    assert (beyond_ball(data, perturbed, ball) <= 0).all()
    assert (beyond_ball(perturbed, data, ball) <= 0).all()
    steps = torch.finfo(dtype).eps * torch.maximum(data.abs(), perturbed.abs()).double()
    outside = (data.double() + epsilon + 3 * steps + 1e-7).to(dtype)  # three steps of the dtype
    ball_excess = beyond_ball(data, outside, ball)
    assert torch.equal(ball_excess, excess_without_allowance(data, outside, ball))
    assert (ball_excess > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_points_really_outside_are_refused(ball, dtype):
    data, _ = examples_of_bytes(50, 64, dtype)
    perturbed = data + (0.125 + 0.125 * (data < 0.5))
    norms = excess_without_allowance(data, perturbed, ball(0.0))
    share = {torch.float16: 0.03, torch.bfloat16: 0.2, torch.float32: 3e-6, torch.float64: 1e-14}
    assert (beyond_ball(data, perturbed, ball(norms.min().item() / (1 + share[dtype]))) > 0).all()


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_a_radius_beyond_the_dtype_is_no_infinite_one(ball):
    data = torch.full((1, 2), -6e4, dtype=torch.float16)
    assert beyond_ball(data, -data, ball(7e4)).item() > 4e4
    assert beyond_ball(data, -data, ball(3e5)).item() <= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", [LinfBall(8 / 255), L2Ball(0.3), L1Ball(2.0)])
def test_our_own_points_need_no_allowance(ball, dtype):
    torch.manual_seed(0)
    data, _ = examples_of_bytes(20, 64, dtype)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    found = attack(model, data, torch.arange(20) % 3, ball=ball, steps=5)
    rounded = max(ball.epsilon, torch.tensor(ball.epsilon).to(dtype).item())  # elementwise bounds
    radius = rounded if ball.p == math.inf else ball.epsilon
    judge = type(ball)(radius * (1 + 66 * 2.0**-53))  # the rounding of float64
    assert (excess_without_allowance(data, found.data, judge) <= 0).all()


def test_radii_may_differ_between_data():
    data, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    ball = L1Ball(torch.tensor([[1.0], [2.0]]))
    perturbed = torch.full((2, 3), 0.5)
    report = verify(reads_larger, data, target, perturbed, ball=ball)
    assert (report.outside_ball, report.ball_excess) == (1, 0.5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_fools_nobody(bad):
    report = verified([0.75, 0.25], [bad, 0.5], LinfBall(1.0))
    assert (report.not_finite, report.fooled) == (1, 0)
    assert not report.feasible
    assert math.isfinite(report.ball_excess) and math.isfinite(report.box_excess)


def test_a_model_that_answers_nan_does_not_read():
    data, target = torch.full((1, 2), 0.5), torch.tensor([0])
    # argmax would name the first NaN, which is the right class
    assert predict(lambda x: x * NAN, data, target).misclassified.tolist() == [True]
    report = verified([0.75, 0.25], [0.5, 0.25], LinfBall(0.25), model=lambda x: x.log() * NAN)
    assert report.not_finite == 1


def test_log_odds_order_data_as_cross_entropy_does_and_never_saturate():
    logits = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.arange(50) % 7
    expected = nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(nn.functional.softplus(log_odds(logits, target)), expected)
    sure = torch.tensor([[5000.0, 0.0], [4999.0, 0.0]])
    assert log_odds(sure, torch.tensor([0, 0])).tolist() == [-5000, -4999]


def test_zero_gradients_and_losses_that_do_not_rise_are_counted():
    cut = nn.Sequential(nn.Linear(2, 2), nn.Threshold(0.5, 0.0))
    with torch.no_grad():
        cut[0].weight.copy_(torch.eye(2))
        cut[0].bias.zero_()
    data = torch.tensor([[0.25, 0.125], [0.75, 0.25], [0.75, 0.125]])
    perturbed = data + torch.tensor([[0.125, 0.0], [-0.125, 0.0], [0.125, 0.0]])
    target = torch.zeros(3, dtype=torch.long)
    report = verify(cut, data, target, perturbed, ball=LinfBall(0.25))
    assert report == VerificationReport(data=3, zero_gradient=1, not_risen=2)
    assert report.feasible


@pytest.mark.parametrize("model", [lambda x: torch.eye(2)[:1], lambda x: x.detach()])
def test_a_model_without_a_graph_has_zero_gradient(model):
    assert verified([0.5, 0.25], [0.5, 0.25], LinfBall(0.1), model=model).zero_gradient == 1


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        verify(
            model, torch.rand(4, 2), torch.tensor([0, 1, 0, 1]), torch.rand(4, 2), ball=L2Ball(1)
        )
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reports_add_up_to_that_of_all():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.rand(20, 3, generator=generator), torch.randn(20, 3, generator=generator)
    target = torch.arange(20) % 3
    perturbed = data + 0.2 * noise
    perturbed[7] = NAN
    parts = [
        verify(reads_larger, data[s], target[s], perturbed[s], ball=L2Ball(0.4))
        for s in (slice(0, 8), slice(8, 20))
    ]
    whole = verify(reads_larger, data, target, perturbed, ball=L2Ball(0.4))
    assert parts[0] + parts[1] == whole
    assert min(whole.outside_ball, whole.outside_box, whole.not_risen, whole.fooled) > 0


def test_each_kind_of_trouble_has_its_words():
    assert VerificationReport(data=5, fooled=2).warnings() == []
    report = VerificationReport(8, 1, 2, 0.5, 3, 0.25, 4, 5, 6)
    assert report.warnings("L2 1") == [
        "L2 1: 2 of 8 examples (25.0%) are outside the ball, by up to 0.5",
        "L2 1: 3 of 8 examples (37.5%) are outside the data range, by up to 0.25",
        "L2 1: 4 of 8 examples (50.0%) have an infinity or NaN in data, loss or gradient",
        "L2 1: the gradient is exactly 0 at 5 of 8 examples (62.5%): the model is flat there",
        "L2 1: the loss did not rise for 6 of 8 examples (75.0%)",
    ]


def test_a_ball_of_which_most_used_little_is_warned_of():
    few = VerificationReport(data=10, fooled=4, underused=3)
    most = VerificationReport(data=10, fooled=5, underused=3)
    assert few.warnings() == []
    assert most.warnings("L2 1") == [
        "L2 1: 3 of 10 examples (30.0%) withstand within half of the radius: "
        "take more or longer steps"
    ]
    assert (most + few).underused == 6 and (most + few).warnings() != []


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_little_use_of_the_ball_is_counted(ball):
    data, perturbed = [0.75, 0.25], [0.6875, 0.25]  # the loss rises, the class stays
    counts = [verified(data, perturbed, ball(1 / 8 + d)).underused for d in (-1e-3, 0, 1e-3)]
    assert counts == [0, 0, 1]
    assert verified(data, [0.8125, 0.25], ball(1.0)).underused == 0  # the loss falls
    assert verified(data, perturbed, ball(1.0), target=1).underused == 0  # fooled
    radii = verified(data, perturbed, ball(torch.tensor([[1.0]])))
    assert radii.underused == 1


def test_no_data_is_no_trouble():
    empty = torch.zeros(0, 2)
    report = verify(reads_larger, empty, torch.zeros(0, dtype=torch.long), empty, ball=L1Ball(1))
    assert report == VerificationReport() and report.warnings() == []


DATA, TARGET = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"ball": 0.1}, TypeError, "`ball` must be a LinfBall, L2Ball or L1Ball, got 0.1"),
        ({"ball": LinfBall(0.1, center=1.0)}, ValueError, "`ball` must have no center"),
        (
            {"data": DATA.byte()},
            TypeError,
            "of a floating-point dtype .* got torch.uint8",
        ),
        ({"data": [0.0]}, TypeError, "`data` and `target` must be tensors, got list"),
        ({"target": TARGET[:1]}, ValueError, r"shape \(2,\), got shape \(1,\)"),
        ({"target": TARGET.float()}, TypeError, "hold classes, .* got torch.float32"),
        ({"target": TARGET + 2}, ValueError, r"`target` must hold classes from 0 to 2, got 3"),
        ({"target": TARGET - 1}, ValueError, r"`target` must hold classes from 0 to 2, got -1"),
        ({"perturbed": DATA[:, :2]}, ValueError, r"shape \(2, 3\), got torch.float32 of"),
        ({"perturbed": DATA.numpy()}, TypeError, r"tensor, got ndarray \(use `torch.from_numpy`\)"),
        ({"perturbed": DATA.long()}, ValueError, "floating-point .* got torch.int64"),
        ({"model": lambda x: x.sum(1)}, ValueError, r"logits of shape \(2, K\)"),
        ({"model": lambda x: [x]}, ValueError, "got list"),
    ],
)
def test_bad_input_is_refused(changed, error, said):
    good = {"model": reads_larger, "data": DATA, "target": TARGET, "perturbed": DATA}
    good["ball"] = LinfBall(0.1)
    verify(*list(good.values())[:4], ball=good["ball"])
    bad = good | changed
    with pytest.raises(error, match=said):
        verify(bad["model"], bad["data"], bad["target"], bad["perturbed"], ball=bad["ball"])
