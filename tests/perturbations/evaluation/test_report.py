"""The table: its shares, its files, its pictures."""

import csv
import io
import json

import pytest
import torch
from scipy.stats import binomtest
from tiers import slow_but

from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations import Examples, RobustnessReport
from rai_toolbox.perturbations.evaluation.rows import wilson_interval
from rai_toolbox.perturbations.evaluation.verification import VerificationReport

CHECK = VerificationReport


def report(counts=(2, 2, 1, 0, -1), **changed):
    """Linf: radii 0.1 and 0.2; L2: radius 1, that fools all."""
    parts = {
        "settings": {"seed": 0, "data_range": [0.0, 1.0]},
        "epsilons": {"Linf": (0.1, 0.2), "L2": (1.0,)},
        "withstood": {"Linf": tuple(counts), "L2": tuple(min(k, 0) for k in counts)},
        "checks": {"Linf": (CHECK(4, 1, not_risen=1), CHECK(3, 1)), "L2": (CHECK(4, 4),)},
    }
    return RobustnessReport(**parts | changed)


def test_shares_are_those_of_all_data():
    found = report()
    assert (len(found), found.clean_accuracy) == (5, 0.8)
    assert [(r.norm, r.epsilon, r.robust_accuracy) for r in found.rows()] == [
        ("Linf", 0.1, 0.6),
        ("Linf", 0.2, 0.4),
        ("L2", 1.0, 0.0),
    ]
    assert found.robust_accuracy(LinfBall(0.2)) == 0.4
    with pytest.raises(ValueError, match=r"`ball` must be one that was evaluated, .*epsilon=0\.2"):
        found.robust_accuracy(L2Ball(0.2))


def test_it_prints_as_a_table():
    lines = str(report()).splitlines()
    assert lines[0].split() == ["norm", "epsilon", "data", "clean", "robust", "95%", "interval"]
    assert lines[2].split()[:5] == ["Linf", "0.2", "5", "80.0%", "40.0%"]
    assert len(lines) == 4


def test_warnings_name_norm_and_epsilon():
    assert report().warnings() == ["Linf 0.1: the loss did not rise for 1 of 4 examples (25.0%)"]
    assert report().feasible
    checks = report().checks | {"L2": (CHECK(4, 0, outside_ball=1),)}
    assert not report(checks=checks).feasible


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (499, 1000)])
def test_intervals_are_those_of_scipy(count, total):
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson_interval(count, total) == pytest.approx(tuple(expected), abs=1e-12)


def test_json_gives_the_report_back():
    found = report()
    assert RobustnessReport.from_json(found.to_json()) == found
    table = json.loads(found.to_json())["table"]
    assert [line["robust_accuracy"] for line in table] == [0.6, 0.4, 0.0]
    assert RobustnessReport.from_json(found.to_json()) != report((2, 2, 2, 0, -1))


def test_a_report_of_no_data_is_strict_json():
    empty = report(())
    assert "NaN" not in empty.to_json()
    assert RobustnessReport.from_json(empty.to_json()) == empty


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "other"}', "not json"])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="`format` must be|Expecting value"):
        RobustnessReport.from_json(text)


def test_csv_has_the_table_and_the_checks():
    lines = list(csv.DictReader(io.StringIO(report().to_csv())))
    assert [line["norm"] for line in lines] == ["Linf", "Linf", "L2"]
    first = lines[0]
    assert [float(first[n]) for n in ("epsilon", "clean_accuracy", "robust_accuracy")] == [
        0.1,
        0.8,
        0.6,
    ]
    assert [int(first[n]) for n in ("data", "attacked", "fooled", "not_risen")] == [5, 4, 1, 1]


def test_parts_merge_to_the_whole():
    one, two = report((2, 2)), report((1, 0, -1))
    whole = RobustnessReport.merged([one, two])
    assert whole.withstood == report().withstood
    assert whole.checks["Linf"] == (CHECK(8, 2, not_risen=2), CHECK(6, 2))
    assert RobustnessReport.merged([one]) == one
    assert RobustnessReport.merged([RobustnessReport.merged([one, two]), one]) == (
        RobustnessReport.merged([one, two, one])
    )


