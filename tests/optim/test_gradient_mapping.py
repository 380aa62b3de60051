"""The gradient mapping: idle where the constraint is, and right around any inner optimizer."""

from functools import cache, partial

import pytest
import torch
from torch import optim
from torch.optim import LBFGS, SGD, Adam

from rai_toolbox.constraints import (
    BoundedBall,
    Box,
    L1Ball,
    L2Ball,
    LinfBall,
    MaxNorm,
    Simplex,
    Stiefel,
    UnitNorm,
)
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedParameterOptimizer,
    ProjectedOptimizer,
    gradient_mapping,
)

# --- an idle constraint changes nothing -----------------------------------------------------------

# Inner optimizers whose steps do not depend on the unit of the loss, or which get small ones.
INNERS = {
    "SGD": partial(SGD, lr=1e-7),
    "Adam": partial(Adam, lr=0.01),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.01),
    "Adadelta": partial(optim.Adadelta, lr=0.1),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
    "LBFGS": partial(LBFGS, lr=1e-9),
}
if hasattr(optim, "Muon"):
    INNERS["Muon"] = partial(optim.Muon, lr=0.01)
WIDE = [MaxNorm(5.0), L1Ball(8.0), Box(-3.0, 3.0), L2Ball(4.0, center=0.5)]


@pytest.mark.parametrize("seldom", ["never", "steps", "rows", "none"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("unit", [1e-6, 1e4])
@pytest.mark.parametrize("inner", INNERS)
def test_an_idle_constraint_changes_nothing(inner, unit, decay, seldom):
    """Whatever the unit of the loss is, and however seldom there is a gradient."""
    settings = {} if inner == "LBFGS" else {"weight_decay": decay}

    def end(make):
        x = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0]], dtype=torch.float64)
        x.requires_grad_()
        opt = make([x], **settings)
        generator = torch.Generator().manual_seed(0)

        def closure():
            x.grad = unit * (1 + 0.1 * torch.randn(2, 3, generator=generator, dtype=x.dtype))
            if seldom == "steps":
                x.grad *= len(steps) % 5 == 0
            elif seldom == "rows":
                x.grad *= torch.rand(2, 1, generator=generator) < 0.4
            elif seldom == "none" and len(steps) % 3 != 0:
                x.grad = None
            return 0.0

        steps = []
        for _ in range(12):
            steps.append(0)
            opt.step(closure)
        return x.detach()

    alone = end(INNERS[inner])
    for constraint in WIDE:
        make = partial(ProjectedOptimizer, constraint=constraint, gradient_mapping=True)
        assert torch.equal(end(partial(make, InnerOpt=INNERS[inner])), alone)


def test_a_row_that_seldom_has_a_gradient_goes_down():
    ends = []
    for settings in ({}, {"averaging": 0.0}, {"gradient_mapping": False}):
        row = torch.tensor([[1.0, 0.0]], requires_grad=True)
        opt = ProjectedOptimizer(
            [row], Adam, lr=0.01, weight_decay=1e-5, constraint=MaxNorm(5.0), **settings
        )
        for step in range(20):
            row.grad = torch.ones(1, 2) * (step % 5 == 0)
            opt.step()
        ends.append(row.detach())
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[2])
    assert (ends[0] < torch.tensor([[0.95, -0.05]])).all()


# --- inner optimizers that mix elements -----------------------------------------------------------


GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(*s, generator=GENERATOR, dtype=torch.float64) for s in ((6, 6), (6,)))


def quadratic(x, ridge):
    return x @ A @ A.T @ x / 2 + ridge * x @ x / 2 - 3 * B @ x


@cache
def least_in_box(ridge):
    """By projected gradients."""
    H = A @ A.T + ridge * torch.eye(6, dtype=torch.float64)
    x, rate = torch.zeros(6, dtype=torch.float64), 1 / torch.linalg.eigvalsh(H)[-1]
    for _ in range(5000):
        x = (x - rate * (H @ x - 3 * B)).clamp(-1, 1)
    return quadratic(x, ridge).item()


