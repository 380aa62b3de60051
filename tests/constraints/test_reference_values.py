"""Values checked elsewhere, solutions of scipy, and sets that are the same by other names."""

import math

import numpy as np
import pytest
import torch
from constraints.cases import sets
from scipy.optimize import minimize

TENTHS = torch.tensor([0.1, 0.2, 0.3, -0.4, 0.5, 0.0], dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def birkhoff():
    """Doubly stochastic 2x2 matrices; one of the four equations follows from the others."""
    sums = tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]])
    return sets.Intersection(sets.NonNegative(), sets.Affine(sums, torch.ones(3)))


ROOT_17 = math.sqrt(17)
PROJECTIONS = {
    "simplex": (lambda: sets.Simplex(), [0.6, 0.5, 0.3], [7 / 15, 11 / 30, 1 / 6]),
    "simplex, a vertex": (lambda: sets.Simplex(), [0.5, 2.1, -3.5], [0, 1, 0]),
    "L1 ball": (lambda: sets.L1Ball(2.0), [1, -2, 0.5], [0.5, -1.5, 0]),
    "L1 ball, a vertex": (lambda: sets.L1Ball(1.0), [3, -4], [0, -1]),
    "half-space": (lambda: sets.HalfSpace(tensor([3, 4]), 5.0), [1, 2], [7 / 25, 26 / 25]),
    "section": (
        lambda: sets.BoxSection(tensor([1, 2, 3]), 1.0, 0.0, 0.8),
        [1.2, 3, 0.7],
        [0, 0.5, 0],
    ),
    "affine": (
        lambda: sets.Affine(tensor([[1, 1, 1], [1, -1, 0]]), tensor([1, 0])),
        [1, 0, 0],
        [0.5, 0.5, 0],
    ),
    "L1 ball and box": (
        lambda: sets.BoundedBall(sets.L1Ball(1.0), 0.0, 0.4),
        [0.9, 0.5, 0.3],
        [0.4, 0.4, 0.2],
    ),
    "L2 ball and box": (
        lambda: sets.BoundedBall(sets.L2Ball(1.0), 0.0, 1.0),
        [2, 0.5, -0.4],
        [4 / ROOT_17, 1 / ROOT_17, 0],
    ),
    "Birkhoff": (birkhoff, [[0.9, 0.3], [0.2, 0.4]], [[0.7, 0.3], [0.3, 0.7]]),
    "isotonic": (lambda: sets.Monotone(), [1, 3, 2, 4], [1, 2.5, 2.5, 4]),
    "isotonic, one block": (lambda: sets.Monotone(), [3, 2, 1], [2, 2, 2]),
    "isotonic, mixed": (lambda: sets.Monotone(), [1, 5, 4, 3, 6, 2], [1, 4, 4, 4, 4, 4]),
    "PSD": (lambda: sets.PSD(), [[1, 2], [2, 1]], [[1.5, 1.5], [1.5, 1.5]]),
    "nuclear": (lambda: sets.NuclearBall(3.0), [[3, 0], [0, 2]], [[2, 0], [0, 1]]),
    "spectral": (lambda: sets.SpectralBall(1.0), [[3, 0], [0, 0.5]], [[1, 0], [0, 0.5]]),
    "L2 ball": (lambda: sets.L2Ball(1.0), [3, 4], [0.6, 0.8]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projection(name, dtype):
    make, x, expected = PROJECTIONS[name]
    x = torch.tensor([x, x], dtype=dtype)
    exact = make().project(x.double())  # of x as it is in the dtype
    for result, tolerance in ((make().project(x).double(), torch.finfo(dtype).eps), (exact, 1e-9)):
        assert (result - exact).abs().max() <= 4 * max(tolerance, 1e-9)
    if dtype == torch.float64:
        assert exact[0].numpy() == pytest.approx(np.array(expected), abs=1e-9)


# Minimizers of 1/2 (x - t)' Q (x - t)

Q, T = tensor([1, 3, 0.5]), tensor([[2, 0.5, -0.4]])
MINIMA = [
    (lambda: sets.L2Ball(1.0), (0.925007941716, 0.360391217747, -0.120326547085), 0.626594190877),
    (lambda: sets.Simplex(), (0.875, 0.125, 0), 0.88375),
    (lambda: sets.L1Ball(1.0), (0.875, 0.125, 0), 0.88375),
    (lambda: sets.Box(0.0, 1.0), (1, 0.5, 0), 0.54),
]


@pytest.mark.parametrize(("make", "point", "value"), MINIMA)
def test_projected_gradient_reaches_the_minimizer(make, point, value):
    c, x = make(), torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(400):
        c.project_(x.sub_((x - T) * Q / Q.max()))
    assert x[0].tolist() == pytest.approx(point, abs=1e-9)
    assert ((x - T) ** 2 * Q).sum().item() / 2 == pytest.approx(value, abs=1e-9)


# The same set by other names

SAME = {
    "section with weight 1 is the simplex": (
        lambda: sets.BoxSection(1.0, 1.0, 0.0, None),
        lambda: sets.Simplex(),
    ),
    "L1 ball in a large box": (
        lambda: sets.BoundedBall(sets.L1Ball(1.0), -9.0, 9.0),
        lambda: sets.L1Ball(1.0),
    ),
    "L2 ball in a large box": (
        lambda: sets.BoundedBall(sets.L2Ball(1.0), -9.0, 9.0),
        lambda: sets.L2Ball(1.0),
    ),
    "Linf ball in a box is a box": (
        lambda: sets.BoundedBall(sets.LinfBall(1.0), 0.0, 2.0),
        lambda: sets.Box(0.0, 1.0),
    ),
    "Linf ball is a box": (lambda: sets.LinfBall(0.3), lambda: sets.Box(-0.3, 0.3)),
    "center": (lambda: sets.LinfBall(0.25, center=0.5), lambda: sets.Box(0.25, 0.75)),
    "MaxNorm is the L2 ball": (lambda: sets.MaxNorm(0.7), lambda: sets.L2Ball(0.7)),
    "one equation": (
        lambda: sets.Affine(torch.ones(1, 6), tensor([2.0])),
        lambda: sets.Hyperplane(1.0, 2.0),
    ),
    "section without bounds": (
        lambda: sets.BoxSection(TENTHS, 2.0, None, None),
        lambda: sets.Hyperplane(TENTHS, 2.0),
    ),
    "the simplex by its parts": (
        lambda: sets.Intersection(sets.NonNegative(), sets.Hyperplane(1.0, 1.0)),
        lambda: sets.Simplex(),
    ),
    "ball and box by their parts": (
        lambda: sets.Intersection(sets.L2Ball(1.0), sets.Box(-0.1, 0.7)),
        lambda: sets.BoundedBall(sets.L2Ball(1.0), -0.1, 0.7),
    ),
    "nothing masked": (
        lambda: sets.Masked(sets.L1Ball(1.0), torch.ones(6, dtype=torch.bool)),
        lambda: sets.L1Ball(1.0),
    ),
    "a zero budget of entries": (lambda: sets.TopK(0), lambda: sets.L2Ball(0.0)),
}


@pytest.mark.parametrize("name", SAME)
def test_same_set(name):
    one, other = (make() for make in SAME[name])
    x = 2 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (one.project(x) - other.project(x)).abs().max() <= 1e-8


@pytest.mark.parametrize(
    ("of_matrices", "of_values"), [("SpectralBall", "LinfBall"), ("NuclearBall", "L1Ball")]
)
def test_diagonal_matrices_are_vectors(of_matrices, of_values):
    x = 2 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = getattr(sets, of_matrices)(1.3).project(torch.diag_embed(x))
    expected = torch.diag_embed(getattr(sets, of_values)(1.3).project(x))
    assert (y - expected).abs().max() <= 1e-12


# scipy

W = np.array([1.0, -2, 0.5, 3, 0.2, -1, 0.7, 1.5])


def at_most(f):
    """A constraint f(y) <= 0 of scipy."""
    return [{"type": "ineq", "fun": lambda y: -f(y)}]


def equals(f):
    return [{"type": "eq", "fun": f}]


SOLVED = {
    "Box": (lambda n: sets.Box(-0.3, 0.7), [], (-0.3, 0.7)),
    "NonNegative": (lambda n: sets.NonNegative(), [], (0, None)),
    "L2Ball": (
        lambda n: sets.L2Ball(0.8, center=0.1),
        at_most(lambda y: (y - 0.1) @ (y - 0.1) - 0.64),
        (),
    ),
    "Simplex": (lambda n: sets.Simplex(1.5), equals(lambda y: y.sum() - 1.5), (0, None)),
    "BoxSection": (
        lambda n: sets.BoxSection(tensor(W[:n]), 0.2, -0.4, 0.6),
        equals(lambda y: W[: len(y)] @ y - 0.2),
        (-0.4, 0.6),
    ),
    "BoundedBall": (
        lambda n: sets.BoundedBall(sets.L2Ball(0.9), -0.2, 0.6),
        at_most(lambda y: y @ y - 0.81),
        (-0.2, 0.6),
    ),
    "Hyperplane": (
        lambda n: sets.Hyperplane(tensor(W[:n]), 0.3),
        equals(lambda y: W[: len(y)] @ y - 0.3),
        (),
    ),
    "HalfSpace": (
        lambda n: sets.HalfSpace(tensor(W[:n]), 0.3),
        at_most(lambda y: W[: len(y)] @ y - 0.3),
        (),
    ),
    "Monotone": (
        lambda n: sets.Monotone(),
        [{"type": "ineq", "fun": lambda y: np.append(np.diff(y), 0.0)}],
        (),
    ),
    "Affine": (
        lambda n: sets.Affine(tensor(np.stack([W[:n], np.arange(1.0, n + 1)])), tensor([0.3, 0.5])),
        equals(lambda y: np.array([W[: len(y)] @ y - 0.3, np.arange(1.0, len(y) + 1) @ y - 0.5])),
        (),
    ),
    "Intersection": (
        lambda n: sets.Intersection(sets.L2Ball(0.8), sets.HalfSpace(tensor(W[:n]), 0.1)),
        at_most(lambda y: np.array([y @ y - 0.64, W[: len(y)] @ y - 0.1])),
        (),
    ),
}


def solved(x, constraints, bounds):
    result = minimize(
        lambda y: (y - x) @ (y - x) / 2,
        np.zeros_like(x),
        jac=lambda y: y - x,
        constraints=constraints,
        bounds=[bounds] * len(x) if bounds else None,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return result.x


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("name", SOLVED)
def test_as_an_independent_solver(name, size):
    make, constraints, bounds = SOLVED[name]
    for seed in range(3):
        x = 1.5 * np.random.default_rng(seed).normal(size=size)
        mine = make(size).project(torch.tensor(x)[None])[0].numpy()
        assert mine == pytest.approx(solved(x, constraints, bounds), abs=2e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [3, 8])
def test_l1_ball_as_an_independent_solver(size, seed):
    """In twice the variables, positive and negative parts, for the solver needs derivatives."""
    x = 1.5 * np.random.default_rng(seed).normal(size=size)

    def left(y):
        return y[:size] - y[size:] - x

    parts = minimize(
        lambda y: left(y) @ left(y) / 2,
        np.full(2 * size, 0.1 / size),
        jac=lambda y: np.concatenate([left(y), -left(y)]),
        constraints=at_most(lambda y: y.sum() - 1.2),
        bounds=[(0, None)] * (2 * size),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    ).x
    mine = sets.L1Ball(1.2).project(torch.tensor(x)[None])[0].numpy()
    assert mine == pytest.approx(parts[:size] - parts[size:], abs=2e-6)
