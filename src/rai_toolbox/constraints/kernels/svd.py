"""Singular values of matrices, and functions of them that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rai_toolbox.autograd import with_value
from rai_toolbox.constraints.kernels.blocks import needs_grad

Parts = tuple[Tensor, Tensor, Tensor]
"""``U, s, V^T`` of each matrix; there are as many vectors as values."""

_Map = Callable[[Tensor], Tensor]


def noise_of(x: Tensor) -> float:
    """Relative error of the largest singular value or eigenvalue, or of the sum of all."""
    return torch.finfo(x.dtype).eps * (8 + x.shape[-2] + x.shape[-1])


def decomposed(x: Tensor, symmetric: bool = False) -> Parts:
    """The parts of each matrix, of falling singular values, or rising eigenvalues if `symmetric`.

    To autograd U and V are constants, and s depends on x.
    """
    if symmetric:
        values, u = torch.linalg.eigh(x.detach())
        vh = u.mT
    else:
        u, values, vh = torch.linalg.svd(x.detach(), full_matrices=False)
    if needs_grad(x):
        values = with_value(values, _diagonal(u.mT @ x @ vh.mT))
    return u, values, vh


def composed(u: Tensor, values: Tensor, vh: Tensor) -> Tensor:
    """``U diag(values) V^T``."""
    return (u * values.unsqueeze(-2)) @ vh


def composed_of(
    x: Tensor, parts: Parts, f: Tensor, moving: Tensor, symmetric: bool = False
) -> Tensor:
    """``U diag(f) V^T`` for the `parts` U, s, V^T of x, differentiable; see `_Composed`."""
    return _Composed.apply(x, *parts, f, moving, symmetric)  # type: ignore[no-untyped-call]


def within_range(y: Tensor, dtype: torch.dtype) -> Tensor:
    """`y`, scaled down where an entry would be infinite in `dtype`: toward 0, which balls hold."""
    most = torch.finfo(dtype).max
    return y * (most / y.abs().amax((-2, -1), keepdim=True).clamp(min=most))


@torch.no_grad()
def rounding_margin(compose: _Map, excess: _Map, most: Tensor, dtype: torch.dtype) -> Tensor:
    """How far inside the exact result must be so that it is in the set when rounded to `dtype`.

    The smallest of three margins at which ``compose(margin)`` rounds into the set: 0, twice the
    excess of the rounded result at 0, and `most`, a bound that holds for any result.
    """
    none = torch.zeros_like(most)

    def excess_at(margin: Tensor) -> Tensor:
        exact = compose(margin)
        return excess(within_range(exact, dtype).to(dtype).to(exact.dtype))

    little = torch.minimum(2 * excess_at(none), most)
    return torch.where(excess_at(little) <= 0, little, most)


class _Composed(torch.autograd.Function):
    """``Y = U diag(f) V^T`` as a function of ``X = U diag(s) V^T`` and of f, which depends on s.

    The values of f that are `moving` have the derivative 1 with respect to their own value of s,
    others 0. X turns U and V, which changes Y by divided differences of f (Lewis & Sendov 2001;
    Yang 2009): other than the derivatives of U and V, they have no poles where values of s are
    equal. If X is `symmetric`, U is V, and values may have any sign.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Any) -> Tensor:
        u, values, vh, f, moving, ctx.symmetric = tensors
        ctx.save_for_backward(u, values, vh, f, moving.to(f.dtype))
        return composed(u, f, vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, values, vh, f, slope = ctx.saved_tensors
        right, left = grad @ vh.mT, u.mT @ grad
        inner = u.mT @ right
        even, odd = (inner + inner.mT) / 2, (inner - inner.mT) / 2
        of_f = _diagonal(even)
        core = _divided_differences(values, f, slope) * (even - torch.diag_embed(of_f))
        if ctx.symmetric:
            return u @ core @ vh, None, None, None, of_f, None, None
        core = core + _divided_sums(values, f, slope) * odd
        # What is outside of the span of U, or of V, turns that value's vector.
        ratio = _ratio(f, values, slope)
        outer = composed(right - u @ inner, ratio, vh) + composed(u, ratio, left - inner @ vh)
        return u @ core @ vh + outer, None, None, None, of_f, None, None


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _divided_differences(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """``(f_i - f_j) / (values_i - values_j)``, which is the slope where both have the same.

    There is none between equal values of which one is kept and one is not: their mean slope.
    """
    step = values.unsqueeze(-1) - values.unsqueeze(-2)
    same = (slope.unsqueeze(-1) == slope.unsqueeze(-2)) | (step == 0)
    quotient = (f.unsqueeze(-1) - f.unsqueeze(-2)) / torch.where(same, 1.0, step)
    return torch.where(same, (slope.unsqueeze(-1) + slope.unsqueeze(-2)) / 2, quotient)


def _divided_sums(values: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    of_f, of_values = (v.unsqueeze(-1) + v.unsqueeze(-2) for v in (f, values))
    return _ratio(of_f, of_values, slope.unsqueeze(-1))


def _ratio(f: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """``f / values``; where f is 0, as it is at 0 for all but the polar factor, no 0 / 0."""
    zero = (f == 0) & (values == 0)
    return torch.where(zero, slope, f / torch.where(zero, 1.0, values))
