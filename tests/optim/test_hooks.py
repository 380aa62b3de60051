"""The two documented hooks, by which users extend the library."""

import copy
from functools import partial
from types import MethodType

import pytest
import torch
from bitwise import same_bits
from engine_cases import WRAPPERS, new_gradients, tensors
from torch.optim import LBFGS, SGD, Adam, Optimizer

from rai_toolbox.optim import (
    L1NormedGradientOptim,
    L2ProjectedOptim,
    LinfProjectedOptim,
    ParamTransformingOptimizer,
    SignedGradientOptim,
)

# How each shape is seen: the documented table, and what follows from the rule for other shapes.
VIEWS = {
    (3, 5, 2): {
        0: (30, 1),
        1: (15, 2),
        2: (3, 5, 2),
        None: (1, 3, 5, 2),
        -1: (3, 5, 2),
        -2: (15, 2),
        -3: (30, 1),
        3: (1, 3, 5, 2),
    },
    (4,): {0: (4, 1), 1: (1, 4), None: (1, 4), -1: (4, 1)},
    (): {0: (1, 1), None: (1, 1)},
    (0, 3): {0: (0, 1), 1: (0, 3), None: (1, 0, 3), -1: (0, 3)},
}
BY_VIEW = [(s, k) for s, ndims in VIEWS.items() for k in ndims]


def permuted(tensor):
    """An equal tensor, in memory in the reverse order of dims: not every view of it exists."""
    dims = tuple(reversed(range(tensor.ndim)))
    return tensor.detach().permute(dims).contiguous().permute(dims)


# --- who overrides what, in which spelling --------------------------------------------------------


def hooked(pre=None, post=None, base=ParamTransformingOptimizer, spelling="optim_group"):
    """A user's subclass: `pre(param, group)` and `post(param, group)` are its hooks, if given."""

    def by_name(function):
        def hook(self, param, optim_group):
            function(param, optim_group)

        return hook

    def by_keywords(function):
        def hook(self, param, **kwargs):
            assert kwargs.keys() == {"optim_group"}
            function(param, kwargs["optim_group"])

        return hook

    wrap = by_name if spelling == "optim_group" else by_keywords
    given = {"_pre_step_transform_": pre, "_post_step_transform_": post}
    return type("Hooked", (base,), {k: wrap(f) for k, f in given.items() if f is not None})


spellings = pytest.mark.parametrize("spelling", ["optim_group", "**kwargs"])


@spellings
@pytest.mark.parametrize("hooks", [("pre",), ("post",), ("pre", "post")], ids="-".join)
@pytest.mark.parametrize(("shape", "param_ndim"), BY_VIEW)
def test_hooks_get_views_and_the_live_group(hooks, spelling, shape, param_ndim):
    calls = []

    def hook(name, param, group):
        assert not torch.is_grad_enabled()
        assert group is opt.param_groups[0]
        calls.append(name)
        assert param.shape == VIEWS[shape][param_ndim]
        if name == "pre":
            assert param.grad.shape == param.shape
            assert torch.equal(param, x.reshape(param.shape))
            assert torch.equal(param.grad, grad.reshape(param.shape))
            param.grad.mul_(2).add_(1)
        else:
            param.mul_(4).sub_(1)

    (contiguous,) = tensors(shape)
    for x in (contiguous, permuted(contiguous).requires_grad_()):
        start, grad = x.detach().clone(), torch.randn(shape)
        x.grad = grad.clone() if x.is_contiguous() else permuted(grad)
        kept = x.grad
        named = {name: partial(hook, name) for name in hooks}
        opt = hooked(**named, spelling=spelling)([x], param_ndim=param_ndim, lr=0.5)
        calls.clear()
        opt.step()
        assert calls == list(hooks)
        assert x.grad is kept  # in place, also where the strides fit no view
        new_grad = grad * 2 + 1 if "pre" in hooks else grad
        stepped = start.add(new_grad, alpha=-0.5)
        assert torch.equal(x.grad, new_grad)
        assert torch.equal(x.detach(), stepped * 4 - 1 if "post" in hooks else stepped)


