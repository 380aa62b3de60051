"""Frank-Wolfe on any set with an oracle: where it gets to, by each of its steps."""

import copy
import math
import pickle

import pytest
import torch
from bitwise import same_bits, snapshot
from engine_cases import new_gradients, tensors
from files import through_a_file
from tiers import slow_but
from torch_versions import takes_grad_dtype

from rai_toolbox import to_batch
from rai_toolbox.constraints import (
    PSD,
    BoundedBall,
    Box,
    BoxSection,
    Intersection,
    L1Ball,
    L2Ball,
    LinfBall,
    Masked,
    Monotone,
    NonNegative,
    NuclearBall,
    Simplex,
    SpectralBall,
    Stiefel,
    UnitNorm,
)
from rai_toolbox.optim import ClampedParameterOptimizer, FrankWolfe, L1FrankWolfe

# Each with the largest distance of two of its points, and how a tensor is seen.
ROWS, MATRICES = ((3, 6), 1), ((2, 3, 4), 2)
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.5, 1.0], dtype=torch.float64)
SETS = {
    "L2Ball": (L2Ball(1.5), 3.0, ROWS),
    "L1Ball": (L1Ball(1.5), 3.0, ROWS),
    "LinfBall": (LinfBall(0.7), 1.4 * math.sqrt(6), ROWS),
    "Simplex": (Simplex(1.2), 1.2 * math.sqrt(2), ROWS),
    "BoxSection": (BoxSection(WEIGHT, 2.0, lower=0.0, upper=0.8), 0.8 * math.sqrt(6), ROWS),
    "SpectralBall": (SpectralBall(0.8), 1.6 * math.sqrt(3), MATRICES),
    "NuclearBall": (NuclearBall(1.5), 3.0, MATRICES),
    "BoundedBall": (BoundedBall(L1Ball(1.5), lower=-0.3, upper=0.6), 3.0, ROWS),
}
each_set = pytest.mark.parametrize("name", SETS)
L = 4.0  # the largest curvature of the problems; the smallest is 1
STEPS = {
    "schedule": {},
    "constant": {"lr": 0.02, "use_default_lr_schedule": False},
    "short": {"smoothness": L},
    "search": {"line_search": True},
}
each_rule = pytest.mark.parametrize("rule", STEPS)


class Quadratic:
    """f(x) = (x - t)' Q (x - t) / 2, with the curvature from 1 to L, over a set."""

    def __init__(self, name, seed=0, dtype=torch.float64):
        self.constraint, self.diameter, (self.shape, self.param_ndim) = SETS[name]
        generator = torch.Generator().manual_seed(seed)
        n = math.prod(self.shape)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.Q = (basis * torch.linspace(1, L, n, dtype=torch.float64)) @ basis.T
        self.t = torch.randn(n, generator=generator, dtype=torch.float64)
        start = torch.empty(self.shape, dtype=dtype)
        self.constraint.sample_(to_batch(start, self.param_ndim), generator)
        self.start = start

    def __call__(self, x):
        away = x.double().flatten() - self.t
        return away @ self.Q @ away / 2

    def project(self, x):
        return self.constraint.project(to_batch(x, self.param_ndim)).view(self.shape)

    def violation(self, x):
        return self.constraint.violation(to_batch(x.detach(), self.param_ndim)).max().item()

    def solved(self):
        """By projected gradient descent, which converges linearly."""
        x = self.start.double()
        for _ in range(400):
            gradient = (self.Q @ (x.flatten() - self.t)).view(self.shape)
            residual, x = x, self.project(x - gradient / L)
        assert (residual - x).abs().max() <= 1e-12
        return x

    def parameter(self, start=None):
        return (self.start if start is None else start).clone().requires_grad_()

    def optimizer(self, x, **settings):
        return FrankWolfe([x], constraint=self.constraint, param_ndim=self.param_ndim, **settings)

    def closure(self, x):
        def evaluate():
            x.grad = None
            loss = self(x)
            loss.backward()
            return loss

        return evaluate

    def run(self, opt, x, steps):
        """Losses and gaps, before each step."""
        seen = []
        closure = self.closure(x)
        for _ in range(steps):
            loss = closure().item()
            seen.append((loss, sum(gap.item() for gap in opt.gap())))
            opt.step(closure)
        return seen


