"""Plain SGD inside a wrapper has the bits of SGD alone, in fewer passes."""

from itertools import product

import pytest
import torch
from bitwise import same_bits
from engine_cases import unbounded
from test_dispatch_counts import operators
from torch.autograd import forward_ad
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from rai_toolbox.optim import ParamTransformingOptimizer
from rai_toolbox.optim import sgd as module

SETTINGS = [
    {"momentum": momentum, "dampening": dampening, "weight_decay": decay} | flags
    for momentum, dampening, decay, flags in product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), ({}, {"nesterov": True}, {"maximize": True})
    )
    if not ("nesterov" in flags and (momentum == 0 or dampening))
]


def shaped(dtype):
    """Tensors of all lengths that a kernel may split, some of them not contiguous."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*[(n,) for n in range(36)], (8, 125), (3, 43_691), (2, 3, 8, 8)]
    numbers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    numbers += [numbers[-3].T, numbers[-1].to(memory_format=torch.channels_last)]
    return [x.to(dtype, copy=True).requires_grad_() for x in numbers]


def steps(opt, params, seed=1):
    """Five steps; in each, some parameters have no gradient, or one with other strides."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(5):
        for i, x in enumerate(params):
            grad = 3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
            if x.ndim > 1 and (i + step) % 3 == 0:
                grad = grad.mT.contiguous().mT
            x.grad = None if (i + step) % 5 == 0 else grad.to(x.dtype)
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_has_the_bits_of_torch(settings, dtype):
    for largest in (32, 2_000, 200_000):
        ours, theirs = (
            [x for x in shaped(dtype) if x.numel() <= largest][-1 if largest == 32 else 0 :]
            for _ in range(2)
        )
        opt, bare = unbounded(ours, SGD, lr=0.0123, **settings), SGD(theirs, lr=0.0123, **settings)
        steps(opt, ours)
        steps(bare, theirs)
        assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])
        assert same_bits(opt.state_dict()["state"], bare.state_dict()["state"])


def alone(*shape):
    x = torch.randn(shape).requires_grad_()
    x.grad = torch.randn(shape)
    return [x]


LARGE, SMALL = (300, 120), (3, 8)
LOOP, FUSED = ["mul_", "add_", "add_"], ["_fused_sgd_"]


@pytest.mark.parametrize(
    ("shape", "settings", "expected"),
    [
        (LARGE, {}, ["add_"]),
        (LARGE, {"momentum": 0.9}, FUSED),
        (SMALL, {"momentum": 0.9}, LOOP),
        (SMALL, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, FUSED),
        (SMALL, {"weight_decay": 0.1}, FUSED),
        (SMALL, {"maximize": True}, FUSED),
        (LARGE, {"momentum": 0.9, "fused": False}, LOOP),
        (LARGE, {"momentum": 0.9, "foreach": False}, LOOP),
    ],
    ids=str,
)
def test_takes_one_pass_unless_a_user_has_chosen(shape, settings, expected):
    if expected is FUSED and not module._rounds_alike(torch.float32):
        pytest.skip("torch was compiled otherwise here: its fused kernel has other bits")
    opt = unbounded(alone(*shape), SGD, lr=0.1, **settings)
    assert [name for name in operators(opt) if not name.startswith("clamp")] == expected


def test_what_rounds_otherwise_is_not_fused(monkeypatch):
    monkeypatch.setattr(module, "_rounds_alike", lambda dtype: False)
    assert "_fused_sgd_" not in operators(unbounded(alone(*LARGE), SGD, lr=0.1, momentum=0.9))


@pytest.mark.parametrize("changed", [3, -3], ids=["short", "long"])
def test_the_trial_sees_one_bit(monkeypatch, changed):
    plain = module.sgd

    def otherwise(params, *args, fused, **settings):
        plain(params, *args, fused=False, **settings)
        if fused:
            last = [x for x in params if (len(x) > 8) == (changed < 0)][-1]
            last[changed].nextafter_(torch.tensor(torch.inf))

    assert module._trial(torch.float32)
    monkeypatch.setattr(module, "sgd", otherwise)
    assert not module._trial(torch.float32)


def test_the_trial_is_seen_by_nobody(monkeypatch):
    monkeypatch.setattr(module, "_FOUND", {})
    opt = unbounded(alone(*LARGE), SGD, lr=0.1, momentum=0.9)
    before = torch.get_rng_state()
    assert operators(opt) == ["mul_", "add_", "add_", "clamp_"]  # under a mode: without a trial
    opt.step()
    assert module._FOUND.keys() == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_replaced_step_of_the_class_is_called(monkeypatch):
    calls = []
    monkeypatch.setattr(SGD, "step", lambda self, closure=None: calls.append(closure))
    unbounded(alone(*SMALL), SGD, lr=0.1).step()
    assert calls == [None]


def test_sparse_and_complex_gradients_have_the_bits_of_torch():
    def make():
        table, waves = torch.ones(5, 8), torch.ones(8, dtype=torch.complex64)
        table.grad = torch.eye(5, 8).to_sparse() / 3
        waves.grad = torch.linspace(0, 1, 8) * (1 + 2j) / 3
        return [table.requires_grad_(), waves.requires_grad_()]

    ours, theirs = make(), make()
    for _ in range(3):
        with torch.no_grad():
            module.step_sgd(SGD(ours, lr=0.1))
        SGD(theirs, lr=0.1).step()
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])


# What the kernels for lists, and the fused one, do not check

SHORT = {"lr": 0.1, "momentum": 0.9}
LONG = {**SHORT, "nesterov": True}


def wrapped(params, **settings):
    return ParamTransformingOptimizer(params, SGD, **settings)


def tensor(*shape, value=1.0):
    x = torch.full(shape, value).requires_grad_()
    x.grad = torch.full(shape, 0.5)
    return x