def test_order_hook_scale_bias_inner_post():
    """Each stage sees what the ones before it have made; powers of two, so that all is exact."""
    seen = []

    class Inner(SGD):
        def step(self, closure=None):
            seen.append(("inner", x.grad.tolist()))
            return super().step(closure)

    def pre(param, group):
        seen.append(("pre", param.grad.flatten().tolist()))
        param.grad.add_(1)

    def post(param, group):
        seen.append(("post", param.flatten().tolist()))
        param.neg_()

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    opt = hooked(pre, post)([x], Inner, lr=0.5, grad_scale=4.0, grad_bias=-2.0)
    x.grad = torch.tensor([3.0, -5.0])
    opt.step()
    assert seen == [
        ("pre", [3.0, -5.0]),
        ("inner", [14.0, -18.0]),  # (g + 1) * 4 - 2
        ("post", [-6.0, 11.0]),
    ]
    assert x.tolist() == [6.0, -11.0]


def test_all_gradients_are_transformed_before_the_inner_step_and_all_parameters_after_it():
    seen = []

    class Inner(SGD):
        def step(self, closure=None):
            seen.append("inner")

    params = tensors(2, 3, 4)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    hooks = [lambda p, _, n=n: seen.append((n, p.numel())) for n in ("pre", "post")]
    hooked(*hooks)(groups, Inner, param_ndim=None).step()
    both = [[(name, n) for n in (2, 3, 4)] for name in ("pre", "post")]
    assert seen == [*both[0], "inner", *both[1]]


def test_parameters_without_a_gradient_get_the_second_hook_only_and_frozen_ones_none():
    seen = []
    with_grad, without = tensors(2, 3)
    without.grad = None
    fixed = torch.ones(4)  # does not require one
    hooks = [lambda p, _, n=n: seen.append((n, p.numel())) for n in ("pre", "post")]
    opt = hooked(*hooks)([with_grad, without, fixed], param_ndim=None)
    opt.step()
    assert seen == [("pre", 2), ("post", 2), ("post", 3)]
    assert without.grad is None
    assert fixed.grad is None


@pytest.mark.parametrize("setting", ["grad_scale", "grad_bias"])
@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_without_any_gradient_there_is_only_the_projection(make, setting):
    (x,), (y,) = tensors((2, 3)), tensors((2, 3))
    groups = [{"params": [x], setting: 2.0}, {"params": [y], "param_ndim": None}]
    opt = make(params=groups)
    x.grad = None
    opt.step()
    assert x.grad is None
    y.grad = None
    opt.step()  # in no group there is one
    assert y.grad is None


def test_with_a_closure_the_first_hook_follows_each_evaluation():
    seen = []

    def pre(param, group):
        assert not torch.is_grad_enabled()
        seen.append("pre")
        param.grad.mul_(0.5)

    def closure():
        assert torch.is_grad_enabled()
        seen.append("closure")
        opt.zero_grad()
        loss = (x - 3).square().sum()
        loss.backward()
        return loss

    x = torch.tensor([1.0, 5.0], requires_grad=True)
    opt = hooked(pre, lambda param, group: seen.append("post"))([x], LBFGS, max_iter=4)
    loss = opt.step(closure)
    evaluations = seen.count("closure")
    assert evaluations > 1
    assert seen == ["closure", "pre"] * evaluations + ["post"]
    assert loss.item() == 8.0


# --- settings per group ---------------------------------------------------------------------------


