"""Scion follows the published rule, Muon, and stays in its sets; Frank-Wolfe with momentum."""

import copy
from math import sqrt

import pytest
import torch

from rai_toolbox._torch import Muon
from rai_toolbox.constraints import Box, L1Ball, L2Ball, NuclearBall, Simplex, SpectralBall
from rai_toolbox.constraints.kernels import polar
from rai_toolbox.optim import FrankWolfe, Scion


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameter(*shape, **kwargs):
    return normal(*shape, **kwargs).requires_grad_()


def feed(params, seed):
    """Gradients for a step."""
    for i, param in enumerate(params):
        param.grad = normal(*param.shape, seed=100 * seed + i, dtype=param.dtype)


def polar_factor(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


# The published rule


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("unconstrained", [False, True])
def test_is_the_published_rule(unconstrained, nesterov):
    radius, lr, beta, decay = 1.7, 0.1, 0.8, 0.3 * unconstrained
    weight = parameter(5, 3, dtype=torch.float64)
    settings = {"unconstrained": unconstrained, "nesterov": nesterov, "weight_decay": decay}
    optim = Scion(
        [weight], constraint=SpectralBall(radius), lr=lr, momentum=beta, polar="svd", **settings
    )
    optim.make_feasible_()
    x, average = weight.detach().clone(), torch.zeros(5, 3, dtype=torch.float64)
    for step in range(20):
        feed([weight], step)
        average = beta * average + (1 - beta) * weight.grad
        seen = beta * average + (1 - beta) * weight.grad if nesterov else average
        shrink = 1 - lr * decay if unconstrained else 1 - lr
        x = shrink * x - lr * radius * polar_factor(seen)
        optim.step()
        torch.testing.assert_close(weight.detach(), x, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(Muon is None, reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_unconstrained_it_follows_muon(shape, nesterov):
    ours, theirs = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    ball = SpectralBall(sqrt(max(1, shape[0] / shape[1])))  # Muon's rule of scale
    optim = Scion([ours], constraint=ball, unconstrained=True, **settings)
    muon = Muon([theirs], **settings)
    for step in range(50):
        feed([ours], step)
        theirs.grad = ours.grad.clone()
        optim.step()
        muon.step()
    # The iteration leaves an error of some percent in each step, other ones in each.
    way = torch.linalg.matrix_norm(theirs.detach() - normal(*shape), 2)
    assert torch.linalg.matrix_norm(ours.detach() - theirs.detach(), 2) < 0.01 * way


# In the set

HARD = {
    "random": lambda m, k: normal(m, k),
    "of rank one": lambda m, k: torch.ones(m, k) / 3,
    "orthogonal": lambda m, k: torch.eye(m, k) * 7,
    "nearly singular": lambda m, k: normal(m, 2) @ normal(2, k) + 1e-4 * normal(m, k),
    "tiny": lambda m, k: 1e-30 * normal(m, k),
    "huge": lambda m, k: 1e30 * normal(m, k),
    "zero": lambda m, k: torch.zeros(m, k),
}


@pytest.mark.parametrize("polar", ["newton_schulz", "newton_schulz_float32"])
@pytest.mark.parametrize("coefficients", [Scion.MUON, Scion.POLAR_EXPRESS], ids=["muon", "pe"])
@pytest.mark.parametrize("lr", [1e-3, 0.3, 1.0, torch.tensor(0.1)])
@pytest.mark.parametrize("name", HARD)
def test_stays_in_the_ball_in_exact_arithmetic(name, lr, coefficients, polar):
    ball = SpectralBall(1.3)
    weights = [torch.nn.Parameter(5 * normal(*shape)) for shape in [(24, 16), (16, 24), (1, 1)]]
    optim = Scion(weights, constraint=ball, lr=lr, coefficients=coefficients, polar=polar)
    for _ in range(60):  # in one direction, the boundary is where it ends
        for weight in weights:
            weight.grad = HARD[name](*weight.shape)
        optim.step()
        assert optim.violation() == [0]


@pytest.mark.parametrize(
    "constraint", [SpectralBall(0.7), NuclearBall(0.7), L2Ball(0.7), L1Ball(0.7)], ids=str
)
def test_rounding_does_not_add_up_to_a_violation(constraint):
    weight = torch.nn.Parameter(normal(6, 9))
    optim = Scion([weight], constraint=constraint, lr=1e-2, polar="svd")
    for step in range(300):
        weight.grad = normal(6, 9, seed=step // 100)
        optim.step()
        assert optim.violation() == [0]


@pytest.mark.parametrize(
    ("polar", "error"), [("newton_schulz_float32", 1e-4), ("newton_schulz", 0.03)]
)
def test_converging_coefficients_reach_the_exact_answer(polar, error):
    ends = []
    for settings in ({"coefficients": Scion.POLAR_EXPRESS, "polar": polar}, {"polar": "svd"}):
        weight = torch.nn.Parameter(torch.zeros(12, 20))
        weight.grad = normal(12, 20)
        Scion([weight], constraint=SpectralBall(2.0), lr=1.0, **settings).step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=error)


@pytest.mark.parametrize("unconstrained", [False, True])
def test_an_empty_matrix_is_left_alone(unconstrained):
    empty, full = (torch.zeros(rows, 3, requires_grad=True) for rows in (0, 2))
    optim = Scion([empty, full], constraint=SpectralBall(1.0), lr=0.5, unconstrained=unconstrained)
    for param in (empty, full):
        param.grad = torch.ones_like(param)
    optim.step()
    assert empty.shape == (0, 3) and bool((full < 0).all())


def test_a_set_that_was_removed_later_is_missed():
    optim = Scion([parameter(2, 2)], constraint=SpectralBall(1.0), lr=0.5)
    optim.param_groups[0]["constraint"] = None
    with pytest.raises(ValueError, match="`constraint` must be given for each group, got None"):
        optim.step()


def test_a_step_of_size_zero_changes_nothing():
    weight = torch.nn.Parameter(normal(3, 2))
    weight.grad = normal(3, 2, seed=1)
    before = weight.detach().clone()
    Scion([weight], constraint=SpectralBall(0.1), lr=0.0).step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_makes_its_matrix_nan(bad):
    weights = [torch.nn.Parameter(0.1 * normal(3, 2)) for _ in range(2)]
    weights[0].grad, weights[1].grad = torch.tensor([[bad, 1.0]] * 3), normal(3, 2)
    Scion(weights, constraint=SpectralBall(1.0), lr=0.1).step()
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


# Groups, kernels of convolutions, shapes together


def test_groups_have_their_own_sets_and_one_step_moves_all():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    conv, bias, head, last = model.parameters()
    radii = torch.full((1, 1, 1, 1), 0.5)
    groups = [
        {"params": [conv], "constraint": SpectralBall(radii, flatten=1)},
        {"params": [head], "constraint": L2Ball(0.3), "param_ndim": 1},
        {"params": [bias, last], "constraint": Box(-0.1, 0.1), "momentum": 0.0},
    ]
    optim = Scion(groups, lr=0.2)
    for step in range(5):
        feed(model.parameters(), step)
        optim.step()
        assert optim.violation() == [0, 0, 0]
    assert torch.linalg.matrix_norm(conv.detach().flatten(1), 2) > 0.2
    assert [bool(torch.isfinite(gap)) for gap in optim.gap()] == [True] * 3


def test_matrices_of_one_shape_are_computed_as_one_by_one():
    shapes = [(6, 4), (4, 6), (6, 4), (3, 3)]
    many, alone = ([torch.nn.Parameter(normal(*s, seed=7)) for s in shapes] for _ in range(2))
    settings = {"constraint": SpectralBall(1.0), "lr": 0.1}
    for params in (many, alone):
        feed(params, 1)
    Scion(many, **settings).step()
    for param in alone:
        Scion([param], **settings).step()
    for a, b in zip(many, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 3, 5), (1, 1, 4), (3, 8, 8)])
def test_large_matrices_go_alone(monkeypatch, shape):
    def factors():
        found = polar.polar_factors([normal(*shape)], Scion.POLAR_EXPRESS, torch.float32)
        return found[0][0]

    together = factors()
    monkeypatch.setattr(polar, "_LARGE", 1)
    alone = factors()
    assert alone.shape == shape
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    wide = alone.mT if shape[-2] > shape[-1] else alone
    eye = torch.eye(wide.shape[-2]).expand(shape[0], -1, -1)
    torch.testing.assert_close(wide @ wide.mT, eye, rtol=0, atol=1e-4)


def test_the_bound_of_singular_values_holds():
    values = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for coefficients in (Scion.MUON, Scion.POLAR_EXPRESS, ((1.5, -0.5, 0.0),), ((2.0, 0.0, 0.0),)):
        s = values
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
        bound = polar.largest_singular_value(coefficients, 2.0**-53)
        assert s.abs().max() <= bound
        assert s.abs().max() >= 0.999 * bound
    assert polar.largest_singular_value(((9.0, 9.0, 9.0),) * 9, 0.0) == torch.inf
    factor, _ = polar.polar_factors([normal(3, 30, 20)], Scion.MUON, torch.float32)[0]
    largest = torch.linalg.matrix_norm(factor, 2)
    assert (largest <= polar.largest_singular_value(Scion.MUON, 2.0**-24)).all()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("coefficients", [Scion.MUON, Scion.POLAR_EXPRESS], ids=["muon", "pe"])
def test_norms_after_bfloat16_products_are_bounded(coefficients, alone, monkeypatch):
    if alone:
        monkeypatch.setattr(polar, "_LARGE", 1)
    limit = polar.largest_singular_value(coefficients, 0.0) * 1.01
    for name, made in HARD.items():
        found = polar.polar_factors([made(65, 130)[None]], coefficients, torch.bfloat16, limit)
        (factor, bound), largest = found[0], torch.linalg.matrix_norm(found[0][0].double(), 2)
        assert largest <= bound, name
        assert bound <= 1.03 * limit, name
    for scale in (1.05, 1.5, 30.0, torch.inf):  # what no polynomial explains
        spoiled = scale * factor + 0.5 * normal(1, 65, 130).bfloat16()
        largest = torch.linalg.matrix_norm(spoiled.double(), 2) if scale < 100 else 0.0
        bound = polar.bounds_of_norms(spoiled, limit)
        assert bound.isnan() or largest <= bound <= 65**0.5 * largest * 1.01
        assert bool(bound.isfinite()) == (scale < 100)
    nearly = torch.eye(65)[None].bfloat16() * limit  # at the limit up to rounding
    assert polar.bounds_of_norms(nearly, limit) >= nearly.amax().double()


def test_a_step_that_ends_outside_the_limit_stays_in_the_ball(monkeypatch):
    iterated = polar._iterated
    monkeypatch.setattr(polar, "_iterated", lambda x, coefficients: 3 * iterated(x, coefficients))
    weights = [torch.nn.Parameter(normal(*shape)) for shape in [(24, 16), (16, 24), (1, 1)]]
    optim = Scion(weights, constraint=SpectralBall(1.3), lr=1.0)
    feed(weights, 1)
    optim.step()
    assert optim.violation() == [0]
    assert all(weight.norm() > 0.3 for weight in weights)


def test_products_of_few_bits_are_refused_if_they_prove_nothing():
    weight = torch.nn.Parameter(normal(3, 2))
    optim = Scion([weight], constraint=SpectralBall(1.0), lr=0.1, polar="newton_schulz_float32")
    feed([weight], 0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        optim.step()
        assert optim.violation() == [0]
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(ValueError, match="`coefficients` must keep singular values bounded"):
            optim.step()
        assert optim.state[weight]["step"] == 1  # nothing has changed
        optim.param_groups[0]["polar"] = "newton_schulz"  # proves its bound in any precision
        optim.step()
        assert optim.violation() == [0]
    finally:
        torch.set_float32_matmul_precision(before)


# State


def test_resumes_bitwise():
    def make():
        weight = torch.nn.Parameter(normal(5, 4))
        return weight, Scion([weight], constraint=SpectralBall(1.0), lr=0.1)

    weight, optim = make()
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((weight.detach(), optim.state_dict()))
        feed([weight], step)
        optim.step()
    other, resumed = make()
    with torch.no_grad():
        other.copy_(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(3, 6):
        feed([other], step)
        resumed.step()
    assert torch.equal(other, weight)
    assert resumed.param_groups[0]["coefficients"] == Scion.MUON


def test_a_state_dict_is_plain_data(tmp_path):
    weight = torch.nn.Parameter(normal(2, 2))
    optim = Scion([weight], constraint=SpectralBall(torch.ones(1, 1, 1)), lr=0.1)
    feed([weight], 0)
    optim.step()
    torch.save(optim.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    optim.load_state_dict(loaded)
    assert optim.param_groups[0]["constraint"] == SpectralBall(torch.ones(1, 1, 1))


@pytest.mark.parametrize("unconstrained", [False, True])
def test_a_step_that_a_scaler_skips_changes_nothing(unconstrained):
    def run(skipped):
        weight = torch.nn.Parameter(normal(3, 2))
        optim = Scion([weight], constraint=SpectralBall(1.0), lr=0.1, unconstrained=unconstrained)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for bad in [True] * skipped + [False, *[True] * skipped, False]:
            optim.zero_grad()
            loss = (weight.square() * (torch.inf if bad else 1.0)).sum()
            before = weight.detach().clone(), copy.deepcopy(optim.state_dict()["state"])
            scaler.scale(loss).backward()
            scaler.step(optim)
            scaler.update()
            if bad:
                torch.testing.assert_close(
                    (weight.detach(), optim.state_dict()["state"]), before, rtol=0, atol=0
                )
        return weight, optim.state[weight]

    torch.testing.assert_close(run(2), run(0), rtol=0, atol=0)


def test_a_scheduler_and_a_scaler_take_it():
    weight = torch.nn.Parameter(normal(3, 2))
    optim = Scion([weight], constraint=SpectralBall(1.0), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.0, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        optim.zero_grad()
        scaler.scale(weight.square().sum()).backward()
        scaler.step(optim)
        scaler.update()
        scheduler.step()
    assert optim.param_groups[0]["lr"] == 0
    assert optim.violation() == [0]
    assert weight.norm() < 0.5 * normal(3, 2).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": None}, "`constraint` must be given for each group, got None"),
        ({"lr": 1.5}, r"`lr` must be in \[0, 1\] if constrained, got 1.5"),
        ({"lr": -1.0, "unconstrained": True}, "`lr` must be >= 0, got -1.0"),
        ({"momentum": 1.0}, "`momentum` must be < 1"),
        ({"weight_decay": 0.1}, "`weight_decay` must be 0 if constrained"),
        ({"polar": "qr"}, "`polar` must be one of"),
        ({"coefficients": ((1.0, 2.0),)}, "`coefficients` must hold three numbers"),
        ({"coefficients": ()}, "`coefficients` must hold three numbers"),
        ({"coefficients": 3}, "`coefficients` must hold three numbers"),
        ({"coefficients": ((9.0, 9.0, 9.0),) * 9}, "`coefficients` must keep singular values"),
        ({"constraint": SpectralBall(1.0), "param_ndim": 1}, "SpectralBall takes a batch"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Scion([parameter(3, 2)], **{"constraint": SpectralBall(1.0), "lr": 0.1, **settings})


# Momentum of Frank-Wolfe


def test_frank_wolfe_averages_gradients():
    weight = parameter(2, 3, dtype=torch.float64)
    settings = {"constraint": Simplex(), "use_default_lr_schedule": False, "lr": 0.25}
    optim = FrankWolfe([weight], momentum=0.6, **settings)
    optim.make_feasible_()
    x, average = weight.detach().clone(), torch.zeros(2, 3, dtype=torch.float64)
    for step in range(10):
        feed([weight], step)
        average = 0.6 * average + 0.4 * weight.grad
        x = 0.75 * x + 0.25 * Simplex().lmo(average)
        gap = (weight.grad * (weight - Simplex().lmo(weight.grad))).sum()
        torch.testing.assert_close(optim.gap()[0], gap.detach())  # of the gradient itself
        optim.step()
        torch.testing.assert_close(weight.detach(), x)


def test_momentum_averages_noise_out():
    target = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = []
    for momentum in (0.0, 0.9):
        x = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
        optim = FrankWolfe([x], constraint=Simplex(), param_ndim=None, momentum=momentum)
        for step in range(300):
            x.grad = x.detach() - target + normal(3, seed=step, dtype=torch.float64)
            optim.step()
        found.append((x.detach() - target).square().sum())
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`momentum` must be 0 with constraint=None, got 0.5"),
        ({"constraint": Simplex(), "smoothness": 1.0}, "`momentum` must be 0 with smoothness=1.0"),
        ({"constraint": Simplex(), "line_search": True}, "`momentum` must be 0 with line_search"),
    ],
)
def test_momentum_is_for_steps_that_do_not_read_the_gradient(settings, message):
    with pytest.raises(ValueError, match=message):
        FrankWolfe([parameter(2, 3)], momentum=0.5, **settings)
