"""Where a constrained optimizer stops, and with which inner ones: at the solution, by scipy.

benchmarks/stationary_points.py measures the same at length.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiers import slow_but
from torch import optim

from rai_toolbox.constraints import (
    BoundedBall,
    BoxSection,
    Constraint,
    L1Ball,
    L2Ball,
    Monotone,
    Simplex,
    SpectralBall,
)
from rai_toolbox.optim import ProjectedOptimizer

f64 = partial(torch.tensor, dtype=torch.float64)
Q, T = f64([1.0, 3.0, 0.5, 2.0]), f64([2.0, 0.5, -0.4, 1.5])  # of the quadratic; n = 3 or 4
WEIGHT = f64([1.0, 2.0, 3.0])


class Case(NamedTuple):
    """A set, the shape of a point, and the set in the words of scipy: bounds, and functions."""

    constraint: Constraint
    shape: tuple[int, ...]
    bounds: tuple[float | None, float | None] = (None, None)
    not_negative: Any = None
    zero: Any = None

    def least(self, decay: float = 0.0) -> float:
        """The least objective, by SLSQP."""
        kinds = {"ineq": self.not_negative, "eq": self.zero}
        n = int(np.prod(self.shape))
        found = minimize(
            lambda x: float(objective(torch.from_numpy(x), decay)),
            np.full(n, 0.3),
            method="SLSQP",
            bounds=[self.bounds] * n,
            constraints=[{"type": kind, "fun": f} for kind, f in kinds.items() if f],
            options={"ftol": 1e-15, "maxiter": 500},
        )
        # on the way to 1e-15 it may find that it cannot get lower
        assert found.success or "Positive directional" in found.message, found.message
        return found.fun


def in_spectral_ball(x: np.ndarray) -> np.ndarray:
    rest = np.eye(2) - x.reshape(2, 2).T @ x.reshape(2, 2)  # to be positive semidefinite
    return np.array([np.trace(rest), np.linalg.det(rest)])


SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
CENTER = f64([1.0, 0.0, 0.0])

SETS = {
    "L2Ball": Case(L2Ball(1.0), (3,), not_negative=lambda x: 1 - x @ x),
    "L1Ball": Case(L1Ball(1.0), (3,), not_negative=lambda x: 1 - SIGNS @ x),
    "Simplex": Case(Simplex(), (3,), (0, None), zero=lambda x: x.sum() - 1),
    "BoxSection": Case(
        BoxSection(WEIGHT, 1.0, 0.0, 0.8), (3,), (0, 0.8), zero=lambda x: WEIGHT.numpy() @ x - 1
    ),
    "SpectralBall": Case(SpectralBall(1.0), (2, 2), not_negative=in_spectral_ball),
    "BoundedBall": Case(
        BoundedBall(L2Ball(1.0), 0.0, 1.0), (3,), (0, 1), not_negative=lambda x: 1 - x @ x
    ),
    "Monotone": Case(Monotone(), (3,), not_negative=np.diff),
    "L2Ball aside": Case(
        L2Ball(0.5, center=CENTER),
        (3,),
        not_negative=lambda x: 0.25 - (x - CENTER.numpy()) @ (x - CENTER.numpy()),
    ),
}

INNER = {  # with the first learning rate, and the steps in which it falls to a tenth
    "SGD": (partial(optim.SGD), 0.3, 1e9),
    "SGD momentum": (partial(optim.SGD, momentum=0.9), 0.3, 1e9),
    "Adam": (optim.Adam, 0.1, 2000),
    "AdamW": (partial(optim.AdamW, weight_decay=0.0), 0.1, 2000),
    "RMSprop": (optim.RMSprop, 0.05, 750),
    "Adagrad": (optim.Adagrad, 1.0, 1e9),
    "NAdam": (optim.NAdam, 0.1, 2000),
    "RAdam": (optim.RAdam, 0.1, 2000),
    "Adadelta": (optim.Adadelta, 10.0, 1200),
    "LBFGS": (partial(optim.LBFGS, max_iter=1, tolerance_grad=0, tolerance_change=0), 1.0, 1e9),
}


def objective(x: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    x = x.flatten()
    q, t = Q[: len(x)], T[: len(x)]
    return (q * (x - t) ** 2).sum() / 2 + decay * (x**2).sum() / 2


def gradient(x: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    n = x.numel()
    return Q[:n].view_as(x) * (x - T[:n].view_as(x)) + decay * x


def residual(case: Case, x: torch.Tensor, decay: float = 0.0) -> float:
    """`|x - P(x - g)|`, of the objective with its decay."""
    batch = x.unsqueeze(0)
    moved = batch - case.constraint.project(batch - gradient(batch, decay))
    return moved.norm().item()


def solved(
    case: Case,
    inner: str,
    decay: float = 0.0,
    steps: int = 2000,
    enough: float = 1e-8,
    **settings: Any,
) -> torch.Tensor:
    """Where the steps lead to; the inner optimizer is to add the decay."""
    InnerOpt, lr, tenfold = INNER[inner]
    x = torch.full(case.shape, 0.3, dtype=torch.float64, requires_grad=True)
    opt = ProjectedOptimizer(
        [x], InnerOpt, constraint=case.constraint, param_ndim=None, lr=lr, **settings
    )

    def closure() -> float:
        x.grad = gradient(x.detach())
        return 0.0

    for done in range(steps):
        opt.param_groups[0]["lr"] = lr * 0.1 ** (done / tenfold)
        opt.step(closure)
        if done % 20 == 19 and residual(case, x.detach(), decay) <= enough:
            break
    return x.detach()


# Each inner optimizer on the sets on which it needs few steps; all others on the simplex.
CELLS = [
    (inner, name)
    for inner in ("SGD", "SGD momentum", "Adam", "NAdam", "LBFGS")
    for name in SETS
    if name != "L2Ball aside"
] + [(inner, "Simplex") for inner in ("AdamW", "RMSprop", "Adagrad", "RAdam")]
QUICK = [("SGD", name) for name in SETS if name != "L2Ball aside"]
QUICK += [("Adam", "L2Ball"), ("Adam", "L1Ball"), ("LBFGS", "Simplex"), ("RMSprop", "Simplex")]
CELLS += [("Adadelta", "L2Ball"), ("Adagrad", "L1Ball"), ("RAdam", "SpectralBall")]


@pytest.mark.parametrize(("inner", "name"), slow_but(CELLS, *QUICK))
def test_it_stops_at_the_solution(inner, name):
    case = SETS[name]
    x = solved(case, inner)
    assert residual(case, x) <= 1e-6
    assert objective(x).item() == pytest.approx(case.least(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "least", "at"),
    [
        ("L2Ball", 0.626594190877, [0.925007941716, 0.360391217747, -0.120326547085]),
        ("L1Ball", 0.88375, [0.875, 0.125, 0]),
        ("Simplex", 0.88375, [0.875, 0.125, 0]),
    ],
)
def test_known_solutions(name, least, at):
    x = solved(SETS[name], "Adam", enough=1e-11)
    assert x.tolist() == pytest.approx(at, abs=1e-7)
    assert objective(x).item() == pytest.approx(least, abs=1e-11)


@pytest.mark.parametrize("name", ["L2Ball", "L1Ball", "Simplex"])
def test_without_the_mapping_adam_stops_elsewhere(name):
    """What the mapping is for; if torch's Adam got this right by itself, it could go."""
    x = solved(SETS[name], "Adam", steps=500, gradient_mapping=False)
    assert residual(SETS[name], x) > 0.1
    assert objective(x) > 1.05 * SETS[name].least()


