"""PyTorch's own checks of every optimizer, over its own table of optimizers, made on wrapped ones.

The table (classes, options, schedules, inputs that err) is `torch.testing._internal`'s. The checks
are ours: torch does not ship the file that holds its own.
"""

import copy
import inspect
import re
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from bitwise import bare, copied, differences, same_bits, snapshot, unbounded
from files import through_a_file
from tiers import slow_but
from torch import nn
from torch.optim import Adadelta, Adafactor, Adam, AdamW, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)
from torch_versions import TORCH

from rai_toolbox._torch import Muon
from rai_toolbox.optim import ParamTransformingOptimizer

# None: a parameter of any shape is one sub-tensor, tensors of 0 dims too.
plain = partial(ParamTransformingOptimizer, param_ndim=None)
WRAPPERS = {"plain": plain, "unbounded": unbounded}

TWO_DIMS = ((3, 4), (1, 1), (2, 2))
ANY_DIMS = ((3, 4), (), (0, 3), (2,), (2, 1, 3), (2, 2))


def inputs(info):
    """Torch's inputs for CPUs, to which it does not count foreach, although it runs there."""
    options = _get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, info, skip=("differentiable",)
    )
    for each in options:  # 5 inner iterations of LBFGS show what its 20 do
        short = {"max_iter": 5} if info.step_requires_closure else {}
        yield each.desc, each.kwargs | short
    if "foreach" in info.supported_impls:
        for each in info.optim_inputs_func("cpu"):
            yield f"{each.desc} & foreach", each.kwargs | {"foreach": True}


def over(wanted=lambda kwargs: True, wrappers=WRAPPERS, of=lambda info: True):
    """Make a law of (wrapper, info, kwargs) a test of each optimizer, over all of its inputs."""
    cases = {
        info: [each for each in inputs(info) if wanted(each[1])] for info in filter(of, optim_db)
    }
    infos = [info for info in cases if cases[info]]
    fast = wrappers.get("unbounded", plain)

    def test_of(law):
        @pytest.mark.parametrize("wrapper", slow_but(wrappers.values(), fast), ids=wrappers.keys())
        @pytest.mark.parametrize("info", infos, ids=lambda info: info.name)
        def test(info, wrapper):
            for desc, kwargs in cases[info]:
                try:
                    law(wrapper, info, copy.deepcopy(kwargs))
                except Exception as error:
                    raise AssertionError(f"{info.name}, {desc}: {kwargs}") from error

        test.__doc__ = law.__doc__
        return test

    assert infos
    return test_of


def over_defaults(law):
    return over(lambda kwargs: not any(kwargs[name] for name in kwargs.keys() - {"max_iter"}))(law)


def takes(info, name):
    return name in inspect.signature(info.optim_cls).parameters


def shapes_for(info):
    if info.optim_cls is Muon or info.only_supports_sparse_grads:
        return TWO_DIMS
    # torch's Adafactor divides by the size
    return [shape for shape in ANY_DIMS if info.optim_cls is not Adafactor or 0 not in shape]


