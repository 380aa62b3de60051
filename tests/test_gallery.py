"""Every example of the gallery runs, and what its text says about its results is true."""

import runpy
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt
from tiers import slow_but

GALLERY = Path(__file__).parents[1] / "examples" / "gallery"


def gradient_mapping(found):
    assert found["residual"] < 1e-3 < 0.05 < found["plain_residual"]
    assert found["loss"](found["mapped"][-1]) < 0.95 * found["loss"](found["plain"][-1])


def sparse_dictionary(found):
    assert max(found["violations"]) == 0
    assert (found["norms"].double() - 1).abs().max() < 3e-7
    assert sum(found["errors"][-15:]) / 15 < 0.1 * found["errors"][0]


def nmf(found):
    ours, theirs = found["objectives"].tolist(), found["theirs"]
    assert min(ours) == pytest.approx(min(theirs), rel=2e-5)
    assert {round(value) for value in [*ours, *theirs]} == {2538, 2546}  # two local minima
    assert min(found["W"].min(), found["H"].min()) >= 0


def mixture_weights(found):
    shares, truth = found["shares"], found["truth"]
    assert (shares - found["em"]).abs().max() < 1e-4
    assert shares.nonzero().flatten().tolist() == [0, 1, 3, 8]
    assert (shares - truth).abs().sum() < (found["counted"] - truth).abs().sum() / 2


def calibration(found):
    assert found["difference"] < 1e-4
    assert found["heights"].diff().min() >= 0


def lipschitz_net(found):
    assert found["bound"] <= 4 + 1e-6
    a, b = found["images"][torch.randint(len(found["images"]), (2, 20_000))]
    with torch.no_grad():
        slopes = (found["net"](a) - found["net"](b)).norm(dim=1) / (a - b).norm(dim=1).clamp(1e-6)
    assert 2 < slopes.max() <= found["bound"]
    pairs = zip(found["certified"], found["attacked"], strict=True)
    assert all(lower <= upper for lower, upper in pairs)
    assert found["certified"][1] > 0.65


def wgan_clipping(found):
    clipped, free = found["groups"]
    assert [name for name, _ in clipped["params"]] == ["0.weight", "3.weight"]
    assert [found["largest"][f"{i}.weight"] for i in (0, 3)] == pytest.approx([0.05] * 2)
    assert free["constraint"] is None
    assert found["largest"]["1.weight"] > 0.5
    with torch.no_grad():
        means = torch.stack([found["fake"].mean(0), found["images"].mean(0)])
    assert torch.corrcoef(means)[0, 1] > 0.9


def sparse_logistic(found):
    weight, bias, loss = found["weight"], found["bias"], found["loss"]
    assert abs(loss(weight, bias) - loss(found["expected"], found["offset"])) < 1e-6
    assert (weight != 0).equal(found["expected"] != 0)


def portfolio(found):
    assert max(found["differences"]) < 1e-9
    assert found["violations"].max() == 0
    assert (found["weights"] == 0).any() and (found["weights"] == 0.2).any()


def low_rank_completion(found):
    # a gap bounds what can still be gained, so no lower bound is above a loss that was reached
    bounds = [loss - gap for loss, gap in zip(found["losses"], found["gaps"], strict=True)]
    assert max(bounds) <= min(found["losses"])
    assert found["losses"][-1] < 0.01 * found["losses"][0]
    assert found["error"] < 0.2
    assert found["nuclear"] <= found["radius"]


def matching(found):
    assert found["right"] == 1
    assert found["losses"][-1] < 0.01 * found["losses"][0]
    assert found["plan"].min() >= 0
    assert (found["plan"].sum(1) - 1).abs().max() < 1e-9


def bounded_fit(found):
    assert found["p"].tolist() == pytest.approx(found["theirs"].x.tolist(), rel=1e-3)
    assert ((found["lower"] <= found["p"]) & (found["p"] <= found["upper"])).all()
    assert found["optim"].evaluations < 100  # a few dozen


def adversarial_training(found):
    plain, robust = (report.robust_accuracy(found["ball"]) for report in found["reports"].values())
    assert plain + 0.1 < robust


def robust_evaluation(found):
    assert found["model"].training
    report = found["report"]
    for row in report.rows():
        assert row.robust_accuracy < report.clean_accuracy > 0.9


CHECKS = [
    gradient_mapping,
    calibration,
    bounded_fit,
    sparse_dictionary,
    nmf,
    mixture_weights,
    lipschitz_net,
    wgan_clipping,
    sparse_logistic,
    portfolio,
    low_rank_completion,
    matching,
    adversarial_training,
    robust_evaluation,
]


@pytest.mark.parametrize("check", slow_but(CHECKS, *CHECKS[:3]))
def test_example(check, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("default", DeprecationWarning)  # scikit-learn's and matplotlib's own
        found = runpy.run_path(str(GALLERY / f"{check.__name__}.py"))
    check(found)
    assert plt.get_fignums()
    plt.close("all")


def test_every_example_has_a_check():
    assert {path.stem for path in GALLERY.glob("*.py")} == {check.__name__ for check in CHECKS}