# Weight decay


@pytest.mark.parametrize("name", ["L2Ball aside", "Simplex"])
@pytest.mark.parametrize(
    ("inner", "settings"),
    slow_but(
        [
            ("SGD", {}),
            ("SGD", {"gradient_mapping": True}),
            ("Adam", {}),
            ("RMSprop", {}),
            ("AdamW", {"decoupled_weight_decay": False}),
        ]
    ),
)
def test_coupled_weight_decay_is_a_part_of_the_objective(name, inner, settings):
    case, decay = SETS[name], 0.7
    if "decoupled_weight_decay" in settings:
        inner = "Adam"  # whose flag it is
    x = solved(case, inner, decay, steps=6000, weight_decay=decay, **settings)
    assert residual(case, x, decay) <= 1e-6
    assert objective(x, decay).item() == pytest.approx(case.least(decay), rel=1e-6)
    assert residual(case, x) > 0.1  # it is another point than that without decay


@pytest.mark.parametrize("name", ["L2Ball aside", "Simplex"])
def test_where_decoupled_weight_decay_leads_to(name):
    """To `-(w x + D g')` in the normal cone, with `D = 1 / (|g'| + eps)`: not to the solution."""
    case, decay, eps = SETS[name], 0.7, 1.0
    x = torch.full((1, *case.shape), 0.3, dtype=torch.float64, requires_grad=True)
    opt = ProjectedOptimizer(
        [x],
        partial(optim.AdamW, weight_decay=decay, eps=eps, betas=(0.9, 0.9)),
        constraint=case.constraint,
        param_ndim=1,
        lr=0.05,
    )
    for _ in range(400):
        x.grad = gradient(x.detach())
        opt.step()
    x, g, P = x.detach(), gradient(x.detach()), case.constraint.project
    e = 0.1 * x.norm() / g.norm()
    mapped = (x - P(x - e * g)) / e
    pull = decay * x + mapped / (mapped.abs() + eps)
    assert (x - P(x - pull)).norm() <= 1e-8
    assert (x - P(x - g)).norm() > 0.1


# Going up


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("inner", [optim.SGD, optim.Adam, optim.RMSprop, optim.NAdam])
@pytest.mark.parametrize("name", ["L2Ball", "Simplex", "Monotone"])
def test_going_up_is_going_down_on_the_negative(name, inner, decay):
    case, ends = SETS[name], []
    for up in (False, True):
        x = torch.full(case.shape, 0.3, dtype=torch.float64, requires_grad=True)
        opt = ProjectedOptimizer(
            [x],
            inner,
            constraint=case.constraint,
            param_ndim=None,
            gradient_mapping=True,
            lr=0.05,
            maximize=up,
            weight_decay=decay,
        )
        for _ in range(20):
            x.grad = -gradient(x.detach()) if up else gradient(x.detach())
            opt.step()
        ends.append(x.detach())
    assert torch.equal(*ends)


