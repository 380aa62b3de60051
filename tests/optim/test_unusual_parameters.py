"""Parameters and gradients of every kind, through the whole step: right, or refused by name."""

from functools import partial

import pytest
import torch
from engine_cases import WITH_INNER, WRAPPERS, new_gradients, recording, tensors
from torch import nn
from torch.optim import Adam
from torch.testing._internal.two_tensor import TwoTensor

from rai_toolbox.optim import (
    ClampedGradientOptimizer,
    ClampedParameterOptimizer,
    L2NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

by_name = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())


class Doubled(ParamTransformingOptimizer):
    """A user's subclass: what it is shown may be a copy."""

    def _pre_step_transform_(self, param, optim_group):
        param.grad.mul_(2)

    def _post_step_transform_(self, param, optim_group):
        param.clamp_(-0.5, 0.5)


ALL = WRAPPERS | {"Doubled": Doubled}
by_any_name = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def two_steps(make, params, grads):
    """Two steps, with gradients as they are given; the values after them."""
    opt = make(params)
    for k in range(2):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad(k)
        opt.step()
    return [p.detach() for p in params]


def reference(make, shape, dtype=torch.float32):
    (x,) = tensors(shape, dtype=dtype)
    return two_steps(make, [x], [partial(gradient, shape, dtype)])[0]


def gradient(shape, dtype, k):
    (x,) = tensors(shape, seed=10 + k, dtype=dtype)
    return x.detach()


# --- strides -----------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "at an offset": lambda x: torch.cat([x, x])[2:],
}


@by_any_name
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("of_grad", ["contiguous", "channels last", "transposed", "sliced"])
def test_strides_change_nothing(make, of_param, of_grad):
    shape = (2, 3, 4, 2)
    for param_ndim in (-1, 2, 0, None):
        some = partial(make, lr=0.3, param_ndim=param_ndim)
        x = LAYOUTS[of_param](tensors(shape)[0].detach()).requires_grad_()
        strides = x.stride()
        (got,) = two_steps(
            some, [x], [lambda k: LAYOUTS[of_grad](gradient(shape, torch.float32, k))]
        )
        assert x.stride() == strides
        torch.testing.assert_close(got, reference(some, shape))


# --- dtypes ------------------------------------------------------------------------------------


@by_any_name
def test_a_float32_gradient_of_a_bfloat16_parameter(make):
    # The transform works at the gradient's precision; the inner optimizer rounds.
    (x,) = tensors((3, 4), dtype=torch.bfloat16)
    x.grad = None
    x.grad_dtype = torch.float32
    seen = gradient((3, 4), torch.float32, 0)
    x.grad = seen
    make([x], lr=0.0).step()
    assert x.grad is seen and seen.dtype is torch.float32
    (y,) = tensors((3, 4))
    y.grad = gradient((3, 4), torch.float32, 0)
    make([y], lr=0.0).step()
    torch.testing.assert_close(seen, y.grad, rtol=0, atol=0)


def test_half_precision_rows_of_zeros_and_of_norms_beyond_its_range():
    x = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    x.grad = torch.tensor([[0.0] * 4, [65504.0] * 4, [6e-8] * 4], dtype=torch.float16)
    L2ProjectedOptim([x], lr=1.0, epsilon=2.0).step()
    assert x.grad.tolist() == [[0.0] * 4, [0.5] * 4, [0.5] * 4]
    assert x.tolist() == [[0.0] * 4, [-0.5] * 4, [-0.5] * 4]


def test_complex_parameters():
    x = torch.tensor([3 + 4j, 0j, -2j], requires_grad=True)
    x.grad = torch.tensor([3 + 4j, 0j, -2j])
    SignedGradientOptim([x], lr=1.0).step()
    torch.testing.assert_close(x.detach(), torch.tensor([2.4 + 3.2j, 0j, -1j]))
    y = torch.tensor([[3 + 4j, 0j]], requires_grad=True)
    y.grad = torch.tensor([[0j, 2j]])
    L2ProjectedOptim([y], lr=1.0, epsilon=1.0).step()
    moved = torch.tensor([[3 + 4j, -1j]])
    torch.testing.assert_close(y.detach(), moved / moved.norm())
    with pytest.raises(TypeError, match="real.*complex64 for parameter 'w'"):
        LinfProjectedOptim([("w", x)], epsilon=1.0)


# --- few or no elements ------------------------------------------------------------------------


@by_any_name
def test_tensors_of_no_dims(make):
    some = partial(make, lr=0.3, param_ndim=None)
    (x,) = tensors(())
    (got,) = two_steps(some, [x], [partial(gradient, (), torch.float32)])
    assert got.shape == ()
    one = x.detach().new_tensor([tensors(())[0].item()]).requires_grad_()
    (same,) = two_steps(some, [one], [lambda k: gradient((), torch.float32, k).reshape(1)])
    torch.testing.assert_close(got, same[0])


