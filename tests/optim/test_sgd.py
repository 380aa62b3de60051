"""Plain SGD inside a wrapper has the bits of SGD alone, in fewer passes."""

from itertools import product

import pytest
import torch
from bitwise import same_bits
from engine_cases import unbounded
from test_dispatch_counts import operators
from torch.optim import SGD

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


def test_the_trial_sees_one_bit(monkeypatch):
    plain = module.sgd

    def otherwise(params, *args, fused, **settings):
        plain(params, *args, fused=False, **settings)
        if fused:
            params[-1][-1].nextafter_(torch.tensor(torch.inf))

    trial = module._rounds_alike.__wrapped__
    monkeypatch.setattr(module, "sgd", otherwise)
    assert not trial(torch.float32)


def test_the_trial_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    module._rounds_alike.__wrapped__(torch.float64)
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
            module.step_sgd(SGD(ours, lr=0.1), SGD.step)
        SGD(theirs, lr=0.1).step()
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])