# --- where it gets to -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", slow_but(["schedule", "short", "search"], "short"))
@each_set
def test_gap_and_loss_fall_as_proven(name, rule):
    """The best of K gaps is <= 27/4 C / (K + 2), and f - f* <= 2 C / (K + 2) (Jaggi, 2013)."""
    problem = Quadratic(name)
    lowest = problem(problem.solved()).item()
    x = problem.parameter()
    steps = 150
    seen = problem.run(problem.optimizer(x, **STEPS[rule]), x, steps)
    units = math.prod(problem.shape[: -problem.param_ndim])
    curvature = L * problem.diameter**2 * units * (2 if rule == "search" else 1)  # L is doubled
    for k, (loss, gap) in enumerate(seen):
        assert lowest - 1e-12 <= loss
        assert loss - lowest <= gap + 1e-12
        assert k == 0 or loss - lowest <= 2 * curvature / (k + 2)
    assert min(gap for _, gap in seen) <= 27 / 4 * curvature / (steps + 2)
    assert min(gap for _, gap in seen) <= 0.01 * seen[0][1]  # as measured, with a margin of 1.5
    assert problem(x).item() - lowest <= 0.01 * (seen[0][0] - lowest)


@pytest.mark.parametrize("rule", ["short", "search"])
@pytest.mark.parametrize("name", ["L2Ball", "LinfBall"])
def test_to_the_last_digit_where_the_rate_is_linear(name, rule):
    """At a corner, and on a strongly convex set around which the gradient is not 0."""
    problem = Quadratic(name)
    problem.t = problem.t.sign() * (2 + problem.t.abs())
    problem.Q = torch.eye(len(problem.t), dtype=torch.float64) * L
    x = problem.parameter()
    opt = problem.optimizer(x, **STEPS[rule])
    seen = problem.run(opt, x, 100)
    assert seen[-1][1] <= 1e-10
    torch.testing.assert_close(x.detach(), problem.solved(), atol=1e-6, rtol=0)


@each_rule
@each_set
def test_iterates_stay_in_the_set(name, rule):
    """But for the rounding of the sums, from a start inside, which float32 shows."""
    problem = Quadratic(name, dtype=torch.float32)
    x = problem.parameter()
    opt = problem.optimizer(x, **STEPS[rule])
    for _ in range(60):
        opt.step(problem.closure(x))
        assert problem.violation(x) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constraint", [LinfBall(0.7), Box(-0.3, 1.1), LinfBall(0.3, center=0.2)])
def test_boxes_hold_bit_for_bit(constraint, dtype):
    x = constraint.project(torch.randn(5, 40)).to(dtype)
    x = constraint.project_(x).requires_grad_()
    opt = FrankWolfe([x], constraint=constraint, initial_step=1)
    for step in range(60):
        new_gradients([x], step)
        opt.step()
        assert constraint.violation(x.detach()).max() == 0


@each_set
def test_the_first_step_of_the_schedule_goes_to_the_oracle(name):
    problem = Quadratic(name)
    x = problem.parameter(100 * problem.start)  # far outside
    opt = problem.optimizer(x)
    problem.closure(x)()
    seen = to_batch(x.grad, problem.param_ndim)
    expected = problem.constraint.lmo(seen).view(x.shape)
    opt.step()
    assert torch.equal(x.detach(), expected)


