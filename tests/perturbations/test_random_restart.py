"""Restarts: the best of each example over all runs, whatever the runs share."""

from functools import partial

import pytest
import torch
from torch.optim import SGD

from rai_toolbox.perturbations.init import uniform_like_linf_n_ball_
from rai_toolbox.perturbations.models import AdditivePerturbation
from rai_toolbox.perturbations.solvers import gradient_ascent, random_restart

WAVY = {
    "model": lambda x: x,
    "criterion": lambda out, target: (3 * out).sin() - 0.1 * out.abs(),
    "target": 0.0,
    "data": torch.linspace(-4, 4, 30),
}
START = partial(AdditivePerturbation, init_fn=uniform_like_linf_n_ball_, epsilon=2.0)


def recording(solver, runs):
    def solve(**kwargs):
        runs.append(solver(**kwargs))
        return runs[-1]

    return solve


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_the_best_of_each_example(targeted, bound):
    torch.manual_seed(0)
    runs = []
    solver, given = gradient_ascent, {"targeted": targeted}
    if bound:
        # `targeted` is seen in a partial, below the recorder's `**kwargs` too
        solver, given = partial(gradient_ascent, targeted=targeted), {}
    solve = random_restart(partial(recording(solver, runs), targeted=targeted), repeats=5)
    data, losses = solve(
        **WAVY, **given, optimizer=SGD, lr=0.02, steps=10, perturbation_model=START
    )
    assert len(runs) == 5
    all_losses = torch.stack([run[1] for run in runs])
    best, which = all_losses.min(0) if targeted else all_losses.max(0)
    assert torch.equal(losses, best)
    assert torch.equal(data, torch.stack([run[0] for run in runs])[which, torch.arange(30)])
    assert len(which.unique()) > 1


@pytest.mark.parametrize("make", [lambda t: partial(gradient_ascent, targeted=t)])
@pytest.mark.parametrize("targeted", [False, True])
def test_a_bound_targeted_is_honored(make, targeted):
    torch.manual_seed(0)
    kwargs = dict(**WAVY, optimizer=SGD, lr=0.02, steps=3, perturbation_model=START)
    once = make(targeted)(**kwargs)[1]
    torch.manual_seed(0)
    often = random_restart(make(targeted), 8)(**kwargs)[1]
    assert (often <= once).all() if targeted else (often >= once).all()
    assert (often != once).any()


def test_one_repeat_is_the_solver():
    torch.manual_seed(0)
    expected = gradient_ascent(**WAVY, optimizer=SGD, lr=0.02, steps=3, perturbation_model=START)
    torch.manual_seed(0)
    found = random_restart(gradient_ascent, 1)(
        **WAVY, optimizer=SGD, lr=0.02, steps=3, perturbation_model=START
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_instances_start_anew_and_end_at_the_best():
    torch.manual_seed(0)
    model = START(WAVY["data"])
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    first, starts, buffers = model.delta.detach().clone(), [], []

    def solver(**kwargs):
        starts.append(model.delta.detach().clone())
        buffers.append(dict(optimizer.state))
        return gradient_ascent(**kwargs, use_best=True)

    data, losses = random_restart(solver, 4)(
        **WAVY, optimizer=optimizer, perturbation_model=model, steps=6
    )
    assert torch.equal(starts[0], first)
    assert not any(torch.equal(a, b) for a, b in zip(starts, starts[1:], strict=False))
    assert all((start.abs() <= 2).all() for start in starts)
    assert not any(buffers)  # no momentum of the run before
    assert torch.equal(WAVY["data"] + model.delta, data)
    assert torch.equal(WAVY["criterion"](data, 0), losses)


def test_a_model_without_reset_goes_back_to_its_start():
    class Shift:
        def __init__(self):
            self.shift = torch.zeros(30, requires_grad=True)

        def __call__(self, data):
            return data + self.shift

        def parameters(self):
            return [self.shift]

    model, starts = Shift(), []

    def solver(**kwargs):
        starts.append(model.shift.detach().clone())
        return gradient_ascent(**kwargs)

    random_restart(solver, 3)(
        **WAVY, optimizer=SGD([model.shift], lr=0.02), perturbation_model=model, steps=3
    )
    assert len(starts) == 3 and not torch.stack(starts).any()


def test_a_loss_that_is_nan_never_wins():
    results = iter([
        (torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, 5.0])),
        (torch.tensor([3.0, 4.0]), torch.tensor([0.0, torch.nan])),
    ])  # fmt: skip
    data, losses = random_restart(lambda: next(results), 2)()
    assert data.tolist() == [3.0, 2.0] and losses.tolist() == [0.0, 5.0]


@pytest.mark.parametrize(
    ("repeats", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError)]
)
def test_repeats_are_counted(repeats, error):
    with pytest.raises(error, match=f"`repeats` must be .*got {repeats}"):
        random_restart(gradient_ascent, repeats)


def test_losses_must_be_of_each_example():
    solve = random_restart(partial(gradient_ascent, criterion=lambda o, t: o.sum()), 2)
    with pytest.raises(ValueError, match=r"`criterion` must give one value .* got shape \(\)"):
        solve(model=lambda x: x, data=[1.0, 2.0], target=0.0, optimizer=SGD, lr=0.1, steps=1)


def test_the_solver_must_be_callable():
    with pytest.raises(TypeError, match="`solver` must be callable, got 3"):
        random_restart(3, 2)