# Where nothing binds, and where all is done

WIDE = {
    "L2Ball": (L2Ball(1e3), (3,)),
    "L1Ball": (L1Ball(1e3), (3,)),
    "SpectralBall": (SpectralBall(1e3), (1, 3)),
    "BoundedBall": (BoundedBall(L2Ball(1e3), -1e3, 1e3), (3,)),
    "Monotone": (Monotone(), (3,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [optim.SGD, optim.Adam, optim.RMSprop, optim.Adagrad])
@pytest.mark.parametrize("name", WIDE)
def test_an_idle_constraint_changes_no_bit(name, inner, dtype):
    constraint, shape = WIDE[name]
    start = torch.tensor([-1.0, 0.2, 1.5], dtype=dtype).reshape(shape)
    alone, kept = start.clone().requires_grad_(), start.clone().requires_grad_()
    bare = inner([alone], lr=0.01)
    opt = ProjectedOptimizer(
        [kept], inner, constraint=constraint, param_ndim=None, gradient_mapping=True, lr=0.01
    )
    for _ in range(10):
        for x, optimizer in ((alone, bare), (kept, opt)):
            x.grad = gradient(x.detach().double()).to(dtype)
            optimizer.step()
        assert torch.equal(kept, alone)
    assert not torch.equal(kept, start)


SOLUTIONS = {
    "Simplex": [0.875, 0.125, 0],
    "L1Ball": [0.875, 0.125, 0],
    "L2Ball": [0.925007941716, 0.360391217747, -0.120326547085],
}


@pytest.mark.parametrize("inner", [optim.Adam, optim.RMSprop, optim.Adagrad, optim.NAdam])
@pytest.mark.parametrize("name", SOLUTIONS)
def test_it_stays_at_the_solution(name, inner):
    case, at = SETS[name], f64(SOLUTIONS[name])
    x = at.clone().requires_grad_()
    # With their own tiny eps these optimizers blow up any rounding error, free or constrained.
    opt = ProjectedOptimizer(
        [x], partial(inner, eps=1.0), constraint=case.constraint, param_ndim=None, lr=0.01
    )
    for _ in range(100):
        x.grad = gradient(x.detach())
        opt.step()
        assert x.grad.norm() <= 1e-10  # the solutions are known to 12 digits
    assert (x.detach() - at).norm() <= 1e-11


def test_without_the_mapping_adam_leaves_the_solution():
    x = f64(SOLUTIONS["L2Ball"]).requires_grad_()
    opt = ProjectedOptimizer(
        [x],
        partial(optim.Adam, eps=1.0),
        constraint=L2Ball(1.0),
        param_ndim=None,
        gradient_mapping=False,
        lr=0.01,
    )
    for _ in range(100):
        x.grad = gradient(x.detach())
        opt.step()
    assert (x.detach() - f64(SOLUTIONS["L2Ball"])).norm() > 0.01


# What docs/stationarity.md says of the simplex


@pytest.mark.parametrize(("mapping", "steps"), [(None, 1), (False, 7)])
def test_steps_until_adam_leaves_a_face(mapping, steps):
    x = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    opt = ProjectedOptimizer(
        [x],
        optim.Adam,
        lr=0.01,
        constraint=Simplex(),
        param_ndim=None,
        gradient_mapping=mapping,
    )
    push = f64([-1.0, -0.5, 1.0])
    for _ in range(200):
        x.grad = push.clone()
        opt.step()
    taken = 0
    while x[2] == 0:
        x.grad = -push
        opt.step()
        taken += 1
    assert taken == steps


@pytest.mark.parametrize(
    ("start", "decay", "distance"),
    slow_but(
        [
            ([0.875, 0.125, 0.0], 0.0, 0.0),
            ([0.875, 0.125, 0.0], 0.1, 1e-6),
            ([1 / 3, 1 / 3, 1 / 3], 0.0, 0.0),
            ([1 / 3, 1 / 3, 1 / 3], 0.01, 5e-5),
            ([1 / 3, 1 / 3, 1 / 3], 0.1, 6e-4),
        ],
        ([1 / 3, 1 / 3, 1 / 3], 0.1, 6e-4),
    ),
)
def test_how_far_decoupled_weight_decay_leads_away(start, decay, distance):
    best = f64([0.875, 0.125, 0.0])
    x = f64(start).requires_grad_()
    opt = ProjectedOptimizer(
        [x], optim.AdamW, lr=0.01, weight_decay=decay, constraint=Simplex(), param_ndim=None
    )
    for step in range(4000):
        opt.param_groups[0]["lr"] = 0.01 * 1e-3 ** (step / 4000)
        x.grad = gradient(x.detach())
        opt.step()
    assert float((x.detach() - best).norm()) == pytest.approx(distance, rel=0.2, abs=1e-12)
