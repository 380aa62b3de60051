"""The table of sets: each as a function of the scale of its points, in every kind of setting."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from rai_toolbox import constraints as sets
from rai_toolbox.constraints import Constraint
from rai_toolbox.testing import Trial

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = (1e-20, 1.0, 1e20)
SCALES_OF_FLOAT16 = (1e-3, 1.0, 1e2)
N, n = 32, 6

# What takes many passes over the rows: all scales in float64, one in each of the others.
COSTLY = {
    "BoxSection",
    "BoundedBall",
    "Monotone",
    "SpectralBall",
    "NuclearBall",
    "PSD",
    "Stiefel",
    "Rank",
}
ITERATES = {
    "tolerance": 1e-8,
    "reach": 30.0,
    "scales": (1.0,),
}  # to an accuracy that is relative to x


@dataclass(frozen=True)
class Case:
    """A set to try: ``make(scale, rand)``, where `rand` draws settings of a shape from [0, 1)."""

    kind: str
    label: str
    make: Callable[..., Constraint]
    shape: tuple[int, ...] = (N, n)
    scales: tuple[float, ...] = ()
    symmetric: frozenset[str] = frozenset()
    compiles: bool = False
    tolerance: float = 0.0
    reach: float = 1e20

    def __str__(self):
        return f"{self.kind}({self.label})"

    def scales_of(self, dtype):
        if self.scales:
            return self.scales
        if self.kind in COSTLY and dtype != torch.float64:
            return SCALES[2:] if dtype == torch.float32 else SCALES[1:2]
        return SCALES_OF_FLOAT16 if dtype == torch.float16 else SCALES

    def constraint(self, scale=1.0):
        generator = torch.Generator().manual_seed(7)

        def rand(*shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        return self.make(scale, rand)


@lru_cache(maxsize=8)  # of one case, whose points all laws then share
def trials(case: Case, dtype: torch.dtype) -> list[Trial]:
    scales = case.scales_of(dtype)
    return [
        Trial(case.constraint(s), case.shape, dtype, s, tolerance=case.tolerance, reach=case.reach)
        for s in scales
    ]


def _case(kind, label, make, shape=(N, n), scales=(), symmetric="", **kwargs):
    return Case(kind, label, make, shape, scales, symmetric=frozenset(symmetric.split()), **kwargs)


def _ball(kind):
    def ball(*args, **kwargs):
        return getattr(sets, kind)(*args, **kwargs)

    return [
        _case(kind, "number", lambda s, rand: ball(s), symmetric="scale sign permutation"),
        _case(kind, "each", lambda s, rand: ball((rand(N, 1) + 0.1) * s), symmetric="scale sign"),
        _case(kind, "zero", lambda s, rand: ball(0.0)),
        _case(kind, "center", lambda s, rand: ball(0.7 * s, center=-0.3 * s), symmetric="scale"),
        _case(
            kind,
            "centers",
            lambda s, rand: ball(rand(N, 1, 1) * s, center=(rand(2, 3) - 0.5) * s),
            (N, 2, 3),
            compiles=True,
        ),
        _case(kind, "n=1", lambda s, rand: ball(0.7 * s), (N, 1)),
        _case(kind, "n=150", lambda s, rand: ball(3.0 * s), (N, 150), symmetric="permutation"),
    ]


def _solvable(matrix, point):
    return sets.Affine(matrix, matrix @ point)


def _transport(rows, columns):
    per_matrix = rows.ndim == 3
    total, found = (
        sums.sum((-2, -1) if per_matrix else -1, keepdim=True) for sums in (rows, columns)
    )
    return sets.Transport(rows, columns * (total / found))


def _norms(kind, make, symmetric="sign permutation scale", **kwargs):
    return [
        _case(kind, f"p={p}", lambda s, rand, p=p: make(s, p), symmetric=symmetric, **kwargs)
        for p in (1, 2, torch.inf)
    ]


CASES = [
    _case("Box", "numbers", lambda s, rand: sets.Box(-s, 0.7 * s), symmetric="scale permutation"),
    _case("Box", "symmetric", lambda s, rand: sets.Box(-s, s), symmetric="scale sign permutation"),
    _case("Box", "below", lambda s, rand: sets.Box(None, 0.3 * s), symmetric="scale"),
    _case("Box", "above", lambda s, rand: sets.Box(-0.1 * s, torch.inf), symmetric="scale"),
    _case("Box", "each", lambda s, rand: sets.Box(-rand(N, 1) * s, s), symmetric="scale"),
    _case(
        "Box",
        "elements",
        lambda s, rand: sets.Box((rand(n) - 1) * s, rand(n).round() * s),
        symmetric="scale",
        compiles=True,
    ),
    _case(
        "NonNegative",
        "",
        lambda s, rand: sets.NonNegative(),
        symmetric="scale permutation",
        compiles=True,
    ),
    *_ball("LinfBall"),
    _case("LinfBall", "elements", lambda s, rand: sets.LinfBall(rand(n) * s), symmetric="scale"),
    _case(
        "BoundedBall",
        "a radius for each channel",
        lambda s, rand: sets.BoundedBall(
            sets.LinfBall(rand(2, 1) * s + 0.2 * s, center=0.3 * s), 0.1 * s, s
        ),
        (N, 2, 3),
    ),
    *_ball("L2Ball"),
    *_ball("L1Ball"),
    _case(
        "Simplex",
        "number",
        lambda s, rand: sets.Simplex(s),
        symmetric="scale permutation",
        compiles=True,
    ),
    _case("Simplex", "each", lambda s, rand: sets.Simplex((rand(N, 1) + 0.1) * s)),
    _case("Simplex", "n=1", lambda s, rand: sets.Simplex(0.3 * s), (N, 1)),
    _case("Simplex", "n=150", lambda s, rand: sets.Simplex(30.0 * s), (N, 3, 50)),
    _case(
        "BoxSection",
        "weights",
        lambda s, rand: sets.BoxSection(rand(n) + 0.5, 1.5 * s, 0.0, 0.8 * s),
        symmetric="scale",
    ),
    _case(
        "BoxSection",
        "signs",
        lambda s, rand: sets.BoxSection(
            torch.tensor([1.0, -2.0, 0.0, 0.5, -0.1, 3.0]), (rand(N, 1) - 0.5) * s, -s, s
        ),
    ),
    _case("BoxSection", "open", lambda s, rand: sets.BoxSection(1.0, s, None, 0.6 * s)),
    _case("BoxSection", "simplex", lambda s, rand: sets.BoxSection(1.0, s, 0.0, None)),
    *_norms("UnitNorm", lambda s, p: sets.UnitNorm(p=p), "sign permutation", scales=(1.0,)),
    *_norms("MaxNorm", lambda s, p: sets.MaxNorm(0.8 * s, p=p)),
    _case("MaxNorm", "each", lambda s, rand: sets.MaxNorm((rand(N, 1) + 0.1) * s), compiles=True),
    *_norms("MinMaxNorm", lambda s, p: sets.MinMaxNorm(0.6 * s, 1.7 * s, p=p)),
    _case(
        "MinMaxNorm",
        "each",
        lambda s, rand: sets.MinMaxNorm(rand(N, 1) * s, (rand(N, 1) + 1) * s),
        compiles=True,
    ),
    _case("MinMaxNorm", "dims", lambda s, rand: sets.MinMaxNorm(0.1 * s, s, dim=(1, 2)), (N, 2, 3)),
    _case(
        "UnitNorm",
        "dims",
        lambda s, rand: sets.UnitNorm(dim=(1, 2)),
        (N, 2, 3),
        (1.0,),
        compiles=True,
    ),
    *(
        _case(
            "BoundedBall",
            f"{kind} around {center}",
            lambda s, rand, kind=kind, center=center: sets.BoundedBall(
                getattr(sets, kind)(0.7 * s, center=None if center is None else center * s),
                -0.2 * s,
                0.5 * s,
            ),
            symmetric="scale",
        )
        for kind in ("LinfBall", "L2Ball", "L1Ball")
        for center in (None, 0.4, 0.6)
    ),
    *(
        _case(
            "BoundedBall",
            f"{kind} of images",
            lambda s, rand, kind=kind: sets.BoundedBall(
                getattr(sets, kind)((rand(N, 1) + 0.1) * s, center=rand(N, n) * s), 0.0, s
            ),
        )
        for kind in ("LinfBall", "L2Ball", "L1Ball")
    ),
    _case(
        "TopK",
        "k=2",
        lambda s, rand: sets.TopK(2),
        symmetric="scale sign permutation",
        compiles=True,
    ),
    _case("TopK", "k=0", lambda s, rand: sets.TopK(0)),
    _case("TopK", "k=9", lambda s, rand: sets.TopK(9), (N, 2, 3)),
    _case("Monotone", "up", lambda s, rand: sets.Monotone(), symmetric="scale", compiles=True),
    _case("Monotone", "down", lambda s, rand: sets.Monotone(increasing=False), (N, 2, 7)),
    _case("Monotone", "n=1", lambda s, rand: sets.Monotone(), (N, 1)),
    _case("Hyperplane", "sum", lambda s, rand: sets.Hyperplane(1.0, s), symmetric="permutation"),
    _case(
        "Hyperplane",
        "elements",
        lambda s, rand: sets.Hyperplane(rand(2, 3) - 0.5, rand(N, 1, 1) * s),
        (N, 2, 3),
        symmetric="scale",
        compiles=True,
    ),
    _case("HalfSpace", "sum", lambda s, rand: sets.HalfSpace(1.0, s), symmetric="permutation"),
    _case(
        "HalfSpace",
        "elements",
        lambda s, rand: sets.HalfSpace(rand(2, 3) - 0.5, (rand(N, 1, 1) - 0.5) * s),
        (N, 2, 3),
        symmetric="scale",
        compiles=True,
    ),
    _case(
        "Affine",
        "one",
        lambda s, rand: sets.Affine(rand(2, n) - 0.5, rand(2) * s),
        symmetric="scale",
        compiles=True,
    ),
    _case("Affine", "each", lambda s, rand: sets.Affine(rand(2, n) - 0.5, rand(N, 2) * s)),
    *(
        _case(
            kind,
            f"{m}x{k}",
            lambda s, rand, kind=kind: getattr(sets, kind)(0.8 * s),
            (N, m, k),
            symmetric="scale sign permutation",
            compiles=(m, k) == (4, 3),
        )
        for kind in ("SpectralBall", "NuclearBall")
        for m, k in ((4, 3), (2, 5), (1, 1))
    ),
    *(
        _case(
            kind,
            "each",
            lambda s, rand, kind=kind: getattr(sets, kind)(rand(N, 1, 1) * s),
            (N, 3, 3),
        )
        for kind in ("SpectralBall", "NuclearBall")
    ),
    _case("SpectralBall", "kernels", lambda s, rand: sets.SpectralBall(s, flatten=1), (N, 2, 2, 2)),
    _case("PSD", "3x3", lambda s, rand: sets.PSD(), (N, 3, 3), symmetric="scale", compiles=True),
    _case("PSD", "1x1", lambda s, rand: sets.PSD(), (N, 1, 1)),
    _case(
        "Stiefel",
        "4x3",
        lambda s, rand: sets.Stiefel(),
        (N, 4, 3),
        scales=(1.0,),
        symmetric="sign permutation",
        compiles=True,
    ),
    _case("Stiefel", "3x5", lambda s, rand: sets.Stiefel(), (N, 3, 5), scales=(1.0,)),
    _case("Stiefel", "2x2", lambda s, rand: sets.Stiefel(), (N, 2, 2), scales=(1.0,)),
    *(
        _case(
            "Rank",
            f"{rank} of {m}x{k}",
            lambda s, rand, rank=rank: sets.Rank(rank),
            (N, m, k),
            symmetric="scale sign permutation",
            compiles=rank == 2,
        )
        for rank, m, k in ((2, 4, 3), (1, 2, 5), (0, 2, 2), (3, 3, 3))
    ),
    _case(
        "SparseSimplex",
        "k=2",
        lambda s, rand: sets.SparseSimplex(2, s),
        symmetric="scale permutation",
        compiles=True,
    ),
    _case("SparseSimplex", "each", lambda s, rand: sets.SparseSimplex(3, (rand(N, 1) + 0.1) * s)),
    _case("SparseSimplex", "k=9", lambda s, rand: sets.SparseSimplex(9, s), (N, 2, 3)),
    _case("Birkhoff", "4x4", lambda s, rand: sets.Birkhoff(), (N, 4, 4), **ITERATES),
    _case("Birkhoff", "each", lambda s, rand: sets.Birkhoff(rand(N, 1, 1)), (N, 3, 3), **ITERATES),
    _case("Birkhoff", "1x1", lambda s, rand: sets.Birkhoff(2.0), (N, 1, 1), **ITERATES),
    _case("Transport", "3x5", lambda s, rand: _transport(rand(3), rand(5)), (N, 3, 5), **ITERATES),
    _case(
        "Transport",
        "each",
        lambda s, rand: _transport(rand(N, 4, 1), rand(N, 1, 2)),
        (N, 4, 2),
        **ITERATES,
    ),
    _case(
        "Transport",
        "with a zero",
        lambda s, rand: _transport(torch.tensor([0.0, 1.0, 2.0]), rand(3)),
        (N, 3, 3),
        **ITERATES,
    ),
    _case(
        "Intersection",
        "polytope",
        lambda s, rand: sets.Intersection(
            sets.NonNegative(), _solvable(rand(2, n) - 0.3, (rand(n) + 0.1) * s)
        ),
        **ITERATES,
    ),
    _case(
        "Intersection",
        "ball and half-space",
        lambda s, rand: sets.Intersection(sets.L2Ball(s), sets.HalfSpace(rand(n) - 0.5, -0.1 * s)),
        symmetric="scale",
        **ITERATES,
    ),
    _case("Intersection", "one", lambda s, rand: sets.Intersection(sets.L1Ball(s)), **ITERATES),
    _case(
        "Masked",
        "ball",
        lambda s, rand: sets.Masked(
            sets.L2Ball(0.7 * s), torch.tensor([True, True, False, True, False, True])
        ),
        symmetric="scale",
        compiles=True,
    ),
    _case("Masked", "box", lambda s, rand: sets.Masked(sets.Box(-s, s), rand(N, n) > 0.5)),
]