@by_any_name
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("param_ndim", [-1, 0, None])
def test_empty_tensors_are_no_obstacle_to_others(make, shape, param_ndim):
    some = partial(make, lr=0.3, param_ndim=param_ndim)
    empty, x = tensors(shape, (3, 4))
    x = tensors((3, 4))[0]
    of_both = [partial(gradient, shape, torch.float32), partial(gradient, (3, 4), torch.float32)]
    got = two_steps(some, [empty, x], of_both)
    assert got[0].shape == shape
    torch.testing.assert_close(got[1], reference(some, (3, 4)))


# --- parameters without a part in the step -----------------------------------------------------


@by_any_name
def test_without_gradient_there_is_no_step_but_a_projection(make):
    x, y = tensors((3, 4), (3, 4))
    y.grad = None
    opt = make([x, y], lr=0.3)
    opt.step()
    assert y.grad is None and y not in opt.state
    projected = tensors((3, 4), (3, 4))[1]
    projected.grad = None
    make([projected], lr=0.3).step()
    assert torch.equal(y, projected)


@by_any_name
def test_no_gradient_at_all(make):
    x, y = tensors((3, 4), (2, 2))
    x.grad = y.grad = None
    opt = make([{"params": [x]}, {"params": [y]}], lr=0.3)
    opt.step()
    opt.step(lambda: 0.0)
    assert x.grad is None and y.grad is None


@by_any_name
def test_a_frozen_parameter_is_a_parameter_without_gradient(make):
    x = tensors((3, 4))[0].detach()
    y = tensors((3, 4))[0]
    y.grad = None
    assert not x.requires_grad
    for p in (x, y):
        make([p], lr=0.3).step()
    assert torch.equal(x, y)
    assert not x.requires_grad and x.grad is None


def test_tied_parameters_are_treated_once():
    log = []
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    opt = recording(log)(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    opt.step()
    assert [entry[0] for entry in log] == ["transform", "project"]
    with pytest.raises(ValueError, match="more than one"):  # torch's own rule
        recording(log)([{"params": [module[0].weight]}, {"params": [module[1].weight]}])


# --- changes between steps ---------------------------------------------------------------------


@by_any_name
def test_swapped_data_are_seen(make):
    # As trainers do that move or flatten parameters: nothing of the old storage may be kept.
    x, y = tensors((3, 4), (3, 4))
    y.detach().copy_(x.detach())
    opt, other = make([x], lr=0.3), make([y], lr=0.3)
    for k in range(3):
        for p in (x, y):
            new_gradients([p], k)
        if k == 1:
            x.data = x.detach().t().contiguous().t()
            x.grad.data = x.grad.detach().t().contiguous().t()
        opt.step()
        other.step()
    torch.testing.assert_close(x, y)


EDITS = {
    "clamp_max": (partial(ClampedParameterOptimizer, clamp_max=1.0), 0.25),
    "clamp_min": (partial(ClampedGradientOptimizer, clamp_min=-1.0), -0.25),
    "epsilon": (partial(L2ProjectedOptim, epsilon=1.0), 0.25),
    "grad_scale": (SignedGradientOptim, 0.25),
    "grad_bias": (SignedGradientOptim, 0.25),
    "param_ndim": (L2NormedGradientOptim, 0),
    "lr": (SignedGradientOptim, 0.25),
    "q": (WRAPPERS["TopQ"], 0.25),
    "0.q": (WRAPPERS["Chained"], 0.25),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_setting_counts_from_the_next_step(name):
    make, value = EDITS[name]
    name = name.removeprefix("0.")
    x = tensors((3, 4))[0]
    opt = make([x])
    opt.step()
    assert opt.param_groups[0][name] != value
    (fresh,) = ([x.detach().clone().requires_grad_()],)
    opt.param_groups[0][name] = value
    later = make(fresh)
    later.param_groups[0][name] = value
    new_gradients([x], 1)
    new_gradients(fresh, 1)
    opt.step()
    later.step()
    assert torch.equal(x, fresh[0])


# --- subclasses of tensors ---------------------------------------------------------------------


class Named(torch.Tensor):
    """A subclass that adds nothing to what operators do."""


@by_any_name
def test_a_subclass(make):
    x = nn.Parameter(tensors((3, 4))[0].detach().as_subclass(Named))
    made = [lambda k: gradient((3, 4), torch.float32, k).as_subclass(Named)]
    (got,) = two_steps(partial(make, lr=0.3), [x], made)
    assert type(got) is Named
    torch.testing.assert_close(
        got.as_subclass(torch.Tensor), reference(partial(make, lr=0.3), (3, 4))
    )


@by_any_name
def test_a_subclass_that_holds_its_data_elsewhere(make):
    # Without storage of its own, as sharded, quantized and nested tensors are. One of the plain
    # kind beside it: lists of both are what foreach operators refuse.
    def both(y):
        return TwoTensor(y, 2 * y)

    x = nn.Parameter(both(tensors((3, 4))[0].detach()))
    (plain,) = tensors((3, 4))
    of_both = [
        lambda k: both(gradient((3, 4), torch.float32, k)),
        partial(gradient, (3, 4), torch.float32),
    ]
    got, of_plain = two_steps(partial(make, lr=0.3), [x, plain], of_both)
    assert type(got) is TwoTensor
    torch.testing.assert_close(got.a, reference(partial(make, lr=0.3), (3, 4)))
    torch.testing.assert_close(of_plain, got.a)


# --- sparse gradients --------------------------------------------------------------------------

KEEP_ZERO = {
    "Param": WITH_INNER["Param"],
    "scaled": partial(ParamTransformingOptimizer, grad_scale=0.5),
    "ClampedParameter": WITH_INNER["ClampedParameter"],
    "ClampedGradient": WITH_INNER["ClampedGradient"],
    "Signed": WITH_INNER["Signed"],
    "LinfProjected": WITH_INNER["LinfProjected"],
    "LinfFrankWolfe": WRAPPERS["LinfFrankWolfe"],
}


def embedding_gradient():
    """Row 1 twice, so that its two parts must be added before anything is done to them."""
    values = torch.tensor([[0.4, -3.0, 0.0], [0.4, 1.0, 0.0], [-0.1, 0.2, 5.0]])
    return torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), values, (5, 3), check_invariants=True)