@pytest.fixture(autouse=True, scope="module")
def quick_and_quiet():
    """One thread: the fused kernels start all of them for each small tensor. Invariants are asked
    for explicitly, or torch warns when its own Adagrad makes a sparse tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield
    torch.set_num_threads(threads)


@dataclass
class Training:
    """Least squares, over all parameters but the last, which never has a gradient."""

    params: list
    optimizer: torch.optim.Optimizer
    sparse: bool = False

    @classmethod
    def start(cls, make, info, kwargs, *, groups=list, shapes=TWO_DIMS, dtype=None, strided=False):
        # (not `torch.manual_seed`: that formats a traceback for each kind of device)
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
        if strided:
            tensors = [randn((*shape, 2))[..., 0] for shape in shapes]
        else:
            tensors = [randn(shape) for shape in shapes]
        params = [nn.Parameter(tensor) for tensor in tensors]
        optimizer = make(groups(params), info.optim_cls, **copy.deepcopy(kwargs))
        return cls(params, optimizer, info.only_supports_sparse_grads)

    def loss(self):
        reals = [torch.view_as_real(p) if p.is_complex() else p for p in self.params[:-1]]
        return sum((p - i).square().sum() for i, p in enumerate(reals)) / 4

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        if self.sparse:
            for p in self.params[:-1]:
                p.grad = p.grad.to_sparse()
        return loss

    def steps(self, n, schedulers=()):
        for _ in range(n):
            self.optimizer.step(self.closure)
            for scheduler in schedulers:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[self.loss().detach()] * plateau)
        return self

    def snapshot(self):
        return snapshot(self.params, self.optimizer)

    def resumed_by(self, make, info, kwargs, state_dict, **how):
        """Another training of the same parameters, its optimizer loaded."""
        other = Training.start(make, info, kwargs, **how)
        with torch.no_grad():
            for mine, theirs in zip(other.params, self.params, strict=True):
                mine.copy_(theirs)
        other.optimizer.load_state_dict(state_dict)
        return other


def both(wrapper, info, kwargs, **how):
    return [Training.start(make, info, kwargs, **how) for make in (wrapper, bare)]


def assert_same(mine, theirs):
    assert not differences(mine.snapshot(), theirs.snapshot())


# --- the step -----------------------------------------------------------------------------------


@over()
def test_the_loss_goes_in_the_right_direction(wrapper, info, kwargs):
    ways = [(False, ())]
    if not (kwargs.get("foreach") or kwargs.get("fused")):
        ways += [(False, schedules) for schedules in info.scheduler_inputs]
    if not kwargs.get("fused"):  # whose kernels ignore strides: they go wrong on a slice, bare too
        ways += [(True, ())]
    for strided, schedules in ways:
        training = Training.start(wrapper, info, kwargs, strided=strided)
        before = training.loss()
        training.steps(5, [make(training.optimizer) for make in schedules])
        assert training.loss() > before if kwargs.get("maximize") else training.loss() < before


@over()
def test_any_shape(wrapper, info, kwargs):
    """0-d, empty, without gradient: as the bare optimizer does it, at every step."""
    mine, theirs = both(wrapper, info, kwargs, shapes=shapes_for(info))
    for _ in range(3):
        assert_same(mine.steps(1), theirs.steps(1))


@over(of=lambda info: info.supports_param_groups)
def test_each_group_goes_by_its_own_options(wrapper, info, kwargs):
    """Groups of one optimizer are as many bare optimizers, under a scheduler too."""
    for option, value in {"lr": 0.03, "weight_decay": 0.3}.items():
        if not takes(info, option):
            continue
        own = {option: value}
        mine, theirs = both(
            wrapper,
            info,
            kwargs,
            groups=lambda ps, own=own: [{"params": ps[:1], **own}] + [{"params": ps[1:]}],
        )
        theirs.optimizer = bare(theirs.params[:1], info.optim_cls, **copy.deepcopy(kwargs) | own)
        others = bare(theirs.params[1:], info.optim_cls, **copy.deepcopy(kwargs))
        schedules = [
            lr_scheduler.StepLR(each, step_size=1, gamma=0.5)
            for each in (mine.optimizer, theirs.optimizer, others)
        ]
        for _ in range(3):
            mine.steps(1)
            others.zero_grad()
            theirs.steps(1)
            others.step()
            for schedule in schedules:
                schedule.step()
        assert same_bits(copied(mine.params), copied(theirs.params)), option


@over(lambda kwargs: not isinstance(kwargs.get("lr"), torch.Tensor))
def test_a_tensor_as_lr_is_as_good_as_a_number(wrapper, info, kwargs):
    if kwargs.get("foreach") and info.optim_cls in (Adam, AdamW):
        return  # refused by torch; among the inputs that err
    if info.optim_cls is Adadelta and TORCH < (2, 7):
        return  # which took numbers only
    lr = kwargs.get("lr", inspect.signature(info.optim_cls).parameters["lr"].default)
    number = Training.start(wrapper, info, kwargs).steps(2)
    for shape in ((), (1,)):
        tensor = torch.full(shape, lr)
        mine, theirs = both(wrapper, info, kwargs | {"lr": tensor.clone()})
        assert_same(mine.steps(2), theirs.steps(2))
        assert_close(mine.params, number.params)

        mine.optimizer.param_groups[0]["lr"] = tensor
        mine.steps(1)
        assert mine.optimizer.inner_opt.param_groups[0]["lr"] is tensor


@over(lambda kwargs: kwargs.get("foreach") or kwargs.get("fused"))
def test_implementations_agree(wrapper, info, kwargs):
    loop = kwargs | {name: False for name in ("foreach", "fused") if takes(info, name)}
    quick, slow = (
        Training.start(wrapper, info, options, shapes=shapes_for(info), dtype=torch.float64)
        for options in (kwargs, loop)
    )
    assert_close(quick.steps(5).params, slow.steps(5).params)
    states = [[*training.optimizer.state.values()] for training in (quick, slow)]
    assert_close(*states)


@over(lambda kwargs: not kwargs.get("fused"), {"plain": plain}, lambda info: info.supports_complex)
def test_complex_parameters_are_pairs_of_reals(wrapper, info, kwargs):
    mine = Training.start(wrapper, info, kwargs, dtype=torch.complex128)
    theirs = Training.start(
        bare, info, kwargs, dtype=torch.float64, shapes=[(*s, 2) for s in TWO_DIMS]
    )
    with torch.no_grad():
        for p, pair in zip(mine.params, theirs.params, strict=True):
            pair.copy_(torch.view_as_real(p))
    mine.steps(3), theirs.steps(3)
    assert_close([torch.view_as_real(p) for p in mine.params], theirs.params)


@over()
def test_without_gradients_nothing_happens(wrapper, info, kwargs):
    mine, theirs = both(wrapper, info, kwargs, shapes=shapes_for(info))
    before = copied(mine.params)
    for training in (mine, theirs):
        training.optimizer.step(lambda: torch.ones(()))
    assert same_bits(copied(mine.params), before)
    assert_same(mine, theirs)


@over()
def test_zero_gradients_move_nothing(wrapper, info, kwargs):
    if info.name == "ASGD":
        return  # decays its parameters by `lambd` all the same
    options = kwargs | ({"weight_decay": 0} if takes(info, "weight_decay") else {})
    mine, theirs = both(wrapper, info, options)
    before = copied(mine.params)
    for training in (mine, theirs):
        for p in training.params:
            p.grad = torch.zeros_like(p).to_sparse() if training.sparse else torch.zeros_like(p)
        training.optimizer.step(lambda: torch.zeros(()))
    assert same_bits(copied(mine.params), before)
    assert_same(mine, theirs)


@over()
def test_step_returns_what_the_closure_returned(wrapper, info, kwargs):
    training = Training.start(wrapper, info, kwargs)
    returned = []

    def closure():
        returned.append(training.closure())
        return returned[-1]

    assert training.optimizer.step(closure) is returned[0]
    if not info.step_requires_closure:
        training.closure()
        assert training.optimizer.step() is None


@over(of=lambda info: info.supports_sparse or info.only_supports_sparse_grads)
def test_sparse_gradients(wrapper, info, kwargs):
    """Those of one row are as the bare optimizer takes them, and go in the right direction."""
    options, schedules = info.metadata_for_sparse
    kwargs = {k: v for k, v in kwargs.items() if k in ("foreach", "lr", "maximize")} | options
    runs = []
    for make in (wrapper, bare):
        table = nn.Parameter(torch.linspace(-2, 2, 12).view(6, 2))
        optimizer = make([table], info.optim_cls, **copy.deepcopy(kwargs))
        schedulers = [schedule(optimizer) for schedule in schedules]
        far = table.norm()
        for row in [0, 1, 2, 3, 4, 5] * 3:
            optimizer.zero_grad()
            rows = nn.functional.embedding(torch.tensor([row, row]), table, sparse=True)
            loss = rows.square().sum()
            loss.backward()
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[loss.detach()] * plateau)
        assert table.norm() > far if kwargs.get("maximize") else table.norm() < far
        runs.append(snapshot([table], optimizer))
    assert not differences(*runs)


@over(
    lambda kwargs: not (kwargs.get("foreach") or kwargs.get("fused")),
    of=lambda info: "differentiable" in info.supported_impls,
)
def test_differentiable(wrapper, info, kwargs):
    """Through one step, in the parameter, the gradient and every tensor of the state."""
    before = Training.start(bare, info, kwargs, dtype=torch.float64).steps(1)
    state = copied(before.optimizer.state.get(before.params[0], {}))
    names = [name for name, value in state.items() if torch.is_tensor(value) and value.ndim]

    def step(make, start, grad, *tensors):
        p = start.clone()
        p.grad = grad
        optimizer = make([p], info.optim_cls, **copy.deepcopy(kwargs), differentiable=True)
        if state:
            given = {name: value.clone() for name, value in zip(names, tensors, strict=True)}
            optimizer.state[p].update(copied(state) | given)
        optimizer.step()
        return p, *(value for value in optimizer.state[p].values() if value.requires_grad)

    # close to .8, whose square is less: as the state of a centered RMSprop must be
    leaves = [0.8 + torch.rand(2, 2, dtype=torch.float64) / 20 for _ in ("p", "grad", *names)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(partial(step, wrapper), leaves)
    assert same_bits(copied(step(wrapper, *leaves)), copied(step(bare, *leaves)))


# --- state --------------------------------------------------------------------------------------


@over()
def test_no_state_is_empty(wrapper, info, kwargs):
    mine, theirs = (each.steps(1) for each in both(wrapper, info, kwargs))
    assert all(state for state in mine.optimizer.state.values())
    assert len(mine.optimizer.state) == len(theirs.optimizer.state)


@over()
def test_a_copy_has_all_public_attributes(wrapper, info, kwargs):
    training = Training.start(wrapper, info, kwargs).steps(2)
    twin = copy.deepcopy(training)

    def public(optimizer):
        names = {name for name in vars(optimizer) if not name.startswith("_")}
        return sorted(names | {"state", "param_groups", "defaults"})

    assert public(twin.optimizer) == public(training.optimizer)
    assert public(twin.optimizer.inner_opt) == public(training.optimizer.inner_opt)
    for name in public(training.optimizer):
        getattr(twin.optimizer, name)
    for p, mine in zip(twin.params, training.params, strict=True):
        p.grad = mine.grad  # of which a copy of an nn.Parameter has none
    assert_same(twin, training)
    assert same_bits(twin.optimizer.defaults, training.optimizer.defaults)


def unchanged(state_dict, info):
    loaded = through_a_file(state_dict)
    assert same_bits(loaded, state_dict)
    return loaded


def of_an_older_torch(state_dict, info):
    """Without the options that came later, and with plain numbers as steps."""
    groups = [
        {k: v for k, v in group.items() if k not in info.not_og_supported_flags}
        for group in state_dict["param_groups"]
    ]
    state = {
        i: {k: v.item() if k == "step" and torch.is_tensor(v) else v for k, v in of_param.items()}
        for i, of_param in state_dict["state"].items()
    }
    return {"state": state, "param_groups": groups}


@over()
def test_a_loaded_state_goes_on_as_the_bare_one(wrapper, info, kwargs):
    mine, theirs = (each.steps(2) for each in both(wrapper, info, kwargs))
    for version in (unchanged, of_an_older_torch):
        saved = [version(copied(each.optimizer.state_dict()), info) for each in (mine, theirs)]
        before = copied(saved[0])
        resumed = mine.resumed_by(wrapper, info, kwargs, saved[0])
        expected = theirs.resumed_by(bare, info, kwargs, saved[1])
        assert same_bits(saved[0], before), version.__name__
        for _ in range(2):
            assert_same(resumed.steps(1), expected.steps(1))


@over()
def test_saving_is_deterministic(wrapper, info, kwargs):
    """Saved, loaded and saved again it is the same, and so is the run that goes on."""
    training = Training.start(wrapper, info, kwargs).steps(2)
    saved = copied(training.optimizer.state_dict())
    resumed = training.resumed_by(wrapper, info, kwargs, saved)
    assert same_bits(copied(resumed.optimizer.state_dict()), saved)
    assert_same(resumed.steps(2), training.steps(2))


NAMES = ["weight", "bias", "unused"]


def named(params):
    return [*zip(NAMES, params, strict=True)]


@over_defaults
def test_names_are_saved_and_loaded_as_by_the_bare_optimizer(wrapper, info, kwargs):
    def names(training):
        groups = training.optimizer.state_dict()["param_groups"]
        return [group.get("param_names") for group in groups]

    for saved_with in (list, named):
        sources = [each.steps(1) for each in both(wrapper, info, kwargs, groups=saved_with)]
        assert all(names(source) == [NAMES if saved_with is named else None] for source in sources)
        for loaded_with in (list, named):
            mine, theirs = (
                source.resumed_by(
                    make, info, kwargs, source.optimizer.state_dict(), groups=loaded_with
                )
                for source, make in zip(sources, (wrapper, bare), strict=True)
            )
            assert_same(mine.steps(1), theirs.steps(1))
            assert names(mine) == names(theirs)


@over()
def test_it_can_be_printed(wrapper, info, kwargs):
    mine, theirs = both(wrapper, info, kwargs)
    lines = str(theirs.optimizer).splitlines()[1:]
    assert set(lines) <= set(str(mine.optimizer).splitlines())


# --- hooks --------------------------------------------------------------------------------------


@over_defaults
def test_step_hooks(wrapper, info, kwargs):
    """All of them, in the order of torch: global before own, own before global."""
    orders = []
    for training in both(wrapper, info, kwargs):
        seen = []

        def note(what, training=training, seen=seen):
            def hook(optimizer, args, kwargs):
                assert optimizer is training.optimizer
                seen.append(what)

            return hook

        handles = [
            training.optimizer.register_step_post_hook(note("post")),
            training.optimizer.register_step_pre_hook(note("pre")),
            register_optimizer_step_post_hook(note("global post")),
            register_optimizer_step_pre_hook(note("global pre")),
        ]
        try:
            training.steps(2)
        finally:
            for handle in handles:
                handle.remove()
        training.steps(1)
        orders.append(seen)
    assert orders[0] == orders[1] == ["global pre", "pre", "post", "global post"] * 2


@over_defaults
def test_state_dict_hooks(wrapper, info, kwargs):
    for prepend in (False, True):
        orders = []
        for training in both(wrapper, info, kwargs):
            training.steps(1)
            optimizer, seen = training.optimizer, []

            def pre(which, optimizer, seen=seen):
                seen.append(("pre", which))

            def post(which, optimizer, state_dict, seen=seen):
                seen.append(("post", which))
                return state_dict | {which: state_dict.get("last")} | {"last": which}

            for which in ("one", "two"):
                optimizer.register_state_dict_pre_hook(partial(pre, which), prepend=prepend)
                optimizer.register_state_dict_post_hook(partial(post, which), prepend=prepend)
            saved = optimizer.state_dict()
            seen.append({k: v for k, v in saved.items() if k not in ("state", "param_groups")})
            orders.append(seen)
        assert orders[0] == orders[1]
        assert len(orders[0]) == 5


@over_defaults
def test_load_state_dict_hooks(wrapper, info, kwargs):
    """A pre hook may change what is loaded, by returning a dict; post hooks see it loaded."""
    for prepend in (False, True):
        outcomes = []
        for training in both(wrapper, info, kwargs):
            training.steps(1)
            optimizer, seen = training.optimizer, []

            def pre(lr, optimizer, state_dict, seen=seen):
                seen.append(("pre", lr, state_dict["param_groups"][0]["lr"]))
                first, *others = state_dict["param_groups"]
                return state_dict | {"param_groups": [first | {"lr": lr}, *others]}

            def post(which, optimizer, seen=seen):
                seen.append(("post", which, optimizer.param_groups[0]["lr"]))

            for lr in (0.125, 0.25):
                optimizer.register_load_state_dict_pre_hook(partial(pre, lr), prepend=prepend)
                optimizer.register_load_state_dict_post_hook(partial(post, lr), prepend=prepend)
            saved = optimizer.state_dict()
            before = copied(saved)
            optimizer.load_state_dict(saved)
            assert same_bits(copied(saved), before)
            outcomes.append(seen)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][-1][-1] == (0.125 if prepend else 0.25)


# --- errors -------------------------------------------------------------------------------------


def tensors_of(error_input):
    given = error_input.optimizer_error_input.params
    return given if isinstance(given, list) and torch.is_tensor(given[0]) else []


ERRORS = [
    pytest.param(wrapper, info, each, id=f"{info.name}-{each.optimizer_error_input.desc}-{name}")
    for info in optim_db
    for each in info.optim_error_inputs_func("cpu", torch.float32)
    for name, wrapper in WRAPPERS.items()
    # bounds do not order complex numbers, which is an error of its own
    if wrapper is not unbounded or not any(map(torch.is_complex, tensors_of(each)))
]


@pytest.mark.parametrize("wrapper, info, error_input", ERRORS)
def test_inputs_that_err(wrapper, info, error_input):
    """They raise when, what and with the words that torch raises."""
    given = error_input.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(2, 3))]
    for make in (bare, wrapper):
        optimizer = None
        with pytest.raises(error_input.error_type) as caught:
            optimizer = make(params, info.optim_cls, **copy.deepcopy(given.kwargs))
            optimizer.step()
        in_step = error_input.error_on is OptimizerErrorEnum.STEP_ERROR
        assert (optimizer is not None) == in_step
        assert caught.type is error_input.error_type
        if make is bare or given.desc != "invalid param type":  # the words for which are ours
            assert re.search(error_input.error_regex, str(caught.value))


@over(lambda kwargs: kwargs.get("fused"))
def test_fused_refuses_parameters_without_memory(wrapper, info, kwargs):
    for make in (bare, wrapper):
        params = [nn.Parameter(torch.empty(2, 2, device="meta"))]
        params[0].grad = torch.empty_like(params[0])
        with pytest.raises(RuntimeError, match="`fused=True` requires all the params"):
            make(params, info.optim_cls, **kwargs).step()


@over(wrappers={"unbounded": unbounded})
def test_bounds_of_complex_parameters_are_refused(wrapper, info, kwargs):
    params = [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]
    with pytest.raises(TypeError, match="`clamp_min` and `clamp_max` must bound real numbers"):
        wrapper(params, info.optim_cls, **kwargs)
