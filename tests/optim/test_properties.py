"""Every class, over dtype, shape, memory layout and param_ndim: the laws that all of them keep."""

from functools import partial
from math import prod

import numpy as np
import pytest
import torch
from every_class import CASES, TRANSFORMING, bridged, distinct, leaf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory_layouts import LAYOUTS, equal_bits

from rai_toolbox import optim, to_batch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

few = settings(deadline=None, derandomize=True, max_examples=25)
of_each_class = pytest.mark.parametrize("name", CASES)
of_each_with_hooks = pytest.mark.parametrize("name", TRANSFORMING)

shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
layouts = st.sampled_from(sorted(LAYOUTS))
seeds = st.integers(0, 2**31)


@st.composite
def tensors(draw):
    """Values of a parameter and of two gradients for it, and a param_ndim that fits."""
    dtype, shape, seed = draw(st.sampled_from(DTYPES)), draw(shapes), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    low, high = (-10, 6) if dtype == torch.float16 else (-60, 60)
    grads = [distinct(shape, dtype, seed + i, 2.0 ** draw(st.integers(low, high))) for i in (1, 2)]
    param_ndim = draw(st.none() | st.integers(-len(shape), len(shape)))
    return data, grads, param_ndim


def group_of(case, params, param_ndim, **more):
    return {
        "params": params,
        **({"param_ndim": param_ndim} if case.has_sub_tensors else {}),
        **more,
    }


def run(case, data, grads, param_ndim, cls=None, layout="contiguous", grad_layout="contiguous"):
    """The parameter and the gradient after steps with these gradients."""
    param = leaf(LAYOUTS[layout](data))
    optimizer = case.make([group_of(case, [param], param_ndim)], cls)
    for grad in grads:
        param.grad = LAYOUTS[grad_layout](grad)
        optimizer.step()
    return param, param.grad


def rows(x, param_ndim):
    """A float64 copy of x as a list of its sub-tensors, flattened."""
    x = x.detach().numpy() if x.dtype == torch.float64 else x.detach().float().numpy()
    x = x.astype(np.float64)
    split = x.ndim if param_ndim == 0 else 0 if param_ndim is None else -param_ndim
    split = x.ndim + split if split < 0 else split
    return list(x.reshape(prod(x.shape[:split]), prod(x.shape[split:])))


def assert_close(actual, expected, size, dtype):
    """Up to a few roundings of numbers of this size, which may differ for each element."""
    info = torch.finfo(dtype)
    error = 4 * info.eps * size + 2 * info.smallest_normal * info.eps
    assert (np.abs(actual - expected) <= error).all(), (actual, expected)


@of_each_class
@few
@given(tensors(), st.sampled_from([1.0, -0.5, 3.0]), st.sampled_from([0.0, 0.25]), st.data())
def test_as_the_reference(name, case_tensors, scale, bias, data):
    case, (start, grads, param_ndim) = CASES[name], case_tensors
    if not case.has_sub_tensors:
        scale, bias, param_ndim = 1.0, 0.0, None
    param = leaf(LAYOUTS[data.draw(layouts)](start))
    more = {"grad_scale": scale, "grad_bias": bias} if case.has_sub_tensors else {}
    optimizer = case.make([group_of(case, [param], param_ndim, **more)])
    for step, grad in enumerate(grads):
        param.grad = LAYOUTS[data.draw(layouts)](grad)
        before = rows(param, param_ndim)
        optimizer.step()
        for g, turned in zip(rows(grad, param_ndim), rows(param.grad, param_ndim), strict=True):
            expected = case.turned(g, scale, bias)
            assert_close(turned, expected, np.abs(expected) + 2 * bias, start.dtype)
        # Errors of the step are compared apart from those of the gradient.
        after = rows(param, param_ndim)
        for p, g, moved in zip(before, rows(param.grad, param_ndim), after, strict=True):
            size = np.linalg.norm(np.abs(p) + np.abs(g)) + 1  # a projection does not expand
            assert_close(moved, case.moved(p, g, step), size, start.dtype)


@of_each_class
@few
@given(tensors(), layouts, layouts)
def test_any_layout_alike(name, case_tensors, layout, grad_layout):
    """Of the parameter and of the gradient, which need not be the same one."""
    case = CASES[name]
    results = run(case, *case_tensors)
    others = run(case, *case_tensors, layout=layout, grad_layout=grad_layout)
    assert all(map(equal_bits, others, results))


@of_each_class
@few
@given(st.lists(tensors(), min_size=2, max_size=5), st.data())
def test_grouped_as_one_by_one(name, several, data):
    """One group of several shapes, layouts and dtypes, with a param_ndim that fits them all."""
    case = CASES[name]
    param_ndim = data.draw(st.sampled_from([None, 0, 1, -1]))
    params = [leaf(LAYOUTS[data.draw(layouts)](start)) for start, _, _ in several]
    vectors = any(p.ndim == 1 for p in params)
    assume(name != "Projected" or not (param_ndim == -1 and vectors))  # refused, see its own tests
    optimizer = case.make([group_of(case, params, param_ndim)])
    for step in (0, 1):
        for param, (_, grads, _) in zip(params, several, strict=True):
            param.grad = grads[step].clone()
        optimizer.step()
    for param, (start, grads, _) in zip(params, several, strict=True):
        alone, alone_grad = run(case, start, grads, param_ndim)
        assert equal_bits(param, alone)
        assert equal_bits(param.grad, alone_grad)


