"""Intersection: against closed forms and another solver, far and near, and what cannot be done."""

import math

import pytest
import torch
from optim.memory_layouts import LAYOUTS, equal_bits
from scipy.optimize import linear_sum_assignment, minimize

from rai_toolbox.constraints.balls import L2Ball
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.box import Box, NonNegative
from rai_toolbox.constraints.intersection import Intersection
from rai_toolbox.constraints.linear import Affine, HalfSpace, Hyperplane
from rai_toolbox.constraints.masked import Masked
from rai_toolbox.constraints.simplex import Simplex

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BIRKHOFF = Intersection(
    NonNegative(),
    Affine(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]), torch.ones(3)),
)
SIMPLEX = Intersection(Hyperplane(1.0, 1.0), Box(0.0, 1.0))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_birkhoff(x):
    t = (x[:, 0, 0] + x[:, 1, 1] - x[:, 0, 1] - x[:, 1, 0] + 2) / 4
    t = t.clamp(0, 1)
    return torch.stack([t, 1 - t, 1 - t, t], 1).view(-1, 2, 2)


def of_simplex(x):
    ranked = x.sort(1, descending=True).values
    thresholds = (ranked.cumsum(1) - 1) / torch.arange(1, x.shape[1] + 1)
    count = (ranked > thresholds).sum(1, keepdim=True)
    return (x - thresholds.gather(1, count - 1)).clamp(min=0)


def test_reference_value():
    x = torch.tensor([[[0.9, 0.3], [0.2, 0.4]]], dtype=torch.float64)
    expected = x.new_tensor([[[0.7, 0.3], [0.3, 0.7]]])
    torch.testing.assert_close(BIRKHOFF.project(x), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1.0, 1e3, 1e20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("constraint", [BIRKHOFF, SIMPLEX], ids=["birkhoff", "simplex"])
def test_feasible_idempotent_and_one_by_one(constraint, dtype, scale):
    x = (normal(20, 2, 2) * scale).to(dtype)
    y = constraint.project(x)
    assert (constraint.violation(y) == 0).all()
    assert equal_bits(constraint.project(y), y)
    allowed = 2 * torch.finfo(dtype).eps * y.double().abs()
    allowed += 4 * constraint.tolerance * x.double().abs().amax((1, 2), keepdim=True)
    alone = torch.cat([constraint.project(row) for row in x.split(1)])
    for other in (alone, *(constraint.project_(layout(x)) for layout in LAYOUTS.values())):
        assert ((other - y).double().abs() <= allowed).all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 30.0, 1e3])
def test_closed_forms(scale):
    x = normal(20, 2, 2) * scale
    close = {"rtol": 0, "atol": 1e-9 * max(1.0, scale)}
    torch.testing.assert_close(BIRKHOFF.project(x), of_birkhoff(x), **close)
    x = x.view(20, 4)
    torch.testing.assert_close(SIMPLEX.project(x), of_simplex(x), **close)


