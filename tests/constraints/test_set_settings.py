"""What all sets do with their settings: checks, plain data, and being values."""

import copy
import dataclasses
import math
import pickle
import re
from functools import partial

import pytest
import torch
from constraints.cases import CASES, N, sets
from files import through_a_file

from rai_toolbox.constraints import Constraint

FIRST = list({case.kind: case for case in reversed(CASES)}.values())  # one case of each kind
NAN = torch.tensor([[1.0], [math.nan]])

# What is wrong, and what the message has to say: the argument, the rule, the value.
BAD = [
    (lambda: sets.Box(None, None), "`lower` or `upper` must be given"),
    (lambda: sets.Box(2.0, 1.0), "`lower` must be <= `upper`, got lower=2.0 and upper=1.0"),
    (lambda: sets.Box(math.nan, 1.0), "`lower` must not be NaN, got nan"),
    (lambda: sets.Box(0.0, NAN), "`upper` must not be NaN, got nan at (1, 0)"),
    (
        lambda: sets.Box(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])),
        "`lower` must be <= `upper`, got lower=2.0 and upper=1.0 at (1,)",
    ),
    (
        lambda: sets.Box(torch.zeros(2), torch.ones(3)),
        "`lower` and `upper` must broadcast against each other, got shapes (2,) and (3,)",
    ),
    *(
        (lambda kind=kind, bad=bad: getattr(sets, kind)(bad), message)
        for kind in ("LinfBall", "L2Ball", "L1Ball", "SpectralBall", "NuclearBall")
        for bad, message in (
            (-1.0, "`epsilon` must be >= 0, got -1.0"),
            (math.nan, "`epsilon` must not be NaN, got nan"),
            (NAN, "`epsilon` must not be NaN, got nan at (1, 0)"),
            (-torch.ones(2, 1), "`epsilon` must be >= 0, got -1.0 at (0, 0)"),
        )
    ),
    (lambda: sets.L2Ball(1.0, center=math.nan), "`center` must not be NaN, got nan"),
    (lambda: sets.L2Ball(1.0, center=math.inf), "`center` must be finite, got inf"),
    (lambda: sets.Simplex(-1.0), "`total` must be >= 0, got -1.0"),
    (lambda: sets.Simplex(math.inf), "`total` must be finite, got inf"),
    (lambda: sets.Simplex(math.nan), "`total` must not be NaN, got nan"),
    (lambda: sets.BoxSection(math.nan, 1.0, 0.0, 1.0), "`weight` must not be NaN, got nan"),
    (lambda: sets.BoxSection(1.0, math.nan, 0.0, 1.0), "`total` must not be NaN, got nan"),
    (lambda: sets.BoxSection(1.0, 1.0, 2.0, 1.0), "`lower` must be <= `upper`"),
    (lambda: sets.MaxNorm(-1.0), "`max_norm` must be >= 0, got -1.0"),
    (lambda: sets.MaxNorm(math.nan), "`max_norm` must not be NaN, got nan"),
    (lambda: sets.MaxNorm(1.0, p=3), "`p` must be"),
    (lambda: sets.UnitNorm(p=0), "`p` must be"),
    (lambda: sets.MinMaxNorm(2.0, 1.0), "`min_norm` must be <= `max_norm`"),
    (lambda: sets.BoundedBall(sets.L2Ball(1.0), 2.0, 1.0), "`lower` must be <= `upper`"),
    (lambda: sets.TopK(-1), "`k` must be >= 0, got -1"),
    (lambda: sets.Hyperplane(0.0, 1.0), "`normal` must not be 0"),
    (lambda: sets.Hyperplane(torch.zeros(3), 1.0), "`normal` must not be 0"),
    (lambda: sets.HalfSpace(1.0, math.nan), "`offset` must not be NaN, got nan"),
    (lambda: sets.Affine(torch.ones(3, 2), 1.0), "`matrix` must have the shape (m, n)"),
    (lambda: sets.Affine(torch.ones(2, 3), torch.ones(2)), "`matrix`"),
    (lambda: sets.Affine(torch.eye(2), torch.ones(3)), "`offset` must have the shape"),
    (lambda: sets.Stiefel(flatten=0), "`flatten` must be >= 1, got 0"),
    (lambda: sets.Intersection(), "`sets` must be at least one constraint"),
]
BAD_TYPES = [
    (lambda: sets.Box("1", 2.0), "`lower` must be a number or a tensor, got '1'"),
    (lambda: sets.Box(True, 2.0), "`lower` must be a number or a tensor, got True"),
    (lambda: sets.L2Ball(None), "`epsilon` must be a number or a tensor, got None"),
    (lambda: sets.L2Ball(1j), "`epsilon` must be a number or a tensor, got 1j"),
    (lambda: sets.L2Ball(torch.ones(2, 1, dtype=torch.complex64)), "`epsilon` must hold real"),
    (lambda: sets.Simplex(torch.ones(2, 1, dtype=torch.bool)), "`total` must hold real numbers"),
    (lambda: sets.TopK(2.5), "`k` must be an int"),
    (lambda: sets.Intersection(1.0), "`sets` must be constraints, got 1.0"),
    (lambda: sets.Masked(sets.Box(0, 1), torch.ones(2)), "`mask` must be a tensor of bools"),
    (lambda: sets.Masked(1.0, torch.ones(2, dtype=torch.bool)), "`constraint` must be"),
    (lambda: sets.BoundedBall(sets.Simplex(), 0.0, 1.0), "`ball` must be"),
]


