"""Targets that are not one class: linear models, whose least radii are known, of four kinds."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from rai_toolbox.constraints import L2Ball
from rai_toolbox.perturbations import (
    Attacked,
    RobustnessReport,
    StateFileError,
    VerificationReport,
    attack,
    cross_entropy,
    evaluate_robustness,
    gradient_ascent,
    margin_loss,
    minimum_norm_attack,
    universal_perturbation,
    verify,
)

N, WIDTH = 12, 0.5


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def linear(outputs):
    """Weights with rows of length 1."""
    return functional.normalize(draw(outputs, 6), dim=1)


class Kind:
    """Model, data, targets, a loss, the rule of who is fooled, and the least radii."""

    def correct(self, output, target):
        return ~self.fooled(output, target)


class Regression(Kind):
    def __init__(self):
        self.model, self.data = nn.Linear(6, 1).double(), draw(N, 6)
        self.target = self.model(self.data).detach() + 0.4 * draw(N, 1).tanh()

    def criterion(self, output, target):
        return (output - target).square().mean(1)

    def fooled(self, output, target):
        return ((output - target).abs() > WIDTH).any(1)

    def least(self):
        error = (self.model(self.data) - self.target).abs().squeeze(1)
        return (WIDTH - error) / self.model.weight.norm()


class OneLogit(Kind):
    def __init__(self):
        weight = linear(1)
        self.model, self.data = lambda x: x @ weight.T, draw(N, 6)
        self.target = (self.model(self.data) > 0).squeeze(1).long()

    def criterion(self, output, target):
        logit, target = output.squeeze(1), target.double()
        return functional.binary_cross_entropy_with_logits(logit, target, reduction="none")

    def fooled(self, output, target):
        return (output.squeeze(1) > 0) != (target == 1)

    def least(self):
        return self.model(self.data).abs().squeeze(1)


class ManyLabels(Kind):
    def __init__(self):
        weight = linear(3)
        self.model, self.data = lambda x: x @ weight.T, draw(N, 6)
        self.target = self.model(self.data) > 0

    def criterion(self, output, target):
        return torch.where(target, -output, output).amax(1)

    def fooled(self, output, target):
        return ((output > 0) != target).any(1)

    def least(self):
        return self.model(self.data).abs().amin(1)


class Pixels(Kind):
    """The output is a dict, as in torchvision's models of segmentation."""

    def __init__(self):
        layer, self.data = nn.Conv2d(3, 2, 1).double(), draw(N, 3, 2, 2)
        self.weight, self.model = layer.weight, lambda x: {"out": layer(x)}
        self.target = self.model(self.data)["out"].argmax(1)

    def margins(self, output, target):
        margin = output["out"][:, 1] - output["out"][:, 0]
        return torch.where(target == 0, margin, -margin).flatten(1)

    def criterion(self, output, target):
        return self.margins(output, target).amax(1)

    def fooled(self, output, target):
        return (output["out"].argmax(1) != target).flatten(1).any(1)

    def least(self):
        margins = self.margins(self.model(self.data), self.target)
        return margins.abs().amin(1) / (self.weight[1] - self.weight[0]).norm()


KINDS = [Regression, OneLogit, ManyLabels, Pixels]
of_each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@of_each_kind
def test_an_attack_succeeds_beyond_the_least_radii(kind):
    of = kind()
    least = of.least().detach()
    run = partial(attack, of.model, of.data, of.target, data_range=None, criterion=of.criterion)
    for factor, succeeds in ((1.01, True), (0.99, False)):
        found = run(ball=L2Ball(least * factor), fooled=of.fooled, steps=20)
        assert isinstance(found, Attacked) and (found.fooled == succeeds).all()
        with torch.no_grad():
            output = of.model(found.data)
            assert torch.equal(found.losses, of.criterion(output, of.target))
            assert torch.equal(found.fooled, of.fooled(output, of.target))
    alone = run(ball=L2Ball(least), steps=20)  # no rule: the largest loss, and nobody counts
    assert not alone.fooled.any()
    torch.testing.assert_close(alone.losses, found.losses, rtol=0.1, atol=0.1)
    stopped = run(ball=L2Ball(1.1 * least), fooled=of.fooled, stop_once_fooled=True)
    assert stopped.fooled.all() and stopped.model_calls < 101