@pytest.mark.parametrize("angle", [1.0, 0.1, pytest.param(0.03, marks=pytest.mark.slow)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sharp_angle(angle, offset):
    """Two half-spaces whose corner plain cycles approach at a rate of cos(2 angle)^2."""
    w = torch.tensor([math.sin(angle), math.cos(angle)], dtype=torch.float64)
    wedge = Intersection(HalfSpace(w, offset), HalfSpace(w * torch.tensor([1, -1]), offset))
    x = torch.tensor([[300.0, 0.3], [3e4, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    y = wedge.project(x)
    corner = x.new_tensor([[offset / math.sin(angle), 0.0]])
    torch.testing.assert_close(y[:1], corner, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y[1:2], corner, rtol=1e-5, atol=1e-5)
    assert equal_bits(y[2:], x[2:]) and (wedge.violation(y) == 0).all()


def test_another_solver():
    x, normals = normal(4, 5), normal(3, 5, seed=1)
    constraint = Intersection(*(HalfSpace(w, 0.2) for w in normals), Box(-0.8, 0.9))
    rule = {"type": "ineq", "fun": lambda z: 0.2 - normals.numpy() @ z}
    for row, y in zip(x.numpy(), constraint.project(x), strict=True):
        found = minimize(
            lambda z, row=row: 0.5 * ((z - row) ** 2).sum(),
            row,
            bounds=[(-0.8, 0.9)] * 5,
            constraints=[rule],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        torch.testing.assert_close(y, torch.from_numpy(found.x), rtol=0, atol=1e-6)


def test_never_expands():
    x, y = normal(50, 4) * 3, normal(50, 4, seed=1) * 3
    before = (x - y).norm(dim=1)
    assert ((SIMPLEX.project(x) - SIMPLEX.project(y)).norm(dim=1) <= before + 1e-8).all()


def test_one_member_alone_and_nested():
    x = normal(6, 4).float()
    assert torch.equal(Intersection(Box(0.0, 0.5)).project(x), Box(0.0, 0.5).project(x))
    nested = Intersection(Intersection(Hyperplane(1.0, 1.0)), Box(0.0, 1.0))
    torch.testing.assert_close(nested.project(x), SIMPLEX.project(x))
    first_two = torch.tensor([True, True, False, False])
    mixed = Intersection(Masked(Hyperplane(1.0, 1.0), first_two), NonNegative()).project(x)
    torch.testing.assert_close(mixed[:, :2], of_simplex(x[:, :2].double()).float())
    torch.testing.assert_close(mixed[:, 2:], x[:, 2:].clamp(min=0))


def test_settings_per_sub_tensor():
    x, upper = normal(3, 4), torch.tensor([[0.3], [0.5], [1.0]], dtype=torch.float64)
    together = Intersection(Hyperplane(1.0, 1.0), Box(0.0, upper)).project(x)
    for i in range(3):
        alone = Intersection(Hyperplane(1.0, 1.0), Box(0.0, upper[i].item()))
        assert equal_bits(alone.project(x[i : i + 1]), together[i : i + 1])


def test_inside_stays():
    x = torch.tensor([[0.25, 0.75, -0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert equal_bits(SIMPLEX.project(x), x)


def test_last_box_holds_exactly():
    x = normal(100, 8).float()
    y = Intersection(Hyperplane(1.0, 1.0), Box(0.0, 0.3)).project(x)
    assert ((y >= 0) & (y <= torch.tensor(0.3))).all()


@pytest.mark.parametrize(
    "constraint",
    [BIRKHOFF, pytest.param(SIMPLEX, marks=pytest.mark.slow)],
    ids=["birkhoff", "simplex"],
)
def test_derivative(constraint):
    x = torch.tensor([[0.9, 0.35, 0.2, 0.4], [2.0, -1.0, 0.1, 0.3]], dtype=torch.float64)
    assert torch.autograd.gradcheck(constraint.project, x.requires_grad_(), atol=1e-6)


def test_what_is_not_finite_makes_its_row_nan():
    x = normal(4, 4).float()
    y = SIMPLEX.project(x)
    x[1, 2], x[2, 0] = math.nan, math.inf
    z = SIMPLEX.project(x)
    assert z[1:3].isnan().all()
    assert equal_bits(z[[0, 3]], y[[0, 3]])


def test_empty_intersection_writes_nothing():
    x = torch.tensor([[0.2, 0.1], [0.3, 0.4]])
    before = x.clone()
    nothing = Intersection(HalfSpace(1.0, -1.0), NonNegative(), max_iterations=300)
    message = "must have points in common.* sub-tensors ended up to 0.707 outside HalfSpace, 0 out"
    with pytest.raises(RuntimeError, match=message):
        nothing.project_(x)
    assert equal_bits(x, before)


@pytest.mark.parametrize(
    "nothing",
    [
        Intersection(L2Ball(1.0, center=2.0), L2Ball(1.0), max_iterations=200),
        Intersection(HalfSpace(1.0, torch.tensor([[1.0], [-1.0]])), NonNegative()),  # in row 2
        Intersection(Hyperplane(1.0, 1.0), Hyperplane(1.0, 1.001), max_iterations=200),
        Intersection(Hyperplane(1.0, 9.0), Box(-1.0, 1.0), max_iterations=200),
    ],
)
def test_no_common_point_is_proved_early(nothing):
    with pytest.raises(RuntimeError, match="none within .*e.* of it: [12] of 2 sub-tensors"):
        nothing.project(normal(2, 4))


def test_not_converged_is_told_from_empty():
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    tangent = Intersection(L2Ball(1.0, center=2.0), L2Ball(math.sqrt(8) - 1), max_iterations=20)
    message = "did not converge in max_iterations=20 .* 1 of 1 .* outside L2Ball.* suggest up to"
    with pytest.raises(RuntimeError, match=message):
        tangent.project_(x)


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5])
def test_flat_angles_take_few_cycles(angle):
    """Plain cycles would approach the corner at a rate of 1 - angle^2."""
    x = torch.tensor([[1.0, 1.0], [3.0, 0.5]], dtype=torch.float64)
    allowed = {"rtol": 0, "atol": 1e-9 + 1e-15 / angle**2}
    for corner in (0.0, 1.0):  # at (0, 0) and (1, 0)
        wedge = Intersection(
            HalfSpace(x.new_tensor([1.0, 0.0]), corner),
            HalfSpace(x.new_tensor([-1.0, angle]), -corner),
            max_iterations=100,
        )
        y = wedge.project(x)
        assert (wedge.violation(y) == 0).all()
        torch.testing.assert_close(y, x.new_tensor([corner, 0.0]).expand(2, 2), **allowed)
    weights = x.new_tensor([1.0, angle, 0.0])
    three = Intersection(
        HalfSpace(weights, 0.0),
        HalfSpace(weights * weights.new_tensor([-1, 1, 0]), 0.0),
        HalfSpace(x.new_tensor([0.0, -1.0, 1.0]), 1.0),
        max_iterations=200,
    )
    y = three.project(x.new_tensor([[3.0, 3.0, 2.0]]))
    torch.testing.assert_close(y, x.new_tensor([[0.0, 0.0, 1.0]]), **allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e5])
def test_doubly_stochastic_from_far(scale, dtype):
    x = (normal(5, 5, 5) * scale).to(dtype)
    doubly = Intersection(Simplex(dim=1), Simplex(dim=2), max_iterations=600)
    y = doubly.project(x)
    assert (doubly.violation(y) == 0).all()
    allowed = 30 * scale * (doubly.tolerance * scale + torch.finfo(dtype).eps)
    for rest, nearest in zip((x - y).double(), y.double(), strict=True):
        corner = linear_sum_assignment(rest, maximize=True)  # the farthest along x - y
        assert rest[corner].sum() - (rest * nearest).sum() <= allowed


def test_curved_sets_from_far():
    x, first = normal(20, 4) * 1e3, torch.tensor([0.9, 0, 0, 0], dtype=torch.float64)
    lens = Intersection(L2Ball(1.0, center=first), L2Ball(1.0), max_iterations=1000)
    y = lens.project(x)
    assert (lens.violation(y) == 0).all()
    z = lens.project(normal(200, 4))
    products = torch.einsum("ia,ija->ij", x - y, z - y.unsqueeze(1))
    assert (products <= 1e-5 * 1e3).all()


def test_bounded_words():
    assert SIMPLEX.bounded and not BIRKHOFF.bounded
    x = SIMPLEX.sample_(torch.full((5, 4), math.nan), torch.Generator().manual_seed(0))
    assert (SIMPLEX.violation(x) == 0).all()
    assert len(x.unique()) > 5
    with pytest.raises(ValueError, match="`lmo` has no closed form for Intersection"):
        SIMPLEX.lmo(x)
    with pytest.raises(ValueError, match="`sample_` needs a bounded set"):
        BIRKHOFF.sample_(torch.ones(1, 4))


def test_plain_data_and_conversion():
    constraint = Intersection(*BIRKHOFF.sets, tolerance=1e-6, max_iterations=77)
    again = Constraint.from_plain(constraint.to_plain())
    assert again == constraint and again != BIRKHOFF
    assert (again.tolerance, again.max_iterations) == (1e-6, 77)
    assert constraint.to(torch.float64).sets[1].matrix.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty_batch(shape):
    assert SIMPLEX.project(torch.ones(shape)).shape == shape
    assert SIMPLEX.violation(torch.ones(shape)).shape == shape[:1]


class Circle(Box):
    convex = False


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Intersection(), ValueError, "`sets` must be at least one constraint"),
        (lambda: Intersection(1.0), TypeError, "`sets` must be constraints, got 1.0"),
        (lambda: Intersection([Box(0, 1)]), TypeError, r"unpack them: Intersection\(\*sets\)"),
        (lambda: Intersection(Circle(0, 1)), ValueError, "`sets` must be convex"),
        (lambda: Intersection(NonNegative(), tolerance=0), ValueError, r"in \(0, 1\), got 0"),
        (lambda: Intersection(NonNegative(), tolerance=math.nan), ValueError, "not be NaN"),
        (lambda: Intersection(NonNegative(), max_iterations=0), ValueError, ">= 1, got 0"),
        (lambda: Intersection(NonNegative(), max_iterations=1.5), TypeError, "int, got 1.5"),
    ],
)
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_batch():
    x = torch.ones(2, 5)
    with pytest.raises(ValueError, match="`matrix` must have one column per element"):
        BIRKHOFF.project_(x)
    with pytest.raises(ValueError, match="Intersection takes a batch"):
        SIMPLEX.project_(torch.ones(4))