def test_the_named_optimizer_is_the_same_method():
    (x,), (y,) = tensors((4, 5), dtype=torch.float64), tensors((4, 5), dtype=torch.float64)
    named = L1FrankWolfe([x], epsilon=1.3)
    general = FrankWolfe([y], constraint=L1Ball(1.3))
    for step in range(8):
        new_gradients([x], step)
        new_gradients([y], step)
        named.step()
        general.step()
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("initial_step", [0, 1, 7])
def test_the_schedule_is_the_formula(initial_step, as_tensor):
    constraint = L2Ball(1.0)
    (x,) = tensors((3, 4), dtype=torch.float64)
    x.data = constraint.project(x.data)
    expected = x.detach().clone()
    lr = torch.tensor(1.5, dtype=torch.float64) if as_tensor else 1.5
    opt = FrankWolfe([x], constraint=constraint, lr=lr, initial_step=initial_step)
    for k in range(5):
        new_gradients([x], k)
        a = 1.5 / (1.5 + initial_step + k)
        expected = (1 - a) * expected + a * constraint.lmo(x.grad)
        opt.step()
        torch.testing.assert_close(x.detach(), expected, rtol=1e-14, atol=1e-14)


def test_initial_step_is_for_the_negative_of_an_oracle_too():
    x = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    opt = FrankWolfe([x], initial_step=6)
    x.grad = torch.ones(1, dtype=torch.float64)
    opt.step()
    assert x.item() == 0.75 * 4 - 0.25


def test_short_steps_are_those_of_each_sub_tensor():
    """The minimizer, along each one's way, of the bound that smoothness gives."""
    constraint, smoothness = L1Ball(1.0), 3.0
    x = constraint.sample_(torch.empty(5, 4, dtype=torch.float64))
    x[3] = 0
    param = x.clone().requires_grad_()
    opt = FrankWolfe([param], constraint=constraint, smoothness=smoothness)
    param.grad = torch.randn(5, 4, dtype=torch.float64)
    param.grad[2:4] *= 1e6  # so far that they go all the way
    opt.step()
    ends = constraint.lmo(param.grad)
    for row in range(5):
        way, g = ends[row] - x[row], param.grad[row]
        a = min(1.0, (-(g @ way) / (smoothness * way @ way)).item())
        torch.testing.assert_close(param[row].detach(), x[row] + a * way, rtol=1e-12, atol=1e-14)
    assert torch.equal(param[2:4].detach(), ends[2:4])


def test_short_steps_in_a_box_are_those_of_projected_gradient_descent():
    """For each element the way to the oracle's answer is the way along its gradient."""
    problem = Quadratic("LinfBall")
    x = problem.parameter()
    opt = problem.optimizer(x, smoothness=L)
    expected = problem.start
    for _ in range(20):
        opt.step(problem.closure(x))
        gradient = (problem.Q @ (expected.flatten() - problem.t)).view(problem.shape)
        expected = problem.project(expected - gradient / L)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=1e-12)


def test_short_steps_lower_losses_that_are_not_separable():
    """Of the step of each sub-tensor: that they go together does not break the bound."""
    problem = Quadratic("L1Ball", seed=3)
    n = len(problem.t)
    problem.Q = torch.eye(n, dtype=torch.float64) * 0.01 + torch.full((n, n), (L - 0.01) / n)
    x = problem.parameter()
    seen = problem.run(problem.optimizer(x, smoothness=L), x, 60)
    units = math.prod(problem.shape[: -problem.param_ndim])
    for (loss, gap), (after, _) in zip(seen, seen[1:], strict=False):
        common = gap / (L * problem.diameter**2 * units)  # not longer than the best common step
        assert after <= loss - min(common, 1.0) * gap / 2 + 1e-12


@each_set
def test_a_search_never_raises_the_loss(name):
    problem = Quadratic(name, seed=1)
    x = problem.parameter()
    seen = problem.run(problem.optimizer(x, **STEPS["search"]), x, 80)
    for (loss, _), (after, _) in zip(seen, seen[1:], strict=False):
        assert after <= loss * (1 + 1e-14)
    assert seen[-1][0] < seen[0][0]


