"""One perturbation for all: closed forms on linear models, the ball, the loop, bad input."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall, Simplex
from rai_toolbox.optim import ProjectedOptimizer
from rai_toolbox.perturbations.losses import margin_loss
from rai_toolbox.perturbations.universal import universal_perturbation

BALLS = [LinfBall(0.1), L2Ball(0.5), L1Ball(1.0)]

find = partial(universal_perturbation, progress=False)


class TwoClasses(nn.Module):
    """Class 1 where ``w . x > threshold``; counts its calls and the range of what it sees."""

    def __init__(self, weight, threshold):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.threshold = threshold
        self.calls, self.low, self.high = 0, float("inf"), -float("inf")

    def forward(self, data):
        self.calls += 1
        self.low, self.high = min(self.low, data.min().item()), max(self.high, data.max().item())
        score = (data * self.weight).flatten(1).sum(1) - self.threshold
        return torch.stack([-score, score], dim=1)


def batches(n=24, shape=(1, 3, 4), size=7, dtype=torch.float32):
    """Data well inside the unit range, all of class 0, in batches that do not divide them."""
    generator = torch.Generator().manual_seed(0)
    data = 0.6 + 0.2 * (torch.rand(n, *shape, generator=generator, dtype=torch.float64) - 0.5)
    return DataLoader(TensorDataset(data.to(dtype), torch.zeros(n).long()), size)


def weights(shape=(1, 3, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
def test_on_a_linear_model_it_is_the_corner_of_the_ball(ball):
    weight = weights()
    model = TwoClasses(weight, threshold=1e3)
    settings = {"criterion": margin_loss, "data_range": None, "epochs": 30}
    found = find(model, batches(), ball=ball, **settings)
    gain = ball.epsilon * torch.linalg.vector_norm(
        weight.flatten(), {LinfBall: 1, L2Ball: 2, L1Ball: float("inf")}[type(ball)]
    )
    assert found.delta.shape == weight.shape and found.delta.dtype == weight.dtype
    assert not ball.violation(found.delta.unsqueeze(0)).any()
    assert (found.delta * weight).sum() == pytest.approx(gain.item(), rel=0.02)


def test_the_rates_are_those_of_all_the_data():
    loader = batches()
    data, target = loader.dataset.tensors
    weight = weights()
    scores = (data * weight).flatten(1).sum(1)
    model = TwoClasses(weight, threshold=scores.sort().values[18].item())  # 5 of 24 beyond it
    found = find(model, loader, ball=LinfBall(0.005), epochs=20)
    after = model(data + found.delta).argmax(1) != target
    assert found.fooled_before == 5 / 24
    assert found.fooled_after == after.sum().item() / 24 > found.fooled_before


def test_targeted_the_wanted_class_is_what_comes_out():
    model = TwoClasses(weights(), threshold=0.0)
    loader = batches()
    wanted = (model(loader.dataset.tensors[0]).argmax(1) == 0).long().mode().values
    targets = TensorDataset(loader.dataset.tensors[0], wanted.expand(24).clone())
    found = find(model, DataLoader(targets, 8), ball=LinfBall(0.5), targeted=True, epochs=10)
    assert found.fooled_before < found.fooled_after == 1.0


@pytest.mark.parametrize(
    "data_range", [(0.5, 0.7), (torch.full((1, 3, 4), 0.5), torch.tensor(0.7))]
)
def test_the_model_sees_data_in_their_range_only(data_range):
    model = TwoClasses(weights(), threshold=1e3)
    settings = {"criterion": margin_loss, "data_range": data_range, "epochs": 4}
    found = find(model, batches(), ball=LinfBall(0.3), **settings)
    assert torch.tensor(0.5).item() <= model.low and model.high <= torch.tensor(0.7).item()
    assert found.delta.abs().max() > 0.1  # and not because it did not move


def test_without_a_range_nothing_is_clipped():
    model = TwoClasses(weights(), threshold=1e3)
    settings = {"criterion": margin_loss, "data_range": None, "epochs": 10}
    find(model, batches(), ball=LinfBall(2.0), **settings)
    assert model.low < -1 and model.high > 2


@pytest.mark.parametrize("ball", [LinfBall(0.5), L2Ball(1.0)], ids=repr)
def test_entries_of_gradients_that_are_not_finite_count_as_0_in_each_example(ball):
    torch.manual_seed(0)
    net, data = nn.Linear(8, 3), torch.rand(60, 8)
    data[torch.arange(60), torch.arange(60) % 8] = 0.0  # at each entry of some examples
    with torch.no_grad():
        net.bias.sub_(net(data).mean(0))  # else all data are of one class
    target = net(data).argmax(1)

    def squares_of_roots(x):  # whose slope at 0 is 0 times infinity
        return net(x.sqrt().square())

    with pytest.warns(UserWarning, match="60 entries of the first gradient are not finite"):
        found = find(squares_of_roots, [(data, target)], ball=ball)
    assert found.delta.isfinite().all()
    expected = find(net, [(data, target)], ball=ball)
    assert found.fooled_after >= 0.75 * expected.fooled_after > 0.1


def test_a_loss_that_is_not_finite_does_not_stop_the_search_from_ending():
    model, calls = TwoClasses(weights(), threshold=1e3), []

    def criterion(logits, target):
        calls.append(1)
        return margin_loss(logits, target) + torch.tensor([torch.nan, *[0.0] * 23])

    found = find(model, batches(size=24), ball=LinfBall(0.1), criterion=criterion)
    assert len(calls) < 50 and (found.delta.sign() == weights().sign()).all()


def test_an_optimizer_without_a_step_of_its_own_is_refused():
    for optimizer in (ProjectedOptimizer, partial(ProjectedOptimizer, InnerOpt=torch.optim.Adam)):
        with pytest.raises(TypeError, match="`optimizer` must be given `lr`, in units of the data"):
            find(TwoClasses(weights(), 1.0), batches(), ball=LinfBall(0.1), optimizer=optimizer)


def test_any_optimizer_with_a_constraint_will_do():
    weight = weights()
    adam = partial(ProjectedOptimizer, InnerOpt=torch.optim.Adam, lr=0.05)
    model = TwoClasses(weight, threshold=1e3)
    ball = L2Ball(0.5)
    found = find(
        model,
        batches(),
        ball=ball,
        optimizer=adam,
        criterion=margin_loss,
        epochs=60,
        data_range=None,
    )
    best = 0.5 * weight / weight.norm()
    torch.testing.assert_close(found.delta, best, atol=0.01, rtol=0)


def test_a_pass_costs_a_call_for_each_batch_and_the_model_is_as_before():
    model = TwoClasses(weights(), threshold=1e3).train()
    with torch.inference_mode():
        find(model, batches(), ball=LinfBall(0.1), epochs=3)
    assert model.calls == (1 + 3 + 1) * 4
    assert model.training and model.weight.requires_grad and model.weight.grad is None


def test_it_shows_its_progress_if_asked(capsys):
    model = TwoClasses(weights(), threshold=1e3)
    find(model, batches(), ball=LinfBall(0.1), epochs=1)
    assert capsys.readouterr().err == ""
    universal_perturbation(model, batches(), ball=LinfBall(0.1), epochs=1)
    assert "universal perturbation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message", "loader", "settings"),
    [
        (TypeError, "`loader` must be iterable more than once", iter(batches()), {}),
        (ValueError, "`loader` must have data, got none", [], {}),
        (ValueError, "`epochs` must be >= 1, got 0", batches(), {"epochs": 0}),
        (TypeError, "`ball` must be a LinfBall, L2Ball or L1Ball", batches(), {"ball": Simplex()}),
        (
            ValueError,
            "`epsilon` of `ball` must be a finite number",
            batches(),
            {"ball": LinfBall(torch.ones(2, 1))},
        ),
        (
            ValueError,
            "`epsilon` of `ball` must be a finite number",
            batches(),
            {"ball": LinfBall(float("inf"))},
        ),
        (
            ValueError,
            "`criterion` must give one value for each example",
            batches(),
            {"criterion": nn.CrossEntropyLoss()},
        ),
        (
            TypeError,
            "`data` must be of a floating-point dtype",
            [(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2).long())],
            {},
        ),
    ],
)
def test_wrong_input_is_refused(error, message, loader, settings):
    model = TwoClasses(weights(), threshold=1e3)
    with pytest.raises(error, match=message):
        find(model, loader, **{"ball": LinfBall(0.1), **settings})


@pytest.mark.parametrize("size", [24, 3])
@pytest.mark.parametrize("criterion", [None, margin_loss])
def test_the_defaults_get_there_with_few_batches_and_stop(size, criterion):
    weight = weights()
    model = TwoClasses(weight, threshold=0.0)
    model.threshold = (0.6 * weight).sum().item() + 0.9 * 0.1 * weight.abs().sum().item()
    found = find(model, batches(size=size), ball=LinfBall(0.1), criterion=criterion)
    assert torch.equal(found.delta, 0.1 * weight.sign())
    assert found.fooled_before == 0.0 < found.fooled_after
    assert model.calls <= (2 + 25) * (24 // size)


@pytest.mark.slow
def test_digits_are_misread_in_numbers():
    from rai_toolbox.cli.digits import load_digits

    train, test = load_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.images), train.labels).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(*train.first(500)), 50)
    ball = LinfBall(0.15)
    found = find(model, loader, ball=ball, epochs=3)

    def misread(delta):
        return (model((test.images + delta).clamp(0, 1)).argmax(1) != test.labels).float().mean()

    chance = ball.sample_(torch.empty(1, 1, 28, 28), torch.Generator().manual_seed(0)).sign() * 0.15
    assert found.fooled_after > 0.5 > 0.2 > found.fooled_before
    assert misread(found.delta) > 0.5 and misread(chance) < 0.3  # also of digits not seen before
