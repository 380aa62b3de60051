"""What is measured: each row is a step of ours beside the same step by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

import plain_loops as by_hand
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from rai_toolbox import optim
from rai_toolbox.constraints import (
    BoundedBall,
    L1Ball,
    L2Ball,
    LinfBall,
    MaxNorm,
    Simplex,
    UnitNorm,
)
from rai_toolbox.optim import FrankWolfe, ProjectedOptimizer
from rai_toolbox.perturbations import attack

BARE, OURS, LOOP, SORTED = "bare", "ours", "inner + loop", "loop by sorting"
COMPILED, PGD, PASSES = "ours, compiled", "PGD", "forward + backward"

NAMED, ELEMENTWISE, ROWS = "Named optimizers", "Clamps", "Sets of rows"
BALLS, ATTACKS, FEW = "Balls within bounds", "Attacks on one example", "Compiled steps"

Step = Callable[[], object]


class Work(NamedTuple):
    """Steps to compare, each of which starts with what `reset` leaves."""

    steps: dict[str, Step]
    reset: Step
    compile_s: float = 0.0


@dataclass(frozen=True)
class Row:
    """The time of the step `ours`, divided by that of `base`, is to be at most `limit`."""

    part: str
    work: str
    base: str
    limit: float | None
    build: Callable[[str], Work]  # on a device
    ours: str = OURS
    tensor_bytes: int = 0  # of the largest parameter, where memory is measured
    tensors_allowed: float = 1.0  # of this size, beyond what the bare step allocates

    @property
    def name(self) -> str:
        return f"{self.work}: {self.ours} / {self.base}"


class Tensors(NamedTuple):
    params: list[Tensor]
    reset: Step


def tensors(count: int, shape: tuple[int, ...], device: str) -> Tensors:
    """Parameters and gradients of standard normal numbers, which a reset restores."""
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(device)) for _ in range(count)
    ]
    for param in params:
        param.grad = torch.randn(shape, generator=generator).to(device)
    changed = [tensor for param in params for tensor in (param.detach(), param.grad)]
    starts = [tensor.clone() for tensor in changed]
    return Tensors(params, partial(torch._foreach_copy_, changed, starts))


# Optimizers

MANY, SMALL, CONV, ONE = (
    (160, (400, 400)),
    (2_000, (25, 40)),
    (1, (256, 3, 32, 32)),
    (1, (1, 784)),
)
BIG = (1, (16_000_000,))

momentum = partial(SGD, lr=0.1, momentum=0.9)


def sized(count: int, shape: tuple[int, ...]) -> str:
    size = ", ".join(f"{n:,}" for n in shape)
    return f"{count:,} x {size}" if len(shape) == 1 else f"{count:,} x ({size})"


def optimizer_row(
    part: str,
    name: str,
    size: tuple[int, tuple[int, ...]],
    inner: Callable[..., Any],
    ours: Callable[[list[Tensor]], Any],
    base: str,
    limit: float | None,
    *,
    before: by_hand.Change | None = None,
    after: by_hand.Change | None = None,
    compiled: bool = False,
    elementwise: bool = False,
) -> Row:
    """A step of ours, of the bare inner optimizer, and of that with loops around it."""

    def build(device: str) -> Work:
        params, reset = tensors(*size, device)
        by_loops = by_hand.step_by_hand(inner(params), params, before, after)
        loop_name = base if base == SORTED else LOOP
        steps: dict[str, Step] = {BARE: inner(params).step, loop_name: by_loops}
        if not compiled:
            return Work({**steps, OURS: ours(params).step}, reset)
        torch.compiler.reset()
        steps[COMPILED] = step = optim.compiled(ours(params))
        step()
        start = perf_counter()
        step()
        return Work(steps, reset, perf_counter() - start)

    inner_name = getattr(inner, "func", inner).__name__
    work = f"{name}, {inner_name}, {sized(*size)}"
    measures_memory = size in (MANY, CONV) and not compiled
    return Row(
        part,
        work,
        base,
        limit,
        build,
        ours=COMPILED if compiled else OURS,
        tensor_bytes=4 * torch.Size(size[1]).numel() if measures_memory else 0,
        tensors_allowed=0.0 if elementwise else 1.0,
    )


# Name: arguments of ours, of the inner optimizer if that is FrankWolfe, and the loops.
CLAMPED, BALL = {"clamp_min": -1.0, "clamp_max": 1.0}, {"epsilon": 1.0}
TOP_Q = {"q": 1 - by_hand.KEPT}
NAMES: dict[str, tuple[dict[str, Any], by_hand.Change | None, by_hand.Change | None]] = {
    "ClampedParameterOptimizer": (CLAMPED, None, by_hand.clamp),
    "ClampedGradientOptimizer": (CLAMPED, by_hand.clamp, None),
    "SignedGradientOptim": ({}, by_hand.sign, None),
    "LinfProjectedOptim": (BALL, by_hand.sign, by_hand.clamp),
    "LinfFrankWolfe": (BALL, by_hand.sign, None),
    "L1NormedGradientOptim": ({}, by_hand.unit_l1, None),
    "L2NormedGradientOptim": ({}, by_hand.unit_l2, None),
    "L2ProjectedOptim": (BALL, by_hand.unit_l2, by_hand.l2_ball(1.0)),
    "L2FrankWolfe": (BALL, by_hand.unit_l2, None),
    "TopQGradientOptimizer": (TOP_Q, by_hand.top_q, None),
    "L1qNormedGradientOptim": (TOP_Q, by_hand.l1q, None),
    "L1qFrankWolfe": (BALL | TOP_Q, by_hand.l1q, None),
    "L1FrankWolfe": (BALL, by_hand.largest_sign, None),
    "ChainedParamTransformingOptimizer": ({}, by_hand.top_q_clamp, None),
}
OF_ELEMENTS = ("Clamped", "Signed", "Linf")


def chain(params: list[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Top-q, then a clamp."""
    return optim.ChainedParamTransformingOptimizer(
        partial(optim.TopQGradientOptimizer, **TOP_Q),
        partial(optim.ClampedGradientOptimizer, **CLAMPED),
        *args,
        params=params,
        **kwargs,
    )


