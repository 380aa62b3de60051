"""The evaluation: exact on linear models, frugal, verified, and the same after an interruption."""

import json
import re
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.extras import Bar
from rai_toolbox.optim import PGD, FrankWolfe
from rai_toolbox.perturbations.attack import attack
from rai_toolbox.perturbations.ensemble import BLACK_BOX, ensemble
from rai_toolbox.perturbations.evaluation.fingerprint import described, fingerprint
from rai_toolbox.perturbations.evaluation.part_file import PartFile
from rai_toolbox.perturbations.evaluation.report import RobustnessReport, RobustnessWarning
from rai_toolbox.perturbations.evaluation.run import evaluate_robustness
from rai_toolbox.perturbations.evaluation.state_file import StateFileError

BALLS = [LinfBall(0.1), LinfBall(0.2), LinfBall(0.3)]


def linear(classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, classes, bias=False)


def noise(number=60, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 6, generator=generator)


MODEL = linear()
DATA = noise()
TARGET = MODEL(DATA).argmax(1)
TARGET[::9] = 1 - TARGET[::9]  # misread


class Corner:
    """The exact worst point of a linear model with two classes in Linf balls; keeps its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, data, target, *, ball, data_range, generator):
        self.calls.append((ball.epsilon, data))
        slope = model.weight.detach()[1 - target] - model.weight.detach()[target]
        room = torch.where(slope > 0, data_range[1] - data, data - data_range[0])
        room = room.clamp(max=ball.epsilon * (1 - 1e-6))
        return SimpleNamespace(data=(data + slope.sign() * room).clamp(*data_range))


def batches(size=20, data=DATA, target=TARGET):
    return [(data[i : i + size], target[i : i + size]) for i in range(0, len(data), size)]


def evaluated(loader=None, **changed):
    settings = {"balls": BALLS, "solver": Corner(), "progress": False, "examples": 0} | changed
    model = settings.pop("model", MODEL)
    return evaluate_robustness(model, batches() if loader is None else loader, **settings)


def worst_margins(epsilon):
    """Logit of the other class - that of the target, at its worst: the closed form."""
    weight = MODEL.weight.detach().double()
    slope, x = weight[1 - TARGET] - weight[TARGET], DATA.double()
    room = torch.where(slope > 0, 1 - x, x).clamp(max=epsilon)
    return (slope * x).sum(1) + (slope.abs() * room).sum(1)


@pytest.mark.parametrize("solver", [Corner(), partial(attack, optimizer=FrankWolfe, steps=20)])
def test_robust_accuracy_is_the_closed_form_of_a_linear_model(solver):
    report = evaluated(solver=solver)
    assert report.clean_accuracy == (worst_margins(0) < 0).double().mean()
    robust = [report.robust_accuracy(ball) for ball in BALLS]
    assert robust == [(worst_margins(ball.epsilon) < 0).double().mean() for ball in BALLS]
    assert 0 < robust[-1] < robust[0] < report.clean_accuracy < 1
    assert report.warnings() == [] and report.feasible


def test_only_what_is_still_robust_is_attacked():
    solver = Corner()
    report = evaluated(solver=solver, balls=BALLS[::-1])  # in any order
    attacked = {ball.epsilon: 0 for ball in BALLS}
    for epsilon, data in solver.calls:
        attacked[epsilon] += len(data)
    margins = [worst_margins(epsilon) for epsilon in (0, *attacked)]
    assert list(attacked.values()) == [int((m < 0).sum()) for m in margins[:-1]]
    assert [row.checks.data for row in report.rows()] == list(attacked.values())


def test_accuracy_never_rises_with_epsilon_even_by_a_solver_that_gets_worse():
    def lazy(model, data, target, **settings):
        good = Corner()(model, data, target, **settings)
        return good if settings["ball"].epsilon < 0.15 else SimpleNamespace(data=data)

    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(solver=lazy)
    said = [str(warning.message).partition(" for ")[0] for warning in caught]
    assert said == ["Linf 0.2: the loss did not rise", "Linf 0.3: the loss did not rise"]
    exact = evaluated().robust_accuracy(BALLS[0])
    assert [report.robust_accuracy(ball) for ball in BALLS] == [exact] * 3


def test_what_is_outside_fools_nobody_and_is_warned_of():
    def cheat(model, data, target, *, ball, **settings):
        return Corner()(model, data, target, ball=LinfBall(3 * ball.epsilon), **settings)

    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(solver=cheat)
    assert all(" are outside the ball, by up to " in str(warning.message) for warning in caught)
    assert len(caught) == len(BALLS)
    assert report.robust_accuracy(BALLS[-1]) == report.clean_accuracy
    assert not report.feasible


def test_a_textbook_solver_is_believed_where_its_points_fool_the_model():
    def textbook(model, data, target, *, ball, data_range, generator):
        slope = model.weight.detach()[1 - target] - model.weight.detach()[target]
        delta = (slope.sign() * ball.epsilon).clamp(-ball.epsilon, ball.epsilon)
        return SimpleNamespace(data=(data + delta).clamp(*data_range))

    report = evaluated(solver=textbook)
    robust = [report.robust_accuracy(ball) for ball in BALLS]
    assert robust == [(worst_margins(ball.epsilon) < 0).double().mean() for ball in BALLS]
    assert report.warnings() == [] and report.feasible


def test_a_solver_may_work_in_place():
    def far(model, data, target, *, ball, **settings):
        target.fill_(9)
        return SimpleNamespace(data=data.add_(2 * ball.epsilon).clamp_(0, 1))

    before = DATA.clone()
    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(solver=far)
    assert "are outside the ball" in str(caught[0].message)
    assert torch.equal(DATA, before) and not report.feasible
    assert report.robust_accuracy(BALLS[-1]) == report.clean_accuracy


def test_a_slope_that_is_not_finite_is_reported_and_no_fault_of_the_points():
    model, data = linear(), DATA.clone()
    data[:, 0] = 0.0

    def squares_of_roots(x):  # whose slope at 0 is 0 times infinity
        return model(x.sqrt().square())

    target = model(data).argmax(1)
    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(model=squares_of_roots, loader=[(data, target)], solver=attack, steps=5)
    assert {warning.category for warning in caught} == {RobustnessWarning}
    text = r"Linf 0.1: 60 of 60 examples \(100.0%\) have an infinity or NaN in .* gradient"
    assert re.match(text, str(caught[0].message)) and report.feasible


def test_the_solver_s_own_word_is_not_taken():
    def boaster(model, data, target, **settings):
        return SimpleNamespace(data=data, fooled=torch.ones(len(data), dtype=torch.bool))

    with pytest.warns(RobustnessWarning, match="did not rise"):
        report = evaluated(solver=boaster, balls=BALLS[-1:])
    assert report.robust_accuracy(BALLS[-1]) == report.clean_accuracy


def test_steps_that_are_too_short_are_warned_of():
    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(solver=partial(attack, optimizer=partial(PGD, lr=1e-4)), steps=20)
    assert [str(w.message).partition(": ")[0] for w in caught] == [
        "Linf 0.1",
        "Linf 0.2",
        "Linf 0.3",
    ]
    assert all("withstand within half of the radius: " in str(w.message) for w in caught)
    assert evaluated(solver=partial(attack, optimizer=partial(PGD, lr=0.02))).warnings() == []
    assert "underused" in report.to_csv()


def test_flat_models_are_warned_of():
    flat = nn.Sequential(nn.Linear(6, 2), nn.Threshold(1e6, 1.0))
    solver = partial(attack, optimizer=FrankWolfe, steps=2)
    with pytest.warns(RobustnessWarning) as caught:
        evaluated(model=flat, solver=solver, balls=[LinfBall(0.1)])
    right = int((TARGET == 0).sum())
    assert [str(w.message) for w in caught] == [
        f"Linf 0.1: the gradient is exactly 0 at {right} of {right} examples (100.0%): "
        "the model is flat there",
        f"Linf 0.1: the loss did not rise for {right} of {right} examples (100.0%)",
        "Linf 0.1: the robust accuracy is unreliable: gradients are 0",
    ]


def test_a_model_that_reads_nothing_is_warned_of():
    nothing = [(DATA, 1 - MODEL(DATA).argmax(1))]
    with pytest.warns(RobustnessWarning, match="no original is predicted right: "):
        assert evaluated(nothing).clean_accuracy == 0


def test_other_batches_and_their_order_do_not_matter():
    solver = partial(attack, optimizer=FrankWolfe, steps=0, random_start=True)
    loader = batches()

    def found(loader, **changed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustnessWarning)
            return evaluated(loader, solver=solver, balls=[LinfBall(0.3), L2Ball(1)], **changed)

    whole = found(loader)
    backwards = found(loader[::-1])
    parts = [found([batch]) for batch in loader]
    assert RobustnessReport.merged(parts) == whole
    assert RobustnessReport.merged(parts[::-1]) == backwards
    seeds = {tuple(found(loader, seed=seed).withstood["Linf"]) for seed in range(4)}
    assert len(seeds) > 1  # random numbers do matter here


def test_random_numbers_of_models_repeat_and_the_callers_are_left_alone():
    def restless(x):
        return MODEL(x) + 0.3 * torch.randn(len(x), 2)

    def still(model, data, target, **settings):
        return SimpleNamespace(data=data + 0 * model(data).sum().detach())

    def found():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RobustnessWarning)
            return evaluated(model=restless, solver=still)

    state = torch.get_rng_state()
    first = found()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert found() == first


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        evaluated(model=model, solver=partial(attack, optimizer=FrankWolfe, steps=1))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ball", [L2Ball, L1Ball])
def test_norms_have_their_own_columns(ball):
    balls = [ball(0.3), LinfBall(0.05), ball(0), LinfBall(0.05)]  # one of them twice
    solver = partial(attack, optimizer=FrankWolfe)
    report = evaluated(balls=balls, solver=solver, steps=5)
    single = evaluated(balls=balls[0], solver=solver, steps=5)
    assert single.robust_accuracy(balls[0]) == report.robust_accuracy(balls[0])
    name = ball.__name__.removesuffix("Ball")
    assert report.epsilons == {name: (0.0, 0.3), "Linf": (0.05,)}
    assert report.robust_accuracy(ball(0)) == report.clean_accuracy  # it has one point
    assert report.robust_accuracy(ball(0.3)) < report.clean_accuracy
    assert report.settings["solver"]["steps"] == 5


def test_any_loader_will_do(capsys):
    dataset = TensorDataset(DATA, TARGET.int())
    expected = evaluated()
    assert evaluated(DataLoader(dataset, batch_size=20)) == expected
    assert evaluated(iter(batches()), progress=True) == expected
    assert "evaluating" in capsys.readouterr().err
    assert evaluated([*batches(), (DATA[:0], TARGET[:0])]) == expected
    assert capsys.readouterr().err == ""


def test_batches_may_be_dicts_and_outputs_hold_logits():
    expected = evaluated(solver=attack, steps=3)

    def model(x):
        return SimpleNamespace(loss=None, logits=MODEL(x))

    dicts = [{"labels": y, "pixel_values": x, "ids": None} for x, y in batches()]
    found = evaluated(dicts, keys=("pixel_values", "labels"), model=model, solver=attack, steps=3)
    assert found == expected
    tuples = [(None, x, y) for x, y in batches()]
    assert evaluated(tuples, keys=(1, 2), solver=attack, steps=3) == expected


@pytest.mark.parametrize("number", [3, 15, 99])
def test_examples_are_the_first_that_are_fooled_then_robust_ones(number, tmp_path):
    balls = {"balls": [LinfBall(0.05), LinfBall(0.2)]}
    report = evaluated(examples=number, state_file=tmp_path / "state.json", **balls)
    (shown,) = report.examples
    right, fooled = worst_margins(0)[:20] < 0, worst_margins(0.2)[:20] > 0
    both = [(right & fooled).nonzero().squeeze(1), (right & ~fooled).nonzero().squeeze(1)]
    assert 3 < len(both[0]) < 15
    rows = torch.cat(both)[:number].sort().values
    assert torch.equal(shown.data, DATA[rows]) and torch.equal(shown.target, TARGET[rows])
    assert torch.equal(shown.reading != shown.target, fooled[rows])
    assert (shown.epsilon, shown.norm) == (0.2, "Linf")
    assert 0.19 < (shown.perturbed - shown.data).abs().max() <= 0.2
    again = evaluated(examples=number, state_file=tmp_path / "state.json", **balls)
    assert torch.equal(again.examples[0].perturbed, shown.perturbed)


# Interruptions


class Stop(BaseException):
    """Neither the evaluation nor the solver may catch it."""


@pytest.mark.parametrize("calls", range(9))  # three batches, three radii
def test_a_run_that_was_stopped_loses_one_ball_at_most(calls, tmp_path):
    path = tmp_path / "state.json"
    solver = Corner()

    def stopping(*args, **settings):
        if len(solver.calls) == calls:
            raise Stop
        return solver(*args, **settings)

    with pytest.raises(Stop):
        evaluated(solver=Named(stopping), state_file=path)
    again = Corner()
    assert evaluated(solver=Named(again), state_file=path) == evaluated(solver=Named(Corner()))
    assert len(again.calls) == 9 - calls
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.filterwarnings("ignore::rai_toolbox.perturbations.RobustnessWarning")
@pytest.mark.parametrize("stop", range(1, 12))  # two batches, two radii, three attacks
def test_an_ensemble_that_was_stopped_loses_one_attack_at_most(stop, tmp_path):
    path, done = tmp_path / "state.json", []

    def random(model, data, target, *, ball, data_range, generator):
        if len(done) == stop:
            raise Stop
        done.append(len(data))
        change = torch.rand(data.shape, generator=generator) - torch.rand(data.shape)
        return SimpleNamespace(data=(data + ball.epsilon * change).clamp(*data_range))

    def run(**more):
        done.clear()
        several = partial(ensemble, attacks=dict.fromkeys(["a", "b", "c"], random))
        settings = {"balls": [LinfBall(0.2), L2Ball(0.5)], "solver": several} | more
        return evaluated(batches(30), **settings)

    with pytest.raises(Stop):
        run(state_file=path)
    at_first, stop = stop, 99
    uninterrupted = run()
    assert len(done) == 12
    assert run(state_file=path) == uninterrupted and len(done) == 12 - at_first
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_the_file_of_another_batch_or_of_something_else_is_ignored(tmp_path):
    path = tmp_path / "state.json.part"
    for held in (b"no such file", b""):
        path.write_bytes(held)
        assert evaluated(state_file=path.with_suffix("")) == evaluated()
        path.with_suffix("").unlink()
    for change in ({"run": "other"}, {"batch": "other"}):
        kept = PartFile(path, "run")
        kept.open("batch")
        kept.keep("ball", {"data": DATA, "by": [], "calls": {}})
        again = PartFile(path, "run")
        again.open("batch")
        assert torch.equal(again.found["ball"]["data"], DATA)
        other = PartFile(path, change.get("run", "run"))
        other.open(change.get("batch", "batch"))
        assert other.found == {}


def test_the_bar_names_batch_ball_and_attack(monkeypatch):
    shown = []
    monkeypatch.setattr(Bar, "set_postfix_str", lambda bar, text, refresh: shown.append(text))
    several = partial(ensemble, attacks={"first": partial(attack, steps=1), "second": attack})
    report = evaluated(solver=several, balls=[LinfBall(0.1)])
    starts = [text.partition(":")[0] for text in shown]
    assert starts[:2] == ["batch 1, Linf 0.1, first", "batch 1, Linf 0.1, second"]
    assert int(shown[0].split()[-2]) == sum(k >= 0 for k in report.withstood["Linf"][:20])


class Named:
    """Solvers that count as one and the same."""

    def __init__(self, solver):
        self.solver = solver

    def __call__(self, *args, **settings):
        return self.solver(*args, **settings)


def test_a_finished_run_is_not_done_again(tmp_path):
    path = tmp_path / "state.json"
    first = evaluated(state_file=path, examples=2)
    solver = Corner()
    again = evaluated(state_file=str(path), solver=solver, examples=2)
    assert again == first and len(solver.calls) == 1  # for the examples
    assert torch.equal(again.examples[0].perturbed, first.examples[0].perturbed)
    assert json.loads(path.read_text(encoding="utf-8"))["report"]["withstood"] == {
        "Linf": list(first.withstood["Linf"])
    }


def test_the_weights_of_a_wrapped_model_count(tmp_path):
    def run(net):
        settings = {"solver": attack, "steps": 1, "state_file": tmp_path / "state.json"}
        return evaluated(model=lambda x: net(x), **settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        assert run(linear()) == run(linear())
        with pytest.raises(StateFileError, match="another model or other weights"):
            run(linear(seed=5))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed = 0 instead of 1"),
        ({"data_range": (0.0, 2.0)}, r"data_range = \[0.0, 1.0\] instead of \[0.0, 2.0\]"),
        ({"balls": BALLS[:2]}, r"epsilons.Linf = \(0.1, 0.2, 0.3\) instead of \(0.1, 0.2\)"),
        ({"solver": partial(attack, steps=1)}, "solver = "),
        ({"model": linear(seed=5)}, "another model or other weights"),
        ({"loader": batches(10)}, "batch 0 of `loader` must be the one that"),
        ({"loader": batches()[::-1]}, "same data, order and batch size"),
        ({"loader": batches(target=1 - TARGET)}, "got another one"),
        ({"loader": batches()[:2]}, "`loader` must have the 3 batches that .* got 2"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(changed, said, tmp_path):
    path = tmp_path / "state.json"
    evaluated(state_file=path)
    before = path.read_bytes()
    with pytest.raises(StateFileError, match=said):
        evaluated(state_file=path, **changed)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "rai_toolbox evaluation 2"}', "\0"])
def test_a_file_of_another_kind_is_refused(text, tmp_path):
    path = tmp_path / "state.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StateFileError, match="`state_file` must be of this format"):
        evaluated(state_file=path)
    assert path.read_text(encoding="utf-8") == text


def test_a_missing_folder_is_refused_before_any_attack(tmp_path):
    path = tmp_path / "missing" / "state.json"
    calls = []
    with pytest.raises(ValueError, match="`state_file` must be in a folder that exists, got .*mis"):
        evaluated(state_file=path, solver=Named(lambda *args, **kwargs: calls.append(args)))
    assert not calls


def test_fingerprints_tell_what_matters():
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        -torch.zeros(4),
        torch.zeros(0),
        torch.zeros(4, dtype=torch.bfloat16),
    ]
    assert len({fingerprint(tensor) for tensor in tensors}) == len(tensors)
    assert fingerprint(DATA[:, ::2]) == fingerprint(DATA[:, ::2].clone())
    assert fingerprint(linear()) == fingerprint(linear()) != fingerprint(linear(seed=1))
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_settings_are_described_as_plain_data():
    ball = LinfBall(torch.tensor([0.5]))
    given = {"a": partial(attack, steps=3, ball=ball), "b": (1, None, float("inf")), "c": nn.ReLU()}
    plain = described(given)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["a"]["call"] == "rai_toolbox.perturbations.attack.attack"
    assert plain["a"]["steps"] == 3 and plain["b"] == [1, None, "inf"]
    assert described(partial(attack, ball=LinfBall(torch.tensor([0.25])))) != described(
        partial(attack, ball=ball)
    )
    assert "0x" not in json.dumps(described([object(), lambda x: x]))  # no addresses


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"balls": []}, ValueError, "`balls` must be one ball at least, got none"),
        ({"balls": [0.1]}, TypeError, "`ball` must be a LinfBall, L2Ball or L1Ball, got 0.1"),
        ({"balls": 0.1}, TypeError, "`ball` must be a LinfBall, L2Ball or L1Ball, got 0.1"),
        ({"balls": [LinfBall(float("inf"))]}, ValueError, "must be a finite number"),
        ({"balls": [LinfBall(torch.ones(1))]}, ValueError, "must be a finite number"),
        ({"balls": [LinfBall(1.0, center=0.5)]}, ValueError, "`ball` must have no center"),
        ({"examples": -1}, ValueError, "`examples` must be >= 0, got -1"),
        ({"seed": 0.5}, TypeError, "`seed` must be an int, got 0.5"),
        ({"loader": []}, ValueError, "`loader` must give one batch at least, got none"),
        ({"loader": [DATA]}, TypeError, r"pairs \(data, target\), got Tensor as batch 0"),
        (
            {"loader": (DATA, TARGET)},
            TypeError,
            r"Tensor .* \(one batch alone: `\[\(data, target\)\]`",
        ),
        (
            {"loader": [{"x": DATA, "y": TARGET}]},
            TypeError,
            r"`\[\(batch\['x'\], batch\['y'\]\) for",
        ),
        (
            {"loader": [(DATA, TARGET, TARGET)]},
            TypeError,
            r"pairs .*, got tuple as batch 0 with 3 items: `\[\(x, y\) for x, y, \*_ in loader\]`",
        ),
        ({"loader": TensorDataset(DATA, TARGET)}, TypeError, "batches, as a DataLoader does, got"),
        ({"loader": [(DATA[0], 1)]}, TypeError, "as a DataLoader does, got one example"),
        ({"loader": [(DATA.byte(), TARGET)]}, TypeError, "must be of a floating-point dtype"),
        (
            {"loader": [(DATA, TARGET + 1)]},
            ValueError,
            r"`target` must hold classes from 0 to 1, got 2",
        ),
        ({"loader": [(DATA + 0.5, TARGET)]}, ValueError, r"within `data_range`, \[0, 1\], got"),
        ({"loader": [(DATA / 0, TARGET)], "data_range": None}, ValueError, "must be finite"),
        ({"solver": lambda *a, **k: SimpleNamespace(data=DATA[:1])}, ValueError, "`solver` must"),
        ({"solver": lambda *a, **k: None}, TypeError, "`solver` must return an object with `data`"),
    ],
)
def test_bad_input_is_refused(changed, error, said):
    with pytest.raises(error, match=said):
        evaluated(**changed)


# What ensembles report


class Pair(Corner):
    """`Corner` as an ensemble: the first survivor is fooled by one attack, the rest by another."""

    def __init__(self, first="APGD", rest="Square"):
        super().__init__()
        self.names = first, rest

    def __call__(self, model, data, target, **settings):
        found = super().__call__(model, data, target, **settings).data
        wrong = (model(found).argmax(1) != target).tolist()
        first, rest = self.names
        names = [
            (first if at == 0 else rest) if is_wrong else None for at, is_wrong in enumerate(wrong)
        ]
        return SimpleNamespace(data=found, fooled_by=names, calls={first: 2, rest: len(data)})


def test_who_fooled_whom_is_kept_merged_and_saved(tmp_path):
    state = tmp_path / "state.json"
    with pytest.warns(RobustnessWarning, match="unreliable"):
        report = evaluated(solver=Pair(), state_file=state)
        resumed = evaluated(solver=Pair(), state_file=state)
    assert len(report.fooled_by["Linf"]) == len(DATA)
    for name, robust in zip(report.fooled_by["Linf"], report.withstood["Linf"], strict=True):
        assert (name is None) == (robust in (-1, len(BALLS)))
    rows = report.by_attack()
    checks = [row.checks for row in report.rows()]
    fooled = [sum(row.fooled for row in rows if row.epsilon == ball.epsilon) for ball in BALLS]
    assert fooled == [check.fooled for check in checks]
    assert [row.calls for row in rows if row.attack == "Square"] == [c.data for c in checks]
    assert [row.calls for row in rows if row.attack == "APGD"] == [6] * 3  # in three batches
    assert str(rows).splitlines()[1].split()[:3] == ["Linf", "0.1", "APGD"]
    assert report == resumed == report.from_json(report.to_json())
    assert json.loads(report.to_json())["attacks"][0]["attack"] == "APGD"
    older = json.loads(report.to_json())
    del older["fooled_by"], older["calls"]
    assert report.from_plain(older).by_attack() == []


def test_another_solver_may_call_other_results_so():
    def solver(model, data, target, **settings):
        found = Corner()(model, data, target, **settings).data
        return SimpleNamespace(data=found, calls=7, fooled_by=torch.zeros(len(data), 2))

    report = evaluated(solver=solver)
    assert report.withstood == evaluated().withstood and report.by_attack() == []


def test_figures_are_called_unreliable_everywhere_where_the_black_box_finds_more():
    with pytest.warns(RobustnessWarning) as caught:
        report = evaluated(solver=Pair())
    text = "unreliable: the black box finds more than gradients"
    assert all(text in line for line in str(report).splitlines()[1:])
    assert all(text[12:] in line for line in report.to_csv().splitlines()[1:])
    table = json.loads(report.to_json())["table"]
    assert all(row["unreliable"] == text[12:] for row in table)
    assert any(text in str(warning.message) for warning in caught)
    legend = report.plot().subfigs[0].axes[0].get_legend().get_texts()
    assert [line.get_text() for line in legend][1:] == ["robust accuracy: unreliable"]
    fair = evaluated(solver=Pair(rest="FAB"))
    assert "unreliable: " not in str(fair) and len(fair.plot().subfigs[0].axes[0].lines) == 1
    assert {row.unreliable for row in fair.rows()} == {""}


def test_the_default_is_an_ensemble_for_models_without_gradients_too():
    weight = MODEL.weight.detach().numpy()

    def in_numpy(x):
        return torch.from_numpy(x.numpy() @ weight.T)

    settings = {"balls": BALLS[1], "progress": False, "steps": 60}
    exact = evaluated(balls=BALLS[1])
    report = evaluate_robustness(MODEL, batches(), **settings)
    assert report.withstood == exact.withstood and not report.rows()[0].unreliable
    with pytest.warns(RobustnessWarning):
        blind = evaluate_robustness(in_numpy, batches(), **settings)
    assert "unreliable: gradients are 0, the black box finds more" in str(blind)
    assert blind.robust_accuracy(BALLS[1]) <= exact.robust_accuracy(BALLS[1]) + 0.05
    assert {None} < set(blind.fooled_by["Linf"]) <= {None, *BLACK_BOX}
