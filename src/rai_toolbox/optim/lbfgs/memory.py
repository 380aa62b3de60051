"""The limited memory of BFGS: past steps, and the Hessian that they make."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import torch
from torch import Tensor

from rai_toolbox.constraints.kernels.blocks import BLOCK, wide_dtype

_WIDE = torch.float64  # of the small matrices, which are on the host
_WIDTH = 2**14


class Memory:
    r"""The last pairs of a step s and the change y of the gradient along it, as a matrix B.

    B is the compact form of the BFGS matrix (Byrd, Nocedal & Schnabel, 1994),

    .. math::
        B = \theta I - W^T K^{-1} W, \quad
        K = \begin{pmatrix} -I & L^T / \theta \\ L / \theta & S S^T / \theta \end{pmatrix},

    where the rows of W are all y and s, and L has the products ``s_i y_j`` of each step with all
    older changes. Pairs are kept divided by ``sqrt(s y)``, which changes no B, so that all have
    the product 1, whatever the units are. W has y and s of each pair next to each other.

    Products of W with itself are kept on the host: over all elements those that K needs, and over
    the free elements all of them.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.pairs = like.new_zeros(size, 2, like.numel())
        self.count = 0  # of pairs so far: each takes the place of the oldest
        self.free = like.new_ones(1, dtype=torch.bool).expand(like.numel())  # without memory
        self.gram = torch.zeros(2 * size, 2 * size, dtype=_WIDE, device="cpu")
        self.gram_free = torch.zeros_like(self.gram)

    def fits(self, size: int, like: Tensor) -> bool:
        """Whether it is a memory of `size` pairs of such vectors."""
        same_kind = self.pairs.dtype == like.dtype and self.pairs.device == like.device
        return same_kind and self.pairs.shape == (size, 2, like.numel())

    def to_plain(self) -> dict[str, Any]:
        """All that it holds, in what a checkpoint keeps as it is.

        (Tensors are cast to the dtype of the parameter when a checkpoint is loaded.)
        """
        small = {name: getattr(self, name).tolist() for name in ("gram", "gram_free")}
        return {"pairs": self.pairs, "free": self.free, "count": self.count, **small}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Memory:
        """What `to_plain` gave, on the same tensors."""
        memory = cls.__new__(cls)
        memory.pairs, memory.count = plain["pairs"], plain["count"]
        memory.free = plain["free"].bool()
        memory.gram = torch.tensor(plain["gram"], dtype=_WIDE, device="cpu")
        memory.gram_free = torch.tensor(plain["gram_free"], dtype=_WIDE, device="cpu")
        return memory

    def clear(self) -> None:
        """Forget all pairs."""
        self.count = 0

    @property
    def theta(self) -> float:
        """The scale of B: ``|y|^2 / (s y)`` of the last pair; 1 without one."""
        newest = 2 * ((self.count - 1) % len(self.pairs))
        return float(self.gram[newest, newest]) if self.count else 1.0

    @property
    def rows(self) -> Tensor:
        """W, of shape (2 k, n)."""
        return self.pairs[: self.count].flatten(0, 1)

    def add(self, step: Tensor, change: Tensor, product: float) -> None:
        """Keep a pair with ``s y = product > 0`` in place of the oldest one."""
        slot = self.count % len(self.pairs)
        scaled_change, scaled_step = self.pairs[slot]
        torch.div(change, product**0.5, out=scaled_change)
        torch.div(step, product**0.5, out=scaled_step)
        theta = dot(scaled_change, scaled_change)
        if not 0 < theta < inf:
            return self.clear()  # out of the range of the dtype
        self.count += 1
        rows = self.rows
        products = torch.zeros(3, len(rows), dtype=wide_dtype(rows), device=rows.device)
        for at in _blocks(rows.shape[1]):
            free, block, s, y = self.free[at], rows[:, at], scaled_step[at], scaled_change[at]
            products += torch.stack([block @ s, block @ (s * free), block @ (y * free)])
        of_s, of_free_s, of_free_y = products.to("cpu", _WIDE)
        at_y, at_s = 2 * slot, 2 * slot + 1
        # (the products of y with older steps are in no matrix)
        self._set(self.gram, at_s, of_s)
        self.gram[at_y, at_y] = theta
        self._set(self.gram_free, at_s, of_free_s)
        self._set(self.gram_free, at_y, of_free_y)

    @staticmethod
    def _set(gram: Tensor, at: int, products: Tensor) -> None:
        gram[at, : len(products)] = gram[: len(products), at] = products

    def restrict(self, free: Tensor) -> Tensor:
        """The products of W with itself over the free elements."""
        used = 2 * min(self.count, len(self.pairs))
        number = int(free.sum())
        changed = (free != self.free).nonzero().squeeze(1)
        if number <= max(BLOCK, len(changed)):
            self.gram_free.zero_()
            changed, signs = free.nonzero().squeeze(1), None
        else:
            signs = torch.where(free[changed], 1, -1)
        rows = self.rows
        total = torch.zeros(used, used, dtype=wide_dtype(rows), device=rows.device)
        for at in _blocks(len(changed)):
            block = rows[:, changed[at]]
            total += (block if signs is None else block * signs[at]) @ block.T
        self.gram_free[:used, :used] += total.to("cpu", _WIDE)
        self.free = free
        return self.gram_free[:used, :used]

    def times(self, vector: Tensor) -> Tensor:
        """``W v``, on the host."""
        return (self.rows @ vector).to("cpu", _WIDE)

    def combined(self, weights: Tensor) -> Tensor:
        """``W' u``."""
        rows = self.rows
        return weights.to(rows.device, rows.dtype) @ rows

    def middle(self) -> Tensor:
        """K."""
        size, theta = len(self.pairs), self.theta
        used = min(self.count, size)
        age = (torch.arange(used, device="cpu") - self.count) % size  # larger for newer ones
        gram = self.gram[: 2 * used, : 2 * used]
        lower = torch.where(age.unsqueeze(1) > age, gram[1::2, ::2], 0.0) / theta
        middle = torch.empty_like(gram)
        middle[::2, ::2] = -torch.eye(used, dtype=_WIDE, device="cpu")
        middle[1::2, ::2], middle[::2, 1::2] = lower, lower.T
        middle[1::2, 1::2] = gram[1::2, 1::2] / theta
        return middle

    def hessian(self, vector: Tensor) -> Tensor:
        """``B v``."""
        scaled = self.theta * vector
        if self.count == 0:
            return scaled
        return scaled.sub_(self.combined(solved(self.middle(), self.times(vector))))


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of a small linear system; NaN or infinite if there is none."""
    return torch.linalg.solve_ex(matrix, right).result


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product, whose rounding errors do not grow with its length."""
    parts = [x @ y for x, y in zip(a.split(BLOCK), b.split(BLOCK), strict=True)]
    return float(torch.stack(parts).sum(dtype=wide_dtype(a)))


def _blocks(size: int) -> Iterator[slice]:
    """Slices, in which float32 is exact enough: what is summed over them is wide."""
    for start in range(0, size, _WIDTH):
        yield slice(start, start + _WIDTH)