def test_autograd_sees_that_a_saved_parameter_has_changed():
    x, y = tensor(8), tensor(8)
    loss = (x * y).sum()
    loss.backward(retain_graph=True)
    wrapped([x], lr=0.1, weight_decay=0.01).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("size", [65, 128])  # (a smaller one is written beyond its end)
def test_a_buffer_of_another_shape_is_an_error(size):
    x = tensor(64)
    opt = wrapped([x], **LONG)
    opt.step()
    opt.state[x]["momentum_buffer"] = torch.ones(size)
    with pytest.raises(RuntimeError, match="size of tensor"):
        opt.step()


def test_forward_derivatives_go_through_a_step():
    x = tensor(8)
    opt = wrapped([x], lr=0.1, weight_decay=0.01)
    with forward_ad.dual_level():
        x.grad = forward_ad.make_dual(torch.ones(8), torch.ones(8))
        opt.step()
        tangent = forward_ad.unpack_dual(x).tangent
    assert torch.allclose(tangent, torch.full((8,), -0.1))


def test_a_prehook_may_add_a_closure():
    calls = []
    opt = wrapped([tensor(8)], lr=0.1)
    opt.inner_opt.register_step_pre_hook(
        lambda opt, args, kwargs: ((*args, lambda: calls.append(1)), kwargs)
    )
    opt.step()
    assert calls == [1]


@pytest.mark.parametrize("settings", [{"nesterov": 1, "momentum": 0.9}, {"maximize": 1}])
def test_flags_may_be_any_true_value(settings):
    ours, theirs = tensor(8), tensor(8)
    opt, bare = wrapped([ours], lr=0.1, **settings), SGD([theirs], lr=0.1, **settings)
    for _ in range(3):
        opt.step()
        bare.step()
    assert torch.equal(ours, theirs)


def test_a_number_beyond_the_dtype_is_an_error():
    with pytest.raises(RuntimeError, match="without overflow"):
        wrapped([tensor(8)], lr=1e39, weight_decay=0.01).step()


def test_negative_zero_stays_with_an_integer_lr_of_zero():
    ours, theirs = tensor(8, value=-0.0), tensor(8, value=-0.0)
    for x, make in ((ours, wrapped), (theirs, SGD)):
        x.grad.neg_()
        make([x], lr=0, weight_decay=0.1).step()
    # (with lr and gradient zero for sure no step that only initializes: the gradient is -0.5)
    assert torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("settings", [LONG, SHORT])
def test_parameters_given_twice_or_overlapping_are_stepped_in_order(settings):
    ends = []
    for make in (wrapped, SGD):
        memory = torch.linspace(0, 1, 24)
        a, b = memory[8:15].requires_grad_(), memory[:16].requires_grad_()
        a.grad, b.grad = torch.full((7,), 0.37), torch.full((16,), 0.7)
        twice = tensor(8)
        with pytest.warns(UserWarning, match="duplicate"):
            opt = make(
                [a, b, twice, twice], weight_decay=0.3 * ("nesterov" in settings), **settings
            )
        for _ in range(4):
            opt.step()
        ends.append(torch.cat([memory, twice.detach()]))
    assert torch.equal(*ends)


def test_groups_are_stepped_in_order_until_one_fails():
    moved, bad = tensor(7), tensor(8)
    opt = wrapped([{"params": [moved], "foreach": False}, {"params": [bad]}], lr=0.1)
    bad.data = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        opt.step()
    assert not torch.equal(moved, torch.ones(7))


def test_vmap_of_a_step():
    def stepped(x, grad):
        x = x.clone()
        x.grad = grad.clone()
        wrapped([x], lr=0.1, weight_decay=0.1).step()
        return x

    assert torch.func.vmap(stepped)(torch.ones(3, 8), torch.ones(3, 8)).shape == (3, 8)


def test_a_gradient_with_the_negative_bit():
    x = tensor(8)
    x.grad = torch._neg_view(x.grad)
    wrapped([x], lr=0.1, weight_decay=0.1).step()
    assert torch.allclose(x.detach(), torch.full((8,), 1.04))


def test_a_gradient_or_average_of_an_inference_tensor_is_an_error():
    x = tensor(64)
    opt = wrapped([x], lr=0.1, momentum=0.9, weight_decay=0.1)
    with torch.inference_mode():
        opt.step()  # which makes the average
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        opt.step()


@pytest.mark.parametrize(
    "settings", [LONG, SHORT, {**SHORT, "weight_decay": 0.01}], ids=["long", "short", "decay"]
)
def test_an_average_that_is_the_parameter(settings):
    ours, theirs = tensor(64), tensor(64)
    opt, bare = wrapped([ours], **settings), SGD([theirs], **settings)
    for _ in range(4):
        opt.step()
        bare.step()
        opt.state[ours]["momentum_buffer"] = ours.data
        bare.state[theirs]["momentum_buffer"] = theirs.data
    assert torch.equal(ours, theirs)


def test_others_see_all_groups_during_a_step():
    params = [tensor(7) for _ in range(3)]  # of an odd length, which is left to SGD
    opt = wrapped([{"params": [x]} for x in params], **LONG)
    opt.step()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(len(opt.param_groups))
            return func(*args, **(kwargs or {}))

    with Watch():
        opt.step()
    assert set(seen) == {3}


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_a_scaler_would_set_is_left_to_torch(name, momentum):
    """Torch refuses it in steps that are not fused; it is not to be ignored."""
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    opt = unbounded([x], SGD, lr=0.1, momentum=momentum)
    opt.step()
    before = x.detach().clone()
    setattr(opt.inner_opt, name, torch.ones(()))
    with pytest.raises(AssertionError):
        opt.step()
    assert torch.equal(x, before)
