"""ProjectedLBFGS: its model, where it gets to, how it ends, and what it keeps."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from bitwise import same_bits
from files import through_a_file
from scipy import optimize
from tiers import slow_but

from rai_toolbox.constraints import (
    Affine,
    BoundedBall,
    Box,
    BoxSection,
    Hyperplane,
    Intersection,
    L1Ball,
    L2Ball,
    LinfBall,
    Masked,
    Monotone,
    NonNegative,
    NuclearBall,
    Simplex,
    SpectralBall,
    Stiefel,
    UnitNorm,
)
from rai_toolbox.optim import ProjectedLBFGS, ProjectedOptimizer
from rai_toolbox.optim.lbfgs import memory as memory_file
from rai_toolbox.optim.lbfgs.cauchy import cauchy_point
from rai_toolbox.optim.lbfgs.memory import Memory
from rai_toolbox.optim.lbfgs.search import Trial, search
from rai_toolbox.optim.lbfgs.spg import model_minimum
from rai_toolbox.optim.lbfgs.subspace import longest_step, subspace_minimum

INF = math.inf
EXACT = {"tolerance_grad": 0.0, "tolerance_change": 1e-15}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quadratic(n, condition=100.0, seed=0, dtype=torch.float64):
    """A loss, and its matrix and center."""
    basis = torch.linalg.qr(normal(n, n, seed=seed))[0]
    matrix = basis @ torch.logspace(0, math.log10(condition), n, dtype=torch.float64).diag()
    matrix, center = (matrix @ basis.T).to(dtype), 1.5 * normal(n, seed=seed + 1).to(dtype)

    def loss(x):
        away = x.flatten() - center
        return away @ matrix @ away / 2

    return loss, matrix, center


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def closure_of(optim, loss, seen=None):
    """A closure, which writes down the points at which it is called."""
    params = [param for group in optim.param_groups for param in group["params"]]

    def closure():
        optim.zero_grad()
        if seen is not None:
            seen.append([param.detach().clone() for param in params])
        value = loss(*params)
        value.backward()
        return value

    return closure


def minimized(loss, start, constraint, seen=None, **settings):
    """Where one long step leads to, and the optimizer."""
    x = start.clone().requires_grad_()
    settings = {"param_ndim": None, "max_iter": 400, "max_eval": 400, **settings}
    optim = ProjectedLBFGS([x], constraint=constraint, **settings)
    optim.step(closure_of(optim, loss, seen))
    return x.detach(), optim


# --- the model ------------------------------------------------------------------------------------


def filled(pairs, n=7, size=3, seed=0):
    """A memory with pairs of a positive definite matrix, and B by the formula of BFGS."""
    _, matrix, _ = quadratic(n, seed=seed)
    memory = Memory(size, torch.zeros(n, dtype=torch.float64))
    steps = [normal(n, seed=seed + 10 + i) for i in range(pairs)]
    for step in steps:
        change = matrix @ step
        memory.add(step, change, float(step @ change))
    kept = [(step, matrix @ step) for step in steps[-size:]]
    dense = torch.eye(n, dtype=torch.float64)
    if kept:
        step, change = kept[-1]
        dense = dense * (change @ change) / (step @ change)
    for step, change in kept:
        image = dense @ step
        dense = dense - torch.outer(image, image) / (step @ image)
        dense = dense + torch.outer(change, change) / (step @ change)
    return memory, dense


@pytest.mark.parametrize("pairs", [0, 1, 2, 3, 5])
def test_the_memory_is_the_matrix_of_bfgs(pairs):
    memory, dense = filled(pairs)
    found = torch.stack([memory.hessian(row) for row in torch.eye(7, dtype=torch.float64)])
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-10)


def test_the_memory_does_not_depend_on_units():
    memory, dense = filled(0)
    _, matrix, _ = quadratic(7)
    dense = filled(2)[1]
    for i in range(2):
        step = 1e-150 * normal(7, seed=10 + i)
        memory.add(step, matrix @ step, float(step @ matrix @ step))
    found = torch.stack([memory.hessian(row) for row in torch.eye(7, dtype=torch.float64)])
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [1, 2**16])
def test_products_over_free_elements_are_kept(monkeypatch, block):
    """By changes of what is free (a block of 1), or anew."""
    monkeypatch.setattr(memory_file, "BLOCK", block)
    memory, _ = filled(2)
    for seed in range(6):
        free = normal(7, seed=seed) > -0.5
        found = memory.restrict(free)
        torch.testing.assert_close(
            found, memory.rows * free @ memory.rows.T, rtol=1e-12, atol=1e-12
        )
        step = normal(7, seed=50 + seed)
        memory.add(step, 3 * step, float(step @ (3 * step)))


def path_minimum(x, gradient, lower, upper, dense):
    """The first minimum along the projected gradient path, one segment after the other."""
    ahead = torch.where(gradient < 0, upper, lower)
    times = torch.where(gradient == 0, INF, (x - ahead) / gradient)
    now = 0.0
    while True:
        moving = times > now
        direction = torch.where(moving, -gradient, 0.0)
        point = (x - now * gradient).clamp(lower, upper)
        slope = gradient @ direction + direction @ dense @ (point - x)
        if slope >= 0 or not moving.any():
            return point
        least = now - float(slope / (direction @ dense @ direction))
        following = float(times[moving].min())
        if least <= following:
            return (x - least * gradient).clamp(lower, upper)
        now = following


@pytest.mark.parametrize("chunk", [1, 2, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_cauchy_point_and_subspace_minimum(seed, chunk, monkeypatch):
    """As one segment after the other, and as a dense system."""
    monkeypatch.setattr("rai_toolbox.optim.lbfgs.cauchy._STEP", chunk)
    monkeypatch.setattr("rai_toolbox.optim.lbfgs.cauchy.BLOCK", chunk)
    memory, dense = filled(1 + seed, seed=seed)
    lower, upper = torch.full((7,), -1.0).double(), torch.full((7,), 0.8).double()
    lower[0], upper[1], lower[2], upper[2] = -INF, INF, 0.3, 0.3
    x = normal(7, seed=30 + seed).clamp(lower, upper)
    gradient = 20 * normal(7, seed=40 + seed)
    gradient[6] = 0.0
    cauchy = cauchy_point(x, gradient, lower, upper, memory)
    expected = path_minimum(x, gradient, lower, upper, dense)
    torch.testing.assert_close(cauchy.point, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(cauchy.moved, memory.times(cauchy.point - x), rtol=1e-7, atol=1e-7)
    free = cauchy.free
    slope = gradient + dense @ (cauchy.point - x)
    step = torch.zeros_like(x)
    step[free] = -torch.linalg.solve(dense[free][:, free], slope[free])
    target = (cauchy.point + step).clamp(lower, upper)
    if gradient @ (target - x) >= 0:
        share = min(1.0, longest_step(cauchy.point, step, lower, upper))
        target = (cauchy.point + share * step).clamp(lower, upper)
    found = subspace_minimum(x, gradient, lower, upper, cauchy, memory)
    torch.testing.assert_close(found, target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [10, 105, 165])
def test_a_step_that_leads_uphill_is_cut_at_the_box(seed, monkeypatch):
    """The projected subspace minimum may lead uphill; the last point of the box on the way not."""
    cut = []
    monkeypatch.setattr(
        "rai_toolbox.optim.lbfgs.subspace.longest_step",
        lambda *args: cut.append(args) or longest_step(*args),
    )
    _, matrix, _ = quadratic(2, 1e4, seed=seed)
    x, gradient = torch.zeros(2).double(), normal(2, seed=seed + 900)
    memory = Memory(5, x)
    for i in range(5):
        step = normal(2, seed=10 * seed + i)
        memory.add(step, matrix @ step, float(step @ matrix @ step))
    lower = -0.01 * normal(2, seed=seed).abs() - 1e-4
    upper = 0.01 * normal(2, seed=seed + 1).abs() + 1e-4
    cauchy = cauchy_point(x, gradient, lower, upper, memory)
    target = subspace_minimum(x, gradient, lower, upper, cauchy, memory)
    assert cut
    assert gradient @ (target - x) < 0
    assert Box(lower, upper).violation(target.unsqueeze(0)) == 0


def test_longest_step_is_where_the_first_bound_is():
    x = torch.tensor([0.0, 0.5, 1.0, 0.0])
    direction = torch.tensor([0.0, 1.0, -0.5, 0.0])
    lower, upper = torch.tensor([0.0, -INF, 0.0, 0.0]), torch.tensor([0.0, INF, 1.0, 1.0])
    assert longest_step(x, direction, lower, upper) == 2.0
    assert longest_step(x, torch.zeros(4), lower, upper) == INF


def test_model_minimum_is_that_of_a_long_projected_gradient():
    memory, dense = filled(3, seed=3)
    x, gradient = Simplex().project(normal(1, 7)).flatten(), normal(7, seed=5)

    def project_(z):
        return Simplex().project_(z.view(1, -1)).flatten()

    z = x.clone()
    rate = 1 / torch.linalg.eigvalsh(dense)[-1]
    for _ in range(200):
        z = project_(z - rate * (gradient + dense @ (z - x)))

    def model(z):
        return gradient @ (z - x) + (z - x) @ dense @ (z - x) / 2

    found = model_minimum(x, gradient, memory, project_)
    assert model(found) <= 0.9 * model(z)  # (which is negative)


def along(f, slope_of):
    """Trials of a function of one number."""
    calls = []

    def trial_at(time):
        calls.append(time)
        x = torch.tensor([time], dtype=torch.float64)
        return Trial(x, f(time), torch.tensor([slope_of(time)], dtype=torch.float64))

    return trial_at, calls


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize(
    ("f", "slope_of"),
    [
        (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
        (
            lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
            lambda t: 5 * (t + 0.004) ** 4 - 8 * (t + 0.004) ** 3,
        ),
        (lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    ],
)
def test_search_finds_the_wolfe_conditions(f, slope_of, first):
    """Functions 1 and 2 of More and Thuente (1994), and a parabola."""
    trial_at, calls = along(f, slope_of)
    start = Trial(0 * ONE, f(0.0), ONE * slope_of(0.0))
    found = search(start, ONE, first, lambda: INF, trial_at, 0.0)
    time = found.place.time
    assert f(time) <= f(0.0) + 1e-3 * time * slope_of(0.0)
    assert abs(slope_of(time)) <= 0.9 * abs(slope_of(0.0))
    assert len(calls) <= 15


def test_search_ends_at_the_longest_step():
    trial_at, calls = along(lambda t: -t, lambda t: -1.0)
    start = Trial(0 * ONE, 0.0, -ONE)
    assert search(start, ONE, 1.0, lambda: 2.5, trial_at, 0.0).place.time == 2.5
    assert calls == [1.0, 2.5]


def test_search_goes_back_from_what_is_not_finite():
    trial_at, calls = along(
        lambda t: t * t - t if t < 0.3 else math.nan, lambda t: 2 * t - 1 if t < 0.3 else INF
    )
    start = Trial(0 * ONE, 0.0, -ONE)
    found = search(start, ONE, 1.0, lambda: 1.0, trial_at, 0.0)
    assert 0 < found.place.time < 0.3 and found.trial.loss < 0


# --- where it gets to -----------------------------------------------------------------------------


def least_squares(decades, n, seed):
    generator = np.random.default_rng(seed)
    A = generator.standard_normal((3 * n // 2, n)) * 10 ** generator.uniform(-decades, decades, n)
    b = generator.standard_normal(len(A))
    matrix, target = torch.from_numpy(A), torch.from_numpy(b)
    least = optimize.nnls(A, b, maxiter=100 * n)[1] ** 2 / 2
    return (lambda x: (matrix @ x - target).square().sum() / 2), least


def evaluations(run, least):
    losses = []
    run(losses)
    return next((i + 1 for i, v in enumerate(losses) if v - least <= 1e-8 * abs(least)), 10**9)


def of_scipy(loss, n, losses, most=3000):
    def both(point):
        x = torch.from_numpy(point.copy()).requires_grad_()
        value = loss(x)
        value.backward()
        losses.append(value.item())
        return value.item(), x.grad.numpy()

    options = {"maxcor": 10, "ftol": 0, "gtol": 0, "maxiter": most, "maxfun": most}
    bounds = [(0, None)] * n
    optimize.minimize(
        both, np.zeros(n), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )


def of_ours(loss, n, losses, most=3000):
    def noted(x):
        value = loss(x)
        losses.append(value.item())
        return value

    settings = {"max_iter": most, "max_eval": most, **EXACT}
    minimized(noted, torch.zeros(n, dtype=torch.float64), NonNegative(), **settings)


@pytest.mark.parametrize(
    ("decades", "n", "seed"),
    [(0.5, 30, 0)]
    + [pytest.param(c, 200, s, marks=pytest.mark.slow) for c in (0.5, 1) for s in (1, 2)],
)
def test_non_negative_least_squares_takes_as_long_as_scipy(decades, n, seed):
    loss, least = least_squares(decades, n, seed)
    ours = evaluations(lambda losses: of_ours(loss, n, losses), least)
    theirs = evaluations(lambda losses: of_scipy(loss, n, losses), least)
    assert ours <= 1.5 * theirs + 20


@pytest.mark.parametrize(
    ("lower", "upper"), [(-1.5, 0.8), (None, 0.5), (-INF, INF), (torch.tensor([0.3, -9]), 0.7)]
)
def test_rosenbrock_in_a_box(lower, upper):
    """Not convex: a stationary point, which scipy finds, too."""
    box = Box(lower, upper)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    x, optim = minimized(rosenbrock, start, box)
    assert optim.status in ("gradient", "change", "no decrease")
    assert optim.kkt_residual()[0] <= 1e-6
    ends = [torch.as_tensor(-INF if lower is None else lower).expand(2), torch.tensor([upper] * 2)]
    found = optimize.minimize(
        lambda p: float(rosenbrock(torch.from_numpy(p))),
        box.project(start.unsqueeze(0))[0].numpy(),
        method="L-BFGS-B",
        bounds=optimize.Bounds(*(end.double().numpy() for end in ends)),
        options={"ftol": 1e-15, "gtol": 1e-9},
    )
    assert float(rosenbrock(x)) <= found.fun + 1e-7


SECTION = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
IN_SCIPY = {
    "Simplex": (Simplex(), [{"type": "eq", "fun": lambda x: x.sum() - 1}], (0, None)),
    "L2Ball": (L2Ball(1.0), [{"type": "ineq", "fun": lambda x: 1 - x @ x}], (None, None)),
    "Monotone": (Monotone(), [{"type": "ineq", "fun": np.diff}], (None, None)),
    "BoxSection": (
        BoxSection(SECTION, 2.0, 0.0, 0.8),
        [{"type": "eq", "fun": lambda x: SECTION.numpy() @ x - 2}],
        (0, 0.8),
    ),
    "Intersection": (
        Intersection(Hyperplane(SECTION, 2.0), Box(0.0, 0.8)),
        [{"type": "eq", "fun": lambda x: SECTION.numpy() @ x - 2}],
        (0, 0.8),
    ),
    "Affine": (
        Affine(torch.ones(1, 12, dtype=torch.float64), torch.ones(1, dtype=torch.float64)),
        [{"type": "eq", "fun": lambda x: x.sum() - 1}],
        (None, None),
    ),
}


@pytest.mark.parametrize("name", slow_but(IN_SCIPY, "Simplex", "L2Ball", "Monotone"))
def test_other_sets_as_scipy(name):
    constraint, conditions, bounds = IN_SCIPY[name]
    loss, matrix, center = quadratic(12)
    x, optim = minimized(loss, torch.zeros(12, dtype=torch.float64), constraint, **EXACT)
    found = optimize.minimize(
        lambda p: float(loss(torch.from_numpy(p))),
        x.numpy(),  # (it stays where it is, if that is the solution)
        jac=lambda p: (matrix @ (torch.from_numpy(p) - center)).numpy(),
        method="SLSQP",
        bounds=[bounds] * 12,
        constraints=conditions,
        options={"ftol": 1e-15, "maxiter": 300},
    )
    least = found.fun
    assert abs(float(loss(x)) - least) <= 1e-8 * least
    assert optim.evaluations <= 80 and optim.violation()[0] == 0


@pytest.mark.parametrize(
    "constraint", [L1Ball(2.0), SpectralBall(1.0), NuclearBall(2.0)], ids=lambda c: type(c).__name__
)
def test_other_sets_end_where_the_linear_oracle_can_prove_it(constraint):
    """The gap of the oracle bounds how far the loss is from its least value."""
    loss, _, _ = quadratic(20)
    shape = (1, 20) if isinstance(constraint, L1Ball) else (1, 5, 4)
    x, optim = minimized(loss, torch.zeros(shape).double(), constraint, param_ndim=-1, **EXACT)
    gradient = optim.param_groups[0]["params"][0].grad
    gap = (gradient * (x - constraint.lmo(gradient))).sum()
    assert gap <= 1e-8 * loss(x)
    assert optim.evaluations <= 150


@pytest.mark.slow
def test_l1_ball_logistic_regression_as_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    data = generator.standard_normal((120, 15))
    labels = (data[:, :3].sum(1) + generator.standard_normal(120) > 0).astype(int)
    theirs = LogisticRegression(
        l1_ratio=1, C=0.3, solver="liblinear", fit_intercept=False, tol=1e-12, max_iter=10_000
    )
    weight = torch.from_numpy(theirs.fit(data, labels).coef_[0])
    inputs, signs = torch.from_numpy(data), torch.from_numpy(2.0 * labels - 1)

    def loss(w):
        return torch.nn.functional.softplus(-signs * (inputs @ w)).sum()

    ball = L1Ball(float(weight.abs().sum()))
    x, optim = minimized(loss, torch.zeros(15, dtype=torch.float64), ball)
    assert abs(float(loss(x) - loss(weight))) <= 1e-8 * float(loss(weight))
    torch.testing.assert_close(x, weight, rtol=1e-4, atol=1e-4)
    assert optim.evaluations <= 60


# --- feasibility ----------------------------------------------------------------------------------

SETS = {
    "Box": Box(-0.3, torch.linspace(0.1, 0.4, 12)),
    "NonNegative": NonNegative(),
    "LinfBall": LinfBall(0.3, center=0.1),
    "Masked": Masked(NonNegative(), torch.arange(12) % 2 == 0),
    "Simplex": Simplex(),
    "L1Ball": L1Ball(0.7),
    "L2Ball": L2Ball(0.7),
    "Monotone": Monotone(),
    "BoxSection": BoxSection(1.0, 1.0, 0.0, 0.2),
    "BoundedBall": BoundedBall(L2Ball(0.7), -0.1, 0.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", slow_but(SETS, "Box", "Masked", "Simplex", "L2Ball"))
def test_every_evaluation_is_in_the_set(name, dtype):
    constraint = SETS[name].to(dtype)
    loss, _, _ = quadratic(12, dtype=dtype)
    seen = []
    start = 5 * normal(12, dtype=dtype)  # outside
    settings = {"max_iter": 25, "max_eval": 40}
    x, optim = minimized(loss, start, constraint, seen, **settings)
    assert len(seen) == optim.evaluations >= 2
    for (point,) in seen:
        assert constraint.violation(point.unsqueeze(0)).max() == 0
    assert optim.violation()[0] == 0
    tolerance = 2e-3 if dtype == torch.float32 else 1e-6
    assert optim.kkt_residual()[0] <= tolerance * 100


def test_solutions_have_exact_bounds():
    loss, _, _ = quadratic(30)
    x, _ = minimized(loss, torch.zeros(30, dtype=torch.float64), Box(-0.25, 0.5), **EXACT)
    near = ((x + 0.25).abs() < 1e-6) | ((x - 0.5).abs() < 1e-6)
    assert near.any()
    assert ((x == -0.25) | (x == 0.5))[near].all()


# --- how it ends ----------------------------------------------------------------------------------


def test_each_reason_to_end():
    loss, _, _ = quadratic(12)
    start = torch.zeros(12, dtype=torch.float64)
    run = partial(minimized, loss, start, NonNegative())
    assert run(tolerance_change=0.0)[1].status == "gradient"
    assert run(tolerance_grad=0.0, tolerance_change=1e-6)[1].status == "change"
    assert run(max_iter=3)[1].status == "max_iter"
    optim = run(max_eval=4)[1]
    assert (optim.status, optim.evaluations) == ("max_eval", 4)
    x, optim = minimized(lambda x: loss(x) * 0 - 1, start, NonNegative())
    assert (optim.status, optim.evaluations) == ("gradient", 1)
    assert torch.equal(x, start)
    x = start.clone().requires_grad_()
    assert ProjectedLBFGS([x], constraint=None, param_ndim=None).status is None


def test_by_default_a_step_takes_as_many_evaluations_as_in_torch():
    optim = minimized(rosenbrock, torch.zeros(6).double(), None, max_iter=8, max_eval=None)[1]
    assert optim.evaluations <= 10


def wrong_way(x):
    """A loss with a gradient of the wrong sign."""
    return x.detach().square().sum() - (x.square() - x.detach().square()).sum()


def test_wrong_gradients_do_not_raise_the_loss():
    start = torch.ones(3, dtype=torch.float64)
    x, optim = minimized(wrong_way, start, Box(-5.0, 5.0))
    assert optim.status in ("no decrease", "change")
    torch.testing.assert_close(x, start)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("constraint", [NonNegative(), L2Ball(9.0)])
def test_what_is_not_finite_at_the_start_is_said_and_changes_nothing(bad, constraint):
    x, optim = minimized(lambda x: x.sum() + bad, torch.ones(3), constraint)
    assert optim.status == "not finite"
    assert torch.equal(x, torch.ones(3))


def test_a_gradient_that_is_not_finite_counts_as_well():
    x, optim = minimized(lambda x: x.sqrt().sum(), torch.zeros(3), NonNegative())
    assert optim.status == "not finite"
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize("constraint", [Box(-9.0, 9.0), L2Ball(30.0)])
def test_trials_that_are_not_finite_are_shortened(constraint):
    """log x is NaN beyond 0, where the bounds lead."""
    x, optim = minimized(lambda x: (x - x.log()).sum(), torch.full((4,), 3.0).double(), constraint)
    torch.testing.assert_close(x, torch.ones(4).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("constraint", [NonNegative(), L2Ball(2.0), None])
@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("bad", ["raises", "NaN"])
def test_a_closure_that_fails_leaves_the_best_point(bad, at, constraint):
    """From then on, whatever it is evaluated at."""
    loss, _, _ = quadratic(12)
    x = torch.ones(12, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=constraint, param_ndim=None, max_iter=50)
    points, calls = [], []

    def failing(x):
        calls.append(1)
        if len(calls) >= at:
            if bad == "raises":
                raise KeyError("mine")
            return loss(x) * math.nan
        points.append((loss(x).item(), x.detach().clone()))
        return loss(x)

    closure = closure_of(optim, failing)
    if bad == "raises":
        with pytest.raises(KeyError, match="mine"):
            optim.step(closure)
        assert optim.status == "closure raised"
    else:
        optim.step(closure)
        assert optim.status == ("not finite" if at == 1 else "no decrease")
    if points:
        assert torch.equal(x.detach(), min(points, key=lambda pair: pair[0])[1])
        assert torch.equal(optim.param_groups[0]["params"][0].grad, gradient_of(loss, x))
    at = 10**9  # and nothing is lost: it goes on from there
    optim.step(closure)
    assert optim.kkt_residual()[0] <= 1e-4


def gradient_of(loss, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


@pytest.mark.parametrize("constraint", [Box(-2.0, 2.0), L2Ball(2.0)])
def test_noise_ends_without_harm(constraint):
    loss, _, _ = quadratic(12)
    generator = torch.Generator().manual_seed(0)

    def noisy(x):
        return loss(x) * (1 + 1e-3 * torch.randn((), generator=generator).double())

    start = torch.zeros(12, dtype=torch.float64)
    x, optim = minimized(noisy, start, constraint)
    assert x.isfinite().all() and optim.violation()[0] == 0
    least = float(loss(minimized(loss, start, constraint)[0]))
    assert float(loss(x)) <= 1.05 * least


# --- inputs of all kinds --------------------------------------------------------------------------


def test_equal_bounds_hold_elements():
    loss, _, _ = quadratic(12)
    lower, upper = torch.full((12,), -1.0).double(), torch.full((12,), 1.0).double()
    lower[::3] = upper[::3] = 0.25
    x, optim = minimized(loss, torch.zeros(12).double(), Box(lower, upper), **EXACT)
    assert (x[::3] == 0.25).all()
    assert optim.kkt_residual()[0] <= 1e-6
    same = Box(torch.full((12,), 0.5).double(), 0.5)
    x, optim = minimized(loss, torch.zeros(12, dtype=torch.float64), same)
    assert (x == 0.5).all() and optim.status == "gradient"


def test_a_start_at_a_bound_with_the_gradient_outward_stays():
    x, optim = minimized(lambda x: x.sum(), torch.zeros(3), NonNegative())
    assert (optim.status, optim.evaluations) == ("gradient", 1)
    assert torch.equal(x, torch.zeros(3))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("constraint", [NonNegative(), Simplex()])
def test_units_of_the_loss_do_not_matter(scale, constraint):
    loss, _, _ = quadratic(12)
    start = torch.full((12,), 1 / 12, dtype=torch.float64)
    least = float(loss(minimized(loss, start, constraint, **EXACT)[0]))
    x, optim = minimized(lambda x: scale * loss(x), start, constraint, **EXACT)
    assert float(loss(x)) <= least * (1 + 1e-9)
    assert optim.evaluations <= 120


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_parameters_do_not_matter(scale):
    loss, _, _ = quadratic(12)
    least = float(loss(minimized(loss, torch.zeros(12).double(), Box(-0.4, 0.4), **EXACT)[0]))
    box = Box(-0.4 * scale, 0.4 * scale)
    x, optim = minimized(lambda x: loss(x / scale), torch.zeros(12).double(), box, **EXACT)
    assert float(loss(x / scale)) <= least * (1 + 1e-9)


def test_columns_of_very_different_units():
    units = torch.logspace(-12, 12, 12, dtype=torch.float64)
    x, optim = minimized(
        lambda x: (units * x - 1).square().sum(),
        torch.zeros(12, dtype=torch.float64),
        NonNegative(),
        **EXACT,
    )
    assert x.isfinite().all() and optim.status != "not finite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_and_linear_functions(dtype):
    start = torch.full((3,), 0.5, dtype=dtype)
    x, optim = minimized(lambda x: (x * 0).sum(), start, Box(0.0, 1.0))
    assert torch.equal(x, start) and optim.status == "gradient"
    x, optim = minimized(
        lambda x: (torch.tensor([1.0, -1.0, 0.0], dtype=dtype) * x).sum(), start, Box(-3.0, 4.0)
    )
    assert x.tolist() == [-3.0, 4.0, 0.5]
    assert optim.status == "gradient"


def test_a_loss_without_a_lower_bound_ends():
    x, optim = minimized(lambda x: -x.square().sum(), torch.ones(3).double(), None, max_iter=60)
    assert not x.isnan().any()


def test_float32_gets_as_far_as_its_gradients():
    """The loss is flat to rounding long before: the search compares slopes."""
    loss, _, _ = quadratic(30, dtype=torch.float32)
    offset = 1e3  # of which a float32 has seven digits
    x, optim = minimized(lambda x: loss(x) + offset, torch.zeros(30), Box(-0.4, 0.4), **EXACT)
    exact, _, _ = quadratic(30)
    best = minimized(exact, torch.zeros(30, dtype=torch.float64), Box(-0.4, 0.4), **EXACT)[0]
    torch.testing.assert_close(x.double(), best, rtol=1e-4, atol=1e-4)


def test_empty_frozen_and_unused_parameters():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    frozen = torch.full((2,), -5.0, dtype=torch.bfloat16)
    unused = torch.full((2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    number = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([empty, frozen, x, unused, number], constraint=NonNegative())

    def closure():
        optim.zero_grad()
        loss = (x - torch.tensor([1.0, -2.0, 3.0])).square().sum() + (number - 2) ** 2
        loss.backward()
        return loss

    optim.step(closure)
    torch.testing.assert_close(x.detach(), torch.tensor([[1.0, 0.0, 3.0]] * 2).double())
    torch.testing.assert_close(number.detach(), torch.tensor(2.0).double())
    assert (unused == 3.0).all() and unused.grad is None and (frozen == -5.0).all()


def test_nothing_to_train():
    x = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=NonNegative())
    assert optim.step(lambda: torch.tensor(3.0)) == 3.0


def test_any_strides():
    loss, _, _ = quadratic(24)
    target = minimized(lambda x: loss(x), torch.zeros(4, 6).double(), NonNegative(), **EXACT)[0]
    x = torch.zeros(6, 4, dtype=torch.float64).T.requires_grad_()
    optim = ProjectedLBFGS([x], constraint=NonNegative(), max_iter=400, **EXACT)
    optim.step(closure_of(optim, loss))
    torch.testing.assert_close(x.detach(), target, rtol=1e-5, atol=1e-5)


def test_sparse_gradients():
    table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    optim = ProjectedLBFGS(table.parameters(), constraint=NonNegative())

    def closure():
        optim.zero_grad()
        loss = (table(torch.tensor([0, 2, 2])) - 1).square().sum()
        loss.backward()
        return loss

    optim.step(closure)
    torch.testing.assert_close(table.weight[[0, 2]].detach(), torch.ones(2, 2).double())
    assert (table.weight >= 0).all()


# --- groups ---------------------------------------------------------------------------------------


def test_groups_are_one_problem_in_the_product_of_their_sets():
    loss, _, _ = quadratic(12)
    lower = torch.tensor([0.0] * 4 + [-INF] * 4 + [-0.2] * 4).double()
    upper = torch.tensor([INF] * 4 + [INF] * 4 + [0.1] * 4).double()
    expected = minimized(loss, torch.zeros(12, dtype=torch.float64), Box(lower, upper), **EXACT)[0]
    parts = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optim = ProjectedLBFGS(
        [
            {"params": [parts[0]], "constraint": NonNegative()},
            {"params": [parts[1]], "constraint": None},
            {"params": [parts[2]], "constraint": Box(-0.2, 0.1)},
        ],
        max_iter=400,
        **EXACT,
    )
    optim.step(closure_of(optim, lambda *parts: loss(torch.cat(parts))))
    torch.testing.assert_close(torch.cat(parts).detach(), expected, rtol=1e-6, atol=1e-6)
    assert len(optim.kkt_residual()) == len(optim.violation()) == 3


def test_groups_of_other_sets_are_projected_one_by_one():
    loss, _, _ = quadratic(12)
    x, y = (torch.ones(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (4,)))
    optim = ProjectedLBFGS(
        [
            {"params": [x], "constraint": Simplex()},
            {"params": [y], "constraint": L2Ball(0.5), "param_ndim": None},
        ],
        max_iter=400,
        **EXACT,
    )
    optim.step(closure_of(optim, lambda x, y: loss(torch.cat([x.flatten(), y]))))
    assert all(residual <= 1e-6 for residual in optim.kkt_residual())
    torch.testing.assert_close(x.sum(1).detach(), torch.ones(2).double())


def test_a_group_may_be_added():
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optim = ProjectedLBFGS([x], constraint=NonNegative())
    optim.step(closure_of(optim, lambda x: (x - 2).square().sum()))
    optim.add_param_group({"params": [y], "constraint": Box(None, 0.5)})
    optim.step(closure_of(optim, lambda x, y: (x - 3).square().sum() + (y - x).square().sum()))
    assert (y == 0.5).all()
    y.requires_grad_(False)
    optim.step(closure_of(optim, lambda x, y: (x - 3).square().sum()))
    torch.testing.assert_close(x.detach(), torch.full((3,), 3.0).double())


# --- what it keeps --------------------------------------------------------------------------------

START = normal(8, seed=4).abs()


def stepped(optim, x, steps):
    points = []
    for _ in range(steps):
        optim.step(closure_of(optim, rosenbrock))
        points.append(x.detach().clone())
    return points


@pytest.mark.parametrize("constraint", [Box(-0.5, 0.9), L2Ball(1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_short_steps_are_one_long(constraint, dtype):
    start = START.to(dtype)
    seen = []
    minimized(rosenbrock, start, constraint, seen, max_iter=12, max_eval=99, **EXACT)
    x = start.clone().requires_grad_()
    optim = ProjectedLBFGS(
        [x], constraint=constraint, param_ndim=None, max_iter=1, max_eval=99, **EXACT
    )
    stepped(optim, x, 12)
    assert torch.equal(x.detach(), seen[-1][0])
    assert optim.evaluations == len(seen) + 11


def saved_and_loaded(optim, x):
    loaded = through_a_file({"x": x.detach(), "optim": optim.state_dict()})
    y = loaded["x"].clone().requires_grad_()
    other = ProjectedLBFGS([y], constraint=NonNegative(), param_ndim=None)
    other.load_state_dict(loaded["optim"])
    return other, y


def copied(optim, x):
    optim, x = copy.deepcopy((optim, x))
    return optim, x


def pickled(optim, x):
    return pickle.loads(pickle.dumps((optim, x)))


@pytest.mark.parametrize("again", [saved_and_loaded, copied, pickled])
@pytest.mark.parametrize("constraint", [Box(-0.5, 0.9), L2Ball(1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_as_uninterrupted(again, constraint, dtype):
    x = START.to(dtype).clone().requires_grad_()
    optim = ProjectedLBFGS(
        [x], constraint=constraint, param_ndim=None, max_iter=3, history_size=4, **EXACT
    )
    stepped(optim, x, 3)
    other, y = again(optim, x)
    assert (other.status, other.evaluations) == (optim.status, optim.evaluations)
    assert same_bits(stepped(optim, x, 4), stepped(other, y, 4))
    assert other.param_groups[0]["constraint"] == constraint


@pytest.mark.slow
def test_distributed_checkpoints_resume_as_uninterrupted():
    """They want a state of each parameter."""
    from torch.distributed.checkpoint import state_dict

    data = normal(20, 3)
    models = [torch.nn.Linear(3, 1).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optims = [ProjectedLBFGS(m.parameters(), constraint=NonNegative(), max_iter=3) for m in models]

    def step(model, optim):
        optim.step(closure_of(optim, lambda *_: (model(data) - data.sum(1)).square().mean()))

    step(models[0], optims[0])
    models[1].load_state_dict(models[0].state_dict())
    saved = state_dict.get_optimizer_state_dict(models[0], optims[0])
    state_dict.set_optimizer_state_dict(models[1], optims[1], saved)
    for model, optim in zip(models, optims, strict=True):
        step(model, optim)
    assert optims[0].evaluations == optims[1].evaluations
    assert same_bits(*([p.detach() for p in model.parameters()] for model in models))


@pytest.mark.parametrize("change", ["history_size", "dtype"])
def test_a_memory_that_does_not_fit_is_forgotten(change):
    x = START.clone().requires_grad_()
    optim = ProjectedLBFGS([x], constraint=Box(-0.5, 0.9), param_ndim=None, max_iter=3)
    stepped(optim, x, 2)
    if change == "dtype":
        x.data = x.data.float()
        x.grad = None
    else:
        optim.param_groups[0]["history_size"] = 2
    stepped(optim, x, 30)
    assert optim.kkt_residual()[0] <= 1e-2


# --- the closure, and errors ----------------------------------------------------------------------


def test_step_returns_the_first_loss_and_gives_gradients_at_the_end():
    loss, _, _ = quadratic(12)
    x = torch.ones(12, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=Box(-0.3, 2.0), param_ndim=None)
    with torch.no_grad():  # as in torch's LBFGS
        found = optim.step(closure_of(optim, loss))
    assert found == loss(torch.ones(12, dtype=torch.float64))
    assert torch.equal(x.grad, gradient_of(loss, x))


def test_the_closure_may_return_a_number():
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=None, param_ndim=None)

    def closure():
        x.grad = 2 * x.detach()
        return float(x.detach() @ x.detach())

    optim.step(closure)
    assert x.abs().max() < 1e-12


def test_no_step_with_lr_zero():
    x = torch.ones(2, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=NonNegative(), lr=0.0)
    assert optim.step() is None
    optim.step(closure_of(optim, lambda x: x.sum()))
    assert (x == 1).all()


def test_lr_is_the_first_trial():
    seen = []
    minimized(lambda x: (x - 9).square().sum(), torch.zeros(1), None, seen, max_iter=1, lr=0.25)
    assert [x.item() for (x,) in seen][:2] == [0.0, 0.25]


X = torch.ones(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("params", "settings", "error", "match"),
    [
        ([X], {}, TypeError, "`constraint` must be given"),
        ([X], {"constraint": 3}, TypeError, "`constraint` must be a set"),
        ([X], {"constraint": UnitNorm()}, ValueError, "`constraint` must be convex, got UnitNorm"),
        ([X], {"constraint": Stiefel()}, ValueError, "`constraint` must be convex"),
        ([X], {"constraint": None, "lr": -1.0}, ValueError, "`lr` must be"),
        ([X], {"constraint": None, "max_iter": 0}, ValueError, "`max_iter` must be >= 1, got 0"),
        ([X], {"constraint": None, "max_eval": 1.5}, TypeError, "`max_eval` must be an int"),
        ([X], {"constraint": None, "history_size": 0}, ValueError, "`history_size` must be >= 1"),
        ([X], {"constraint": None, "tolerance_grad": -1}, ValueError, "`tolerance_grad` must be"),
        (
            [X],
            {"constraint": None, "tolerance_change": math.nan},
            ValueError,
            "`tolerance_change` must not be NaN",
        ),
        (
            [("a", X), ("b", torch.ones(2, dtype=torch.float64, requires_grad=True))],
            {"constraint": None},
            TypeError,
            "one dtype and device, got torch.float32 on cpu, and torch.float64 on cpu for .*'b'",
        ),
        (
            [("w", torch.ones(2, dtype=torch.bfloat16, requires_grad=True))],
            {"constraint": None},
            TypeError,
            "float32 or float64, got torch.bfloat16 for parameter 'w'",
        ),
        (
            [torch.ones(2, dtype=torch.complex64, requires_grad=True)],
            {"constraint": None},
            TypeError,
            "float32 or float64, got torch.complex64",
        ),
        (
            [{"params": [X]}, {"params": [torch.ones(1, requires_grad=True)], "max_iter": 3}],
            {"constraint": None},
            ValueError,
            r"`max_iter` must be the same in all groups, got \[20, 3\]",
        ),
        (
            [torch.ones(3, requires_grad=True)],
            {"constraint": Simplex()},
            ValueError,
            "`param_ndim` must be None or 1 for a vector",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(params, settings, error, match):
    with pytest.raises(error, match=match):
        ProjectedLBFGS(params, **settings)


def test_errors_of_a_step():
    x = torch.ones(2, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=NonNegative())
    with pytest.raises(ValueError, match="`closure` must be given, got None"):
        optim.step()
    with pytest.raises(TypeError, match="`closure` must return the loss, got None"):
        optim.step(lambda: None)
    assert (x == 1).all()
    optim.param_groups[0]["max_iter"] = 0
    with pytest.raises(ValueError, match="`max_iter` must be >= 1, got 0"):
        optim.step(closure_of(optim, lambda x: x.sum()))


def test_it_is_no_inner_optimizer():
    with pytest.raises(TypeError, match="`InnerOpt` must not be ProjectedLBFGS, .*its own set"):
        ProjectedOptimizer([X], ProjectedLBFGS, constraint=NonNegative())


def test_asking_before_a_step_makes_no_state():
    optim = ProjectedLBFGS([X], constraint=NonNegative())
    assert (optim.status, optim.evaluations) == (None, 0)
    assert not optim.state_dict()["state"]


def test_a_pair_out_of_range_is_not_kept():
    memory = Memory(3, torch.zeros(2))
    step, change = torch.tensor([1e15, 0.0]), torch.tensor([1e-35, 0.0])
    memory.add(step, change, 1e-20)  # theta would be 1e-50
    assert memory.count == 0 and memory.theta == 1.0


def test_small_matrices_are_on_the_host_whatever_the_default_device():
    x = torch.zeros(4, requires_grad=True)
    optim = ProjectedLBFGS([x], constraint=Box(0.0, 1.0))
    target = torch.tensor([0.5, 2.0, -1.0, 0.1])
    closure = closure_of(optim, lambda x: ((x - target) ** 4).sum())
    with torch.device("meta"):
        optim.step(closure)
        optim.load_state_dict(through_a_file(optim.state_dict()))
        optim.step(closure)
    assert (x - target.clamp(0, 1)).abs().max() < 0.1
