"""Every class over every kind of parameter and gradient: right, or a clear error beforehand."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from every_class import CASES, TRANSFORMING, bridged, distinct, leaf
from memory_layouts import LAYOUTS, equal_bits
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms
from torch_versions import takes_grad_dtype

from rai_toolbox import optim
from rai_toolbox.constraints import L2Ball, LinfBall

of_each_class = pytest.mark.parametrize("name", CASES)
of_each_with_hooks = pytest.mark.parametrize("name", TRANSFORMING)
SHAPE = (4, 6)


def data_and_grad(shape=SHAPE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, torch.float64))
    return data.to(dtype), distinct(shape, dtype, 1, 2.0**-3)


def stepped(case, data, grad, cls=None, **settings):
    """A parameter and its gradient after one step: what the other kinds are compared with."""
    param = leaf(data, grad.clone())
    case.make([param], cls, **settings).step()
    return param, param.grad


def wide(case):
    """Settings by which also a 0-d tensor has a sub-tensor."""
    return {"param_ndim": None} if case.has_sub_tensors else {}


def scaled(case, params, scale):
    """With a scale, which not every constructor takes, but every group."""
    return case.make(
        [{"params": params, **({"grad_scale": scale} if case.has_sub_tensors else {})}]
    )


# -------------------------------------------------------------- shapes, dtypes


@of_each_class
def test_0d(name):
    case = CASES[name]
    param, grad = stepped(case, torch.tensor(2.0), torch.tensor(-3.0), **wide(case))
    turned = case.turned(np.array([-3.0]))
    assert grad.item() == pytest.approx(turned[0])
    assert param.item() == pytest.approx(case.moved(np.array([2.0]), turned, 0)[0])
    assert param.shape == grad.shape == ()


@of_each_with_hooks
def test_0d_has_no_last_dims(name):
    """Refused by name, beforehand; elementwise transforms ask for no dims."""
    case, param = CASES[name], torch.tensor(2.0, requires_grad=True)
    if case.elementwise:
        case.make([("bias", param)], param_ndim=-1)
    else:
        with pytest.raises(ValueError, match=r"`param_ndim` .* got -1 \(parameter 'bias'\)"):
            case.make([("bias", param)], param_ndim=-1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@of_each_class
def test_empty_beside_others(name, shape):
    case, (data, grad) = CASES[name], data_and_grad()
    for cls in (None, bridged(case.cls)) if case.has_sub_tensors else (None,):
        empty = leaf(torch.empty(shape), torch.empty(shape))
        param = leaf(data, grad.clone())
        case.make([empty, param], cls).step()
        assert empty.shape == empty.grad.shape == shape
        assert all(map(equal_bits, (param, param.grad), stepped(case, data, grad)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@of_each_class
def test_complex(name, dtype):
    """Norms, signs and magnitudes are those of complex numbers; bounds are refused by name."""
    case, (real, _) = CASES[name], data_and_grad()
    data, grad = real * (0.6 + 0.8j), (real.flip(0) + 1j * real.flip(1)).to(dtype)
    param = leaf(data.to(dtype), grad.clone())
    before = param.detach().clone()
    if case.real_only:
        with pytest.raises(TypeError, match=rf"must bound real numbers, got {dtype} for .*'W'"):
            case.make([("W", param)])
        return
    case.make([("W", param)]).step()
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for start, raw, turned, moved in zip(before, grad, param.grad, param.detach(), strict=True):
        expected = case.turned(raw.numpy())
        assert np.allclose(turned.numpy(), expected, **tolerance)
        assert np.allclose(moved.numpy(), case.moved(start.numpy(), expected, 0), **tolerance)


@of_each_class
def test_several_dtypes_in_one_group(name):
    case = CASES[name]
    kinds = [data_and_grad(dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    params = [leaf(data, grad.clone()) for data, grad in kinds]
    case.make(params).step()
    for param, (data, grad) in zip(params, kinds, strict=True):
        assert all(map(equal_bits, (param, param.grad), stepped(case, data, grad)))


# ------------------------------------------------------------------- gradients


@takes_grad_dtype
@of_each_class
def test_gradient_of_another_dtype(name):
    """A float32 gradient of a bfloat16 parameter is transformed in float32."""
    case, (data, _) = CASES[name], data_and_grad()
    grad = data.flip(0)  # no numbers of bfloat16
    for cls in (None, bridged(case.cls)) if case.has_sub_tensors else (None,):
        param = leaf(data.bfloat16())
        param.grad_dtype = torch.float32
        param.grad = grad.clone()
        case.make([param], cls).step()
        expected, turned = stepped(case, data.bfloat16().float(), grad, cls)
        assert equal_bits(param.grad, turned)
        assert param.dtype == torch.bfloat16
        assert torch.allclose(param.float(), expected, rtol=2**-6, atol=2**-6)


def sparse(coalesced):
    """A gradient by rows: two of them, of which one is given in two parts unless coalesced."""
    index = torch.tensor([[3, 1, 3]])
    values = torch.arange(18.0).view(3, 6) / 16 - 0.25
    grad = torch.sparse_coo_tensor(index, values, SHAPE, check_invariants=True)
    return grad.coalesce() if coalesced else grad


@pytest.mark.parametrize("coalesced", [True, False])
@of_each_class
def test_sparse_gradient(name, coalesced):
    """As the dense one, where a transform is elementwise and keeps 0; else refused by name."""
    case, (data, dense) = CASES[name], data_and_grad()
    other, embedding = leaf(data, dense.clone()), leaf(data, sparse(coalesced))
    optimizer = case.make([("other", other), ("embedding", embedding)])
    if case.keeps_zero:
        optimizer.step()
        expected, turned = stepped(case, data, sparse(coalesced).to_dense())
        assert embedding.grad.is_sparse
        assert torch.equal(embedding.grad.to_dense(), turned)
        # An inner optimizer may add the parts of an uncoalesced gradient one by one.
        assert torch.allclose(embedding, expected, rtol=1e-6, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"needs dense gradients .* for parameter 'embedding'"):
            optimizer.step()
        assert all(equal_bits(param, data) for param in (other, embedding))
        assert equal_bits(other.grad, dense)
        assert torch.equal(embedding.grad.to_dense(), sparse(coalesced).to_dense())
        assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (partial(optim.ClampedGradientOptimizer, clamp_min=0.1), "0 becomes 0.1"),
        (partial(optim.ClampedGradientOptimizer, clamp_max=-0.1), "0 becomes -0.1"),
        (partial(optim.SignedGradientOptim, grad_bias=0.1), "0 becomes 0.1"),
        (partial(optim.ParamTransformingOptimizer, grad_bias=0.1), "0 becomes 0.1"),
        (bridged(optim.SignedGradientOptim), "a user's hook sees (N, d0, ...)"),
    ],
)
def test_sparse_gradients_that_would_become_dense(make, why):
    data, dense = data_and_grad()
    other, embedding = leaf(data, dense.clone()), leaf(data, sparse(False))
    # The gradients of all groups are looked at before the first is changed.
    groups = [{"params": [("other", other)]}, {"params": [("embedding", embedding)]}]
    with pytest.raises(ValueError, match=r"needs dense gradients .* for parameter 'embedding'"):
        make(groups, lr=1.0).step()
    assert equal_bits(other, data) and equal_bits(other.grad, dense), why
    assert torch.equal(embedding.grad.to_dense(), sparse(False).to_dense())


def test_sparse_gradients_of_views():
    """Torch adds coalesced ones without dense dims outside of a view, as plain SGD does."""
    buffer = torch.zeros(7)
    x = buffer[2:5].detach().requires_grad_()
    grad = torch.sparse_coo_tensor([[1, 2, 1]], [2.0, -3.0, 2.0], (3,), check_invariants=True)
    x.grad = grad
    with pytest.raises(ValueError, match=r"got storage_offset\(\) = 2 for parameter 'x'"):
        optim.SignedGradientOptim([("x", x)], lr=1.0).step()
    assert x.grad is grad and not buffer.any()
    rows = buffer[1:].view(3, 2).detach().requires_grad_()
    rows.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 2), (3, 2), check_invariants=True)
    optim.SignedGradientOptim([rows], lr=1.0).step()
    assert buffer.tolist() == [0, -1, -1, 0, 0, -1, -1]


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_embedding(inner):
    """The real source of sparse gradients: as the same training with the transform by hand."""
    weights = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(5, 3, sparse=True)
        settings = {"lr": 0.1}
        if wrapped:
            optimizer = optim.LinfProjectedOptim(
                layer.parameters(), inner, epsilon=0.5, grad_scale=0.5, **settings
            )
        else:
            optimizer = inner(layer.parameters(), **settings)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(torch.tensor([1, 3, 1, 4])) ** 3).sum().backward()
            if not wrapped:
                grad = layer.weight.grad.coalesce()
                grad.values().sign_().mul_(0.5)
                layer.weight.grad = grad
            optimizer.step()
            if not wrapped:
                with torch.no_grad():
                    layer.weight.clamp_(-0.5, 0.5)
        weights.append(layer.weight)
    assert equal_bits(*weights)


@of_each_class
def test_expanded_gradient(name):
    """As `torch.autograd.grad` gives it: many elements in one place cannot be written to."""
    case, (data, _) = CASES[name], data_and_grad()
    param = leaf(data)
    (param.grad,) = torch.autograd.grad(param.sum(), param)
    assert param.grad.stride() == (0, 0)
    try:
        case.make([("W", param)]).step()
    except (TypeError, ValueError) as error:
        assert "parameter 'W'" in str(error)
        assert equal_bits(param, data)
    else:
        expected = stepped(case, data, torch.ones(SHAPE))
        assert all(map(equal_bits, (param, param.grad), expected))


@pytest.mark.parametrize("groups", [1, 2])
@of_each_class
def test_one_gradient_for_two_parameters(name, groups):
    """As `torch.autograd.grad` gives it for a sum of two: each parameter needs its own."""
    case, (data, _) = CASES[name], data_and_grad()
    params = [leaf(data), leaf(data)]
    for param, grad in zip(
        params, torch.autograd.grad((params[0] + params[1]).square().sum(), params), strict=True
    ):
        param.grad = grad
    raw = params[0].grad.clone()
    assert params[0].grad is params[1].grad
    if groups == 1:
        scaled(case, params, 0.5).step()
    else:
        optimizer = scaled(case, params[:1], 0.5)
        optimizer.add_param_group(scaled(case, params[1:], 0.5).param_groups[0])
        optimizer.step()
    alone = leaf(data, raw)
    scaled(case, [alone], 0.5).step()
    for param in params:
        assert equal_bits(param.grad, alone.grad)
        assert equal_bits(param, alone)


@of_each_class
def test_conjugated_gradient(name):
    """Autograd leaves such a view in `.grad` of a complex parameter."""
    case = CASES[name]
    if case.real_only:
        return  # refused whatever the gradient is, see test_complex
    data, grad = data_and_grad(dtype=torch.complex64)
    grad = grad + 1j * grad.flip(0)
    param = leaf(data)
    param.conj().backward(grad)
    assert param.grad.is_conj()
    alone = leaf(data, grad.conj().resolve_conj().clone())
    for each in (param, alone):
        scaled(case, [each], 0.5).step()
    assert equal_bits(param.grad, alone.grad)
    assert equal_bits(param, alone)


@of_each_class
def test_negated_gradients(name):
    """Views of complex numbers, which torch refuses to change in a list."""
    case, (data, grad) = CASES[name], data_and_grad()
    params = [leaf(data), leaf(data)]
    for param in params:
        param.grad = torch.complex(grad, -grad).conj().imag
        assert param.grad.is_neg()
    alone = leaf(data, grad.clone())
    for each in (params, [alone]):
        scaled(case, each, 0.5).step()
    for param in params:
        assert equal_bits(param.grad, alone.grad)
        assert equal_bits(param, alone)


# ------------------------------------------------------- which parameters move


@of_each_class
def test_parameters_without_gradient_are_projected_only(name):
    case, (data, grad) = CASES[name], data_and_grad()
    frozen, unused = leaf(data).requires_grad_(False), leaf(data)
    param = leaf(data, grad.clone())
    optimizer = case.make([frozen, unused, param])
    for _ in range(2):
        optimizer.step()
        for idle in (frozen, unused):
            assert idle.grad is None
            assert idle not in optimizer.state
        expected = np.array([case.project(row) for row in data.numpy()])
        assert torch.allclose(unused, torch.tensor(expected), rtol=1e-6)
        assert torch.equal(frozen, data)
    assert (frozen.requires_grad, unused.requires_grad) == (False, True)
    frozen.grad = torch.ones_like(frozen)  # which torch's optimizers follow
    optimizer.step()
    expected = torch.tensor(np.array([case.project(row) for row in frozen.numpy()]))
    assert torch.allclose(frozen, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integer_parameters_stay_as_they_are(dtype):
    packed, (data, grad) = torch.tensor([[3, 1, 0]]).to(dtype), data_and_grad()
    for make in (
        partial(optim.ClampedParameterOptimizer, clamp_max=0.5),
        partial(optim.ProjectedOptimizer, constraint=L2Ball(0.5)),
        partial(optim.PGD, constraint=LinfBall(0.5)),
    ):
        before, param = packed.clone(), leaf(data, grad.clone())
        optimizer = make([packed, param], lr=0.1)
        optimizer.step()
        if isinstance(optimizer, optim.ProjectedOptimizer):
            optimizer.make_feasible_()
        assert torch.equal(packed, before)


def test_frozen_parameters_are_not_made_feasible():
    adapted = torch.nn.Linear(3, 2)
    adapted.weight.requires_grad_(False)
    before = adapted.weight.clone()
    optimizer = optim.ProjectedOptimizer(
        adapted.parameters(), constraint=L2Ball(0.01), param_ndim=None, lr=0.1
    )
    optimizer.make_feasible_()
    assert torch.equal(adapted.weight, before)
    assert adapted.bias.norm() <= 0.01


@of_each_class
def test_the_same_parameter_twice_in_a_group(name):
    """Torch warns and steps twice; the gradient that both steps see is transformed once."""
    case, (data, grad) = CASES[name], data_and_grad()
    twice = leaf(data, grad.clone())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        optimizer = scaled(case, [twice, twice], 0.5)
    assert ["duplicate parameters" in str(w.message) for w in warned] == [True]
    optimizer.step()
    once = leaf(data, grad.clone())
    scaled(case, [once], 0.5).step()
    assert equal_bits(twice.grad, once.grad)


@of_each_class
def test_the_same_parameter_in_two_groups_is_refused(name):
    param = leaf(*data_and_grad())
    with pytest.raises(ValueError, match="more than one parameter group"):
        CASES[name].make([{"params": [param]}, {"params": [param]}])


# ------------------------------------------------------- changes between steps


@of_each_class
def test_data_swapped_between_steps(name):
    """By another tensor, of other strides, dtype or shape: nothing of the old one is kept."""
    case, (data, grad) = CASES[name], data_and_grad()
    param = leaf(data, grad.clone())
    optimizer = case.make([param])
    optimizer.step()
    for change in (
        lambda x: x.clone(),
        LAYOUTS["transposed"],
        torch.Tensor.double,
        lambda x: x.reshape(2, 3, 4).clone(),
    ):
        param.grad = None
        param.data = change(data)
        param.grad = change(grad)
        optimizer.step()
        fresh = leaf(change(data), change(grad))
        other = case.make([fresh])
        if case.frank_wolfe:  # whose step sizes count on
            other.state[fresh]["step"] = optimizer.state[param]["step"] - 1
        other.step()
        assert equal_bits(param, fresh)
        assert equal_bits(param.grad, fresh.grad)


EDITS = [
    ("ClampedParameter", {"clamp_min": -0.1, "clamp_max": None}),
    ("ClampedGradient", {"clamp_min": None, "clamp_max": 0.1}),
    ("Signed", {"grad_scale": 0.5, "grad_bias": 0.25, "lr": 0.1}),
    ("L1Normed", {"param_ndim": 0, "div_by_zero_eps": 100.0}),
    ("L2Normed", {"param_ndim": None}),
    ("L2Projected", {"epsilon": 0.25}),
    ("L2Projected", {"epsilon": 0.0, "param_ndim": 0}),
    ("LinfProjected", {"epsilon": 0.25}),
    ("TopQ", {"q": 0.2, "param_ndim": None}),
    ("L1qNormed", {"q": 0.2, "grad_scale": 2.0}),
    ("Chained", {"q": 0.2, "epsilon": 0.25, "grad_bias": 0.5}),
    ("L1FrankWolfe", {"epsilon": 0.25}),
    ("L2FrankWolfe", {"epsilon": 0.25, "param_ndim": None}),
    ("LinfFrankWolfe", {"epsilon": 0.25, "grad_scale": 0.5}),
    ("L1qFrankWolfe", {"q": 0.2, "epsilon": 0.25}),
    ("FrankWolfe", {"lmo_scaling_factor": 0.25}),
]


@pytest.mark.parametrize(("name", "edit"), EDITS)
def test_group_options_edited_between_steps(name, edit):
    """As a group that was made with them: schedulers and users write into `param_groups`."""
    case, (data, grad) = CASES[name], data_and_grad()
    before, edited, made = (leaf(data, grad.clone()) for _ in range(3))
    case.make([before]).step()
    optimizer = case.make([edited])
    optimizer.param_groups[0].update(edit)
    optimizer.step()
    case.make([{"params": [made], **edit}]).step()
    assert equal_bits(edited, made)
    assert equal_bits(edited.grad, made.grad)
    assert not (equal_bits(edited, before) and equal_bits(edited.grad, before.grad))


# --------------------------------------------------------------- tensor classes


class Tagged(torch.Tensor):
    """A user's subclass, which every operator returns again."""


