"""What a step costs, in counts that are the same on every machine: operators, calls and bytes."""

import sys
from functools import partial
from itertools import accumulate

import pytest
import torch
from bitwise import same_bits
from engine_cases import WITH_INNER, WRAPPERS, recording, tensors, unbounded
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch_versions import takes_grad_dtype

from rai_toolbox.constraints import L1Ball, L2Ball, Simplex, UnitNorm
from rai_toolbox.constraints.kernels.blocks import GROUP
from rai_toolbox.optim import (
    ClampedParameterOptimizer,
    L1FrankWolfe,
    L1qFrankWolfe,
    L1qNormedGradientOptim,
    ProjectedOptimizer,
    TopQGradientOptimizer,
)


class Operators(TorchDispatchMode):
    """Notes the name of each operator that is dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(opt):
    opt.step()  # which may make state
    with Operators() as mode:
        opt.step()
    return mode.names


def python_calls(opt):
    """Number of Python and C functions that Python code calls in a step."""
    opt.step()
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    return count


# --- small tensors: what is called once per group, not per tensor ------------------------------

ELEMENTWISE = {
    name: WRAPPERS[name]
    for name in ("Param", "ClampedParameter", "ClampedGradient", "Signed", "LinfProjected")
} | {
    "scale": partial(WRAPPERS["Param"], grad_scale=2.0),
    "bias": partial(WRAPPERS["Param"], grad_bias=0.5),
    "one bound": partial(ClampedParameterOptimizer, clamp_min=0.0),
    "no bounds": unbounded,
    "all": partial(WRAPPERS["LinfProjected"], grad_scale=2.0, grad_bias=0.5),
}


def most_held(opt):
    """The most bytes that a step holds at once, beyond what is there before."""
    opt.step()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        opt.step()
    return max(accumulate(allocations(profile), initial=0))


FOREACH_SGD = partial(SGD, foreach=True)


@pytest.mark.parametrize("inner", [FOREACH_SGD, Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_elementwise_transforms_of_many_tensors_add_few_operators(make, inner):
    def added(n):
        shapes = [(3, 2)] * n
        return len(operators(make(tensors(*shapes), InnerOpt=inner))) - len(
            operators(inner(tensors(*shapes)))
        )

    assert added(640) - added(128) <= 512 / 8  # one for each tensor would be 512


READ = "_local_scalar_dense"
OF_ONE_ROW = {
    "Param": [],
    "ClampedParameter": ["clamp_"],
    "Signed": ["equal", "sgn_"],
    "L1Normed": ["linalg_vector_norm", READ, "div_"],
    "L2Normed": ["linalg_vector_norm", READ, "div_"],
    "L2Projected": ["linalg_vector_norm", READ, "div_", "linalg_vector_norm", READ, "mul_"],
}


@pytest.mark.parametrize("name", OF_ONE_ROW)
def test_one_small_row_takes_few_operators(name):
    opt = WRAPPERS[name](tensors((1, 84)), lr=50.0)
    assert [each for each in operators(opt) if each != "add_"] == OF_ONE_ROW[name]


NORM, LOOK = "linalg_vector_norm", ["aminmax", READ, READ]
NORMALIZED = [NORM, *LOOK, "reciprocal_", "mul_"]
OF_ROWS = {
    "L2Normed": NORMALIZED,
    "L2Projected": [*NORMALIZED, NORM, NORM, *LOOK, "div", "mul_"],
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_of_one_large_tensor_take_few_operators(name):
    opt = WRAPPERS[name](tensors((256, 3, 32, 32)), lr=50.0)
    assert [each for each in operators(opt) if each not in ("add_", "view")] == OF_ROWS[name]


def test_projecting_many_tensors_adds_few_calls():
    def added(n):
        shapes = [(3, 2)] * n
        opt = WRAPPERS["ClampedParameter"](tensors(*shapes), InnerOpt=FOREACH_SGD)
        return python_calls(opt) - python_calls(FOREACH_SGD(tensors(*shapes)))

    assert added(640) - added(128) <= 512 / 4


@pytest.mark.parametrize("share_outside", [0.0, 1.0], ids=["inside", "outside"])
def test_rows_of_many_tensors_are_projected_together(share_outside):
    def added(n):
        shapes = [(3, 20)] * n
        opt = ProjectedOptimizer(tensors(*shapes), constraint=L2Ball(50.0 - 49.9 * share_outside))
        return len(operators(opt)) - len(operators(FOREACH_SGD(tensors(*shapes))))

    assert added(640) - added(128) <= 512 * 4  # views alone; one by one it is over 20


def test_plain_sgd_steps_many_tensors_together():
    def number(**settings):
        params = tensors(*[(3, 2)] * 200)
        return len(operators(unbounded(params, InnerOpt=SGD, **settings)))

    assert number() == number(foreach=True) <= 20 < 200 <= number(foreach=False)


def test_sgd_with_momentum_steps_small_tensors_together():
    def number(**settings):
        params = tensors(*[(3, 2)] * 60)
        return len(operators(unbounded(params, InnerOpt=SGD, momentum=0.9, **settings)))

    assert number() == number(foreach=True) <= 20 < 180 <= number(foreach=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_tensors_stepped_together_get_the_same_bits(dtype, dampening):
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    ours, theirs = (
        [x.detach().to(dtype).requires_grad_() for x in tensors(*[(5, 7)] * 9)] for _ in range(2)
    )
    opt, bare = unbounded(ours, InnerOpt=SGD, **settings), SGD(theirs, **settings)
    for step in range(4):
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            x.grad = None if i == step else torch.randn(5, 7).to(dtype)
            y.grad = None if x.grad is None else x.grad.clone()
        opt.step()
        bare.step()
    assert same_bits([x.detach() for x in ours], [y.detach() for y in theirs])
    assert same_bits(opt.state_dict()["state"], bare.state_dict()["state"])


@pytest.mark.parametrize(
    ("inner", "settings"),
    [
        (SGD, {"weight_decay": 0.1}),
        (SGD, {"momentum": 0.9}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, {}),
        (SGD, {"maximize": True}),
        (Adam, {}),
    ],
    ids=str,
)
def test_no_memory_is_taken_to_step_tensors_together(inner, settings):
    params = tensors(*[(64, 64)] * 40)
    bare = inner(params, lr=0.1, **settings)
    assert most_held(unbounded(params, InnerOpt=inner, lr=0.1, **settings)) <= most_held(bare)


def test_foreach_is_left_open_after_a_step_that_fails():
    params = tensors((3, 2), (2, 2))
    opt = unbounded(params, InnerOpt=SGD, lr=0.1)
    opt.param_groups[0]["lr"] = "none"
    with pytest.raises(TypeError, match="str"):
        opt.step()
    assert opt.param_groups[0]["foreach"] is None


@takes_grad_dtype
def test_a_gradient_that_torch_refuses_among_others_is_stepped_as_ever():
    params = tensors(*[(3, 2)] * 10)
    for param in params:
        param.grad = torch.ones(param.shape)
    params[5].grad = None
    params[5].grad_dtype = torch.float16
    params[5].grad = torch.ones(params[5].shape, dtype=torch.float16)
    starts = [param.detach().clone() for param in params]
    unbounded(params, InnerOpt=SGD, lr=0.5).step()
    for param, start in zip(params, starts, strict=True):
        assert torch.equal(param.detach(), start - 0.5)


def test_a_closure_sees_foreach_as_it_was_given():
    opt = unbounded(tensors((3, 2), (2, 2)), InnerOpt=SGD, lr=0.5)
    seen = []

    def closure():
        seen.append(opt.state_dict()["param_groups"][0]["foreach"])
        opt.param_groups[0]["foreach"] = False
        return torch.zeros(())

    opt.step(closure)
    assert seen == [None]
    assert opt.param_groups[0]["foreach"] is False


def test_hooks_of_a_user_are_called_for_each_tensor():
    # the slow path, against which the counts above are to be seen
    log = []
    recording(log)(tensors(*[(3, 2)] * 50)).step()
    assert len(log) == 100


# --- rows: never a loop over them --------------------------------------------------------------


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("param_ndim", [-1, 0, None])
def test_the_number_of_operators_does_not_depend_on_the_shape(make, param_ndim):
    def of(*shape):
        (x,) = tensors(shape)
        x.grad = -100 * x.detach()  # outwards: what is inside a set may take fewer
        return operators(make([x], param_ndim=param_ndim))

    assert of(4, 8) == of(300, 8) == of(4, 70)


# --- no waiting for a device -------------------------------------------------------------------

# Each of these hands a value to the host.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"}


@pytest.mark.parametrize("make", WITH_INNER.values(), ids=WITH_INNER.keys())
@pytest.mark.parametrize("inner", [SGD, partial(SGD, momentum=0.9), partial(Adam, fused=True)])
def test_a_step_reads_no_tensor(make, inner, as_on_a_device):
    opt = make(tensors((3, 2), (2, 2)), InnerOpt=inner, lr=0.1, grad_scale=2.0)
    with Operators() as first:
        opt.step()
    assert not READS.intersection(first.names + operators(opt))


def test_the_measure_of_reading_sees_it():
    with Operators() as mode:
        bool(torch.ones(2).any())
    assert READS.intersection(mode.names)


# --- memory ------------------------------------------------------------------------------------

SIZE = 2**19  # floats: 2 MB
BIG = {
    "rows": (lambda: torch.randn(512, 1024), -1),
    "transposed": (lambda: torch.randn(512, 1024).t(), -1),
    "sliced": (lambda: torch.randn(512, 2048)[:, ::2], -1),
    "channels last": (
        lambda: torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last),
        -1,
    ),
    "the whole": (lambda: torch.randn(512, 1024), None),
    "few rows": (lambda: torch.randn(2, SIZE // 2), -1),
    "one row": (lambda: torch.randn(1, SIZE), -1),
    "one dim": (lambda: torch.randn(SIZE), None),
}
# The others sort: their indices alone take twice the bytes of the entries that they keep.
FRUGAL = [name for name in WITH_INNER if name not in ("TopQ", "L1qNormed", "Chained")]


def allocations(profile):
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@pytest.mark.parametrize(("make_tensor", "param_ndim"), BIG.values(), ids=BIG.keys())
@pytest.mark.parametrize("make", [WITH_INNER[name] for name in FRUGAL], ids=FRUGAL)
def test_a_step_allocates_nothing_of_the_size_of_a_parameter(make, make_tensor, param_ndim):
    torch.manual_seed(0)
    x = make_tensor().requires_grad_()
    x.grad = torch.randn_like(x)
    opt = make([x], lr=0.1, param_ndim=param_ndim, grad_scale=2.0)
    opt.step()
    x.grad.normal_()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        opt.step()
    assert max(allocations(profile), default=0) <= 4 * SIZE / 4


@pytest.mark.parametrize("share_outside", [0.0, 0.5, 1.0])
def test_rows_of_many_tensors_take_no_more_memory_than_one_of_them(share_outside):
    torch.manual_seed(0)
    params = [torch.randn(400, 400, requires_grad=True) for _ in range(20)]
    for param in params:
        param.grad = -param.detach()
    opt = ProjectedOptimizer(params, SGD, constraint=L2Ball(23.0 - 4 * share_outside), lr=0.05)
    assert most_held(opt) <= 4 * 400 * 400


def test_norms_in_float64_take_the_memory_of_one_tensor():
    torch.manual_seed(0)
    params = [torch.randn(400, 400, requires_grad=True) for _ in range(20)]
    for param in params:
        param.grad = torch.randn(400, 400)
    opt = ProjectedOptimizer(params, SGD, constraint=UnitNorm(), lr=0.05)
    together = GROUP // 400**2
    of_norms = 8 * 400 * together
    assert most_held(opt) <= 4 * 400 * 400 + 2 * of_norms


@pytest.mark.parametrize(
    ("constraint", "mapping"),
    [(UnitNorm(), False), (UnitNorm(), True), (L1Ball(1.0), False), (Simplex(), False)],
    ids=str,
)
def test_temporaries_of_many_large_tensors_are_allocated_once(constraint, mapping):
    torch.manual_seed(0)
    params = [torch.randn(300, 250, requires_grad=True) for _ in range(30)]
    for param in params:
        param.grad = torch.randn(300, 250)
    settings = {"lr": 0.05, "gradient_mapping": mapping}  # (all rows are outside)
    opt = ProjectedOptimizer(params, SGD, constraint=constraint, **settings)
    opt.step()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        opt.step()
    large = [nbytes for nbytes in allocations(profile) if nbytes >= params[0].nbytes / 2]
    assert len(large) <= 1 + mapping


@pytest.mark.parametrize("kind", [TopQGradientOptimizer, L1qNormedGradientOptim, L1qFrankWolfe])
@pytest.mark.parametrize("shape", [(400, 400), (256, 3, 32, 32)], ids=str)
def test_a_selection_takes_no_more_memory_than_the_tensor(kind, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    x.grad = torch.randn(shape)
    settings = {"epsilon": 1.0} if kind is L1qFrankWolfe else {"InnerOpt": SGD}
    assert most_held(kind([x], q=0.9, lr=0.05, **settings)) <= x.nbytes


@pytest.mark.parametrize("shape", [(400, 400), (256, 3, 32, 32)], ids=str)
def test_the_largest_signs_take_no_copy_of_the_tensor(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    x.grad = torch.randn(shape)
    x.grad[3] = 0.0
    assert most_held(L1FrankWolfe([x], epsilon=1.0)) <= x.nbytes / 16


def test_the_measure_of_memory_sees_what_an_operator_needs_in_passing():
    x = torch.zeros(SIZE)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        torch.linalg.vector_norm(x, dtype=torch.float64)  # converts all of x first
    assert max(allocations(profile)) == 8 * SIZE