@of_each_kind
def test_the_smallest_perturbations(kind):
    of = kind()
    found = minimum_norm_attack(
        of.model, of.data, of.target, ball=L2Ball, data_range=None, largest=50.0, steps=20,
        search_steps=25, criterion=of.criterion, fooled=of.fooled,
    )  # fmt: skip
    ratio = (found.radius / of.least()).detach()
    assert found.fooled.all() and (1 - 1e-9 <= ratio).all() and (ratio <= 1.01).all()
    with torch.no_grad():
        assert of.fooled(of.model(found.data), of.target).all()
    none = minimum_norm_attack(
        of.model, of.data, of.target, ball=L2Ball, data_range=None, largest=1e-6,
        steps=2, criterion=of.criterion, fooled=of.fooled,
    )  # fmt: skip
    assert not none.fooled.any() and none.radius.isinf().all()


def test_a_point_that_fools_in_another_batch_only_is_not_the_end():
    of = OneLogit()
    side = torch.where(of.target == 1, 1.0, -1.0)[:, None]

    def model(data):  # in the whole batch, a point next to the boundary does not fool
        return of.model(data) + (0.01 * side if len(data) == N else 0)

    found = minimum_norm_attack(
        model, of.data, of.target, ball=L2Ball, data_range=None, largest=50.0, steps=20,
        criterion=of.criterion, fooled=of.fooled,
    )  # fmt: skip
    assert found.fooled.all() and of.fooled(model(found.data), of.target).all()
    change = (found.data - of.data).norm(dim=1)
    torch.testing.assert_close(found.radius, change)


@of_each_kind
@pytest.mark.parametrize("how", ["argument", "solver", "own solver"])
def test_robust_accuracy(kind, how):
    of = kind()
    least = of.least().detach()
    radii = least.sort().values[[2, 6]] + 1e-3
    loss, solver = of.criterion, partial(attack, criterion=of.criterion)

    def own(model, data, target, *, ball, data_range, generator):
        return solver(model, data, target, ball=ball, data_range=data_range)

    how = {"argument": {"criterion": loss}, "solver": {"solver": solver}, "own solver": {
        "solver": own}}[how]  # fmt: skip
    batches = [(of.data[i : i + 4], of.target[i : i + 4]) for i in range(0, N, 4)]
    balls = [L2Ball(radius) for radius in radii.tolist()]
    report = evaluate_robustness(
        of.model, batches, balls=balls, data_range=None, progress=False, correct=of.correct,
        examples=2, **how,
    )  # fmt: skip
    assert report.clean_accuracy == 1
    for ball in balls:
        assert report.robust_accuracy(ball) == (least > ball.epsilon).double().mean()
    assert report.warnings() == [] and report.feasible
    assert report.settings["correct"] == "test_targets.Kind.correct"
    (shown,) = report.examples
    assert shown.misread.shape == (2,) and shown.target.shape == of.target[:2].shape


@of_each_kind
def test_verification(kind):
    of = kind()
    ball = L2Ball(float(of.least().median().detach()) + 1e-3)
    run = partial(verify, of.model, of.data, of.target, ball=ball, data_range=None)
    found = attack(
        of.model, of.data, of.target, ball=ball, data_range=None, criterion=of.criterion,
        fooled=of.fooled,
    )  # fmt: skip
    expected = VerificationReport(N, int(found.fooled.sum()))
    assert 0 < expected.fooled < N
    assert run(found.data, correct=of.correct, criterion=of.criterion) == expected
    assert run(found.data, correct=of.correct) == expected
    still = run(of.data, correct=of.correct, criterion=of.criterion)
    assert still == VerificationReport(N, not_risen=N)
    assert run(of.data, correct=of.correct) == VerificationReport(N)  # without a loss