@of_each_with_hooks
@few
@given(tensors(), layouts, layouts)
def test_overridden_hooks_that_call_super_change_nothing(name, case_tensors, layout, grad_layout):
    """One tensor at a time, in its batch view, as a group at once."""
    case = CASES[name]
    results = run(case, *case_tensors)
    theirs = run(case, *case_tensors, bridged(case.cls), layout, grad_layout)
    assert all(map(equal_bits, theirs, results))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@of_each_with_hooks
def test_large_tensors_by_pieces_or_whole(name, dtype):
    """Norms go block by block there: the batch view sums alike, other strides to rounding."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    data, grad = torch.randn(2, 400, 400, generator=generator, dtype=torch.float64).to(dtype)
    results = run(case, data, [grad], None)
    assert all(map(equal_bits, run(case, data, [grad], None, bridged(case.cls)), results))
    other = run(case, data, [grad], None, None, "sliced", "narrowed")
    tolerance = 16 * torch.finfo(dtype).eps + (5e-6 if dtype == torch.float32 else 0.0)
    for found, expected in zip(other, results, strict=True):  # (balls are aimed at from inside)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chains", [None, 0, 1, 2, -1, -2])
@pytest.mark.parametrize("members", [None, 0, 1, 2, -1, -2])
def test_a_members_own_param_ndim_counts_for_the_tensor_not_for_its_view(chains, members):
    """Where the chain's hooks are overridden, members see a view: right, or a clear error."""
    shape, cls = (2, 3, 4), optim.ChainedParamTransformingOptimizer
    member = partial(optim.L2ProjectedOptim, epsilon=0.9, param_ndim=members)

    def stepped(chain, *args, **kwargs):
        param = leaf(distinct(shape, torch.float32, 1), distinct(shape, torch.float32, 2))
        chain(*args, params=[param], lr=1.0, **kwargs).step()
        return param, param.grad

    alone = stepped(optim.L2ProjectedOptim, epsilon=0.9, param_ndim=members)
    assert all(map(equal_bits, stepped(cls, member, param_ndim=chains), alone))
    try:
        theirs = stepped(bridged(cls), member, param_ndim=chains)
    except (TypeError, ValueError) as error:
        assert "param_ndim" in str(error)
    else:
        assert all(map(equal_bits, theirs, alone))


# -------------------------------------------------------------- users' hooks


@few
@given(tensors(), layouts, layouts)
def test_hooks_see_batches_and_write_into_the_tensors(case_tensors, layout, grad_layout):
    data, grads, param_ndim = case_tensors
    seen = []

    class Users(optim.ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            assert optim_group["param_ndim"] == param_ndim
            seen.append((param.clone(), param.grad.clone()))
            index = torch.arange(param.numel()).view(param.shape)
            param.grad.copy_(index % 5)

        def _post_step_transform_(self, param, **kwargs):
            assert kwargs["optim_group"]["param_ndim"] == param_ndim
            seen.append((param.clone(), None))
            index = torch.arange(param.numel()).view(param.shape)
            param.mul_(2).add_(index % 3)

    start = distinct(data.shape, data.dtype, 1)
    param = leaf(LAYOUTS[layout](start), LAYOUTS[grad_layout](grads[0]))
    grad = param.grad
    Users([param], lr=1.0, param_ndim=param_ndim).step()

    numbers = torch.arange(data.numel()).view(data.shape)
    stepped = start - (numbers % 5).to(data.dtype)
    (first, first_grad), (second, _) = seen
    assert equal_bits(first, to_batch(start, param_ndim))
    assert equal_bits(first_grad, to_batch(grads[0], param_ndim))
    assert torch.equal(second, to_batch(stepped, param_ndim))
    assert param.grad is grad
    assert torch.equal(grad, (numbers % 5).to(data.dtype))
    assert torch.equal(param, stepped * 2 + (numbers % 3).to(data.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hooks_may_write_by_any_means(layout):
    """By index, by view, by out=: whatever reaches the batch reaches the tensor."""

    class Users(optim.ParamTransformingOptimizer):
        def _pre_step_transform_(self, param, optim_group):
            param.grad[1:] = 0
            param.grad[0].flatten(0)[0] += 0
            torch.neg(param.grad, out=param.grad)

        def _post_step_transform_(self, param, optim_group):
            param[0, ...] = 7
            param[-1].fill_(-7)

    data = distinct((3, 2, 4), torch.float32, 1)
    for param_ndim in (None, 0, 1, 2):
        param = leaf(LAYOUTS[layout](data), LAYOUTS[layout](data))
        Users([param], lr=1.0, param_ndim=param_ndim).step()
        batch, grad, start = (to_batch(t, param_ndim) for t in (param.detach(), param.grad, data))
        assert torch.equal(grad[0], -start[0])
        assert not grad[1:].any()
        assert (batch[-1] == -7).all()
        assert (batch[0] == 7).all() or len(batch) == 1
        assert torch.equal(batch[1:-1], start[1:-1])
