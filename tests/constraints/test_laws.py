"""The table of sets x the table of laws, and what only a test can ask of a set."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from constraints.cases import CASES, DTYPES, trials
from torch_versions import compiles

from rai_toolbox import constraints
from rai_toolbox.constraints import Constraint
from rai_toolbox.testing import LAWS

# The polar factor has no derivative at points that lack full rank, which the law tries: NaN is
# right. (Elsewhere it has tests of its own.)
NOT_DIFFERENTIATED = {"Stiefel(4x3)", "Stiefel(3x5)", "Stiefel(2x2)"}
# At a boundary autograd takes the derivative of the inside, as it does for `torch.clamp`; these
# are nothing but boundary, and unlike other sets without interior are documented to do so.
NOT_DIFFERENTIATED |= {"LinfBall(zero)", "L2Ball(zero)", "L1Ball(zero)", "Intersection(polytope)"}


def laws_of(case, dtype):
    """The laws that say something of that set, in that dtype."""
    skipped = {"compiled"}  # which has a test of its own
    if dtype != DTYPES[0] or str(case) in NOT_DIFFERENTIATED:
        skipped.add("gradient")
    if dtype == DTYPES[0]:
        skipped.add("accurate")
    return [law for law in LAWS if law not in skipped]


def is_quick(case, dtype, index):
    """One scale of each case in float32, one case of each kind in bfloat16 and in float64."""
    middle = index == len(case.scales_of(dtype)) // 2
    first = case is next(c for c in CASES if c.kind == case.kind)
    if case.kind == "Intersection":
        return dtype == torch.float32 and case.label == "one"
    return middle and (dtype == torch.float32 or (first and dtype != torch.float16))


@pytest.mark.parametrize(
    ("case", "dtype", "index"),
    [
        pytest.param(
            case,
            dtype,
            index,
            id=f"{case}-{str(dtype).removeprefix('torch.')}-{scale:g}",
            marks=[] if is_quick(case, dtype, index) else pytest.mark.slow,
        )
        for case in CASES
        for dtype in DTYPES
        for index, scale in enumerate(case.scales_of(dtype))
    ],
)
def test_laws(case, dtype, index, subtests):
    trial = trials(case, dtype)[index]
    for law in laws_of(case, dtype):
        with subtests.test(law):
            LAWS[law](trial)


COMPILED = [case for case in CASES if case.compiles]


# torch's own code says so whenever it captures an autograd function
@compiles
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if c.kind in ("Box", "L2Ball") else pytest.mark.slow)
        for c in COMPILED
    ],
    ids=str,
)
def test_compiled(case):
    for trial in trials(case, torch.float32):
        LAWS["compiled"](trial)


# Some read values on the host; a graph of the others' 64 passes takes minutes to trace.
NOT_COMPILED = {"Intersection", "BoxSection", "BoundedBall", "Birkhoff", "Transport"}


def test_each_set_has_a_case():
    found = {name: getattr(constraints, name) for name in constraints.__all__}
    kinds = {name for name, kind in found.items() if issubclass(kind, Constraint)} - {"Constraint"}
    assert {case.kind for case in CASES} == kinds
    assert {case.kind for case in CASES if case.compiles} == kinds - NOT_COMPILED


# Feasible in exact arithmetic


def as_fractions(setting, trial):
    """A setting of each entry of the batch, exactly."""
    setting = torch.as_tensor(setting, dtype=torch.float64).expand(trial.shape)
    return [[Fraction(v) for v in row] for row in setting.reshape(len(setting), -1).tolist()]


def rounded(setting, trial):
    """A setting of elements as it counts."""
    wide = setting if isinstance(setting, torch.Tensor) else torch.tensor(setting, dtype=DTYPES[0])
    return as_fractions(wide.to(trial.dtype), trial)


def radii(setting, trial):
    """Radii as they are given; float64 tells of its own numbers only to within rounding."""
    last = Fraction(1 if trial.dtype != torch.float64 else 1 + trial.shape[-1] * 2**-51)
    return [last * row[0] for row in as_fractions(setting, trial)]


def in_ball(p, rows, trial, ball):
    centers = rounded(0.0 if ball.center is None else ball.center, trial)
    for row, radius, center in zip(rows, radii(ball.epsilon, trial), centers, strict=True):
        yield shorter(p, [v - c for v, c in zip(row, center, strict=True)], radius)


def shorter(p, row, radius):
    if p == 1:
        return sum(map(abs, row)) <= radius
    return sum(v * v for v in row) <= radius**2 if p == 2 else max(map(abs, row)) <= radius


def in_box(rows, trial, box):
    ends = zip(rounded(box.lower, trial), rounded(box.upper, trial), strict=True)
    for row, (lower, upper) in zip(rows, ends, strict=True):
        yield all(l <= v <= u for l, v, u in zip(lower, row, upper, strict=True))  # noqa: E741


def in_half_space(rows, trial, half):
    normals, offsets = as_fractions(half.normal, trial), as_fractions(half.offset, trial)
    for row, normal, offset in zip(rows, normals, offsets, strict=True):
        yield sum(v * w for v, w in zip(row, normal, strict=True)) <= offset[0]


def in_simplex(rows, trial, simplex):
    unit = Fraction(torch.finfo(trial.dtype).eps) + Fraction(1, 2**44)
    least = Fraction(torch.finfo(trial.dtype).smallest_normal) * len(rows[0])
    for row, total in zip(rows, as_fractions(simplex.total, trial), strict=True):
        yield min(row) >= 0 and abs(sum(row) - total[0]) <= unit * sum(row) + least


def in_bounded_ball(rows, trial, both):
    p = {"L1Ball": 1, "L2Ball": 2, "LinfBall": torch.inf}[type(both.ball).__name__]
    return map(min, in_ball(p, rows, trial, both.ball), in_box(rows, trial, both))


EXACT = {
    "Box": in_box,
    "LinfBall": lambda *args: in_ball(torch.inf, *args),
    "L2Ball": lambda *args: in_ball(2, *args),
    "L1Ball": lambda *args: in_ball(1, *args),
    "BoundedBall": in_bounded_ball,
    "Simplex": in_simplex,
    "HalfSpace": in_half_space,
    "MaxNorm": lambda rows, trial, c: (
        shorter(c.p, row, radius)
        for row, radius in zip(rows, radii(c.max_norm, trial), strict=True)
    ),
    "TopK": lambda rows, trial, c: (sum(v != 0 for v in row) <= c.k for row in rows),
    "Monotone": lambda rows, trial, c: (
        row == sorted(row, reverse=not c.increasing) for row in rows
    ),
}


def exactly(case):
    """Cases whose sets are told by fractions: those with bounds that are numbers, and short."""
    c = case.constraint()
    bounds = [getattr(c, name, 0.0) for name in ("lower", "upper")]
    # without a center the bounds of this ball count as rounded, which is the law of the box
    rounds = case.kind == "LinfBall" and c.center is None
    return (
        not any(b is None or b == torch.inf for b in bounds if not isinstance(b, torch.Tensor))
        and not rounds
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.kind in EXACT and exactly(c)], ids=str)
def test_feasible_in_exact_arithmetic(case, dtype):
    for trial in trials(case, dtype):
        for x, y in trial.pairs:
            rows = [[Fraction(v) for v in row] for row in y.flatten(1).tolist()]
            inside = list(EXACT[case.kind](rows, trial, trial.constraint))
            assert len(inside) == len(rows)
            assert all(inside), (trial.scale, x[inside.index(False)], y[inside.index(False)])


# Equivariance


def scaled(trial, x):
    return x * 2


def signed(trial, x):
    signs = torch.randint(2, x.shape[1:2], generator=trial.generator(1)) * 2 - 1
    return x * signs.to(x).view(-1, *(1,) * (x.ndim - 2))


def permuted(trial, x):
    return x[:, torch.randperm(x.shape[1], generator=trial.generator(2))]


CHANGES = {"scale": scaled, "sign": signed, "permutation": permuted}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "change"),
    [
        pytest.param(case, change, id=f"{case}-{change}")
        for case in CASES
        for change in sorted(case.symmetric)
    ],
)
def test_equivariant(case, change, dtype):
    """``P(change x) = change P(x)``; of a scale, with the settings scaled alike."""
    act = CHANGES[change]
    for trial in trials(case, dtype):
        x = trial.normal(1, 2.0)
        other = case.constraint(2 * trial.scale) if change == "scale" else trial.constraint
        changed = replace(trial, constraint=other, scale=2 * trial.scale)
        y, expected = changed.projected(act(trial, x)), act(trial, trial.projected(x))
        assert (changed.length(y.double() - expected.double()) <= changed.slack(y)).all()