def named_rows() -> Iterator[Row]:
    for size in (MANY, SMALL, CONV, ONE):
        for name, (arguments, before, after) in NAMES.items():
            kind = chain if name.startswith("Chained") else getattr(optim, name)
            frank_wolfe = name.endswith("FrankWolfe")
            inner = FrankWolfe if frank_wolfe else momentum
            given = {} if frank_wolfe else {"InnerOpt": momentum}
            ours = partial(kind, **given, **arguments)
            yield optimizer_row(
                NAMED,
                name,
                size,
                inner,
                ours,
                LOOP,
                1.0,
                before=before,
                after=after,
                elementwise=name.startswith(OF_ELEMENTS),
            )


def set_rows() -> Iterator[Row]:
    adamw, sgd = partial(AdamW, lr=1e-2), partial(SGD, lr=0.1)
    clamp = partial(optim.ClampedParameterOptimizer, **CLAMPED)
    for inner, size, limit in (
        (sgd, (2_000, (1_000,)), 1.15),
        (adamw, (2_000, (1_000,)), 1.03),
        (sgd, BIG, 1.55),
    ):
        yield optimizer_row(
            ELEMENTWISE,
            "clamp",
            size,
            inner,
            partial(clamp, InnerOpt=inner),
            BARE,
            limit,
            after=by_hand.clamp,
        )

    def row(
        name: str,
        inner: Any,
        constraint: Any,
        loop: by_hand.Change,
        limit: float | None,
        base: str = LOOP,
        part: str = ROWS,
        size: tuple[int, tuple[int, ...]] = MANY,
        **options: Any,
    ) -> Row:
        ours = partial(ProjectedOptimizer, InnerOpt=inner, constraint=constraint, **options)
        compiled = part == FEW
        return optimizer_row(
            part, name, size, inner, ours, base, limit, after=loop, compiled=compiled
        )

    # The rows have a norm of about 20.
    for kind in (L2Ball, MaxNorm):
        name = kind.__name__
        yield row(f"{name}, all inside", momentum, kind(30.0), by_hand.l2_ball(30.0), 1.0)
        yield row(f"{name}, half outside", momentum, kind(20.0), by_hand.l2_ball(20.0), 1.1)
    unit = partial(row, inner=adamw, constraint=UnitNorm(), loop=by_hand.unit_l2)
    yield unit("UnitNorm, without mapping", limit=1.1, gradient_mapping=False)
    yield unit("UnitNorm, with mapping", limit=1.6)
    yield row("L1Ball, all outside", sgd, L1Ball(10.0), by_hand.sorted_l1(10.0), 0.15, SORTED)
    yield row("Simplex, all outside", sgd, Simplex(), by_hand.sorted_simplex, 0.15, SORTED)

    for inner in (sgd, adamw):
        yield optimizer_row(
            FEW,
            "clamp",
            BIG,
            inner,
            partial(clamp, InnerOpt=inner),
            LOOP,
            None,
            after=by_hand.clamp,
            compiled=True,
        )
    few = partial(row, limit=None, part=FEW, size=(4, (400, 400)))
    yield few("L2Ball, half outside", adamw, L2Ball(20.0), by_hand.l2_ball(20.0))
    yield few("UnitNorm, with mapping", adamw, UnitNorm(), by_hand.unit_l2)
    l1 = by_hand.sorted_l1(10.0)
    yield few("L1Ball, all outside", sgd, L1Ball(10.0), l1, base=SORTED, size=(1, (400, 400)))


