"""Ranks that share an evaluation find what one process finds, and fail together."""

import contextlib
import io
import json
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from engines import ddp, fsdp
from ranks import on_ranks, outcomes
from tiers import slow_but
from torch import nn
from torch_versions import shards_on_cpu

from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations import attack, evaluate_robustness
from rai_toolbox.perturbations.evaluation.report import RobustnessWarning

BALLS = [LinfBall(0.05), LinfBall(0.2), L2Ball(0.3)]


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Dropout(), nn.Linear(6, 3, bias=False))


def batches(size, number=30):
    x = torch.rand(number, 6, generator=torch.Generator().manual_seed(1))
    y = model().eval()(x).argmax(1)
    y[::9] = (y[::9] + 1) % 3
    return [(x[i : i + size], y[i : i + size]) for i in range(0, number, size)]


def evaluated(of, loader, group=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)  # of solvers that are made to be poor
        return evaluate_robustness(
            of,
            loader,
            **{"balls": BALLS, "steps": 4, "progress": False, "group": group, **settings},
        )


def drawing(model, data, target, **settings):
    """A solver that draws from its own generator and from torch's."""
    noise = 0.01 * torch.rand(data.shape)
    found = attack(model, data, target, restarts=2, **settings)
    return found._replace(data=torch.where(noise < 0.005, data, found.data))


def shared(size, **settings):
    report = evaluated(model(), batches(size), dist.group.WORLD, solver=drawing, **settings)
    return report, report.examples


@pytest.mark.parametrize(("k", "size"), slow_but([(2, 7), (2, 5), (2, 30), (4, 7), (4, 16)]))
def test_the_report_is_that_of_one_process(k, size, tmp_path):
    path = tmp_path / "state.json"
    ((one, shown),) = on_ranks(1, shared, size)
    assert 0 < one.robust_accuracy(LinfBall(0.2)) < one.clean_accuracy < 1
    for report, examples in on_ranks(k, partial(shared, state_file=path), size):
        assert report.to_json() == one.to_json()
        assert len(examples) == len(shown) == 2
        pairs = zip(examples, shown, strict=True)
        assert all(torch.equal(a.perturbed, b.perturbed) for a, b in pairs)
    assert evaluated(model(), batches(size), solver=drawing, state_file=path) == one


def stopping(model, data, target, *, stopped, **settings):
    if any(torch.equal(data, batches(4)[i][0][-len(data) :]) for i in stopped):
        raise ArithmeticError("on purpose")
    return attack(model, data, target, **settings)


class Named:
    """Solvers that count as one and the same."""

    def __init__(self, stopped=()):
        self.solver = partial(stopping, stopped=stopped)

    def __call__(self, *args, **settings):
        return self.solver(*args, **settings)


def stopped(path, at):
    evaluated(model(), batches(4), dist.group.WORLD, state_file=path, solver=Named(at), examples=0)


def gone_on_with(path):
    seen = io.StringIO()
    with contextlib.redirect_stderr(seen):
        settings = {"state_file": path, "solver": Named(), "progress": True}
        report = evaluated(model(), batches(4), dist.group.WORLD, **settings)
    return report.to_json(), seen.getvalue()


@pytest.mark.parametrize("k", slow_but([1, 3]))
def test_an_error_on_one_rank_is_one_on_all_and_any_number_goes_on(k, tmp_path):
    path = tmp_path / "state.json"
    first, second = outcomes(2, stopped, path, range(5, 6), timeout=40.0)
    assert "RuntimeError: rank 1 of 2 failed with ArithmeticError: on purpose" in first.error
    assert "ArithmeticError: on purpose" in second.error and "rank 1 of" not in second.error
    assert len(json.loads(path.read_text(encoding="utf-8"))["batches"]) == 4  # two rounds
    one = evaluated(model(), batches(4), solver=Named()).to_json()
    found = on_ranks(k, gone_on_with, path)
    assert [report for report, _ in found] == [one] * k
    assert ["evaluating" in seen for _, seen in found] == [True] + [False] * (k - 1)
    assert "24/24" in found[0][1]


@pytest.mark.parametrize("size", slow_but([4, 16]))
def test_a_file_that_cannot_be_written_is_an_error_on_all(size, tmp_path):
    (tmp_path / "state.json.tmp").mkdir()  # (what is beside the file is written first)
    first, second = outcomes(2, kept_at, tmp_path / "state.json", size, timeout=40.0)
    assert "IsADirectoryError" in first.error
    assert "RuntimeError: rank 0 of 2 failed with IsADirectoryError" in second.error


def kept_at(path, size):
    evaluated(model(), batches(size), dist.group.WORLD, state_file=path, examples=0)


def refused(how, said):
    rank = dist.get_rank()
    of, loader = model(), batches(7)
    if how == "model":
        of = model(seed=rank)
    elif how == "order":
        loader = loader[::-1] if rank else loader
    elif how == "length":
        loader = loader[: 5 - rank]
    elif how == "settings":
        return evaluated_refused(of, loader, said, seed=rank)
    elif how == "ddp":
        of = ddp(of)
    elif how == "shards":
        of = fsdp(of)
    return evaluated_refused(of, loader, said)


def evaluated_refused(of, loader, said, **settings):
    with pytest.raises(ValueError, match=said):
        evaluated(of, loader, dist.group.WORLD, **settings)


@pytest.mark.parametrize(
    ("how", "said"),
    slow_but(
        [
            ("model", "`model` must be the same on each rank, weights too"),
            ("order", "`loader` must give the same batches on each rank, in one order"),
            ("length", "`loader` must give the same batches on each rank, in one order"),
            ("settings", "must have the same settings"),
            ("ddp", "got DistributedDataParallel: give its `module`"),
            pytest.param("shards", "got the sharded parameter 'weight'", marks=shards_on_cpu),
        ]
    ),
)
def test_ranks_that_do_not_fit_each_other_are_refused(how, said):
    on_ranks(2, refused, how, said)


def each_for_itself():
    return evaluated(model(), batches(10)[dist.get_rank() :]).to_json()


def test_without_a_group_each_process_is_for_itself():
    first, second = on_ranks(2, each_for_itself)
    assert first == evaluated(model(), batches(10)).to_json()
    assert second == evaluated(model(), batches(10)[1:]).to_json()


def of_shards():
    return evaluated(fsdp(model()), batches(10)).to_json()


@shards_on_cpu
def test_without_a_group_ranks_do_the_same_on_the_shards_of_one_model():
    assert on_ranks(2, of_shards) == [evaluated(model(), batches(10)).to_json()] * 2