@of_each_kind
def test_one_perturbation_for_all(kind):
    of = kind()
    run = partial(
        universal_perturbation, of.model, [(of.data, of.target)], ball=L2Ball(2.0), epochs=5,
        data_range=None, progress=False, criterion=of.criterion,
    )  # fmt: skip
    found = run(fooled=of.fooled)
    assert found.fooled_before == 0 and found.fooled_after > 0.2
    assert torch.equal(run().delta, found.delta) and run().fooled_after == 0


# --- classes ------------------------------------------------------------------------------------


def of_classes():
    model, data = nn.Linear(6, 4).double(), draw(N, 6)
    return model, data, model(data).argmax(1)


def test_a_rule_of_ones_own_for_classes():
    model, data, target = of_classes()

    def far(output, target):  # by a margin
        return margin_loss(output, target) > 0.5

    run = partial(
        attack, model, data, target, ball=L2Ball(0.8), data_range=None, rivals=2, steps=20
    )
    found, default = run(fooled=far), run()
    assert torch.equal(found.fooled, default.losses > 0.5)
    assert torch.equal(default.fooled, default.losses > 0)
    search = partial(
        minimum_norm_attack, model, data, target, ball=L2Ball, data_range=None, largest=9.0, steps=9
    )
    assert (search(fooled=far).radius > search().radius).all()


def test_a_criterion_alone_keeps_the_rule_of_classes():
    model, data, target = of_classes()
    run = partial(attack, model, data, ball=L2Ball(0.8), data_range=None)
    assert run(
        target=target, criterion=lambda output, target: margin_loss(output, target)
    ).fooled.any()
    search = partial(
        minimum_norm_attack, model, data, target, ball=L2Ball, data_range=None, largest=9.0, steps=9
    )
    assert search(criterion=cross_entropy).fooled.all()
    with pytest.raises(ValueError, match=r"classes from 0 to 3, got 4 \(if not a class: pass"):
        run(target=torch.full_like(target, 4), criterion=cross_entropy)


def test_integers_that_are_no_classes():
    model, data, target = of_classes()
    found = attack(
        model, data, 100 + target, ball=L2Ball(0.8), data_range=None,
        criterion=lambda output, target: output.sum(1) + target,
        fooled=lambda output, target: output.sum(1) + target > 100,
    )  # fmt: skip
    assert (found.losses > 100).any() and torch.equal(found.losses > 100, found.fooled)


# --- what is missing or wrong -------------------------------------------------------------------


@of_each_kind
def test_what_to_pass_is_named(kind):
    of = kind()
    given = {"data_range": None, "ball": L2Ball(0.1)}
    hint = r"\(if not of classes: pass `criterion`, a rule `fooled` or `correct`"
    for call in (
        partial(attack, of.model, of.data, of.target, **given),
        partial(attack, of.model, of.data, of.target, fooled=of.fooled, **given),
        partial(
            minimum_norm_attack,
            of.model,
            of.data,
            of.target,
            ball=L2Ball,
            data_range=None,
            largest=1.0,
        ),  # fmt: skip
        partial(verify, of.model, of.data, of.target, of.data, **given),
        partial(
            evaluate_robustness,
            of.model,
            [(of.data, of.target)],
            balls=L2Ball(0.1),
            data_range=None,
        ),
        partial(universal_perturbation, of.model, [(of.data, of.target)], **given),
    ):
        with pytest.raises((TypeError, ValueError), match=hint):
            call()
    with pytest.raises(ValueError, match="`fooled` must be given for targets that are not classes"):
        minimum_norm_attack(
            of.model, of.data, of.target, ball=L2Ball, data_range=None, largest=1.0,
            criterion=of.criterion,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"criterion": "ce"},
            TypeError,
            "`criterion` must be a function of output and target, suc",
        ),
        ({"criterion": nn.MSELoss}, TypeError, "`criterion` must be a function .* got <class"),
        (
            {"criterion": nn.MSELoss(reduction="none")},
            ValueError,
            r'"none"` and `.flatten\(1\).mean\(1\)`, got shape \(12, 1\)',
        ),
        (
            {"fooled": "far"},
            TypeError,
            "`fooled` must be a function of output and target, got 'far'",
        ),
        ({"fooled": lambda output, target: output[:, 0]}, ValueError, "`fooled` must give a bool"),
        ({"fooled": lambda output, target: output > 1}, ValueError, r"got torch.bool of shape"),
        ({"fooled": lambda output, target: True}, ValueError, r"shape \(12,\), got <class 'bool'>"),
        ({"target": torch.zeros(3, 1)}, ValueError, "`target` must have one entry for each of 12"),
        ({"target": torch.tensor(0.0)}, ValueError, "`target` must have one entry for each of 12"),
        ({"rivals": 2}, TypeError, "`target` must hold classes, .* and no `rivals`"),
    ],
)
def test_bad_input(options, error, said):
    of = Regression()
    given = {"target": of.target, "criterion": of.criterion, "fooled": of.fooled} | options
    with pytest.raises(error, match=said):
        attack(of.model, of.data, ball=L2Ball(0.1), data_range=None, **given)


