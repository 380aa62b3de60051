"""Any set around any inner optimizer: feasible, by the right point, and told by its own numbers."""

import copy
from functools import partial

import pytest
import torch
from bitwise import same_bits
from constraints.cases import CASES, trials
from files import through_a_file
from tiers import slow_but
from torch.optim import LBFGS, SGD, Adam, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.constraints import (
    PSD,
    Affine,
    BoundedBall,
    Box,
    L1Ball,
    L2Ball,
    LinfBall,
    MaxNorm,
    NonNegative,
    Simplex,
    SpectralBall,
    UnitNorm,
)
from rai_toolbox.optim import (
    ChainedParamTransformingOptimizer,
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    ProjectedOptimizer,
)
from rai_toolbox.optim.gradient_mapping import GradientMapping, step_size

INNERS = {
    "SGD": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adam": partial(Adam, lr=0.1),
    "RMSprop": partial(RMSprop, lr=0.1),
}
each_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(optimizer, steps, start=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + steps):
        for i, param in enumerate(params):
            param.grad = normal(*param.shape, seed=100 * step + i, dtype=param.dtype)
        optimizer.step()
    return params


def descend(optimizer, param, target, steps=1):
    """Steps towards the target, by the gradient of ``|x - target|^2 / 2``."""
    for _ in range(steps):
        param.grad = (param - target).detach()
        optimizer.step()


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_set_holds_after_each_step(case, dtype):
    trial = trials(case, dtype)[-1]
    param = trial.normal(1, 2.0).requires_grad_()
    optimizer = ProjectedOptimizer([param], Adam, constraint=trial.constraint, lr=0.01)
    for seed in range(3):
        param.grad = trial.normal(10 + seed, 1.0)
        optimizer.step()
        assert (trial.constraint.violation(param) == 0).all()
        assert [float(v) for v in optimizer.violation()] == [0.0]


@pytest.mark.parametrize(
    "constraint", [L1Ball(0.9), Simplex(), UnitNorm(), Box(-0.3, 0.2)], ids=str
)
def test_around_sgd_it_is_projected_gradient_descent(constraint):
    param = normal(5, 4).requires_grad_()
    expected = param.detach().clone()
    optimizer = ProjectedOptimizer([param], constraint=constraint, lr=0.1)
    for step in range(5):
        grad = normal(5, 4, seed=step)
        param.grad = grad.clone()
        optimizer.step()
        assert same_bits(param.grad, grad)
        expected = constraint.project(expected.add(grad, alpha=-0.1))
        assert same_bits(param.detach(), expected)


@each_inner
@pytest.mark.parametrize(
    "constraint", [L2Ball(1e3), L1Ball(1e4), BoundedBall(L2Ball(1e3), -50.0, 50.0)], ids=str
)
def test_where_the_constraint_is_not_active_it_is_the_inner_optimizer(inner, constraint):
    ours, theirs = normal(5, 4).requires_grad_(), normal(5, 4).requires_grad_()
    run(ProjectedOptimizer([ours], inner, constraint=constraint), 5)
    run(inner([theirs]), 5)
    assert same_bits(ours.detach(), theirs.detach())


@each_inner
def test_a_box_is_what_the_clamping_optimizer_does(inner):
    shapes = [(3, 2), (), (4,), (0, 3), (2, 3, 2)]
    ours = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    theirs = copy.deepcopy(ours)
    run(ProjectedOptimizer(ours, inner, constraint=Box(-0.3, 0.4)), 4)
    run(ClampedParameterOptimizer(theirs, inner, clamp_min=-0.3, clamp_max=0.4), 4)
    assert all(map(same_bits, [p.detach() for p in ours], [p.detach() for p in theirs]))


@pytest.mark.parametrize(
    ("inner", "constraint", "wanted", "mapped"),
    [
        (SGD, L1Ball(0.5), None, False),  # its fixed points are right without
        (SGD, L1Ball(0.5), True, True),
        (Adam, L1Ball(0.5), None, True),
        (Adam, L1Ball(0.5), False, False),
        (Adam, Box(-0.1, 0.1), None, False),
        (Adam, LinfBall(0.1), True, True),
        (Adam, None, True, False),
        (LBFGS, Box(-0.1, 0.1), None, True),
        (LBFGS, Box(-0.1, 0.1), False, False),
        (LBFGS, Simplex(), None, True),
    ],
)
@pytest.mark.parametrize("chained", [False, True])
def test_where_the_gradient_mapping_is_used(inner, constraint, wanted, mapped, chained):
    param = normal(1, 6).requires_grad_()
    make = partial(ProjectedOptimizer, constraint=constraint, gradient_mapping=wanted)
    if chained:
        optimizer = ChainedParamTransformingOptimizer(make, params=[param], InnerOpt=inner, lr=0.1)
    else:
        optimizer = make([param], inner, lr=0.1)
    grad = normal(1, 6, seed=1)

    def closure():
        param.grad = grad.clone()
        return 0.0

    optimizer.step(closure)
    assert torch.equal(param.grad, grad) is not mapped


