"""Scion: momentum, and a step of constant size toward, or along, the answer of an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isinf, prod, sqrt
from typing import Any, cast

import torch
from torch import Tensor

from rai_toolbox import checks
from rai_toolbox.constraints.balls import L1Ball, L2Ball
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.kernels import polar
from rai_toolbox.constraints.sharding import ON_SHARDS, is_sharded
from rai_toolbox.constraints.spectral import NuclearBall, SpectralBall
from rai_toolbox.optim.frank_wolfe import FrankWolfe, check_momentum, check_oracle, interpolate_
from rai_toolbox.optim.own_step import OwnStepOptimizer, check_lr_value
from rai_toolbox.optim.wrapper import Group, Params

_POLAR = ("newton_schulz", "newton_schulz_float32", "svd")


class Scion(FrankWolfe):
    r"""Train with the answers of norm balls' oracles to a moving average of the gradients.

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \quad
        s \in \arg\min_{s \in C} \langle m, s \rangle, \quad
        p \leftarrow (1 - a) p + a s

    with beta = `momentum` and a = `lr`: a Frank-Wolfe step of constant size, which stays in the set
    C. If `unconstrained`, ``p <- (1 - a w) p + a s``, with w = `weight_decay` (Pethick et al.,
    2025, "Training Deep Learning Models with Norm-Constrained LMOs"). With a `SpectralBall` this is
    the step of Muon (Jordan et al., 2024). `norm_groups` makes the groups of a module.

    The oracle of a `SpectralBall` needs the polar factor of m, ``U V^T`` for ``m = U diag(s) V^T``:

    - ``polar="newton_schulz"`` iterates ``X <- a X + (b X X^T + c (X X^T)^2) X`` in bfloat16, as
      Muon does. The constrained step divides the result by a bound of its largest singular value,
      so that s is in the ball whatever the error. The bound is proved afterwards, by a Cholesky
      factor. It is about the largest value of the last polynomial, 1.2 with Muon's coefficients
      and 1 with those of Polar Express, and rounding errors loosen it, by 4 % for 512 rows;
    - ``polar="newton_schulz_float32"`` iterates in float32: more accurate with Polar Express, and
      faster on CPUs without instructions for bfloat16. The bound follows from the coefficients;
    - ``polar="svd"`` is exact, and computed in float64 as by `SpectralBall.lmo`.

    A start outside C is projected first. In float32 and float64, parameters stay in a
    `SpectralBall`, a `NuclearBall`, and in an `L1Ball` or `L2Ball` without center also after
    rounding: s is scaled inward by what rounding a step may add. For other sets, and in bfloat16
    and float16, see `FrankWolfe`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors, or dicts that define parameter groups.
    lr : float
        The step size a, >= 0; in [0, 1] if constrained. With 0 nothing moves.
    constraint : Constraint
        The set C of each sub-tensor, bounded, convex, and with an oracle; for all groups that have
        none of their own.
    momentum : float
        The weight of past gradients, in [0, 1).
    nesterov : bool
        Whether the oracle gets ``beta m + (1 - beta) g``.
    unconstrained : bool
        Whether to add ``a s`` rather than to move toward s.
    weight_decay : float
        Decoupled, >= 0; only if unconstrained.
    polar : {"newton_schulz", "newton_schulz_float32", "svd"}
        How the oracle of a `SpectralBall` is computed; no effect for other sets.
    coefficients : sequence of tuple
        ``(a, b, c)`` of each Newton-Schulz iteration: `Scion.MUON`, five times the same, or
        `Scion.POLAR_EXPRESS`, eight that converge (Amsel et al., 2025).
    param_ndim : int or None
        Number of trailing dims that make a sub-tensor, see `rai_toolbox.to_batch`; by default, a
        parameter as a whole.

    Raises
    ------
    TypeError, ValueError
        If a setting breaks its rule, the constraint does not fit a parameter, or settings
        contradict each other. At each step, if `lr` is out of its range, and if constrained in
        float32, if the precision of float32 products (`torch.set_float32_matmul_precision`) is too
        low for the coefficients: "medium", and with Polar Express "high".

    Notes
    -----
    `gap` is that of the present gradient, not of its average, with the exact oracle: an upper bound
    of f - min f over C for convex f and parameters in C.

    Examples
    --------
    >>> import torch
    >>> from rai_toolbox.constraints import SpectralBall
    >>> from rai_toolbox.optim import Scion
    >>> weight = torch.zeros(2, 2, requires_grad=True)
    >>> optim = Scion([weight], constraint=SpectralBall(2.0), lr=0.5, polar="svd")
    >>> weight.backward(gradient=torch.tensor([[0.0, 3.0], [-1.0, 0.0]]))
    >>> optim.step()  # half of the way to -2 times the polar factor
    >>> weight
    tensor([[ 0.0000, -1.0000],
            [ 1.0000,  0.0000]], requires_grad=True)
    """

    MUON: polar.Coefficients = polar.MUON
    POLAR_EXPRESS: polar.Coefficients = polar.POLAR_EXPRESS

    _checks = {
        "momentum": check_momentum,
        "nesterov": checks.check_flag,
        "unconstrained": checks.check_flag,
        "weight_decay": checks.check_finite,
        "polar": lambda name, value: _check_polar(name, value),
        "coefficients": lambda name, value: _check_coefficients(name, value),
        "constraint": lambda _, value: check_oracle(value),
    }

    def __init__(
        self,
        params: Params,
        *,
        lr: float | Tensor,
        constraint: Constraint | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        unconstrained: bool = False,
        weight_decay: float = 0.0,
        polar: str = "newton_schulz",
        coefficients: Iterable[tuple[float, float, float]] = MUON,
        param_ndim: int | None = None,
    ) -> None:
        # (not that of FrankWolfe, whose rules of the step size have other settings)
        OwnStepOptimizer.__init__(self, params, dict(locals()))

    def _completed(self, group: Any) -> Group:
        given = group["coefficients"]
        if isinstance(given, Iterable) and not isinstance(given, (str, Tensor)):
            rows = (tuple(row) if isinstance(row, Iterable) else row for row in given)
            group = {**group, "coefficients": tuple(rows)}
        return super()._completed(group)

    def _check_step_size(self, group: Group) -> None:
        self._check_before_step(group)
        if group["weight_decay"] and not group["unconstrained"]:
            raise ValueError(
                "`weight_decay` must be 0 if constrained (a step leads to the oracle's answer, "
                f"whose radius bounds the weights), got {group['weight_decay']!r}"
            )

    def _check_before_step(self, group: Group) -> None:
        if group["constraint"] is None:
            raise checks.wrong("constraint", "be given for each group", "None")
        lr = check_lr_value("lr", group["lr"])
        if lr is not None and lr > 1 and not group["unconstrained"]:
            raise ValueError(f"`lr` must be in [0, 1] if constrained, got {group['lr']!r}")
        if _iterates(group) and not group["unconstrained"]:
            _limit(group)

    def _starts_inside(self, group: Group) -> bool:
        return not group["unconstrained"]

    def _step_group_(self, group: Group) -> None:
        for portion in _portions(self._moving(group), group):
            directed = [self._directed(param, group) for param, _ in portion]
            answers = _answers([direction for _, direction in directed], group)
            for (param, step), (x, _), end in zip(portion, directed, answers, strict=True):
                if group["unconstrained"]:
                    _add_(param, end, group)
                else:
                    interpolate_(param, x, _inward(end.to(x.dtype), group), group["lr"])
                step += 1


def _portions(
    moving: list[tuple[Tensor, Tensor]], group: Group
) -> Iterable[list[tuple[Tensor, Tensor]]]:
    """What is moved together: matrices that fill no cache; all others one by one."""
    small = []
    for each in moving:
        if _iterates(group) and not is_sharded(each[0]) and not polar.fills_cache(each[0]):
            small.append(each)
        else:
            yield [each]
    if small:
        yield small


def _add_(param: Tensor, end: Tensor, group: Group) -> None:
    """The unconstrained step, with decoupled weight decay."""
    lr = group["lr"]
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])
    end = end.reshape(param.shape)
    if isinstance(lr, Tensor):
        param.add_((end * lr).to(param.dtype))
    else:
        param.add_(end, alpha=lr)


# Oracles


def _iterates(group: Group) -> bool:
    """Whether the oracle of a group is the Newton-Schulz iteration."""
    return isinstance(group["constraint"], SpectralBall) and group["polar"] != "svd"


def _answers(directions: list[Tensor], group: Group) -> Iterable[Tensor]:
    """The oracle's answer to each direction."""
    constraint = group["constraint"]
    if not _iterates(group):
        return (constraint.lmo(direction) for direction in directions)
    if not any(map(is_sharded, directions)):
        return _by_iteration(constraint, directions, group)

    def of_shard(part: SpectralBall, local: Tensor) -> Tensor:
        return _by_iteration(part, [local], group)[0]

    lmo = cast(Callable[..., Tensor], ON_SHARDS["lmo"])
    return (lmo(of_shard, constraint, direction) for direction in directions)


