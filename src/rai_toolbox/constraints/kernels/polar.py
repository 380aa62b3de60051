"""The polar factor of matrices by Newton-Schulz iteration: matrix products only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf, sqrt

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]
"""``(a, b, c)`` of each iteration, which maps singular values s to ``a s + b s^3 + c s^5``."""

MUON: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Of Muon (Jordan et al., 2024): steep at 0; singular values end between .68 and 1.21."""

# Those of Polar Express before the factor that leaves room for rounding.
_OPTIMAL = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_ROOM = 1.01

POLAR_EXPRESS: Coefficients = (
    *((a / _ROOM, b / _ROOM**3, c / _ROOM**5) for a, b, c in _OPTIMAL),
    (1.875, -1.25, 0.375),
)
"""Of Polar Express (Amsel, Persson, Musco & Gower, 2025): singular values converge to 1, from about
.001 of the Frobenius norm on."""

_BLOWN_UP = 4.0
"""No published iteration has singular values this large, and few return from there."""

_LARGE = 2**17
"""A tensor of as many elements fills a cache of the CPU alone; smaller ones go together."""

_MOST_IN_FLOAT32 = 1024
"""Up to as many rows, the rounding errors of a Cholesky factor in float32 are small enough."""


def fills_cache(x: Tensor) -> bool:
    """Whether a tensor is faster computed by itself than together with others."""
    return x.is_cpu and x.numel() >= _LARGE


def polar_factors(
    batches: Sequence[Tensor],
    coefficients: Coefficients,
    dtype: torch.dtype,
    limit: float | None = None,
) -> list[tuple[Tensor, float | Tensor]]:
    """About ``U V^T`` of each ``X = U diag(s) V^T``, for batches (N, m, k) of matrices.

    Products are computed in `dtype`. Singular values of 0 stay 0, and small ones rise with each
    iteration. Batches of matrices of one shape, or its transpose, are computed together. A matrix
    that is not finite becomes NaN.

    Each factor comes with a number to divide it by, so that no singular value exceeds 1: `limit`
    itself, which is to be one that they should not exceed, if `dtype` is float32, and
    `bounds_of_norms` if it is bfloat16; 1 without `limit`.
    """
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in batches]
    factors = {i: x.to(dtype) for i, x in enumerate(wide) if x.numel() == 0}
    divisors: dict[int, float | Tensor] = dict.fromkeys(range(len(wide)), limit or 1.0)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(wide):
        if i in factors:
            continue
        key = (i,) if fills_cache(x) else (x.shape[1:], x.dtype, x.device)
        alike.setdefault(key, []).append(i)
    for members in alike.values():
        x = torch.cat([wide[i] for i in members]) if len(members) > 1 else wide[members[0]]
        found = _iterated(_normalized(x).to(dtype), coefficients)
        counts = [len(wide[i]) for i in members]
        factors.update(zip(members, found.split(counts), strict=True))
        if limit is not None and dtype != torch.float32:
            bounds = bounds_of_norms(found, limit)
            divisors.update(zip(members, bounds.split(counts), strict=True))
    turned = (factors[i].mT if x is not wide[i] else factors[i] for i, x in enumerate(batches))
    return [(factor, divisors[i]) for i, factor in enumerate(turned)]