def test_settings_per_group():
    seen = []
    params = tensors((2, 3), (2, 3), (2, 3))
    grads = [p.grad.clone() for p in params]
    more = [{}, {"param_ndim": None, "grad_scale": 4.0}, {"param_ndim": 0, "grad_bias": 8.0}]
    groups = [{"params": [p], **settings} for p, settings in zip(params, more, strict=True)]

    def pre(param, group):
        seen.append((tuple(param.shape), group["mine"]))
        param.grad.add_(group["mine"])

    opt = hooked(pre)(
        [*groups[:2]], param_ndim=1, grad_scale=2.0, grad_bias=1.0, defaults={"mine": 16}
    )
    opt.add_param_group({**groups[2], "mine": 32})
    opt.step()
    assert seen == [((2, 3), 16), ((1, 2, 3), 16), ((6, 1), 32)]
    expected = [(16, 2.0, 1.0), (16, 4.0, 1.0), (32, 2.0, 8.0)]
    for param, grad, (term, scale, bias) in zip(params, grads, expected, strict=True):
        assert torch.equal(param.grad, (grad + term) * scale + bias)

    # all of them may change from step to step
    seen.clear()
    for group in opt.param_groups:
        group.update(param_ndim=-1, mine=0, grad_scale=0.0, grad_bias=0.5)
    opt.step()
    assert seen == [((2, 3), 0)] * 3
    assert all(torch.equal(param.grad, torch.full((2, 3), 0.5)) for param in params)


class Shifted(ParamTransformingOptimizer):
    """As code written against older versions spells it, dict and all."""

    def __init__(self, params=None, InnerOpt=SGD, *, foo, defaults=None, **kw):
        defaults = {} if defaults is None else defaults
        defaults.setdefault("foo", foo)
        super().__init__(params, InnerOpt, defaults=defaults, **kw)

    def _pre_step_transform_(self, param, optim_group):
        param.grad += optim_group["foo"]


def test_settings_by_the_older_idiom():
    params = tensors(2, 3, 4)
    grads = [p.grad.clone() for p in params]
    opt = Shifted([{"params": params[0]}, {"params": params[1], "foo": 2.0}], Adam, foo=1.0, lr=0.1)
    opt.add_param_group({"params": params[2]})
    assert [group["foo"] for group in opt.param_groups] == [1.0, 2.0, 1.0]
    assert [group["lr"] for group in opt.param_groups] == [0.1] * 3
    opt.param_groups[2]["foo"] = 4.0
    opt.step()
    for param, grad, foo in zip(params, grads, (1.0, 2.0, 4.0), strict=True):
        assert torch.equal(param.grad, grad + foo)
    assert Shifted(params, foo=1.0, defaults={"foo": 3.0}).param_groups[0]["foo"] == 3.0
    fresh = Shifted([{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2]}], foo=9)
    fresh.load_state_dict(opt.state_dict())
    assert [group["foo"] for group in fresh.param_groups] == [1.0, 2.0, 4.0]


# --- what a hook may do with `param.grad` ---------------------------------------------------------


def _divided(param):
    param.grad /= 2


def _by_slice(param):
    param.grad[:] = param.grad / 2


def _by_data(param):
    param.grad.data.div_(2)


def _by_out(param):
    torch.div(param.grad, 2, out=param.grad)


IN_PLACE = [_divided, _by_slice, _by_data, _by_out, lambda param: param.grad.mul_(0.5)]


def _another(param):
    param.grad = param.grad / 2


def _none(param):
    param.grad = None


def _deleted(param):
    del param.grad


def _equal(param):
    param.grad = param.grad.clone()


LAYOUTS = {
    "as it is": lambda grad: grad,
    "flattened": lambda grad: grad,
    "permuted": permuted,
}
NDIMS = {"as it is": -1, "flattened": None, "permuted": 0}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@pytest.mark.parametrize("change", IN_PLACE, ids=lambda f: f.__name__.strip("_<>"))
def test_gradients_are_changed_in_place(change, layout):
    (x,) = tensors((2, 3, 4))
    grad = x.grad.clone()
    x.grad = LAYOUTS[layout](grad.clone())
    hooked(lambda param, group: change(param))([x], param_ndim=NDIMS[layout]).step()
    assert torch.equal(x.grad, grad / 2)