def _by_iteration(ball: SpectralBall, directions: list[Tensor], group: Group) -> list[Tensor]:
    """``-radius U V^T``, or less if constrained, as far as the iteration finds ``U V^T``."""
    points = [ball._points(direction) for direction in directions]
    dtype = torch.float32 if group["polar"] == "newton_schulz_float32" else torch.bfloat16
    limit = None if group["unconstrained"] else _limit(group)
    factors = polar.polar_factors(points, group["coefficients"], dtype, limit)
    answers = []
    for direction, (factor, divisor) in zip(directions, factors, strict=True):
        radius = ball.epsilon
        if isinstance(radius, Tensor):
            aligned = radius.reshape((1,) * (direction.ndim - radius.ndim) + radius.shape)
            radius = ball._points(aligned)
        answers.append(factor.to(direction.dtype).mul_(-radius / divisor).reshape(direction.shape))
    return answers


def _limit(group: Group) -> float:
    """What the singular values of a constrained step's iteration should stay below."""
    # Bfloat16 products are checked afterwards, with some room for their rounding errors. Those of
    # float32 have fewer bits if the user allows it, such as those of TF32.
    in_bfloat16 = group["polar"] == "newton_schulz"
    precision = "highest" if in_bfloat16 else torch.get_float32_matmul_precision()
    bits = {"highest": 24, "high": 11}.get(precision, 8)
    limit = polar.largest_singular_value(group["coefficients"], 2.0**-bits)
    if isinf(limit):
        raise ValueError(
            "`coefficients` must keep singular values bounded if constrained, got "
            f"{group['coefficients']!r} with products of {bits} bits, see "
            "torch.set_float32_matmul_precision"
        )
    return limit * (1 + torch.finfo(torch.bfloat16).eps) if in_bfloat16 else limit


