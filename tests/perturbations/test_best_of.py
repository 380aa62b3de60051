"""Which of several trials is kept: in one look at all of them, as by one look after the other."""

import itertools
from math import inf, nan

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import L2Ball
from rai_toolbox.perturbations import attack, solve
from rai_toolbox.perturbations.best_of import BestOf


def kept_by_hand(trials, best, stop):
    """The number of the trial that one example keeps: what `BestOf` documents, in plain Python."""
    kept = 0
    for number, (cost, success, value) in enumerate(trials):
        kept_cost, kept_success, _ = trials[kept]
        if number == 0 or (stop and kept_success):
            continue
        is_number = cost == cost
        lower = cost < kept_cost or (is_number and kept_cost != kept_cost)
        better = success > kept_success or (success == kept_success and lower)
        if (better and value == value) if best else True:
            kept = number
    return kept


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_one_look_at_some_trials_is_as_good_as_a_look_at_each(together, best, stop):
    cases = itertools.product([0.0, 1.0, inf, nan], [False, True], [0.5, nan])
    examples = list(itertools.product(cases, repeat=3))  # three trials of each, after a first one
    first = (1.0, False, 0.5)
    count = len(examples)
    found = BestOf(
        torch.full((count,), first[0]), torch.full((count,), first[1]),
        [torch.full((count, 1), first[2])], best, stop,
    )  # fmt: skip
    by_trial = [tuple(map(torch.tensor, zip(*trial, strict=True))) for trial in zip(*examples)]  # noqa: B905
    for start in range(0, 3, together):
        some = by_trial[start : start + together]
        costs, successes, values = (list(each) for each in zip(*some, strict=True))
        found.choose_(costs, successes, [[value.unsqueeze(1)] for value in values])
    wanted = [(first, *trials)[kept_by_hand((first, *trials), best, stop)] for trials in examples]
    cost, success, value = map(torch.tensor, zip(*wanted, strict=True))
    torch.testing.assert_close(found.cost, cost, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.success, success)
    torch.testing.assert_close(found.tensors[0][:, 0], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("room", [0, 2, 5])
def test_trials_may_wait_to_be_judged(monkeypatch, room):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    search = {"ball": L2Ball(0.3), "steps": 12, "stop_once_fooled": False}
    found = attack(net, x, y, **search)
    monkeypatch.setattr(solve, "_room", lambda *_: room)
    for stop in (False, True):
        again = attack(net, x, y, **{**search, "stop_once_fooled": stop})
        if not stop:
            assert all(map(torch.equal, found[:4], again[:4]))
        else:
            assert torch.equal(found.fooled, again.fooled)