@layouts
@pytest.mark.parametrize("change", [_another, _none, _deleted, _equal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given_by", ["subclass", "instance"])
def test_another_gradient_is_refused(change, layout, given_by):
    (x,) = tensors((2, 3, 4))
    before, grad = x.detach().clone(), x.grad.clone()
    kept = x.grad = LAYOUTS[layout](grad.clone())
    opt = hooked(lambda param, group: change(param))([x], param_ndim=NDIMS[layout])
    if given_by == "instance":
        opt = SignedGradientOptim([x], param_ndim=NDIMS[layout])
        opt._pre_step_transform_ = lambda param, optim_group: change(param)
    name = type(opt).__name__
    with pytest.raises(ValueError, match=rf"{name}\._pre_step_transform_ must .* in place"):
        opt.step()
    assert x.grad is kept
    assert torch.equal(x.grad, grad)
    assert torch.equal(x.detach(), before)


def _data_of_grad(param, group):
    param.grad.data = param.grad.data / 2


def _data_of_param(param, group):
    param.data = param.data / 2


@layouts
@pytest.mark.parametrize("hook", [_data_of_grad, _data_of_param], ids=lambda f: f.__name__)
def test_new_data_counts_in_every_view(hook, layout):
    """What works for tensors seen in their own shape works in other views, too."""
    (x,) = tensors((2, 3, 4))
    start, grad = x.detach().clone(), x.grad.clone()
    x.grad = LAYOUTS[layout](x.grad)
    which = "pre" if hook is _data_of_grad else "post"
    opt = hooked(**{which: hook})([x], param_ndim=NDIMS[layout], lr=0.0)
    opt.step()
    actual, given = (x.grad, grad) if which == "pre" else (x.detach(), start)
    assert torch.equal(actual, given / 2)


@pytest.mark.parametrize("which", ["pre", "post"])
def test_what_a_hook_raises_passes_through(which):
    def fails(param, group):
        raise KeyError("mine")

    (x,) = tensors((2, 3))
    grad, values = x.grad, x.grad.clone()
    opt = hooked(**{which: fails})([x], param_ndim=None)
    with pytest.raises(KeyError, match="mine"):
        opt.step()
    assert torch.is_grad_enabled()
    assert x.grad is grad
    assert torch.equal(x.grad, values)
    assert x.is_leaf and x.requires_grad


# --- subclasses of the named classes --------------------------------------------------------------


def subclass_calling_super(cls, names):
    """A subclass that adds nothing, but goes through the per-tensor hooks."""

    def calling(name):
        def hook(self, param, optim_group):
            return getattr(super(made, self), name)(param, optim_group=optim_group)

        return hook

    made = type(cls.__name__, (cls,), {name: calling(name) for name in names})
    return made


PRE, POST = "_pre_step_transform_", "_post_step_transform_"
NAMED = {
    name: make if isinstance(make, partial) else partial(make)
    for name, make in WRAPPERS.items()
    if name != "Chained"
}


@pytest.mark.parametrize("names", [(PRE,), (POST,), (PRE, POST)], ids="-".join)
@pytest.mark.parametrize("param_ndim", [None, -1, -2, 0, 1, 2])
@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED.keys())
def test_a_subclass_that_calls_super_is_the_class(make, param_ndim, names):
    runs = []
    for cls in (make.func, subclass_calling_super(make.func, names)):
        params = tensors((2, 3), (4, 2, 3), (3, 3))
        params.append(permuted(params[1]).requires_grad_())
        opt = cls(params=params, **make.keywords, param_ndim=param_ndim)
        for step in range(3):
            new_gradients(params, step)
            params[3].grad = permuted(params[3].grad)
            opt.step()
        runs.append([p.detach() for p in params] + [p.grad for p in params])
    # all are float32; sums over other strides may differ in float64's last place, so in one of ours
    torch.testing.assert_close(*runs, rtol=2**-23, atol=0)
    contiguous = [[t for t in run if t.is_contiguous()] for run in runs]
    assert same_bits(*contiguous)


def test_a_subclass_adds_to_its_class():
    class Damped(L2ProjectedOptim):
        def _pre_step_transform_(self, param, optim_group):
            super()._pre_step_transform_(param, optim_group)
            param.grad *= 0.5

        def _post_step_transform_(self, param, **kwargs):
            super()._post_step_transform_(param, **kwargs)
            param.clamp_(min=0)

    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    opt = Damped([x], param_ndim=None, lr=1.0, epsilon=0.5)
    x.grad = torch.tensor([-2.0, 0.0])
    opt.step()
    assert x.grad.tolist() == [-0.5, 0.0]
    expected = torch.tensor([0.0, 0.5 / 1.25**0.5])  # of (-.5, 1), projected
    torch.testing.assert_close(x.detach(), expected)


def test_a_hook_replaces_that_of_its_class():
    class Other(LinfProjectedOptim):
        def _pre_step_transform_(self, param, optim_group):
            pass  # no sign

    x = torch.tensor([0.0, 0.0], requires_grad=True)
    x.grad = torch.tensor([0.5, -8.0])
    Other([x], epsilon=2.0, lr=1.0).step()
    assert x.tolist() == [-0.5, 2.0]


def test_hooks_by_a_mixin_and_of_several_classes():
    class Halving:
        def _pre_step_transform_(self, param, optim_group):
            super()._pre_step_transform_(param, optim_group)
            param.grad /= 2

    class Nonnegative:
        def _post_step_transform_(self, param, optim_group):
            super()._post_step_transform_(param, optim_group)
            param.clamp_(min=0)

    class Both(Nonnegative, Halving, L1NormedGradientOptim):
        pass

    x = torch.tensor([1.0, 0.25], requires_grad=True)
    x.grad = torch.tensor([2.0, 2.0])
    Both([x], param_ndim=None, lr=2.0).step()
    assert x.grad.tolist() == [0.25, 0.25]
    assert x.tolist() == [0.5, 0.0]


# --- hooks put on afterwards ----------------------------------------------------------------------


def _zeros(param, optim_group):
    (param if param.grad is None else param.grad).zero_()


@pytest.mark.parametrize("base", [ParamTransformingOptimizer, SignedGradientOptim])
@pytest.mark.parametrize("on", ["instance", "instance, bound", "class"])
def test_hooks_may_be_patched(base, on, monkeypatch):
    cls = type("Patched", (base,), {})
    (x,) = tensors((2, 3))
    before = x.detach().clone()
    opt = cls([x], lr=1.0)

    def as_method(self, param, optim_group):
        assert self is opt
        _zeros(param, optim_group)

    if on == "instance":
        opt._pre_step_transform_ = _zeros
    elif on == "class":
        cls._pre_step_transform_ = as_method
    else:
        opt._pre_step_transform_ = MethodType(as_method, opt)
    opt.step()
    assert torch.equal(x.grad, torch.zeros(2, 3))
    assert torch.equal(x.detach(), before)
    opt._post_step_transform_ = lambda param, optim_group: param.fill_(7)
    opt.step()
    assert torch.equal(x.detach(), torch.full((2, 3), 7.0))
    del opt._post_step_transform_
    x.grad.fill_(1)
    if on == "instance":
        del opt._pre_step_transform_
        opt.step()
        assert torch.equal(x.detach(), torch.full((2, 3), 6.0))


def test_a_copy_calls_its_own_patched_hook():
    (x,) = tensors((2, 3))
    opt = ParamTransformingOptimizer([x])
    opt.seen = []
    opt._post_step_transform_ = MethodType(lambda self, param, **_: self.seen.append(1), opt)
    other = copy.deepcopy(opt)
    other.step()
    assert (opt.seen, other.seen) == ([], [1])


def test_the_hooks_of_torch_get_the_wrapper():
    seen = []
    (x,) = tensors((2, 3))

    def pre(param, group):
        seen.append("transform")

    opt = hooked(pre)([x])
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(o))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(o))
    opt.step()
    assert seen == [opt, "transform", opt]
    assert isinstance(opt, Optimizer)
