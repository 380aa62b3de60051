"""With other libraries: inside cooper and Opacus, and around schedule-free optimizers and Muon.

Each problem has a solution that is known: the projection of a target onto the set.
"""

import pytest
import torch
from torch import nn

from rai_toolbox.constraints import HalfSpace, Intersection, L1Ball, Simplex, SpectralBall
from rai_toolbox.optim import ProjectedOptimizer


def is_inside(constraint, param):
    return bool(constraint.violation(param.detach()).max() == 0)


@pytest.mark.slow
def test_as_the_primal_optimizer_of_cooper():
    """The simplex by projection, a linear inequality by its multiplier."""
    import cooper

    target, weight, most = torch.tensor([[0.9, 0.5, -0.2]]), torch.tensor([3.0, 1.0, 2.0]), 1.5

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            self.cost = cooper.Constraint(
                cooper.ConstraintType.INEQUALITY,
                cooper.formulations.Lagrangian,
                multiplier=cooper.multipliers.DenseMultiplier(num_constraints=1),
            )

        def compute_cmp_state(self, x):
            excess = cooper.ConstraintState(violation=x @ weight - most)
            return cooper.CMPState((x - target).square().sum() / 2, {self.cost: excess})

    x = torch.full((1, 3), 1 / 3, requires_grad=True)
    problem = Problem()
    optimizer = cooper.optim.SimultaneousOptimizer(
        cmp=problem,
        primal_optimizers=ProjectedOptimizer([x], constraint=Simplex(), lr=0.1),
        dual_optimizers=torch.optim.SGD(problem.dual_parameters(), lr=0.1, maximize=True),
    )
    for _ in range(600):
        optimizer.roll(compute_cmp_state_kwargs={"x": x})
        assert is_inside(Simplex(), x)
    solution = Intersection(Simplex(), HalfSpace(weight, most)).project(target)
    torch.testing.assert_close(x.detach(), solution, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_inside_the_private_optimizer_of_opacus(noise):
    """Projection is post-processing of a private step, and costs no privacy."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x, ball = torch.randn(64, 4), L1Ball(2.0)
    data = TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.0], [3.0]]))
    model = nn.Linear(4, 1, bias=False)
    optimizer = ProjectedOptimizer(model.parameters(), constraint=ball, lr=0.3)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=noise,
        max_grad_norm=1.0,
    )
    assert isinstance(optimizer.original_optimizer, ProjectedOptimizer)
    for _ in range(8):
        for batch, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(private(batch), y).backward()
            optimizer.step()
            assert is_inside(ball, model.weight)
    assert float(model.weight.detach().abs().sum()) > 1.5  # it has moved to the boundary
    if not noise:  # the best weights in the ball keep the two largest entries
        assert model.weight[0, 3] > 0.9 and model.weight[0, 1] < -0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_around_a_schedule_free_optimizer(name):
    import schedulefree

    target = torch.tensor([[2.0, -1.0, 0.3], [0.2, 0.1, 0.5]])
    x = torch.full((2, 3), 1 / 3, requires_grad=True)
    inner, lr = getattr(schedulefree, name), 0.5 if name.startswith("SGD") else 0.05
    optimizer = ProjectedOptimizer([x], inner, constraint=Simplex(), lr=lr)
    optimizer.train()
    for _ in range(400):
        optimizer.zero_grad()
        ((x - target).square().sum() / 2).backward()
        optimizer.step()
        assert is_inside(Simplex(), x)
    optimizer.eval()
    assert is_inside(Simplex(), x)
    torch.testing.assert_close(x.detach(), Simplex().project(target), rtol=0, atol=1e-4)


def test_around_muon():
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    target, ball = torch.diag(torch.tensor([3.0, 2.0, 0.5])), SpectralBall(1.0)
    w = torch.zeros(3, 3, requires_grad=True)
    optimizer = ProjectedOptimizer(
        [w], muon, constraint=ball, param_ndim=2, lr=0.2, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for _ in range(300):
        optimizer.zero_grad()
        ((w - target).square().sum() / 2).backward()
        optimizer.step()
        schedule.step()
        assert is_inside(ball, w[None])
    torch.testing.assert_close(w.detach(), ball.project(target[None])[0], rtol=0, atol=1e-3)
