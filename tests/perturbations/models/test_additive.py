"""The additive perturbation model, and what counts as a perturbation model."""

import pytest
import torch

from rai_toolbox.perturbations.init import uniform_like_l2_n_ball_
from rai_toolbox.perturbations.models import (
    AdditivePerturbation,
    MaskedPerturbation,
    PerturbationModel,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_a_tensor_gives_shape_dtype_and_device(dtype):
    data = torch.ones(2, 3, dtype=dtype)
    model = AdditivePerturbation(data)
    assert (model.delta.shape, model.delta.dtype, model.delta.device) == (
        data.shape,
        dtype,
        data.device,
    )
    assert model.delta.requires_grad and not model.delta.any()
    assert torch.equal(model(data), data)


def test_arguments_win_over_the_tensor():
    model = AdditivePerturbation(
        torch.ones(2, dtype=torch.int64), dtype=torch.float64, device="meta"
    )
    assert model.delta.dtype == torch.float64 and model.delta.device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size([2, 3])])
def test_a_shape_is_enough(shape):
    delta = AdditivePerturbation(shape).delta
    assert delta.shape == (2, 3) and delta.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("delta_ndim", "shape"),
    [
        (None, (4, 3, 2)),
        (3, (4, 3, 2)),
        (2, (3, 2)),
        (-1, (3, 2)),
        (1, (2,)),
        (-2, (2,)),
        (0, ()),
        (-3, ()),
    ],
)
def test_delta_ndim_counts_trailing_dims(delta_ndim, shape):
    model = AdditivePerturbation((4, 3, 2), delta_ndim=delta_ndim)
    assert model.delta.shape == shape
    assert model(torch.zeros(4, 3, 2)).shape == (4, 3, 2)
    assert model.per_datum == (delta_ndim is None)


@pytest.mark.parametrize("delta_ndim", [4, -4])
def test_delta_ndim_has_a_range(delta_ndim):
    with pytest.raises(
        ValueError, match=rf"`delta_ndim` must be None or lie in \[-3, 3\].*got {delta_ndim}"
    ):
        AdditivePerturbation((4, 3, 2), delta_ndim=delta_ndim)


def test_init_fn_fills_in_place_and_again():
    torch.manual_seed(0)
    model = AdditivePerturbation((5, 3), uniform_like_l2_n_ball_, epsilon=0.5)
    first = model.delta.detach().clone()
    assert first.any() and (first.norm(dim=1) <= 0.5).all()
    model.reset_parameters()
    assert not torch.equal(model.delta, first) and model.delta.requires_grad


def test_init_kwargs_without_init_fn():
    with pytest.raises(TypeError, match="`init_fn` must be given .* got None and epsilon"):
        AdditivePerturbation((2,), epsilon=1.0)


def test_integer_data_are_refused():
    with pytest.raises(TypeError, match="`dtype` must be .*got torch.uint8"):
        AdditivePerturbation(torch.ones(2, dtype=torch.uint8))


@pytest.mark.parametrize("value", [1.0, True, "1"])
def test_delta_ndim_is_an_int(value):
    with pytest.raises(TypeError, match="`delta_ndim` must be an int or None"):
        AdditivePerturbation((2, 3), delta_ndim=value)


def test_the_gradient_of_a_masked_entry_is_zero():
    mask = torch.tensor([[True, False]])
    model = MaskedPerturbation(torch.zeros(3, 2), mask)
    with torch.no_grad():
        model.delta.fill_(2.0)
    model(torch.zeros(3, 2)).sum().backward()
    assert torch.equal(model(torch.zeros(3, 2)), 2.0 * mask.expand(3, 2))
    assert torch.equal(model.delta.grad, mask.expand(3, 2).float())
    with pytest.raises(TypeError, match="`mask` must be a tensor of bools, got torch.float32"):
        MaskedPerturbation(torch.zeros(3, 2), torch.ones(2))


def test_what_is_a_perturbation_model():
    class Scaling:
        def __init__(self):
            self.factor = torch.ones(1, requires_grad=True)

        def __call__(self, data):
            return data * self.factor

        def parameters(self):
            return [self.factor]

    assert isinstance(Scaling(), PerturbationModel)
    assert isinstance(AdditivePerturbation((1,)), PerturbationModel)
    assert not isinstance(torch.zeros(1), PerturbationModel)
    assert not isinstance(lambda data: data, PerturbationModel)
