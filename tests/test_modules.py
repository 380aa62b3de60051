"""freeze / frozen / evaluating: all comes back exactly as it was, whatever happens between."""

import gc
import weakref
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rai_toolbox.modules import evaluating, freeze, frozen, modules_in


def leaf(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.ones(shape, requires_grad=grad)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
    )


def flags(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters()}


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: sub.training for name, sub in module.named_modules()}


# --- freeze: what it takes ---------------------------------------------------------------------

HOLDERS = {
    "tensors": lambda a, b: [a, b],
    "list": lambda a, b: [[a, b]],
    "generator": lambda a, b: [(x for x in (a, b))],
    "nested": lambda a, b: [[(a,), [[b]]]],
    "module": lambda a, b: [nn.ParameterList([a, b])],
    "optimizer": lambda a, b: [torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.1)],
    "group": lambda a, b: [{"params": [a, b], "lr": 0.1}],
    "group of one tensor": lambda a, b: [{"params": a}, b],
    "group of a generator": lambda a, b: [{"params": (x for x in (a, b))}],
    "param_groups": lambda a, b: [torch.optim.SGD([a, b], lr=0.1).param_groups],
    "named": lambda a, b: [nn.ParameterDict({"a": a, "b": b}).named_parameters()],
    "group of named": lambda a, b: [{"params": [("a", a), ("b", b)]}],
    "set": lambda a, b: [{a, b}],
    "mixed": lambda a, b: [a, torch.optim.SGD([b], lr=0.1), nn.ParameterList([a])],
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS.keys())
@pytest.mark.parametrize("switch", ["freeze", "with", "decorator twice"])
def test_every_kind_of_item(holder, switch):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    items = holder(a, b)

    def states():
        return a.requires_grad, b.requires_grad

    if switch == "freeze":
        restore = freeze(*items)
        assert states() == (False, False)
        restore()
    elif switch == "with":
        with frozen(*items):
            assert states() == (False, False)
    else:
        inside = frozen(*items)(states)
        assert inside() == (False, False)
        assert states() == (True, True)
        assert inside() == (False, False)  # a generator is not used up by the first call
    assert states() == (True, True)


def test_dtypes_and_shapes():
    tensors = [
        torch.ones(2, dtype=d, requires_grad=True) for d in (torch.bfloat16, torch.complex64)
    ]
    tensors += [leaf(0, 3), leaf()]
    integers, no_grad = torch.arange(3), leaf(2, grad=False)
    with frozen(tensors, integers, no_grad):
        assert not any(t.requires_grad for t in [*tensors, integers, no_grad])
    assert all(t.requires_grad for t in tensors)
    assert not integers.requires_grad
    assert not no_grad.requires_grad


def test_nothing_is_fine():
    freeze()()
    freeze([], {"params": []}, nn.ReLU())()
    with frozen():
        pass


def test_values_gradients_and_buffers_are_left_alone():
    model = net()
    model(torch.randn(5, 3)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in grads]
    with frozen(model):
        out = model(torch.randn(5, 3))
        assert not out.requires_grad
    assert all(
        p.grad is g and torch.equal(g, c)
        for p, g, c in zip(model.parameters(), grads, copies, strict=True)
    )


def test_gradients_reach_the_input_of_a_frozen_model():
    model, x = net(), leaf(5, 3)
    with frozen(model):
        model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())


# --- freeze: what it restores ------------------------------------------------------------------


def test_mixed_flags_are_restored_one_by_one():
    model = net()
    model[0].weight.requires_grad_(False)
    model[2][1].bias.requires_grad_(False)
    before = flags(model)
    restore = freeze(model)
    assert not any(flags(model).values())
    restore()
    assert flags(model) == before


@pytest.mark.parametrize("flag", [True, False])
def test_the_same_tensor_many_times(flag):
    x = leaf(2, grad=flag)
    opt = torch.optim.SGD([x], lr=0.1)
    with frozen(x, [x, x], opt, opt.param_groups, {"params": x}):
        assert not x.requires_grad
    assert x.requires_grad is flag