def _normalized(x: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, which nothing overflows; 0 stays 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    entries = (-2, -1)
    largest = torch.maximum(x.amax(entries, keepdim=True), -x.amin(entries, keepdim=True))
    x = x / torch.where(largest == 0, 1.0, largest)
    length: Tensor = torch.linalg.vector_norm(x, dim=entries, keepdim=True)
    return x.div_(length.clamp(min=1.0))


def _iterated(x: Tensor, coefficients: Coefficients) -> Tensor:
    if fills_cache(x[0]):  # (faster there than as a batch)
        return _stacked([_iterated_one(matrix, coefficients) for matrix in x])
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _stacked(matrices: list[Tensor]) -> Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _iterated_one(x: Tensor, coefficients: Coefficients) -> Tensor:
    """The iteration without the upper right quarter of symmetric matrices, a sixth of the work."""
    half = len(x) // 2
    for a, b, c in coefficients:
        gram = _gram_but_a_quarter(x)
        left, low = gram[:, :half], gram[half:]
        y = torch.empty_like(gram)
        y[:half, :half] = torch.addmm(left[:half], left.mT, left, beta=b, alpha=c)
        y[half:, :half] = torch.addmm(left[half:], low, left, beta=b, alpha=c)
        y[half:, half:] = torch.addmm(low[:, half:], low, low.mT, beta=b, alpha=c)
        previous, x = x, x.clone()
        x[:half].addmm_(y[:, :half].mT, previous, beta=a)
        x[half:].addmm_(y[half:], previous, beta=a)
    return x


def _gram_but_a_quarter(x: Tensor) -> Tensor:
    """``x x^T``, of which the upper right quarter is not set."""
    half = len(x) // 2
    y = x.new_empty(len(x), len(x))
    y[:, :half] = x @ x[:half].mT
    y[half:, half:] = x[half:] @ x[half:].mT
    return y


def _gram_of_one(x: Tensor) -> Tensor:
    y, half = _gram_but_a_quarter(x), len(x) // 2
    y[:half, half:] = y[half:, :half].mT
    return y


def bounds_of_norms(x: Tensor, limit: float) -> Tensor:
    """A number >= the largest singular value of each matrix (N, m, k) with m <= k, as (N, 1, 1).

    If that is at most `limit`, little more than `limit`; otherwise the Frobenius norm. That
    ``limit^2 I - X X^T`` has a Cholesky factor proves, up to bounds of all rounding errors, that it
    has no negative eigenvalue (Rump, 2006, "Verification of positive definiteness").
    """
    rows, columns = x.shape[-2:]
    if not x.is_cpu:  # (others may add the products of bfloat16 in bfloat16)
        gram = x.float() @ x.float().mT
    elif fills_cache(x[0]):
        gram = _stacked([_gram_of_one(matrix) for matrix in x])
    else:
        gram = x @ x.mT
    wide = torch.float32 if rows <= _MOST_IN_FLOAT32 else torch.float64
    room = gram.to(wide).neg_()
    length = torch.linalg.vector_norm(room, dim=(-2, -1), keepdim=True)
    diagonal = room.diagonal(dim1=-2, dim2=-1)
    squares = -diagonal.sum(-1)[..., None, None] * (1 + 2 * _unit(gram.dtype))
    diagonal.add_(limit**2)
    failed = torch.linalg.cholesky_ex(room)[1][..., None, None] != 0
    lost = (
        _unit(gram.dtype) * length  # each product is rounded once,
        + columns * _unit(torch.float32) * squares  # its sum is one of float32,
        + (rows + 2) * _unit(wide) * (rows * limit**2 - squares).clamp(min=0.0)  # and the factor
    )
    # (one hundredth of it is for the rounding of these three terms)
    return torch.where(failed, squares, limit**2 + 1.01 * lost).sqrt() * (1 + 1e-5)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@lru_cache
def largest_singular_value(coefficients: Coefficients, roundoff: float) -> float:
    """A bound on the singular values of what `polar_factors` returns; infinite if there is none.

    The largest value of each polynomial on the interval that the last one left, plus what rounding
    adds: `roundoff`, half of the distance of 1 to the next number, counts twice for each term.
    """
    largest = 1.0 + 2 * roundoff
    for a, b, c in coefficients:
        ends = [largest, *(s for s in _extrema(a, b, c) if s < largest)]
        rounding = abs(a) * largest + abs(b) * largest**3 + abs(c) * largest**5
        largest = max(abs(a * s + b * s**3 + c * s**5) for s in ends) + 2 * roundoff * rounding
        if largest > _BLOWN_UP:
            return inf
    return largest


def _extrema(a: float, b: float, c: float) -> list[float]:
    """Where the derivative ``a + 3 b s^2 + 5 c s^4`` is 0, for s > 0."""
    if c == 0:
        squares = [-a / (3 * b)] if b else []
    else:
        square = 9 * b * b - 20 * a * c
        roots = (sqrt(square), -sqrt(square)) if square >= 0 else ()
        squares = [(root - 3 * b) / (10 * c) for root in roots]
    return [sqrt(s) for s in squares if s > 0]
