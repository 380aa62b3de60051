"""A projection as a module: parametrizations, layers, and where they are."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

from rai_toolbox.constraints import Affine, L2Ball, Projected, Simplex, SpectralBall


def test_a_layer_projects_each_example_and_differentiates():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = Projected(Simplex(2.0))
    assert torch.equal(layer(x), Simplex(2.0).project(x))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_a_parametrized_weight_is_always_in_its_set():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    parametrize.register_parametrization(layer, "weight", Projected(SpectralBall(0.5), None))
    start = layer.weight.detach().clone()
    optim = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = torch.randn(16, 6)
    losses = []
    for _ in range(30):
        optim.zero_grad()
        loss = (layer(x) - x[:, :4]).square().mean()
        loss.backward()
        losses.append(loss.item())
        optim.step()
        assert SpectralBall(0.5).violation(layer.weight[None].detach()) == 0
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(start, SpectralBall(0.5).project(start[None])[0])
    layer.weight = torch.ones(4, 6)  # is stored as its projection
    stored = layer.parametrizations.weight.original
    torch.testing.assert_close(stored, torch.full((4, 6), 0.5 / 24**0.5))


@pytest.mark.parametrize(("shape", "param_ndim"), [((), None), ((3, 2, 4), 1), ((3, 2, 4), None)])
def test_sub_tensors(shape, param_ndim):
    y = Projected(L2Ball(0.5), param_ndim)(torch.ones(shape))
    assert y.shape == shape
    whole = y.norm() if param_ndim is None else y.norm(dim=-1)
    torch.testing.assert_close(whole, torch.full_like(whole, 0.5))


def test_settings_move_with_the_module_and_keep_their_dtype():
    radius = torch.full((3, 1), 0.3, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Projected(L2Ball(radius)))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert model.half()[1].constraint.epsilon.dtype == torch.float64
    moved = copy.deepcopy(model).to("meta")
    assert moved[1].constraint.epsilon.device.type == "meta"
    assert model[1].constraint.epsilon.device.type == "cpu"
    assert Projected(Affine(torch.ones(1, 2), 1.0)).float()(torch.zeros(1, 2)).tolist() == [
        [0.5] * 2
    ]
    assert repr(Projected(Simplex(), 1)) == "Projected(Simplex(total=1.0, dim=None), param_ndim=1)"


def test_bad_arguments():
    with pytest.raises(TypeError, match="`constraint` must be a set of rai_toolbox.constraints"):
        Projected(1.0)
    with pytest.raises(TypeError, match="`param_ndim` must be an int or None"):
        Projected(Simplex(), 1.5)