def _inward(end: Tensor, group: Group) -> Tensor:
    """The end of a step, scaled such that what rounding adds to the step cannot lead outside.

    Rounding ``(1 - a) x + a s`` moves each entry by at most ``u (1 + 4 a)`` times the larger of
    |x| and |s|, and so a matrix of rank r by ``sqrt(r)`` times that in each of the norms.
    """
    constraint, unit = group["constraint"], torch.finfo(end.dtype).eps / 2
    matrices = isinstance(constraint, (SpectralBall, NuclearBall))
    balls = isinstance(constraint, (L1Ball, L2Ball)) and constraint.center is None
    if not (matrices or balls) or unit > 1e-6:
        return end
    rows = 1 + (constraint.flatten or 1) if matrices else 1
    rank = min(prod(end.shape[1:rows]), prod(end.shape[rows:])) if matrices else 1
    lost = unit * sqrt(rank) * (1 / group["lr"] + 4)
    share = 1 - lost
    inward = share.clamp(min=0.0).to(end) if isinstance(share, Tensor) else max(0.0, share)
    return end.mul_(inward)


# Checks


def _check_polar(name: str, value: object) -> None:
    if value not in _POLAR:
        raise checks.wrong(name, f"be one of {_POLAR}", repr(value))


def _check_coefficients(name: str, value: object) -> None:
    if (
        not isinstance(value, tuple)
        or not value
        or any(not isinstance(row, tuple) or len(row) != 3 for row in value)
    ):
        raise checks.wrong(name, "hold three numbers for each iteration", repr(value), TypeError)
    for row in value:
        for number in row:
            checks.check_number(name, number, finite=True)
