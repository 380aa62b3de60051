"""The sets of matrices, by their singular values and eigenvalues: closed forms, laws, gradients."""

import math
from functools import partial

import pytest
import torch
from optim.memory_layouts import equal_bits

from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.matrices import PSD, Stiefel
from rai_toolbox.constraints.spectral import NuclearBall, SpectralBall

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (2, 2), (5, 3), (8, 8), (13, 11), (64, 48)]
SETS = [SpectralBall(0.37), NuclearBall(0.37), PSD(), Stiefel()]
BALLS = [SpectralBall, NuclearBall]

in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
for_each_set = pytest.mark.parametrize("constraint", SETS, ids=lambda s: type(s).__name__)
for_each_ball = pytest.mark.parametrize("ball", BALLS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, threads that share a small matrix spend their time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrices(shape, dtype=torch.float64, seed=0, square=False):
    """Random ones, of rank one, with equal singular values, zero, huge, tiny, of integers."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (shape[0], shape[0]) if square else shape
    x = torch.randn(12, rows, columns, generator=generator, dtype=torch.float64)
    x[1] = x[1, :, :1] @ x[1, :1]
    q, _ = torch.linalg.qr(x[2] if rows >= columns else x[2].mT)
    x[2] = q if rows >= columns else q.mT
    x[3] = 0.0
    x[4] *= 1e20 if torch.finfo(dtype).max > 1e20 else 1e3
    x[5] *= 1e-20 if torch.finfo(dtype).tiny < 1e-20 else 1e-5
    x[6] = x[6].round()
    x[7] = 1.0
    x[8] = torch.eye(rows, columns)
    x[9, :, 0] *= 1e6 if dtype is not torch.float16 else 1e3
    x[10] = (x[10] + x[10].mT) / 2 if rows == columns else x[10] * 1e-3
    x[11] = x[11] @ x[11].mT if rows == columns else x[11] * 3
    return x.to(dtype)


def batch_for(constraint, shape, dtype=torch.float64, seed=0):
    return matrices(shape, dtype, seed, square=isinstance(constraint, PSD))


def diag(*values):
    return torch.tensor(values, dtype=torch.float64).diag_embed().unsqueeze(0)


# Closed forms


@in_each_dtype
@pytest.mark.parametrize(
    ("constraint", "x", "expected"),
    [
        (PSD(), [[1, 2], [2, 1]], [[1.5, 1.5], [1.5, 1.5]]),
        (PSD(), [[1, 4], [0, 1]], [[1.5, 1.5], [1.5, 1.5]]),
        (PSD(), [[-1, 0], [0, -2]], [[0, 0], [0, 0]]),
        (NuclearBall(3), [[3, 0], [0, 2]], [[2, 0], [0, 1]]),
        (NuclearBall(1), [[0, 3], [1, 0]], [[0, 1], [0, 0]]),
        (SpectralBall(1), [[3, 0], [0, 0.5]], [[1, 0], [0, 0.5]]),
        (SpectralBall(0), [[3, 1], [0, 0.5]], [[0, 0], [0, 0]]),
        (NuclearBall(0), [[3, 1], [0, 0.5]], [[0, 0], [0, 0]]),
        (Stiefel(), [[0, -2], [3, 0], [0, 0]], [[0, -1], [1, 0], [0, 0]]),
    ],
    ids=str,
)
def test_reference_values(constraint, x, expected, dtype):
    x, expected = (torch.tensor([v], dtype=dtype) for v in (x, expected))
    tolerance = 1e-13 if dtype is torch.float64 else 0.0  # the wide noise is taken off
    torch.testing.assert_close(constraint.project(x), expected, rtol=tolerance, atol=tolerance)


@in_each_dtype
def test_of_diagonals_are_the_clamp_and_the_l1_ball(dtype):
    values = torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signed = (values * torch.tensor([1, -1, 1, 1, -1, 1])).to(dtype)
    unit = torch.finfo(dtype).eps * 3 + 1e-13
    clamped = SpectralBall(0.5).project(signed.diag_embed())
    expected = signed.double().clamp(-0.5, 0.5).diag_embed()
    torch.testing.assert_close(clamped.double(), expected, rtol=unit, atol=0)
    summed = NuclearBall(0.5).project(signed.diag_embed()).double()
    ordered = signed.double().abs().sort(descending=True).values
    theta = ((ordered.cumsum(-1) - 0.5) / torch.arange(1, 7)).amax(-1, keepdim=True)
    expected = (signed.double().abs() - theta).clamp(min=0) * signed.double().sign()
    torch.testing.assert_close(summed, expected.diag_embed(), rtol=0, atol=3 * unit)


# Laws


@in_each_dtype
@in_each_shape
@for_each_set
def test_is_in_the_set_after_rounding_and_stays_there(constraint, shape, dtype):
    for wide in (False, True):
        if wide and isinstance(constraint, Stiefel):
            continue
        x = batch_for(constraint, shape[::-1] if wide else shape, dtype)
        y = constraint.project(x)
        assert (constraint.violation(y) == 0).all()
        assert equal_bits(constraint.project(y), y)
        inside = constraint.violation(x) == 0
        assert equal_bits(y[inside], x[inside])


@in_each_dtype
@in_each_shape
@for_each_ball
@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 2e-7, 0.1, 1.0, 3e4, 1e20])
def test_balls_hold_what_they_give(ball, epsilon, shape, dtype):
    """Told by another norm, to within its own noise; projections, corners and samples."""
    constraint, x = ball(epsilon), matrices(shape, dtype)
    outside = constraint.violation(x) > 0
    order = 2 if ball is SpectralBall else "nuc"
    sample = constraint.sample_(torch.empty_like(x), torch.Generator().manual_seed(0))
    for y in (constraint.project(x)[outside], constraint.lmo(x), sample):
        assert y.isfinite().all()
        assert (torch.linalg.matrix_norm(y.double(), order) <= epsilon * (1 + 1e-15)).all()
    assert (constraint.violation(sample) == 0).all()


@in_each_shape
@for_each_ball
def test_rounding_costs_little(ball, shape):
    """Radii are aimed at to within a few times what rounding does to the norm."""
    x = matrices(shape, torch.bfloat16)[[0, 1, 9]] * 1000
    size = ball(1.0).violation(ball(1.0).project(x) * 2) + 1  # the norm, twice
    least = min(shape)
    lost = 2 * math.sqrt(least) if ball is NuclearBall else min(2 * math.sqrt(least), 3.0)
    assert (size >= 2 * (1 - lost * 2**-8)).all()


@in_each_shape
@for_each_ball
def test_projections_onto_balls_are_optimal(ball, shape):
    constraint, x = ball(0.8), matrices(shape)
    y = constraint.project(x)
    corner = constraint.lmo(y - x)
    gap = ((x - y) * (corner - y)).sum((-2, -1))
    assert (gap <= 1e-12 * (x - y).abs().sum((-2, -1))).all()


@in_each_shape
def test_projections_onto_the_cone_are_optimal(shape):
    x = matrices(shape, square=True)
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)
    y = PSD().project(x)
    rest = (y - x + (y - x).mT) / 2  # minus the part in the polar cone
    noise = 1e-13 * shape[0]
    assert (torch.linalg.eigvalsh(rest) >= -noise).all()
    assert ((rest * y).sum((-2, -1)).abs() <= noise * shape[0]).all()


@in_each_shape
@for_each_ball
def test_oracles_reach_the_dual_norm(ball, shape):
    gradient = matrices(shape)
    answer = ball(0.7).lmo(gradient)
    dual = torch.linalg.matrix_norm(gradient, "nuc" if ball is SpectralBall else 2)
    value = (gradient * answer).sum((-2, -1))
    torch.testing.assert_close(value, -0.7 * dual, rtol=1e-12, atol=0)


def test_oracle_of_the_nuclear_ball_is_of_rank_one_also_with_ties():
    answer = NuclearBall(2.0).lmo(torch.eye(5).expand(3, 5, 5))
    values = torch.linalg.svdvals(answer.double())
    assert (values[:, 0] >= 2 - 1e-5).all()
    assert (values[:, 1:] <= 1e-6).all()


@in_each_shape
def test_stiefel(shape):
    """The polar factor is nearer than other points, and the oracle its mirror image."""
    x = matrices(shape)
    y = Stiefel().project(x)
    identity = torch.eye(shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    torch.testing.assert_close(y.mT @ y, identity, rtol=0, atol=1e-14 * sum(shape))
    nuclear = torch.linalg.matrix_norm(x, "nuc")
    torch.testing.assert_close((x * y).sum((-2, -1)), nuclear, rtol=1e-12, atol=0)
    torch.testing.assert_close((x * Stiefel().lmo(x)).sum((-2, -1)), -nuclear, rtol=1e-12, atol=0)


def test_samples_of_stiefel_are_uniform():
    x = Stiefel().sample_(torch.empty(4000, 4, 2, dtype=torch.float64))
    assert (Stiefel().violation(x) == 0).all()
    flat = x.flatten(1)
    second = flat.T @ flat / len(x)
    torch.testing.assert_close(second, torch.eye(8).double() / 4, rtol=0, atol=0.03)
    assert (flat.mean(0).abs() < 0.05).all()


@in_each_dtype
@in_each_shape
@for_each_set
def test_batched_is_one_by_one_in_any_layout(constraint, shape, dtype):
    x = batch_for(constraint, shape, dtype)
    wide = x.double().flatten(1)
    allowed = (16 * torch.finfo(dtype).eps + 1e-13) * (wide.norm(dim=1) + 1)
    measures = {  # points that are equally near, or equally low, may differ
        constraint.project: lambda y: (y.double().flatten(1) - wide).norm(dim=1),
        constraint.violation: lambda y: y,
    }
    if constraint.bounded:
        measures[constraint.lmo] = lambda y: (y.double().flatten(1) * wide).sum(1)
    for method, measured in measures.items():
        whole = measured(method(x))
        for other in (
            torch.cat([method(row) for row in x.split(1)]),
            method(x.mT.contiguous().mT),
        ):
            assert ((measured(other) - whole).abs() <= allowed).all()


def test_the_cone_takes_stacks_of_matrices():
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    each = x.flatten(0, 1)
    torch.testing.assert_close(PSD().project(x).flatten(0, 1), PSD().project(each))
    worst = PSD().violation(each).view(6, 2).amax(1)
    torch.testing.assert_close(PSD().violation(x), worst)


@pytest.mark.parametrize("make", [*(partial(ball, 0.7) for ball in BALLS), Stiefel])
@pytest.mark.parametrize(("flatten", "shape"), [(1, (4, 3, 2, 2)), (2, (4, 3, 2, 2)), (1, (3, 4))])
def test_flatten_makes_a_sub_tensor_one_matrix(make, flatten, shape):
    kernels = torch.randn(5, *shape, dtype=torch.float64)
    of, x = make(flatten=flatten), kernels.flatten(1 + flatten).flatten(1, flatten)
    assert torch.equal(of.violation(kernels), make().violation(x))
    for method in ("project", "lmo"):
        found = getattr(of, method)(kernels)
        assert found.shape == kernels.shape
        assert torch.equal(found.view(x.shape), getattr(make(), method)(x))
    generator = torch.Generator()
    drawn = of.sample_(torch.empty_like(kernels), generator.manual_seed(0))
    assert torch.equal(drawn.view(x.shape), make().sample_(x, generator.manual_seed(0)))
    assert Constraint.from_plain(of.to_plain()) == of


def test_orthonormal_rows_of_wide_matrices():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for method in ("project", "lmo"):
        found, of_columns = getattr(Stiefel(), method)(x), getattr(Stiefel(), method)(x.mT)
        torch.testing.assert_close(found, of_columns.mT)
    assert (Stiefel().violation(Stiefel().sample_(x.clone())) == 0).all()
    assert torch.equal(Stiefel().violation(x), Stiefel().violation(x.mT.contiguous()))


@for_each_ball
@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 4, 5)], ids=str)
def test_a_radius_for_each_sub_tensor(ball, shape):
    x = torch.randn(shape, dtype=torch.float64)
    radii = torch.tensor([0.0, 0.5, 1e3]).reshape(-1, *(1,) * (len(shape) - 1))
    ball = partial(ball, flatten=1)
    many = ball(radii)
    for word in ("project", "lmo", "violation"):
        each = [getattr(ball(r.item()), word)(x[i : i + 1]) for i, r in enumerate(radii)]
        assert torch.equal(getattr(many, word)(x), torch.cat(each))
    assert (many.violation(many.sample_(torch.empty_like(x))) == 0).all()
    again = Constraint.from_plain(many.to_plain())
    assert torch.equal(again.project(x), many.project(x))


@for_each_set
def test_what_is_not_finite_makes_its_matrix_nan(constraint):
    x = batch_for(constraint, (5, 3))
    expected = constraint.project(x)
    x[0, 0, 0], x[1, 1, 1] = math.nan, math.inf
    y = constraint.project(x)
    assert y[:2].isnan().all()
    assert equal_bits(y[2:], expected[2:])
    if constraint.bounded:
        assert constraint.lmo(x)[:2].isnan().all()


@for_each_set
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e150, 1e300])
def test_far_beyond_the_squares_that_are_finite(constraint, size):
    unique = [0] if isinstance(constraint, Stiefel) else [0, 1, 6, 7]
    x = batch_for(constraint, (5, 3))[unique] * size
    scaled, unit = constraint, 1.0 if isinstance(constraint, Stiefel) else size
    if isinstance(constraint, (SpectralBall, NuclearBall)):
        scaled = type(constraint)(size * constraint.epsilon)
    y = scaled.project(x)
    assert (scaled.violation(y) == 0).all()
    expected = constraint.project(x / size)
    torch.testing.assert_close(y / unit, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_near_the_largest_number(dtype):
    """Entries of a projection may be larger than those of x; none becomes infinite."""
    x = torch.finfo(dtype).max * torch.tensor([[[1.0, 1, 1], [1, -1, 1], [1, 1, -1]]]).to(dtype)
    y = PSD().project(x)
    assert y.isfinite().all()
    assert (PSD().violation(y) == 0).all()


@for_each_set
def test_empty_batches(constraint):
    for shape in [(0, 3, 3), (2, 0, 0), (0, 0, 0)]:
        x = torch.empty(shape)
        assert constraint.project(x).shape == x.shape
        assert torch.equal(constraint.violation(x), torch.zeros(shape[0], dtype=torch.float64))


# Gradients


def with_values(left, values, right):
    """A matrix of these singular values, in random directions."""
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(left, left, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(right, right, generator=generator, dtype=torch.float64))[0]
    count = len(values)
    return (u[:, :count] * torch.tensor(values).double()) @ v[:, :count].mT


AT = {
    "distinct": (3.0, 1.6, 0.3),
    "equal inside": (3.0, 0.2, 0.2),
    "equal outside": (3.0, 3.0, 0.2),
    "all equal": (3.0, 3.0, 3.0),
    "rank one": (3.0, 0.0, 0.0),
    "rank two": (3.0, 2.0, 0.0),
}


DIFFERENTIABLE = [
    pytest.param(constraint, values, shape, id=f"{type(constraint).__name__}-{label}-{shape}")
    for constraint in (SpectralBall(1.0), NuclearBall(2.0), Stiefel())
    for label, values in AT.items()
    for shape in ((3, 3), (5, 3), (3, 4))
    # the last has no wide matrices, and no derivative where rank is lacking
    if not isinstance(constraint, Stiefel) or (shape[0] >= shape[1] and values[-1] > 0)
]


@pytest.mark.parametrize(("constraint", "values", "shape"), DIFFERENTIABLE)
def test_derivative(constraint, values, shape):
    x = torch.stack([with_values(shape[0], values, shape[1]), 2 * torch.eye(*shape).double()])
    assert torch.autograd.gradcheck(constraint.project, x.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [(3, 1, -1, -2), (2, 2, -1, -1), (-1, -1, -1, -1), (2, 2, 2, 2), (2, 2, 2, -3)],
    ids=str,
)
def test_derivative_of_the_cone(values):
    q = with_values(4, (1, 1, 1, 1), 4)
    symmetric = (q * torch.tensor(values).double()) @ q.mT
    noise = torch.triu(torch.ones(4, 4, dtype=torch.float64))
    x = torch.stack([symmetric + noise - noise.mT, torch.diag(torch.tensor(values).double())])
    x[1, 0, 1] += 1e-3
    assert torch.autograd.gradcheck(PSD().project, x.requires_grad_(), atol=1e-6)


@for_each_ball
def test_derivative_with_respect_to_the_radius(ball):
    x = torch.stack([with_values(5, values, 3) for values in AT.values()])
    epsilon = torch.linspace(0.9, 1.4, len(x), dtype=torch.float64).reshape(-1, 1, 1)
    epsilon.requires_grad_()
    assert torch.autograd.gradcheck(lambda radius: ball(radius).project(x), epsilon, atol=1e-6)


@for_each_set
def test_derivative_inside_and_of_nan_touches_no_other(constraint):
    """The identity in a ball; without interior, only along the set."""
    x = batch_for(constraint, (5, 3))
    x[7] = inside = constraint.project(x[7:8])[0]
    x[0, 0, 0] = math.nan
    x = x[[0, 4, 7, 9]].requires_grad_()
    weights = torch.randn_like(x)
    (constraint.project(x)[1:] * weights[1:]).sum().backward()
    w = weights[2]
    if isinstance(constraint, Stiefel):  # the tangent part, of orthonormal columns
        w = w - inside @ (inside.mT @ w + w.mT @ inside) / 2
    if isinstance(constraint, PSD):
        assert torch.allclose(x.grad[2], x.grad[2].mT)
    else:
        assert torch.allclose(x.grad[2], w, rtol=1e-10, atol=1e-10)
    assert x.grad.isfinite().all()


def test_no_wrong_derivative_where_there_is_none():
    x = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    Stiefel().project(x).sum().backward()
    assert not x.grad.isfinite().all()
    x = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    for constraint in SETS:
        (grad,) = torch.autograd.grad(constraint.project(x).pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# Bad input


@for_each_ball
@pytest.mark.parametrize(
    ("epsilon", "error", "rule"),
    [
        (-1.0, ValueError, "`epsilon` must be >= 0, got -1.0"),
        (math.nan, ValueError, "`epsilon` must not be NaN"),
        (math.inf, ValueError, "`epsilon` must be finite"),
        (torch.tensor([1.0, math.nan]), ValueError, "`epsilon` must not be NaN"),
        (torch.tensor([1.0, -2.0]), ValueError, "`epsilon` must be >= 0, got -2.0 at "),
        ("1", TypeError, "`epsilon` must be a number"),
        (None, TypeError, "`epsilon` must be a number"),
    ],
    ids=str,
)
def test_bad_radius(ball, epsilon, error, rule):
    with pytest.raises(error, match=rule):
        ball(epsilon)


def test_bad_batches():
    with pytest.raises(ValueError, match=r"square matrices, got a batch of shape \(2, 3, 4\)"):
        PSD().project_(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="`lmo` needs a bounded set"):
        PSD().lmo(torch.ones(2, 3, 3))
    for constraint in SETS:
        with pytest.raises(ValueError, match=r"batch of shape \(N, ..., m, k\), got \(3, 3\)"):
            constraint.project_(torch.ones(3, 3))
        with pytest.raises(TypeError, match="floating-point"):
            constraint.project_(torch.ones(2, 3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="`epsilon` must have one value per sub-tensor"):
        SpectralBall(torch.ones(2, 3, 1)).project_(torch.ones(2, 3, 3))