# Attacks

RADII = {LinfBall: 8 / 255, L2Ball: 0.5, L1Ball: 10.0}
STEPS = 40


def ball_rows() -> Iterator[Row]:
    for kind, radius in RADII.items():

        def build(device: str, kind: Any = kind, radius: float = radius) -> Work:
            (delta,), reset = tensors(1, (128, 784), device)
            data = torch.rand(128, 784, generator=torch.Generator().manual_seed(1)).to(device)
            constraint = BoundedBall(kind(radius), -data, 1 - data)
            lr = 2.5 * radius / STEPS
            # Both go about as far: PGD makes the gradient one of norm 1.
            length = {inf: 1.0, 2: 784**0.5, 1: 0.8 * 784}[kind.p]
            start = constraint.project(delta.detach().clone())

            def on_boundary() -> None:
                reset()
                delta.detach().copy_(start)

            projected = ProjectedOptimizer([delta], SGD, constraint=constraint, lr=lr / length)
            pgd = optim.PGD([delta], constraint=constraint, lr=lr)
            return Work({OURS: projected.step, PGD: pgd.step}, on_boundary)

        work = f"BoundedBall({kind.__name__}), ProjectedOptimizer, SGD, 1 x (128, 784)"
        yield Row(BALLS, work, PGD, 1.5, build)


def attack_rows() -> Iterator[Row]:
    for kind, limit in ((LinfBall, 2.2), (L2Ball, 3.2)):

        def build(device: str, kind: Any = kind) -> Work:
            ball = kind(RADII[kind])
            torch.manual_seed(0)
            net = nn.Linear(784, 10).to(device).requires_grad_(False)
            data, target = torch.rand(1, 784, device=device), torch.tensor([3], device=device)
            shown = data.clone().requires_grad_()

            def ours() -> None:
                attack(
                    net,
                    data,
                    target,
                    ball=ball,
                    optimizer=optim.PGD,
                    steps=STEPS,
                    criterion=criterion,
                )

            def criterion(logits: Tensor, target: Tensor) -> Tensor:
                return cross_entropy(logits, target, reduction="none")

            def passes() -> None:
                for _ in range(STEPS):
                    shown.grad = None
                    criterion(net(shown), target).sum().backward()

            return Work({OURS: ours, PASSES: passes}, lambda: None)

        work = f"attack, {kind.__name__}, PGD-{STEPS}, N=1, linear model"
        yield Row(ATTACKS, work, PASSES, limit, build)


def all_rows() -> list[Row]:
    return [*named_rows(), *set_rows(), *ball_rows(), *attack_rows()]