class Weight(torch.nn.Parameter):
    """A user's subclass of Parameter."""


@pytest.mark.parametrize("kind", [Tagged, Weight, torch.nn.Parameter])
@of_each_class
def test_subclasses(name, kind):
    case, (data, grad) = CASES[name], data_and_grad()
    for cls in (None, bridged(case.cls)) if case.has_sub_tensors else (None,):
        made = torch.nn.Parameter(data.clone().as_subclass(Tagged)) if kind is Tagged else None
        param = kind(data.clone()) if made is None else made
        param.grad = grad.clone().as_subclass(Tagged) if kind is Tagged else grad.clone()
        plain = leaf(data, grad.clone())
        case.make([param, plain], cls).step()
        assert type(param) is kind
        results = (t.detach().as_subclass(torch.Tensor) for t in (param, param.grad))
        assert all(map(equal_bits, results, stepped(case, data, grad, cls)))
        assert all(map(equal_bits, (plain, plain.grad), stepped(case, data, grad)))


PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}


@pytest.mark.parametrize("param_ndim", [-1, None, 1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dtensor(placement, param_ndim):
    """Two ranks, as threads: the same result as one process, or an error with the name."""
    shape, found = (5, 6), {}  # uneven shards

    @spawn_threads_and_init_comms(world_size=2)
    def on_each_rank(_):
        mesh = init_device_mesh("cpu", (2,))
        for name, case in CASES.items():
            data, grad = data_and_grad(shape)
            param = torch.nn.Parameter(distribute_tensor(data, mesh, PLACEMENTS[placement]))
            param.grad = distribute_tensor(grad.clone(), mesh, PLACEMENTS[placement])
            plain = leaf(data, grad.clone())  # beside it, as a scale that is not sharded would be
            group = {"params": [("W", param), ("plain", plain)], "param_ndim": param_ndim}
            if not case.has_sub_tensors:
                del group["param_ndim"]
            error = None
            try:
                case.make([group]).step()
            except Exception as raised:
                error = raised
            gathered = (param.full_tensor().detach(), param.grad.full_tensor())
            kept = param.placements == param.grad.placements == tuple(PLACEMENTS[placement])
            found[dist.get_rank(), name] = (error, gathered, kept)

    on_each_rank(None)
    wrong = {}
    for (rank, name), (error, gathered, kept) in found.items():
        case, (data, grad) = CASES[name], data_and_grad(shape)
        expected = leaf(data, grad.clone())
        settings = {"param_ndim": param_ndim} if case.has_sub_tensors else {}
        case.make([{"params": [expected], **settings}]).step()
        if error is None:
            right = kept and all(
                torch.allclose(mine, its, rtol=1e-6, atol=1e-7)
                for mine, its in zip(gathered, (expected, expected.grad), strict=True)
            )
        else:
            named = isinstance(error, (TypeError, ValueError)) and "parameter 'W'" in str(error)
            right = named and all(map(equal_bits, gathered, (data, grad)))
        if not right:
            wrong[name, rank] = error
    assert len(found) == 2 * len(CASES)
    assert not wrong