class Mixing(torch.optim.Optimizer):
    """Steps along ``D g`` with a positive definite matrix D that is not diagonal, as Shampoo's."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for x in group["params"]:
                n = x.numel()
                steps = torch.arange(n, dtype=x.dtype)
                D = 0.5 ** (steps[:, None] - steps).abs()
                x -= (group["lr"] * D @ x.grad.flatten()).view_as(x)


BOXES = {
    "Box": partial(ProjectedOptimizer, constraint=Box(-1.0, 1.0), param_ndim=None),
    "by elements": partial(ProjectedOptimizer, constraint=Box(-1.0, 1.0)),
    "LinfBall": partial(ProjectedOptimizer, constraint=LinfBall(1.0), param_ndim=None),
    "MaxNorm": partial(
        ProjectedOptimizer, constraint=MaxNorm(1.0, p=float("inf")), param_ndim=None
    ),
    "Clamped": partial(ClampedParameterOptimizer, clamp_min=-1.0, clamp_max=1.0),
}


@pytest.mark.parametrize("make", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize(
    ("inner", "steps", "ridge"),
    [(LBFGS, 15, 0.1), (partial(Mixing, lr=0.015), 250, 8.0)],
    ids=["LBFGS", "Mixing"],
)
def test_an_inner_optimizer_that_mixes_elements_stops_at_the_solution_of_a_box(
    inner, steps, ridge, make
):
    def end(make, inner, steps, parts=1):
        xs = [
            torch.zeros(6 // parts, dtype=torch.float64, requires_grad=True) for _ in range(parts)
        ]
        opt = make(xs, inner)

        def closure():
            opt.zero_grad()
            loss = quadratic(torch.cat(xs), ridge)
            loss.backward()
            return loss

        for _ in range(steps):
            opt.step(closure)
        return quadratic(torch.cat(xs), ridge).item()

    least = least_in_box(ridge)
    assert end(make, inner, steps) == pytest.approx(least, rel=1e-5)
    if inner is LBFGS:
        assert end(make, inner, steps, parts=2) == pytest.approx(least, rel=1e-5)
    if inner is LBFGS and make is BOXES["Box"]:
        plain = end(partial(make, gradient_mapping=False), inner, steps)
        assert plain > least + 0.01 * abs(least)  # what the mapping is for


def test_what_scales_elementwise_needs_no_mapping_in_a_box():
    """Nor does an optimizer with a set of its own get one by default."""
    for inner in (SGD, Adam, optim.Adagrad, optim.Adafactor, optim.NAdam, optim.Rprop):
        x = torch.ones(2, 3, requires_grad=True)
        for opt in (
            ProjectedOptimizer([x], inner, constraint=Box(-1.0, 1.0)),
            ClampedParameterOptimizer([x], inner, clamp_max=1.0),
        ):
            assert not any(each.is_active(opt.param_groups[0]) for each in opt._before)


@pytest.mark.parametrize(
    "make",
    [
        partial(ProjectedOptimizer, constraint=Box(0.0, 1.0)),
        partial(ProjectedOptimizer, constraint=Simplex(), gradient_mapping=False),
        partial(ClampedParameterOptimizer, clamp_min=0.0),
    ],
)
@pytest.mark.parametrize("form", ["argument", "partial", "instance", "chain"])
def test_a_line_search_is_refused(make, form):
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"`line_search_fn` must be None .*strong_wolfe"):
        if form == "argument":
            make([x], LBFGS, line_search_fn="strong_wolfe")
        elif form == "partial":
            make([x], partial(LBFGS, line_search_fn="strong_wolfe"))
        elif form == "instance":
            make(InnerOpt=LBFGS([x], line_search_fn="strong_wolfe"))
        else:
            ChainedParamTransformingOptimizer(
                make, params=[x], InnerOpt=LBFGS, line_search_fn="strong_wolfe"
            )


def test_a_line_search_without_a_constraint_is_fine():
    x = torch.ones(2, 3, requires_grad=True)
    ProjectedOptimizer([x], LBFGS, constraint=None, line_search_fn="strong_wolfe")


# --- scaled gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "bias"), [(-1.0, 0.0), (4.0, 0.0), (-0.5, 0.3)])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("averaging", [0.0, 0.9])
@pytest.mark.parametrize("chained", [False, True])
def test_the_mapping_is_that_of_the_scaled_gradient(scale, bias, maximize, averaging, chained):
    target, ends, residuals = torch.tensor([[2.0, 0.5, -0.4]], dtype=torch.float64), [], []
    for factor, shift in ((scale, bias), (1.0, 0.0)):
        x = torch.full((1, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
        settings = {"grad_scale": factor, "grad_bias": shift, "lr": 0.1, "maximize": maximize}
        make = partial(ProjectedOptimizer, constraint=Simplex(), averaging=averaging)
        if chained:
            opt = ChainedParamTransformingOptimizer(make, params=[x], InnerOpt=Adam, **settings)
        else:
            opt = make([x], Adam, **settings)
        for _ in range(30):
            wanted = (x.detach() - target) * (-1 if maximize else 1)
            x.grad = (wanted - shift) / factor
            if not chained:
                residuals.append(float(opt.kkt_residual()[0]))
            opt.step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-10)
    if not chained:
        assert residuals[:30] == pytest.approx(residuals[30:], abs=1e-10)


# --- the step of the mapping, and averages --------------------------------------------------------


@pytest.mark.parametrize(
    "ball",
    [
        lambda c: L2Ball(1.0, center=c),
        lambda c: L1Ball(1.0, center=c),
        lambda c: L2Ball(torch.ones(4, 1, dtype=torch.float64), center=c),
        lambda c: BoundedBall(L2Ball(1.0, center=c), c - 0.5, c + 0.5),
    ],
)
def test_where_a_ball_is_does_not_matter(ball):
    ends = []
    for distance in (3.0, 1e4):
        center = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64) * distance
        x = center.repeat(4, 1).requires_grad_()
        opt = ProjectedOptimizer([x], Adam, lr=0.1, constraint=ball(center))
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            noise = torch.randn(4, 3, generator=generator, dtype=x.dtype)
            x.grad = x.detach() - center - torch.tensor([2.0, 0.5, -0.4]) + 3 * noise
            opt.step()
        ends.append(x.detach() - center)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_no_average_of_gradients_on_sets_that_are_not_convex():
    """An average lags behind the turns of the set: Adam got to a rotation in twice the steps."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    target, steps = A @ Q, []
    for settings in ({}, {"averaging": 0.9}):
        turn = torch.linalg.matrix_exp(torch.tensor([[0.0, 1.5], [-1.5, 0.0]], dtype=A.dtype))
        start = Q @ torch.block_diag(turn, turn)
        x = start.unsqueeze(0).clone().requires_grad_()
        opt = ProjectedOptimizer([x], Adam, lr=0.1, constraint=Stiefel(), param_ndim=2, **settings)
        taken, loss = 0, 1.0
        while loss > 1e-3 and taken < 300:
            opt.zero_grad()
            value = (A @ x[0] - target).square().mean()
            value.backward()
            opt.step()
            taken, loss = taken + 1, value.item()
        steps.append(taken)
    assert steps[0] < 0.8 * steps[1]
    row = torch.tensor([[0.6, 0.8]], requires_grad=True)
    opt = ProjectedOptimizer([row], Adam, constraint=UnitNorm())
    row.grad = torch.ones(1, 2)
    opt.step()
    assert "gradient_average" not in opt.state[row]