def test_a_loss_of_classes_says_what_targets_it_takes():
    with pytest.raises(TypeError, match="`target` must hold classes, or their .* pass `criterion`"):
        gradient_ascent(
            model=nn.Flatten(), data=torch.rand(3, 2), target=torch.rand(3), steps=1,
            optimizer=torch.optim.SGD, lr=0.1,
        )  # fmt: skip
    one_hot = torch.tensor([[0.0, 1.0]])  # probabilities are fine
    torch.testing.assert_close(
        cross_entropy(one_hot, one_hot), cross_entropy(one_hot, torch.tensor([1]))
    )


@pytest.mark.parametrize(
    ("correct", "error", "said"),
    [
        ("near", TypeError, "`correct` must be a function of output and target, got 'near'"),
        (lambda output, target: output[:, 0], ValueError, "`correct` must give a bool for each"),
    ],
)
def test_a_wrong_rule_of_correctness(correct, error, said):
    of = Regression()
    loader = [(of.data, of.target)]
    run = partial(evaluate_robustness, of.model, balls=L2Ball(0.1), data_range=None, progress=False)
    with pytest.raises(error, match=said):
        run(loader, criterion=of.criterion, correct=correct)
    with pytest.raises(error, match=said):
        verify(of.model, of.data, of.target, of.data, ball=L2Ball(0.1), correct=correct)


# --- resuming -----------------------------------------------------------------------------------


def within(output, target, width):
    return ((output - target).abs() < width).all(1)


def nearly(output, target):
    return within(output, target, 0.5)


def still(model, data, *others, **settings):
    return SimpleNamespace(data=data)


LAMBDAS = [
    lambda output, target: within(output, target, 0.5),
    lambda output, target: within(output, target, 0.6),
]


@pytest.mark.parametrize(
    "rules",
    [
        (nearly, None),
        (nearly, partial(within, width=0.5)),
        (partial(within, width=0.5), partial(within, width=0.6)),
        LAMBDAS,
    ],
)
def test_another_rule_does_not_resume(rules, tmp_path):
    of, path = Regression(), tmp_path / "state.json"
    run = partial(
        evaluate_robustness, of.model, balls=L2Ball(0.01), data_range=None, progress=False,
        state_file=path, solver=still,
    )  # fmt: skip
    report = run([(of.data, of.target)], correct=rules[0])
    assert run([(of.data, of.target)], correct=rules[0]) == report
    assert RobustnessReport.from_json(report.to_json()).settings["correct"]
    before = path.read_bytes()
    with pytest.raises(StateFileError, match="made with correct"):
        run([(of.data, of.target)], correct=rules[1])
    assert path.read_bytes() == before


def test_a_rule_is_no_setting_where_there_is_none():
    model, data, target = of_classes()
    run = partial(evaluate_robustness, model, [(data, target)], balls=L2Ball(0.1), steps=1)
    assert set(run(data_range=None, progress=False).settings) == {"data_range", "solver", "seed"}