def test_a_search_lowers_a_loss_of_which_no_smoothness_is_known():
    """A logarithm, which is infinite or NaN where too long a step may lead."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(20, 5, generator=generator, dtype=torch.float64) - 0.1
    x = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
    opt = FrankWolfe([x], constraint=Simplex(), param_ndim=None, line_search=True)

    def closure():
        opt.zero_grad()
        loss = -(data @ x).log().sum()
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(300)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False))
    assert opt.gap()[0] <= 0.1


def test_a_search_finds_the_smoothness_and_keeps_it_in_all_groups():
    """To within the factor of its trials; and it then needs about one trial per step."""
    problem = Quadratic("L2Ball")
    problem.Q = torch.eye(len(problem.t), dtype=torch.float64) * L
    problem.t *= 0.1  # inside, so that no step goes all the way
    x = problem.parameter()
    opt = problem.optimizer(x, line_search=True, smoothness=1e-3 * L)
    calls = []

    def closure():
        calls.append(None)
        return problem.closure(x)()

    for _ in range(40):
        opt.step(closure)
    assert 0.9 * L <= opt.param_groups[0]["smoothness"] <= 2 * L
    assert len(calls) <= 40 * 2 + 20


@pytest.mark.parametrize("smoothness", [1e-30, 1e8])
def test_a_search_does_not_depend_on_a_good_first_guess(smoothness):
    problem = Quadratic("L2Ball")
    x = problem.parameter()
    seen = problem.run(problem.optimizer(x, line_search=True, smoothness=smoothness), x, 250)
    assert seen[-1][1] <= 1e-6 * seen[0][1]


def test_a_search_is_over_all_groups():
    problem = Quadratic("Simplex")
    rows = [row.clone().requires_grad_() for row in problem.start]
    opt = FrankWolfe(
        [{"params": rows[:1]}, {"params": rows[1:], "smoothness": 2.0}],
        constraint=problem.constraint,
        param_ndim=None,
        line_search=True,
    )

    def closure():
        opt.zero_grad()
        loss = problem(torch.stack(rows))
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(150)]
    assert all(b <= a * (1 + 1e-14) for a, b in zip(losses, losses[1:], strict=False))
    lowest = problem(problem.solved()).item()
    closure()
    assert lowest <= losses[-1] <= lowest + sum(gap.item() for gap in opt.gap()) + 1e-12
    assert losses[-1] <= lowest + 0.01 * (losses[0] - lowest)


def test_a_search_that_finds_nothing_lower_leaves_parameters_and_gradients():
    """As with a gradient that is wrong."""
    x = torch.tensor([[0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    opt = FrankWolfe([x], constraint=Simplex(), line_search=True)

    def closure():
        x.grad = torch.stack([x[0, 0], -3 * x[0, 0]]).detach()[None]
        return 7.0 + (x[0, 1] - 0.5).abs().sqrt().item()

    assert opt.step(closure) == 7.0
    assert x.tolist() == [[0.5, 0.5]]
    assert x.grad.tolist() == [[0.5, -1.5]]
    assert opt.state[x]["step"] == 0
    assert opt.param_groups[0]["smoothness"] is None


@pytest.mark.parametrize("loss", ["tensor", "number"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_search_goes_on_where_rounding_hides_the_change_of_the_loss(dtype, loss):
    """The gap gets to where the square root of the precision of the loss would not let it."""
    generator = torch.Generator().manual_seed(5)
    t = torch.randn(1, 20, generator=generator, dtype=dtype) * 0.1
    x = torch.zeros(1, 20, dtype=dtype, requires_grad=True)
    opt = FrankWolfe([x], constraint=L2Ball(1.0), line_search=True)

    def closure():
        opt.zero_grad()
        value = 1000 + (x - t).square().sum()
        value.backward()
        return value if loss == "tensor" else value.item()

    for _ in range(300):
        opt.step(closure)
    gap = opt.gap()[0].item()
    assert gap <= 0.02 * math.sqrt(1000 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rule", slow_but(["short", "search"], "search"))
@pytest.mark.parametrize("name", slow_but(SETS, "L2Ball", "Simplex", "SpectralBall"))
def test_a_warm_start_is_respected(name, rule):
    """From the solution, no step leads to a higher loss than it has."""
    problem = Quadratic(name)
    solution = problem.solved()
    lowest = problem(solution).item()
    x = problem.parameter(solution)
    seen = problem.run(problem.optimizer(x, **STEPS[rule]), x, 20)
    assert seen[0][1] <= 1e-10
    assert max(loss for loss, _ in seen) <= lowest + 1e-12
    torch.testing.assert_close(x.detach(), solution, atol=1e-5, rtol=0)


def test_a_warm_start_by_the_schedule():
    problem = Quadratic("L1Ball")
    losses = {}
    for initial_step in (0, 200):
        x = problem.parameter(problem.solved())
        seen = problem.run(problem.optimizer(x, initial_step=initial_step), x, 20)
        losses[initial_step] = max(loss - seen[0][0] for loss, _ in seen)
    assert losses[200] <= 0.02 * losses[0]


# --- the gap --------------------------------------------------------------------------------------


def test_gap_of_each_group():
    x, y, z, w = tensors((2, 3), (4,), (5,), (3, 2))
    z.grad = None
    constraint = L1Ball(2.0)
    opt = FrankWolfe(
        [
            {"params": [x, w], "constraint": constraint},
            {"params": [y], "constraint": Simplex(), "param_ndim": None},
            {"params": [z], "constraint": Simplex(), "param_ndim": None},
        ]
    )
    gaps = opt.gap()
    assert [gap.shape for gap in gaps] == [()] * 3
    expected = sum((p.grad * p.detach()).sum() + 2 * p.grad.abs().amax(1).sum() for p in (x, w))
    torch.testing.assert_close(gaps[0].float(), expected)
    torch.testing.assert_close(gaps[1].float(), y.grad @ y.detach() - y.grad.min())
    assert gaps[2] == 0
    assert not opt.state  # it only looks


def test_gap_needs_constraints():
    x, y = tensors((2, 3), (2, 3))
    opt = FrankWolfe([{"params": [x], "constraint": L1Ball(1.0)}, {"params": [y]}])
    with pytest.raises(ValueError, match="`gap` needs a constraint in every group.*group 1"):
        opt.gap()


# --- kinds of parameters --------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["schedule", "short", "search"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_strides_give_the_same(dtype, rule):
    results = []
    for strided in (False, True):
        x = torch.linspace(-0.1, 0.1, 24, dtype=dtype).view(2, 3, 4)
        g = torch.linspace(-1, 2, 24, dtype=dtype).sin().view(2, 3, 4)
        if strided:
            x, g = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, g))
        x = x.clone().requires_grad_()

        def closure(x=x, g=g):
            x.grad = g.clone()
            return (x * g).sum().item()

        opt = FrankWolfe([x], constraint=L1Ball(1.0), param_ndim=1, **STEPS[rule])
        for _ in range(3):
            opt.step(closure)
        results.append(x.detach().contiguous())
    assert torch.equal(*results)


@takes_grad_dtype
def test_gradients_of_another_dtype_and_layout():
    x = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    x.grad_dtype = torch.float32
    x.grad = torch.eye(3, 4)
    opt = FrankWolfe([x], constraint=L1Ball(0.5))
    opt.step()
    assert torch.equal(x.detach(), -0.5 * torch.eye(3, 4, dtype=torch.bfloat16))
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    opt = FrankWolfe(embedding.parameters(), constraint=L1Ball(0.5))
    embedding(torch.tensor([1, 1])).square().sum().backward()
    expected = L1Ball(0.5).lmo(embedding.weight.grad.to_dense())
    opt.step()
    assert torch.equal(embedding.weight.detach(), expected)


@pytest.mark.parametrize("rule", STEPS)
def test_empty_parameters_and_those_without_a_gradient(rule):
    empty, still, moved = tensors((0, 3), (2, 3), (2, 3))
    with torch.no_grad():
        still.mul_(0.01), moved.mul_(0.01)
    grad, still.grad = moved.grad, None
    before = still.detach().clone()
    opt = FrankWolfe([empty, still, moved], constraint=L2Ball(1.0), **STEPS[rule])

    def closure():
        moved.grad = grad.clone()
        return (moved * grad).sum().item()

    opt.step(closure)
    assert torch.equal(still.detach(), before)
    assert still not in opt.state
    assert (moved * grad).sum() < 0
    assert opt.gap()[0].isfinite()


@pytest.mark.parametrize("rule", STEPS)
def test_nan_is_not_hidden(rule):
    x = torch.zeros(2, 3, requires_grad=True)
    opt = FrankWolfe([x], constraint=L2Ball(1.0), **STEPS[rule])

    def closure():
        x.grad = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
        return x.sum().item()

    opt.step(closure)
    assert x[0].isnan().all()
    assert x[1].isfinite().all() or rule == "search"  # which compares one loss of all
    assert opt.gap()[0].isnan()


@pytest.mark.parametrize("rule", ["schedule", "short", "search"])
def test_lr_of_0_moves_nothing(rule):
    (x,) = tensors((2, 3))
    before = x.detach().clone()
    settings = {**STEPS[rule], "lr": 0.0}
    opt = FrankWolfe([x], constraint=L2Ball(1.0), **settings)
    opt.step()
    assert torch.equal(x.detach(), before)
    assert opt.state[x]["step"] == 0 if rule != "search" else not opt.state


def test_around_it_another_optimizer_has_its_own_param_ndim():
    (x,) = tensors((4, 5))
    opt = ClampedParameterOptimizer(None, FrankWolfe([x]), clamp_max=0.25)
    assert opt.param_groups[0]["param_ndim"] is None
    (y,) = tensors((4, 5))
    constraint = Simplex()
    inside = {"constraint": constraint, "param_ndim": 1}
    opt = ClampedParameterOptimizer([y], FrankWolfe, clamp_max=0.25, **inside)
    opt.step()
    assert torch.equal(y.detach(), constraint.lmo(y.grad).clamp(max=0.25))


@pytest.mark.parametrize("rule", ["schedule", "short"])
def test_nothing_waits_for_a_device(rule):
    """No value is read, of tensors that may be on one: they are said to have none."""
    x = torch.zeros(2, 3, device="meta", requires_grad=True)
    x.grad = torch.zeros(2, 3, device="meta")
    opt = FrankWolfe([x], constraint=L2Ball(1.0), **STEPS[rule])
    opt.step()
    assert opt.gap()[0].device.type == "meta"


# --- state ----------------------------------------------------------------------------------------


@each_rule
@each_set
def test_resumed_is_uninterrupted(name, rule):
    problem = Quadratic(name)
    x = problem.parameter()
    settings = STEPS[rule] | ({"initial_step": 3} if rule == "schedule" else {})
    opt = problem.optimizer(x, **settings)
    for _ in range(5):
        opt.step(problem.closure(x))
    y = problem.parameter(x.detach())
    fresh = FrankWolfe([y])
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert fresh.param_groups[0]["constraint"] == problem.constraint
    (again, third), (pickled, fourth) = (
        copy.deepcopy((opt, x)),
        pickle.loads(pickle.dumps((opt, x))),
    )
    everyone = [(opt, x), (fresh, y), (again, third), (pickled, fourth)]
    for optimizer, param in everyone:
        assert optimizer.param_groups[0]["params"][0] is param
        for _ in range(5):
            optimizer.step(problem.closure(param))
    expected = snapshot([x], opt)
    for optimizer, param in everyone[1:]:
        assert same_bits(snapshot([param], optimizer), expected)


def test_checkpoints_keep_what_they_do_not_name():
    """One of an optimizer that knew of no constraints leaves them as they are."""
    (x,) = tensors((2, 3))
    opt = FrankWolfe([{"params": [x], "constraint": L1Ball(1.0), "smoothness": 2.0}])
    state_dict = opt.state_dict()
    (group,) = state_dict["param_groups"]
    for setting in ("constraint", "param_ndim", "smoothness", "line_search", "initial_step"):
        del group[setting]
    opt.load_state_dict(state_dict)
    (group,) = opt.param_groups
    assert group["constraint"] == L1Ball(1.0)
    assert (group["param_ndim"], group["smoothness"], group["line_search"]) == (-1, 2.0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"constraint": {"set": "NonNegative"}}, "`constraint` must be convex and bounded"),
        ({"constraint": {"set": "Nothing"}}, "`set` must be one of"),
        ({"smoothness": -1.0}, "`smoothness` must be >= 0"),
        ({"param_ndim": 5}, "`param_ndim` must be None or lie in"),
    ],
)
def test_a_bad_checkpoint_changes_nothing(change, message):
    (x,) = tensors((2, 3))
    opt = FrankWolfe([x], constraint=L1Ball(1.0))
    opt.step()
    before = snapshot([x], opt)
    state_dict = opt.state_dict()
    state_dict["param_groups"][0].update(change)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state_dict)
    assert same_bits(snapshot([x], opt), before)


# --- bad input ------------------------------------------------------------------------------------

BALL = L2Ball(1.0)
BAD = [
    ({"constraint": "simplex"}, TypeError, "`constraint` must be a set of"),
    ({"constraint": NonNegative()}, ValueError, "`constraint` must be convex and bounded"),
    ({"constraint": Monotone()}, ValueError, "`constraint` must be convex and bounded"),
    ({"constraint": PSD()}, ValueError, "`constraint` must be convex and bounded"),
    ({"constraint": UnitNorm()}, ValueError, "`constraint` must be convex and bounded"),
    ({"constraint": Stiefel()}, ValueError, "`constraint` must be convex and bounded"),
    (
        {"constraint": Masked(BALL, torch.tensor([True, False, True]))},
        ValueError,
        "`constraint` must be convex and bounded",
    ),
    (
        {"constraint": Intersection(BALL, NonNegative())},
        ValueError,
        "`constraint` must have an oracle",
    ),
    ({"constraint": BALL, "lmo_scaling_factor": 2.0}, ValueError, "`lmo_scaling_factor` must be 1"),
    ({"constraint": BALL, "smoothness": 0.0}, ValueError, "`smoothness` must be > 0"),
    ({"constraint": BALL, "smoothness": math.nan}, ValueError, "`smoothness` must not be NaN"),
    ({"constraint": BALL, "smoothness": math.inf}, ValueError, "`smoothness` must be finite"),
    ({"constraint": BALL, "smoothness": "1"}, TypeError, "`smoothness` must be a number"),
    ({"smoothness": 1.0}, ValueError, "`constraint` must be given with smoothness=1.0"),
    ({"line_search": True}, ValueError, "`constraint` must be given with line_search=True"),
    ({"constraint": BALL, "line_search": 1}, TypeError, "`line_search` must be True or False"),
    (
        {"constraint": BALL, "smoothness": 1.0, "lr": 0.5, "use_default_lr_schedule": False},
        ValueError,
        "`use_default_lr_schedule` must be True .* with smoothness=1.0",
    ),
    ({"initial_step": -1}, ValueError, "`initial_step` must be >= 0, got -1"),
    ({"initial_step": 1.0}, TypeError, "`initial_step` must be an int, got 1.0"),
    (
        {"constraint": BALL, "smoothness": 1.0, "initial_step": 1},
        ValueError,
        r"`initial_step` must be 0 without the schedule \(smoothness=1.0\), got 1",
    ),
    (
        {"use_default_lr_schedule": False, "lr": 0.5, "initial_step": 1},
        ValueError,
        "`initial_step` must be 0 without the schedule",
    ),
    ({"param_ndim": "all"}, TypeError, "`param_ndim` must be an int or None"),
    ({"constraint": BALL, "param_ndim": 3}, ValueError, "`param_ndim` .*parameter 0 of its group"),
    (
        {"constraint": L2Ball(torch.ones(2, 1))},
        ValueError,
        r"`epsilon` must broadcast .*\(parameter 1 of its group\)",
    ),
    (
        {"constraint": SpectralBall(1.0)},
        ValueError,
        r"SpectralBall takes a batch .*\(parameter 0 of its group\)",
    ),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD)
@pytest.mark.parametrize("when", ["at once", "in a group"])
def test_wrong_settings(settings, error, message, when):
    params = tensors((2, 3), (4, 3))
    if when == "at once":
        with pytest.raises(error, match=message):
            FrankWolfe(params, **settings)
        return
    opt = FrankWolfe(tensors((2, 3)))
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": params, **settings})
    assert len(opt.param_groups) == 1


def test_errors_name_the_parameter():
    (x,) = tensors((3,))
    for settings in ({}, {"param_ndim": -1}):
        with pytest.raises(ValueError, match="`param_ndim` must be None or 1 .* 'shares'"):
            FrankWolfe([("shares", x)], constraint=Simplex(), **settings)
    y = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="real numbers.*'phases'"):
        FrankWolfe([("phases", y)], constraint=BALL)


def test_all_groups_search_or_none():
    x, y = tensors((2, 3), (2, 3))
    opt = FrankWolfe([x], constraint=BALL, line_search=True)
    with pytest.raises(ValueError, match="`line_search` must be the same in all groups"):
        opt.add_param_group({"params": [y], "line_search": False})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [y]})
    state_dict = opt.state_dict()
    state_dict["param_groups"][1]["line_search"] = False
    with pytest.raises(ValueError, match="`line_search` must be the same in all groups"):
        opt.load_state_dict(state_dict)
    assert opt.param_groups[1]["line_search"] is True


def test_a_search_needs_a_closure():
    (x,) = tensors((2, 3))
    before = x.detach().clone()
    opt = FrankWolfe([x], constraint=BALL, line_search=True)
    with pytest.raises(ValueError, match="`closure` must be given with `line_search=True`"):
        opt.step()
    assert torch.equal(x.detach(), before)


# --- a start outside the set ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"smoothness": 2.0},
        {"line_search": True},
        {},
        {"initial_step": 3},
        {"use_default_lr_schedule": False, "lr": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("first_lr", [None, 0.0])
def test_the_first_step_from_outside_leads_into_the_set(settings, first_lr):
    x = torch.tensor([5.0, 4.0], dtype=torch.float64, requires_grad=True)
    opt = FrankWolfe([x], constraint=L2Ball(1.0), param_ndim=None, **settings)

    def closure():
        opt.zero_grad()
        loss = (x - 3).square().sum()
        loss.backward()
        return loss

    if first_lr is not None:  # which moves nothing
        lr, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], first_lr
        opt.step(closure)
        assert x.tolist() == [5.0, 4.0]
        opt.param_groups[0]["lr"] = lr
    for _ in range(50):
        opt.step(closure)
        assert L2Ball(1.0).violation(x.detach()[None]) <= 1e-12
    assert closure().item() == pytest.approx(2 * (3 - 0.5**0.5) ** 2, rel=0.02)


def test_a_point_of_the_set_is_where_short_steps_start():
    x = torch.tensor([0.2, 0.3, 0.5], requires_grad=True)
    opt = FrankWolfe([x], constraint=Simplex(), param_ndim=None, smoothness=1e9)
    x.grad = torch.tensor([0.0, 1.0, 2.0])
    opt.step()
    torch.testing.assert_close(x.detach(), torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=1e-6)