@pytest.mark.parametrize("make", KEEP_ZERO.values(), ids=KEEP_ZERO.keys())
def test_sparse_gradients_do_what_dense_ones_do(make):
    x, y = tensors((5, 3), (5, 3))
    y.detach().copy_(x.detach())
    x.grad = embedding_gradient()
    assert not x.grad.is_coalesced()
    y.grad = embedding_gradient().to_dense()
    for p in (x, y):
        make([p], lr=0.3).step()
    assert x.grad.layout is torch.sparse_coo
    torch.testing.assert_close(x.grad.to_dense(), y.grad)
    torch.testing.assert_close(x, y)


REFUSE_SPARSE = {name: make for name, make in ALL.items() if name not in KEEP_ZERO} | {
    "biased": partial(ParamTransformingOptimizer, grad_bias=0.5),
    "lifting": partial(ClampedGradientOptimizer, clamp_min=0.1),
    "signed, biased": partial(SignedGradientOptim, grad_bias=0.5),
}


@pytest.mark.parametrize("make", REFUSE_SPARSE.values(), ids=REFUSE_SPARSE.keys())
def test_sparse_gradients_are_refused_where_zeros_would_change(make):
    x, y = tensors((5, 3), (5, 3))
    opt = make([("dense", x), ("sparse", y)], lr=0.3)
    y.grad = embedding_gradient()
    before = [x.detach().clone(), y.detach().clone(), x.grad.clone()]
    with pytest.raises(ValueError, match="sparse_coo for parameter 'sparse'"):
        opt.step()
    assert all(map(torch.equal, before, [x, y, x.grad]))  # of any parameter


# --- rebound gradients -------------------------------------------------------------------------


def test_a_rebound_gradient_is_told_by_identity_not_by_storage():
    # A view of the same storage is another gradient object, too.
    class Rebinding(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            param.grad = param.grad.view(param.shape)

    class InPlace(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            param.grad.set_(param.grad.clone())  # other storage, the same object

    (x,) = tensors(3)
    with pytest.raises(ValueError, match="in place"):
        Rebinding([x]).step()
    InPlace([x]).step()


@by_name
def test_adam_around_several_kinds_at_once(make):
    # One group of all that there is: each is treated as if it were alone.
    shapes = (3, 4), (2, 2), (0, 3), (4, 3, 2)
    params = tensors(*shapes)
    params[1].grad = None
    inner = {} if "FrankWolfe" in str(make) else {"InnerOpt": Adam}
    opt = make(params, lr=0.3, **inner)
    opt.step()
    for i in range(len(shapes)):
        alone = tensors(*shapes)[i]
        if i == 1:
            alone.grad = None
        make([alone], lr=0.3, **inner).step()
        assert torch.equal(params[i], alone)