def test_flags_changed_in_between_go_back_too():
    x, y = leaf(2), leaf(2, grad=False)
    restore = freeze(x, y)
    x.requires_grad_(True)
    y.requires_grad_(True)
    restore()
    assert x.requires_grad
    assert not y.requires_grad


def test_nested_restores():
    x, y = leaf(2), leaf(2)
    outer = freeze(x)
    inner = freeze(x, y)
    inner()
    assert not x.requires_grad  # it was frozen when `inner` began
    assert y.requires_grad
    outer()
    assert x.requires_grad


def test_restoring_goes_on_past_a_tensor_that_became_a_result():
    x, frozen_before, z = leaf(2), leaf(2, grad=False), leaf(2)
    restore = freeze(z, frozen_before, x)
    frozen_before.mul_(leaf(2))  # now has a graph, and its flag cannot be changed
    restore()
    assert x.requires_grad
    assert z.requires_grad
    assert frozen_before.grad_fn is not None


def test_restore_does_not_outlive_its_tensors():
    x = leaf(2)
    ref = weakref.ref(x)
    freeze(x)()
    with frozen(x):
        pass
    del x
    gc.collect()
    assert ref() is None


# --- freeze: what it refuses -------------------------------------------------------------------

BAD = {
    "int": 1,
    "none": None,
    "str": "weight",
    "bytes": b"weight",
    "dict without params": {"weight": torch.ones(2)},
    "empty dict": {},
    "list with a number": [torch.ones(2), 1.0],
    "group with a number": {"params": [1.0]},
    "class": nn.Linear,
    "object": SimpleNamespace(params=[torch.ones(2)]),
    "function": torch.ones,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("switch", [freeze, frozen])
def test_unsupported_items_change_nothing(bad, switch):
    x, model = leaf(2), net()
    with pytest.raises(TypeError, match="`items` must be tensors, modules, optimizers"):
        switch(x, model, bad)
    assert x.requires_grad
    assert all(flags(model).values())


def test_a_string_and_a_tensor_as_arguments_are_no_named_pair():
    x = leaf(2)
    with pytest.raises(TypeError, match="'weight' of type str"):
        freeze("weight", x)
    assert x.requires_grad


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"params": [t]}])
def test_non_leaf_is_refused_before_anything_changes(wrap):
    x, model = leaf(2, 3), net()
    result = 2 * x
    message = r"`items` must hold leaf tensors only .* got a non-leaf tensor of shape \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        freeze(x, model, wrap(result))
    with pytest.raises(ValueError, match=message), frozen(x, model, wrap(result)):
        pytest.fail("entered")
    assert x.requires_grad
    assert result.requires_grad
    assert all(flags(model).values())


def test_a_failed_entry_leaves_the_manager_usable():
    x, y = leaf(2), leaf(2, grad=False)
    manager = frozen(x, y)
    y.mul_(leaf(2))  # now a result
    with pytest.raises(ValueError, match="leaf"), manager:
        pytest.fail("entered")
    assert x.requires_grad
    y.detach_()
    with manager:
        assert not x.requires_grad
    assert x.requires_grad


def test_plain_attributes_of_a_module_are_not_its_parameters():
    model = nn.Linear(2, 2)
    weight = model.weight
    del model.weight
    model.weight = 2 * weight
    with frozen(model):
        assert not model.bias.requires_grad
        assert model.weight.requires_grad
    assert model.bias.requires_grad


# --- frozen ------------------------------------------------------------------------------------


def test_restored_after_an_exception():
    model = net()
    model[0].bias.requires_grad_(False)
    before = flags(model)
    with pytest.raises(KeyError, match="mine"), frozen(model):
        raise KeyError("mine")
    assert flags(model) == before

    @frozen(model)
    def fails():
        assert not any(flags(model).values())
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            fails()
        assert flags(model) == before


def test_one_manager_many_times_and_inside_itself():
    x = leaf(2)
    manager = frozen(x)
    for _ in range(2):
        with manager:
            with manager:
                assert not x.requires_grad
            assert not x.requires_grad
        assert x.requires_grad