def test_only_equal_settings_merge():
    with pytest.raises(ValueError, match="`parts` must have the same settings and epsilons"):
        RobustnessReport.merged([report(), report(settings={"seed": 1})])
    with pytest.raises(ValueError, match="`parts` must be one report at least"):
        RobustnessReport.merged([])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epsilons": {"Linf": (0.1, 0.2)}}, "must have the same norms"),
        ({"epsilons": {"Linf": (0.2, 0.1), "L2": (1.0,)}}, "`epsilons` must ascend"),
        ({"epsilons": {"Linf": (0.1, 0.1), "L2": (1.0,)}}, "`epsilons` must ascend"),
        ({"epsilons": {"Linf": (0.1,), "L2": (1.0,)}}, "`checks` must be one per epsilon, got 2"),
        ({"withstood": {"Linf": (3,), "L2": (0,)}}, r"must be in \[-1, 2\] for Linf, got 3"),
        ({"withstood": {"Linf": (1,), "L2": ()}}, "the same data for each norm"),
        ({"epsilons": {}, "withstood": {}, "checks": {}}, "at least one"),
        ({"fooled_by": {"Linf": ("a",)}}, "`fooled_by` must be one per example, got 1 for Linf"),
        ({"calls": {"L2": ()}}, "`calls` must be one per epsilon, got 0 for L2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        report(**changed)


@pytest.fixture
def drawn():
    def draw(*shape):
        data = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
        data.view(-1)[0] = 1.0  # so that the largest change is 0.5
        target = torch.tensor([0, 1, 2])
        shown = Examples("L2", 1.0, data, data / 2, target, torch.tensor([0, 2, 2]))
        return report(examples=(shown,)).plot()

    return draw


@pytest.mark.parametrize(
    "shape", slow_but([(1, 6, 5), (6, 5), (3, 6, 5), (7,), (2, 6, 5)], single=True)
)
def test_the_picture_has_panels_and_examples_of_any_shape(drawn, shape, tmp_path):
    figure = drawn(*shape)
    panels, grid = figure.subfigs[0].axes, figure.subfigs[1].subfigs[0].axes
    assert len(panels) == 2 and len(grid) == 3 * 3 + (shape in [(1, 6, 5), (6, 5)])
    assert grid[3].get_ylabel() == "change" + ", ±0.5" * (len(grid) == 9)
    if len(grid) > 9:
        ticks = [tick.get_text() for tick in grid[9].get_yticklabels()]
        assert ticks == ["-0.5", "0", "0.5"]
    figure.savefig(tmp_path / "report.png", dpi=40)
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_panels_show_the_table(drawn):
    linf, l2 = drawn(4).subfigs[0].axes
    assert linf.lines[0].get_xydata().tolist() == [[0, 80], [0.1, 60], [0.2, 40]]
    assert l2.lines[0].get_xydata().tolist() == [[0, 80], [1, 0]]


def test_curves_are_named(drawn):
    for axes in drawn(4).subfigs[0].axes:
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["robust accuracy (band: 95% interval)"]


def test_examples_show_what_was_changed_and_misread(drawn):
    grid = drawn(2, 2).subfigs[1].subfigs[0].axes
    original, change, result = (axes.images[0].get_array() for axes in grid[:9:3])
    assert (result - original - change).max() == pytest.approx(0, abs=1e-6)
    assert [axes.get_title() for axes in grid[:3]] == ["0", "1", "2"]
    assert [axes.get_xlabel() for axes in grid[6:9]] == ["0", "2", "2"]
    assert len({axes.spines["left"].get_edgecolor() for axes in grid[6:9]}) == 2


@pytest.mark.parametrize(
    ("target", "reading", "titles", "labels"),
    [
        (torch.tensor([[0.25], [1.0], [2.0]]), torch.ones(3, 1) / 3, ["0.25", "1", "2"], "0.333"),
        (torch.eye(3).bool(), torch.ones(3, 3), ["True False False"], "1 1 1"),
        (torch.zeros(3, 4, 4).long(), torch.zeros(3, 2, 4, 4), [""], ""),
        (torch.tensor([1000, 1, 2]), torch.tensor([12345, 1, 1]), ["1000", "1"], "12345"),
    ],
)
def test_examples_of_other_targets(target, reading, titles, labels):
    data, misread = torch.rand(3, 2, 2), torch.tensor([True, False, True])
    shown = Examples("L2", 1.0, data, data / 2, target, reading, misread)
    grid = report(examples=(shown,)).plot().subfigs[1].subfigs[0].axes
    assert [axes.get_title() for axes in grid[: len(titles)]] == titles
    assert grid[6].get_xlabel() == labels
    colors = [axes.spines["left"].get_edgecolor() for axes in grid[6:]]
    assert colors[0] == colors[2] != colors[1]


def test_few_features_are_bars_and_many_a_curve(drawn):
    axes = drawn(7).subfigs[1].subfigs[0].axes
    assert [len(axes[at].patches) for at in (0, 3)] == [7, 7] and not axes[0].lines
    assert axes[3].get_ylabel().startswith("change, ±0.")
    axes = drawn(101).subfigs[1].subfigs[0].axes
    assert len(axes[0].lines) == 1 and not axes[0].patches


SOLVERS = {
    "attack": "package.attack",
    "other": {"call": {"call": "package.other"}, "steps": 5},
    "APGD-CE, Square": {"call": "package.ensemble", "attacks": {"APGD-CE": {}, "Square": {}}},
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_picture_names_the_attacks(name):
    figure = report(settings={"solver": SOLVERS[name]}).plot()
    assert figure.subfigs[0].get_suptitle() == f"attacked by {name}"
    figure = report(settings={"solver": SOLVERS[name]}).plot("my net, my data")
    assert figure.subfigs[0].get_suptitle() == f"my net, my data\nattacked by {name}"
    assert report().plot("my net, my data").subfigs[0].get_suptitle() == "my net, my data"


def test_without_examples_there_are_only_panels():
    assert len(report().plot().subfigs) == 1