def test_sparse_gradients_where_nothing_is_mapped():
    param = normal(4, 3).requires_grad_()
    grad = torch.sparse_coo_tensor([[1, 3]], normal(2, 3, seed=1), (4, 3), check_invariants=True)
    param.grad = grad.clone()
    ProjectedOptimizer([param], constraint=L2Ball(0.5), lr=0.1).step()
    assert L2Ball(0.5).violation(param).amax() == 0
    param.grad = grad.clone()
    with pytest.raises(ValueError, match="needs dense gradients"):
        ProjectedOptimizer([param], RMSprop, constraint=L2Ball(0.5), lr=0.1).step()


@pytest.mark.parametrize("param_ndim", [1, 2, -1, None])
def test_any_strides(param_ndim):
    """Where no view shows the sub-tensors, too."""
    start, grad = normal(4, 3, 2, 5), normal(4, 3, 2, 5, seed=1)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = start.clone(memory_format=layout).requires_grad_()
        param.grad = grad.clone(memory_format=layout)
        ProjectedOptimizer(
            [param], Adam, constraint=L1Ball(0.7), param_ndim=param_ndim, lr=0.1
        ).step()
        results += [param.detach(), param.grad]
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[1], results[3], rtol=1e-13, atol=1e-13)


def test_a_gradient_that_is_not_finite_shows():
    param = normal(3, 4).requires_grad_()
    param.grad = normal(3, 4, seed=1)
    param.grad[1, 2] = torch.nan
    ProjectedOptimizer([param], Adam, constraint=L2Ball(1.0), lr=0.1).step()
    assert param[1].isnan().all()
    assert param[[0, 2]].isfinite().all()


# --- groups, and when to project ------------------------------------------------------------------


def test_each_group_has_its_own_set():
    free, one, rows = (normal(3, 4, seed=50 + i).requires_grad_() for i in range(3))
    radii = torch.tensor([[0.1], [0.2], [0.3]])
    optimizer = ProjectedOptimizer(
        [
            {"params": [free], "constraint": None},
            {"params": [one], "param_ndim": None},
            {"params": [rows], "constraint": L2Ball(radii)},
        ],
        constraint=Simplex(),
        lr=1.0,
    )
    expected = free.detach() - normal(3, 4, seed=0)
    run(optimizer, 1)
    assert torch.equal(free.detach(), expected)
    assert one.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(rows.norm(dim=1, keepdim=True), radii.double())


def test_every_third_step_after_a_warmup():
    param = normal(2, 3).requires_grad_()
    optimizer = ProjectedOptimizer([param], constraint=MaxNorm(0.1), lr=0.5, every=3, warmup=4)
    projected = []
    for step in range(12):
        run(optimizer, 1, start=step)
        projected.append(float(optimizer.violation()[0]) == 0)
    assert [step + 1 for step, done in enumerate(projected) if done] == [7, 10]


def test_the_inner_optimizer_is_alone_in_the_warmup():
    ours, theirs = normal(2, 3).requires_grad_(), normal(2, 3).requires_grad_()
    run(ProjectedOptimizer([ours], Adam, constraint=L2Ball(0.1), lr=0.5, warmup=3), 3)
    run(Adam([theirs], lr=0.5), 3)
    assert same_bits(ours.detach(), theirs.detach())