def test_a_recursive_function():
    x = leaf(2)
    seen = []

    @frozen(x)
    def down(n: int) -> int:
        """Count down."""
        seen.append(x.requires_grad)
        result = down(n - 1) if n else 0
        seen.append(x.requires_grad)
        return result

    assert down(3) == 0
    assert seen == [False] * 8
    assert x.requires_grad
    assert down.__name__ == "down"
    assert down.__doc__ == "Count down."


def test_each_call_looks_at_flags_and_parameters_anew():
    model = nn.Sequential(nn.Linear(2, 2))

    @frozen(model)
    def inside():
        return any(flags(model).values())

    assert inside() is False
    model.append(nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = flags(model)
    assert before == {"0.weight": True, "0.bias": False, "1.weight": True, "1.bias": True}
    assert inside() is False
    assert flags(model) == before


def test_groups_added_to_an_optimizer_later_are_frozen():
    x, y = leaf(2), leaf(2)
    opt = torch.optim.SGD([x], lr=0.1)
    manager = frozen(opt)
    opt.add_param_group({"params": y})
    with manager:
        assert not y.requires_grad
    assert y.requires_grad


def test_decorates_methods():
    class Solver:
        x = leaf(2)

        @frozen(x)
        def solve(self, value):
            return value, self.x.requires_grad

    assert Solver().solve(3) == (3, False)
    assert Solver.x.requires_grad


def generator():
    yield


async def coroutine():
    pass


async def async_generator():
    yield


@pytest.mark.parametrize("fn", [generator, coroutine, async_generator])
@pytest.mark.parametrize("manager", [frozen, evaluating])
def test_functions_whose_body_runs_later_are_refused(fn, manager):
    with pytest.raises(TypeError, match=f"`{manager.__name__}` must decorate a plain function"):
        manager(nn.Linear(1, 1))(fn)


# --- evaluating --------------------------------------------------------------------------------


def test_each_submodule_gets_its_own_mode_back():
    model = net()
    model[1].eval()
    model[2].training = False  # the container alone: its children stay in training
    before = modes(model)
    assert before == {"": True, "0": True, "1": False, "2": False, "2.0": True, "2.1": True}
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before


@pytest.mark.parametrize("train", [True, False])
def test_uniform_modes(train):
    model = net().train(train)
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == before


def test_shared_submodules_and_the_same_module_twice():
    shared = nn.Dropout().eval()
    first, second = nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.ReLU().eval(), shared)
    before = modes(first), modes(second)
    with evaluating(first, second, first, shared):
        assert not any({**modes(first), **modes(second)}.values())
    assert (modes(first), modes(second)) == before


class FrozenNorm(nn.Sequential):
    """The usual override: batch norms stay in eval mode when the model trains."""

    def train(self, mode: bool = True):
        super().train(mode)
        for sub in self.modules():
            if isinstance(sub, nn.BatchNorm1d):
                sub.eval()
        return self


class AlwaysDropout(nn.Dropout):
    """Monte-Carlo dropout: is never switched off."""

    def train(self, mode: bool = True):
        return super().train(True)


class Refuses(nn.Module):
    def train(self, mode: bool = True):
        raise NotImplementedError("no modes")


def test_overridden_train():
    model = FrozenNorm(nn.Linear(2, 2), nn.BatchNorm1d(2), AlwaysDropout()).train()
    model[1].training = True  # by hand, against its `train`
    before = modes(model)
    assert before == {"": True, "0": True, "1": True, "2": True}
    with evaluating(model):
        assert modes(model) == {"": False, "0": False, "1": False, "2": True}
    assert modes(model) == before


def test_leaving_calls_no_train():
    calls = []

    class Records(nn.Module):
        def train(self, mode: bool = True):
            calls.append(mode)
            return super().train(mode)

    with evaluating(Records()):
        assert calls == [False]
    assert calls == [False]


