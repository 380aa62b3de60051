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
"""A matrix of as many elements fills a cache of the CPU alone; smaller ones go together."""


def polar_factors(
    batches: Sequence[Tensor], coefficients: Coefficients, dtype: torch.dtype
) -> list[Tensor]:
    """About ``U V^T`` of each ``X = U diag(s) V^T``, for batches (N, m, k) of matrices, in `dtype`.

    Singular values of 0 stay 0, and small ones rise with each iteration. Batches of matrices of one
    shape, or its transpose, are computed together. A matrix that is not finite becomes NaN.
    """
    wide = [x.mT if x.shape[-2] > x.shape[-1] else x for x in batches]
    factors = {i: x.to(dtype) for i, x in enumerate(wide) if x.numel() == 0}
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(wide):
        if i in factors:
            continue
        alone = x.is_cpu and x.numel() >= _LARGE
        key = (i,) if alone else (x.shape[1:], x.dtype, x.device)
        alike.setdefault(key, []).append(i)
    for members in alike.values():
        x = torch.cat([wide[i] for i in members]) if len(members) > 1 else wide[members[0]]
        found = _iterated(_normalized(x).to(dtype), coefficients)
        factors.update(zip(members, found.split([len(wide[i]) for i in members]), strict=True))
    return [factors[i].mT if x is not wide[i] else factors[i] for i, x in enumerate(batches)]


def _normalized(x: Tensor) -> Tensor:
    """Each matrix over its Frobenius norm, which nothing overflows; 0 stays 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    length: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / length.clamp(min=1.0)


def _iterated(x: Tensor, coefficients: Coefficients) -> Tensor:
    if x.is_cpu and x.shape[-2] * x.shape[-1] >= _LARGE:  # (faster there than as a batch)
        return torch.stack([_iterated_one(matrix, coefficients) for matrix in x])
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterated_one(x: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