class Halving(torch.optim.Optimizer):
    """An inner optimizer that has no learning rate."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param -= param.grad / 2


def test_an_inner_optimizer_without_a_learning_rate():
    param = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    param.grad = normal(2, 3)
    ProjectedOptimizer([param], Halving, constraint=L2Ball(0.5)).step()
    assert L2Ball(0.5).violation(param).amax() == 0
    assert (param != 0).all()


def test_parameters_without_gradient_are_projected_too():
    param = normal(2, 3).requires_grad_()
    ProjectedOptimizer([param], Adam, constraint=NonNegative()).step()
    assert (param >= 0).all()


def test_make_feasible():
    param, free = normal(2, 3).requires_grad_(), normal(2, 3).requires_grad_()
    groups = [{"params": [param]}, {"params": [free], "constraint": None}]
    optimizer = ProjectedOptimizer(groups, constraint=UnitNorm(), every=7, warmup=7)
    optimizer.make_feasible_()
    torch.testing.assert_close(param.norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert torch.equal(free.detach(), normal(2, 3))
    assert param.requires_grad and param.grad is None


def test_a_chain_transforms_then_maps_and_projects_in_order():
    param = normal(1, 4).requires_grad_()
    chain = ChainedParamTransformingOptimizer(
        partial(ClampedGradientOptimizer, clamp_min=-0.1, clamp_max=0.1),
        partial(ProjectedOptimizer, constraint=L2Ball(0.5)),
        partial(ProjectedOptimizer, constraint=NonNegative()),
        params=[param],
        lr=1.0,
    )
    grad = normal(1, 4, seed=1)
    expected = L2Ball(0.5).project(param.detach() - grad.clamp(-0.1, 0.1)).clamp(min=0)
    param.grad = grad.clone()
    chain.step()
    assert torch.equal(param.detach(), expected)
    (group,) = chain.state_dict()["param_groups"]
    assert group["1.constraint"] == L2Ball(0.5).to_plain()
    chain.load_state_dict(chain.state_dict())
    assert chain.param_groups[0]["2.constraint"] == NonNegative()


# --- state ----------------------------------------------------------------------------------------


@each_inner
@pytest.mark.parametrize(
    "constraint",
    [L1Ball(0.8, center=normal(3)), BoundedBall(L2Ball(0.5), -0.1, normal(4, 3).abs()), Simplex()],
    ids=lambda c: type(c).__name__,
)
def test_a_resumed_run_is_the_uninterrupted_one(inner, constraint):
    make = partial(ProjectedOptimizer, InnerOpt=inner, constraint=constraint, every=3, warmup=1)
    whole = normal(4, 3).requires_grad_()
    run(make([whole]), 9)
    first = normal(4, 3).requires_grad_()
    optimizer = make([first])
    run(optimizer, 4)
    again = first.detach().clone().requires_grad_()
    resumed = ProjectedOptimizer([again], inner, constraint=None)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["constraint"] == constraint
    run(resumed, 5, start=4)
    assert same_bits(again.detach(), whole.detach())


def test_copies_have_their_own_groups_with_the_same_sets():
    optimizer = ProjectedOptimizer([normal(3, 2).requires_grad_()], Adam, constraint=L2Ball(0.5))
    run(optimizer, 2)
    other = copy.deepcopy(optimizer)
    (ours,), (theirs,) = run(optimizer, 2, start=2), run(other, 2, start=2)
    assert ours is not theirs
    assert same_bits(ours.detach(), theirs.detach())
    assert other.param_groups[0]["constraint"] == L2Ball(0.5)


def test_a_set_is_loaded_to_the_device_of_its_parameters():
    param = torch.empty(3, 2, device="meta", requires_grad=True)
    optimizer = ProjectedOptimizer([param], constraint=Simplex())
    other = ProjectedOptimizer([normal(3, 2)], constraint=L2Ball(torch.ones(3, 1)))
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["constraint"].epsilon.device.type == "meta"


def test_a_bad_set_in_a_checkpoint_changes_nothing():
    optimizer = ProjectedOptimizer([normal(3, 2).requires_grad_()], constraint=L2Ball(0.5))
    state = optimizer.state_dict()
    for plain, words in [
        ({"set": "L2Ball", "epsilon": -1.0, "center": None}, "`epsilon` must be >= 0"),
        ({"set": "NoSuchSet"}, "`set` must be one of"),
        (SpectralBall(1.0).to_plain(), r"takes a batch of shape .* \(parameter 0"),
    ]:
        state["param_groups"][0]["constraint"] = plain
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["constraint"] == L2Ball(0.5)


# --- the gradient mapping -------------------------------------------------------------------------


def mapped_gradient(grad, x, constraint, **settings):
    group = {"constraint": constraint, "reach": 0.1, **settings}
    return GradientMapping(inner=Adam).map_(grad, x, None, group)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_mapping_is_zero_at_the_solution_and_only_there(scale):
    """Of the unit L2 ball: where the gradient is normal to it, and points inwards."""
    x = normal(6, 5)
    x /= x.norm(dim=1, keepdim=True)
    x = L2Ball(1.0).project(x)
    grad = -3.0 * x * scale
    grad[1] *= -1  # into the ball: not stationary
    grad[2] += scale * normal(5, seed=1)
    mapped = mapped_gradient(grad.clone(), x, L2Ball(1.0), lr=1.0)
    length = mapped.norm(dim=1) / scale
    assert (length[[0, 3, 4, 5]] <= 1e-13).all()
    assert (length[[1, 2]] > 0.1).all()
    assert torch.equal(mapped[1], grad[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mapping_of_narrow_dtypes_is_computed_in_float32(dtype):
    x = L2Ball(1.0).project(normal(6, 50, dtype=dtype))
    grad = (-2 * x.double() + 0.05 * normal(6, 50, seed=1)).to(dtype)
    mapped = mapped_gradient(grad.clone(), x, L2Ball(1.0), lr=1.0)
    exact = mapped_gradient(grad.double(), x.double(), L2Ball(1.0), lr=1.0)
    assert (mapped.double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_the_step_of_a_set_along_columns_is_one_number_for_each_of_them():
    x, grad = normal(6, 3), normal(6, 3, seed=1) * torch.tensor([1e-6, 1.0, 1e6])
    e = step_size(x, grad, UnitNorm(dim=0), reach=0.1, lr=1.0)
    torch.testing.assert_close(
        e, 0.1 * x.norm(dim=0, keepdim=True) / grad.norm(dim=0, keepdim=True)
    )
    x = UnitNorm(dim=0).project(x)
    grad = x * torch.tensor([-1.0, 5.0, -1e3])  # along the columns: normal to the set
    mapped = mapped_gradient(grad.clone(), x, UnitNorm(dim=0), lr=1.0)
    assert (mapped.abs() <= 1e-12 * grad.abs().amax(0)).all()


@pytest.mark.parametrize("size", [0.0, 1e-40, 0.5])
@pytest.mark.parametrize("slope", [0.0, 1e-40, 3e38])
def test_the_mapping_is_finite_within_the_set(size, slope):
    x, grad = torch.full((1, 3), size), torch.full((1, 3), slope)
    for constraint in (L2Ball(1.0), Simplex()):
        assert mapped_gradient(grad.clone(), x, constraint, lr=0.1).isfinite().all()


@pytest.mark.parametrize(
    "inner", slow_but([partial(Adam, lr=0.5), partial(AdamW, lr=0.5, weight_decay=0)])
)
@pytest.mark.parametrize(
    "constraint",
    slow_but(
        [L2Ball(1.0), L1Ball(1.0), Simplex(), Affine(normal(2, 6, seed=5), normal(2, seed=6))]
    ),
    ids=lambda c: type(c).__name__,
)
def test_adam_ends_at_the_nearest_point(inner, constraint):
    """Which is the projection; plain projection under Adam ends elsewhere."""
    weights = torch.logspace(-1, 1, 6, dtype=torch.float64)
    target = 2 * normal(3, 6)
    found = []
    for mapping in (None, False):
        param = constraint.project(normal(3, 6, seed=1)).requires_grad_()
        make = partial(ProjectedOptimizer, constraint=constraint, gradient_mapping=mapping)
        optimizer = make([param], inner)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-6 ** (1 / 1500))
        for _ in range(1500):
            param.grad = weights * (param.detach() - target)
            optimizer.step()
            decay.step()
        param.grad = weights * (param.detach() - target)
        found.append(float(optimizer.kkt_residual()[0]))
    assert found[0] <= 1e-6
    assert found[1] > 1e-2


# --- what it tells --------------------------------------------------------------------------------


def test_what_it_tells_of_each_group():
    first, second, free = (normal(4, 3, seed=i).requires_grad_() for i in range(3))
    groups = [
        {"params": [first, second], "constraint": L2Ball(0.5)},
        {"params": [free], "constraint": None},
    ]
    optimizer = ProjectedOptimizer(groups, constraint=None)
    grads = [normal(4, 3, seed=10 + i) for i in range(3)]
    for param, grad in zip((first, second, free), grads, strict=True):
        param.grad = grad.clone()
    ball = L2Ball(0.5)
    x = torch.cat([first, second]).detach()
    g = torch.cat(grads[:2])
    residual = (x - ball.project(x - g)).norm()
    gap = (g * (x - ball.lmo(g))).sum()
    of_free = grads[2].norm()
    for found, expected, expected_free in [
        (optimizer.violation(), ball.violation(x).max(), 0 * of_free),
        (optimizer.kkt_residual(), residual, of_free),
        (optimizer.frank_wolfe_gap(), gap, torch.inf + of_free),
        (optimizer.active_fraction(), optimizer.active_fraction()[0], 0 * of_free),
    ]:
        torch.testing.assert_close(found, [expected, expected_free])


def test_the_share_of_active_constraints():
    optimizer = ProjectedOptimizer(
        [torch.tensor([[0.0, 1.0, 0.0, 0.5]], requires_grad=True)], constraint=Box(0.0, 1.0)
    )
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.tensor([[1.0, 1.0, -1.0, 1.0]])  # only the first is pushed outwards
    assert optimizer.active_fraction() == [0.25]
    rows = L2Ball(1.0).project(torch.tensor([[3.0, 4.0], [0.1, 0.0], [0.0, 2.0]])).requires_grad_()
    balls = ProjectedOptimizer([rows], constraint=L2Ball(1.0))
    rows.grad = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(balls.active_fraction()[0], torch.tensor(1 / 3, dtype=torch.float64))


def test_maximize_turns_the_residual_and_the_mapping():
    target = 2 * normal(2, 4)
    params, residuals = [], []
    for sign, maximize in ((1, False), (-1, True)):
        param = Simplex().project(normal(2, 4, seed=1)).requires_grad_()
        optimizer = ProjectedOptimizer(
            [param], Adam, constraint=Simplex(), lr=0.1, maximize=maximize
        )
        for _ in range(20):
            param.grad = sign * (param.detach() - target)
            residuals.append(float(optimizer.kkt_residual()[0]))
            optimizer.step()
        params.append(param.detach())
    assert residuals[:20] == residuals[20:]
    assert same_bits(*params)


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_no_number_waits_for_a_device(as_on_a_device):
    param = normal(4, 3).requires_grad_()
    optimizer = ProjectedOptimizer([param], Adam, constraint=L1Ball(0.5))
    run(optimizer, 1)
    param.grad = normal(4, 3, seed=1)
    with NothingIsRead():
        optimizer.violation()
        optimizer.kkt_residual()
        optimizer.active_fraction()
        optimizer.frank_wolfe_gap()
        optimizer.make_feasible_()


def test_groups_of_nothing():
    """No parameters with a gradient, or none with an element."""
    optimizer = ProjectedOptimizer(
        [{"params": [torch.ones(2, 2, requires_grad=True)]}, {"params": [torch.ones(0, 3)]}],
        constraint=L2Ball(3.0),
    )
    optimizer.step()
    assert optimizer.violation() == [0.0, 0.0]
    for word in ("kkt_residual", "active_fraction", "frank_wolfe_gap"):
        assert all(value.isnan() for value in getattr(optimizer, word)())
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    for word in ("kkt_residual", "active_fraction"):
        assert getattr(optimizer, word)() == [0.0, 0.0]


# --- bad input: see test_bad_input for the settings -----------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "shape", "words"),
    [
        (Simplex(), (4,), "`param_ndim` must be None or 1 for a vector"),
        (SpectralBall(1.0), (4, 3), "takes a batch of shape"),
        (PSD(), (2, 4, 3), "square"),
        (L2Ball(torch.ones(5, 1)), (4, 3), "`epsilon` must broadcast"),
        (Affine(torch.ones(1, 5), torch.ones(1)), (4, 3), "got"),
        (BoundedBall(L2Ball(1.0), torch.zeros(7), 1.0), (4, 3), "`lower` must broadcast"),
    ],
    ids=str,
)
def test_a_set_that_does_not_fit_is_refused_by_the_name_of_the_parameter(constraint, shape, words):
    bad = normal(*shape).requires_grad_()
    good = normal(4, 3).requires_grad_()
    with pytest.raises(ValueError, match=rf"{words}.*weight"):
        ProjectedOptimizer([("weight", bad)], constraint=constraint)
    optimizer = ProjectedOptimizer([("ok", good)], constraint=L2Ball(1.0))
    with pytest.raises(ValueError, match=rf"{words}.*weight"):
        optimizer.add_param_group({"params": [("weight", bad)], "constraint": constraint})
    assert len(optimizer.param_groups) == 1