@pytest.mark.parametrize(
    ("make", "message", "kind"),
    [(*bad, ValueError) for bad in BAD] + [(*bad, TypeError) for bad in BAD_TYPES],
)
def test_a_wrong_setting_is_named(make, message, kind):
    with pytest.raises(kind, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: sets.Box(0.0, torch.ones(3)), (2, 4), "`upper` must broadcast"),
        (lambda: sets.L2Ball(torch.ones(3, 1)), (2, 4), "`epsilon` must broadcast"),
        (
            lambda: sets.L2Ball(torch.ones(4)),
            (2, 4),
            "`epsilon` must have one value per sub-tensor",
        ),
        (lambda: sets.L1Ball(1.0, center=torch.ones(3)), (2, 4), "`center` must broadcast"),
        (lambda: sets.L2Ball(1.0), (4,), "L2Ball takes a batch of shape (N, ...), got (4,)"),
        (lambda: sets.PSD(), (2, 3), "PSD takes a batch of shape (N, ..., m, k), got (2, 3)"),
        (lambda: sets.PSD(), (2, 3, 4), "square"),
        (lambda: sets.Stiefel(), (2, 3, 4, 4), "flatten=1 makes one matrix of a sub-tensor"),
        (lambda: sets.NuclearBall(1.0), (2, 3, 4, 4), "takes sub-tensors of 2 dims"),
        (lambda: sets.SpectralBall(1.0, flatten=2), (2, 3, 4), "takes a batch of shape"),
        (lambda: sets.Simplex(), (4,), "param_ndim=None for a tensor as a whole"),
        (lambda: sets.Simplex(), (), "param_ndim=None for a tensor as a whole"),
        (lambda: sets.BoxSection(1.0, 9.0, 0.0, 1.0), (2, 4), "`total`"),
        (lambda: sets.BoxSection(torch.ones(3), 9.0, 0.0, 1.0), (2, 3), "`total`"),
        (lambda: sets.Affine(torch.eye(3), 1.0), (2, 4), "`matrix` must have one column"),
        (
            lambda: sets.Masked(sets.L2Ball(1.0), torch.ones(3, dtype=torch.bool)),
            (2, 4),
            "`mask` must",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_left_alone(make, shape, message):
    c, x = make(), torch.full(shape, 7.0)
    for word in (c.project_, c.project, c.violation):
        with pytest.raises(ValueError, match=re.escape(message)):
            word(x)
    assert (x == 7).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_only_real_floating_point(dtype):
    for case in CASES:
        x = torch.ones(case.shape, dtype=dtype)
        message = f"{case.kind} takes real floating-point tensors, got {dtype}"
        with pytest.raises(TypeError, match=message):
            case.constraint().project_(x)


COPIES = {
    "plain": lambda c: Constraint.from_plain(through_a_file(c.to_plain())),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "to": lambda c: c.to("cpu"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_comes_back_as_it_was(case):
    c = case.constraint()
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    y = c.project(x)
    for copied in COPIES.values():
        other = copied(c)
        assert type(other) is type(c) and other == c and hash(other) == hash(c)
        assert repr(other) == repr(c)
        assert (other.bounded, other.convex) == (c.bounded, c.convex)
        assert torch.equal(other.project(x), y)


def test_repr_names_the_settings():
    for case in CASES:
        text = repr(case.constraint())
        assert text.startswith(f"{case.kind}(")
        for field in dataclasses.fields(case.constraint()):
            assert f"{field.name}=" in text or not field.repr


def test_sets_differ_by_kind_and_settings():
    for case in CASES:
        one, plain = case.constraint(), repr(case.constraint().to_plain())
        for near in CASES:
            if near.kind == case.kind or (near in FIRST and case in FIRST):
                other = near.constraint()
                assert (one == other) == (plain == repr(other.to_plain())), (case, near)
    assert sets.L2Ball(1.0) != sets.L2Ball(torch.tensor(1.0))
    assert sets.L2Ball(1.0) != "L2Ball(1.0)"
    assert len({sets.L2Ball(1.0), sets.L2Ball(1), sets.L2Ball(2.0)}) == 2


def test_immutable():
    for case in FIRST:
        c = case.constraint()
        for name in (*(field.name for field in dataclasses.fields(c)), "misspelt"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(c, name, 1.0)
            with pytest.raises(dataclasses.FrozenInstanceError):
                delattr(c, name)


def test_a_plain_subclass_may_have_attributes_of_its_own():
    class Counted(sets.L2Ball):
        def __init__(self, radius):
            super().__init__(radius)
            self.radius = radius

    ball = Counted(2.0)
    assert ball.epsilon == ball.radius == 2.0
    del ball.radius
    with pytest.raises(dataclasses.FrozenInstanceError):
        ball.epsilon = 1.0


def test_numbers_of_other_libraries_become_plain():
    numpy = pytest.importorskip("numpy")
    c = sets.L2Ball(numpy.float32(0.5))
    assert type(c.epsilon) is float
    assert type(sets.TopK(numpy.int64(3)).k) is int


def test_to_converts_tensor_settings():
    c = sets.L2Ball(torch.ones(N, 1, dtype=torch.float64), center=0.5)
    half = c.to(torch.float32)
    assert (half.epsilon.dtype, half.center) == (torch.float32, 0.5)
    assert c.epsilon.dtype == torch.float64
    meta = c.to("meta")
    with pytest.raises(
        ValueError, match="`epsilon` must be on the device of the batch, cpu, got meta"
    ):
        meta.project(torch.ones(N, 3))


@pytest.mark.parametrize(
    "make",
    [
        sets.UnitNorm,
        lambda: sets.HalfSpace(1e-50, 5e-51),  # (0 in float32)
        lambda: sets.BoxSection(1.0, 0.5, lower=0.0, upper=1.0),
        lambda: sets.BoundedBall(sets.L2Ball(0.5), 0.0, 1.0),
    ],
)
def test_numbers_are_checked_whatever_the_default_device_is(make):
    x = torch.tensor([[1.0, -2.0, 3.0]])
    expected = make().project(x)
    with torch.device("meta"):
        found = make().project(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("plain", [{"set": "Ball", "epsilon": 1.0}, {}, {"set": "__init__"}])
def test_an_unknown_set_is_named(plain):
    with pytest.raises(ValueError, match=r"`set` must be one of \[.*'L2Ball'.*\], got "):
        Constraint.from_plain(plain)


def test_plain_settings_are_checked():
    with pytest.raises(ValueError, match="the settings of L2Ball must fit it, got"):
        Constraint.from_plain({"set": "L2Ball", "radius": 1.0})
    with pytest.raises(ValueError, match="`epsilon` must be >= 0, got -1.0"):
        Constraint.from_plain({"set": "L2Ball", "epsilon": -1.0, "center": None})


def test_words_of_unbounded_sets_say_so():
    for c in (sets.Box(0.0, None), sets.NonNegative(), sets.L2Ball(math.inf)):
        for word in ("lmo", "sample_"):
            with pytest.raises(
                ValueError, match=f"`{word}` needs a bounded set, got {type(c).__name__}"
            ):
                getattr(c, word)(torch.ones(2, 3))


class Wedge(sets.Intersection):
    """Bounded, while no member is."""

    bounded = True


def test_a_subclass_may_say_that_it_is_bounded():
    wedge = Wedge(sets.NonNegative(), sets.HalfSpace(1.0, 1.0))
    for copied in COPIES.values():
        assert copied(wedge).bounded and wedge.to(torch.float64).bounded
    assert not sets.Intersection(*wedge.sets).bounded


class Open(sets.MaxNorm):
    """Neither bounded nor convex, whatever its settings say."""

    bounded = convex = False


def test_a_subclass_may_say_that_it_is_not():
    for copied in COPIES.values():
        less = copied(Open(1.0))
        assert not (less.bounded or less.convex)
    assert sets.MaxNorm(1.0).bounded and sets.MaxNorm(1.0).convex
    with pytest.raises(ValueError, match="`lmo` needs a bounded set, got Open"):
        less.lmo(torch.ones(2, 3))


@pytest.mark.parametrize(
    "name", ["L1Ball", "L2Ball", "LinfBall", "Simplex", "MaxNorm", "p=1", "MinMaxNorm", "Masked"]
)
@pytest.mark.parametrize("bounded", [False, True])
def test_autograd_of_a_setting_alone(name, bounded):
    """What a set does quickly for a batch without gradients is no reason to lose a setting's."""
    if bounded and not name.endswith("Ball"):
        return

    def project(size, x):
        others = {
            "Masked": sets.Simplex,
            "p=1": partial(sets.MaxNorm, p=1),
            "MinMaxNorm": partial(sets.MinMaxNorm, 0.1),
        }
        kind = others.get(name) or getattr(sets, name)
        made = kind(size)
        made = sets.BoundedBall(made, -1.0, 1.0) if bounded else made
        return (sets.Masked(made, torch.arange(6) < 5) if name == "Masked" else made).project(x)

    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-3  # inside
    size = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (size, x))
    torch.testing.assert_close(project(size, x), project(0.7, x))
    expected = project(size, x.clone().requires_grad_())
    found = project(size, x)
    for y in (expected, found):
        assert y.requires_grad
    assert torch.autograd.grad(found.sum(), size) == torch.autograd.grad(expected.sum(), size)