def test_a_module_that_refuses_undoes_the_others():
    model = net()
    model[1].eval()
    before = modes(model)
    with pytest.raises(NotImplementedError, match="no modes"), evaluating(model, Refuses()):
        pytest.fail("entered")
    assert modes(model) == before
    container = nn.Sequential(nn.ReLU(), nn.Dropout(), Refuses())
    before = modes(container)
    with pytest.raises(NotImplementedError, match="no modes"), evaluating(container):
        pytest.fail("entered")
    assert modes(container) == before


def test_evaluating_after_an_exception():
    model = net()
    model[1].eval()
    before = modes(model)
    with pytest.raises(KeyError, match="mine"), evaluating(model):
        raise KeyError("mine")
    assert modes(model) == before

    @evaluating(model)
    def fails():
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            fails()
        assert modes(model) == before


def test_evaluating_inside_itself_and_as_decorator():
    model = net()
    manager = evaluating(model)

    @manager
    def down(n):
        assert not any(modes(model).values())
        model.train()
        if n:
            down(n - 1)
            assert all(modes(model).values())  # as the inner call found it

    for _ in range(2):
        down(3)
        assert all(modes(model).values())
    model.eval()
    down(1)
    assert not any(modes(model).values())


def test_submodules_replaced_inside():
    model = net()
    old = model[2]
    with evaluating(model):
        model[2] = nn.Dropout().eval()
    assert all(modes(old).values())
    assert model[2].training is False  # not known at entry: left alone


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_modules(compiled):
    model = net()
    model[1].eval()
    before = modes(model)
    wrapped = torch.compile(model, backend="eager") if compiled else nn.Sequential(model)
    with evaluating(wrapped):
        assert not any(modes(model).values())
        assert not wrapped.training
    assert modes(model) == before
    assert wrapped.training


def test_no_module():
    with evaluating():
        pass


@pytest.mark.parametrize("bad", [None, 1, torch.ones(2), nn.Linear, [nn.ReLU()], torch.relu])
def test_evaluating_refuses_what_is_no_module(bad):
    model = net()
    with pytest.raises(TypeError, match=r"`modules` must be of type torch\.nn\.Module, got "):
        evaluating(model, bad)
    assert all(modes(model).values())


def test_together():
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = flags(model), modes(model)
    with frozen(model), evaluating(model):
        assert not any(flags(model).values())
        assert not any(modes(model).values())
    assert (flags(model), modes(model)) == before


# --- modules in callables -------------------------------------------------------------------------

A_GLOBAL = nn.Linear(2, 2)


class Slots:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class OfAGlobal:
    def __call__(self, x):
        return A_GLOBAL(x)


def of_a_global(x):
    return A_GLOBAL(x)


def test_modules_in_callables():
    one, other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    assert modules_in(one) == [one]
    assert modules_in(other) == [other]  # and not what is inside
    assert {*modules_in(lambda x: other(one(x)))} == {one, other}
    assert modules_in(Slots(one)) == modules_in(Slots(one).__call__) == [one]
    assert modules_in(lru_cache(lambda x: one(x))) == [one]
    for call in (of_a_global, lambda x: of_a_global(x), OfAGlobal(), OfAGlobal().__call__):
        assert modules_in(call) == [A_GLOBAL]
    for call in (torch.relu, nn.functional.softmax, nn.ReLU, lambda x: x, None):
        assert modules_in(call) == []


def test_modules_that_a_module_holds_in_collections_and_what_names_a_namespace():
    plain, held, of_class = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.Sequential(nn.Linear(1, 1), nn.Identity())
    model[1].others = {"all": [(held, model)]}  # also itself
    vars(model)["plain"] = plain
    assert modules_in(model) == [model, plain, held]
    Namespace.net = of_class
    assert modules_in(lambda data: Namespace.net(data)) == [of_class]


class Namespace:
    net: nn.Module


def test_the_search_ends():
    one, data = nn.Linear(2, 2), [[torch.ones(1), number] for number in range(10_000)]
    data.append(data)
    assert modules_in(lambda x: (one(x), data)) == [one]
