"""Adam and AdamW inside a wrapper have the bits of those alone, in fewer calls."""

from itertools import product

import pytest
import torch
from bitwise import same_bits
from engine_cases import unbounded
from test_dispatch_counts import operators
from test_sgd import steps
from torch.optim import Adam, AdamW

SETTINGS = [
    {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay}
    for amsgrad, maximize, decay in product((False, True), (False, True), (0, 0.02))
]
both_kinds = pytest.mark.parametrize("kind", [Adam, AdamW])


def parameters(dtype=torch.float32):
    """Tensors of several lengths and strides, in more parts than one."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*[(n,) for n in range(20)], (8, 125), *[(3, 10_900)] * 3, (2, 3, 8, 8), ()]
    numbers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    numbers += [numbers[20].T, numbers[-2].to(memory_format=torch.channels_last)]
    return [x.to(dtype, copy=True).requires_grad_() for x in numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@both_kinds
def test_has_the_bits_of_torch(kind, settings, dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    opt, bare = (
        make([{"params": xs[:9]}, {"params": xs[9:], "lr": 0.03}], **options, **settings)
        for make, xs, options in ((unbounded, ours, {"InnerOpt": kind}), (kind, theirs, {}))
    )
    steps(opt, ours)
    steps(bare, theirs)
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])
    assert same_bits(opt.state_dict()["state"], bare.state_dict()["state"])


def with_gradients(params):
    for x in params:
        x.requires_grad_().grad = torch.ones_like(x)
    return params


@pytest.mark.parametrize("kind_of_memory", ["parameters", "a gradient"])
@both_kinds
def test_what_shares_memory_has_the_bits_of_torch(kind, kind_of_memory):
    def made():
        x = torch.arange(10.0)
        params = with_gradients([x[:6], x[4:]] if kind_of_memory == "parameters" else [x, 2 * x])
        if kind_of_memory == "a gradient":  # which the first update changes
            params[1].grad = params[0].detach()
        return params

    ours, theirs = made(), made()
    opt, bare = unbounded(ours, kind), kind(theirs)
    for _ in range(3):
        opt.step()
        bare.step()
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])


@both_kinds
def test_steps_that_share_memory_have_the_bits_of_torch(kind):
    ours, theirs = (with_gradients([torch.ones(4), torch.ones(5)]) for _ in range(2))
    opt, bare = unbounded(ours, kind), kind(theirs)
    for made, inner, params in ((opt, opt.inner_opt, ours), (bare, bare, theirs)):
        made.step()
        count = torch.tensor(5.0)
        for x in params:
            inner.state[x]["step"] = count.view(())  # another tensor each time
        made.step()
    assert same_bits([x.detach() for x in ours], [x.detach() for x in theirs])


@pytest.mark.parametrize(
    ("settings", "together"),
    [({}, True), ({"lr": torch.tensor(0.1)}, False), ({"foreach": False}, False)],
    ids=str,
)
@both_kinds
def test_operators_on_lists_unless_a_user_has_chosen(kind, settings, together):
    opt = unbounded(with_gradients([torch.ones(4, 3), torch.ones(5)]), kind, **settings)
    assert ("_foreach_lerp_" in operators(opt)) == together
    assert opt.param_groups[0]["foreach"] is settings.get("foreach")


@both_kinds
def test_a_sparse_gradient_is_an_error_before_any_change(kind):
    params = with_gradients([torch.ones(4, 3), torch.ones(5), torch.ones(2)])
    opt = unbounded(params, kind)
    opt.step()
    before = [x.detach().clone() for x in params]
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises((RuntimeError, ValueError), match="sparse|dense"):
        opt.step()
    assert same_bits([x.detach() for x in params], before)


@both_kinds
def test_a_replaced_step_of_the_class_is_called(monkeypatch, kind):
    calls = []
    opt = unbounded(with_gradients([torch.ones(4), torch.ones(4)]), kind)
    opt.step()
    monkeypatch.setattr(kind, "step", lambda self, closure=None: calls.append(closure))
    opt.step()
    assert calls == [None]