# --- large batches --------------------------------------------------------------------------------

COUPLED = {
    "columns": (UnitNorm(dim=0), Adam),
    "radii": (L2Ball(torch.linspace(0.1, 3.0, 300).unsqueeze(1)), Adam),
    "center": (L1Ball(1.0, center=torch.linspace(-1.0, 1.0, 300 * 256).view(300, 256)), Adam),
}
if hasattr(optim, "Muon"):
    COUPLED["whole"] = (MaxNorm(1.0, dim=1), optim.Muon)


@pytest.mark.parametrize(("constraint", "inner"), COUPLED.values(), ids=COUPLED)
def test_batches_that_are_not_taken_apart(constraint, inner, monkeypatch):
    """Where columns or the whole batch are coupled, or each row has a setting, rows stay joined."""
    ends, generator = [], torch.Generator().manual_seed(0)
    start, grad = torch.randn(2, 300, 256, generator=generator)
    for size in (2**30, 2**15):
        monkeypatch.setattr(gradient_mapping, "GROUP", size)
        x = start.clone().requires_grad_()
        settings = {"constraint": constraint, "param_ndim": 1, "gradient_mapping": True}
        opt = ProjectedOptimizer([x], inner, lr=0.01, **settings)
        x.grad = grad.clone()
        opt.step()
        ends.append(x.detach())
    assert torch.equal(*ends)
