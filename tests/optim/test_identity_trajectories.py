"""A wrapper that transforms nothing is its inner optimizer, bit for bit, at every step."""

import copy
import inspect
import io
import pickle
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from bitwise import DoNothing, around_an_instance, bare, chain, differences, snapshot, unbounded
from torch import optim
from torch.nn.functional import embedding
from torch.optim.lr_scheduler import StepLR

from rai_toolbox._torch import Muon
from rai_toolbox.optim import ParamTransformingOptimizer

STEPS, INTERRUPTED_AT = 6, 4

WRAPPERS = {
    "plain": ParamTransformingOptimizer,
    "unbounded": unbounded,
    "around_an_instance": around_an_instance,
    # 1: a channels_last tensor has no such view, so that hooks see a copy that is written back
    "hooks": partial(DoNothing, param_ndim=1),
    "chain": chain,
}
# They leave gradients alone; the others would have to coalesce them, or refuse.
WRAPPERS_FOR_SPARSE = ("plain", "unbounded", "around_an_instance")

# Options that make a class take another path of its step. To each class the table adds the ones
# that its signature shows: foreach, fused, maximize, a tensor as lr.
OPTIONS: dict[type[optim.Optimizer], list[dict[str, Any]]] = {
    optim.SGD: [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
    ],
    optim.Adam: [{}, {"amsgrad": True, "weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    optim.AdamW: [{}, {"amsgrad": True}],
    optim.RMSprop: [{}, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}],
    optim.Adagrad: [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1}],
    optim.Adadelta: [{}, {"weight_decay": 0.1}],
    optim.Adamax: [{}, {"weight_decay": 0.1}],
    optim.NAdam: [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    optim.RAdam: [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    optim.Rprop: [{}, {"etas": (0.4, 1.5)}],
    optim.ASGD: [{}, {"t0": 2.0, "weight_decay": 0.1}],
    optim.Adafactor: [{}, {"weight_decay": 0.1, "d": 1.5}],
    optim.LBFGS: [{"max_iter": 4}, {"max_iter": 4, "line_search_fn": "strong_wolfe"}],
    optim.SparseAdam: [{}],
}
# What torch itself takes: two dims only, a `view(-1)` of each gradient, sparse gradients only.
MODELS = {optim.LBFGS: "contiguous", optim.SparseAdam: "sparse"}
if Muon is not None:
    OPTIONS[Muon] = [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}]
    MODELS[Muon] = "matrices"
# torch refuses a tensor as lr there, unless it is capturable, which takes an accelerator
NO_TENSOR_LR_IN_FOREACH = (optim.Adam, optim.AdamW)


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer class with its options, on the kind of parameters that it takes."""

    cls: type[optim.Optimizer]
    options: dict[str, Any]
    model: str = "mixed"

    def __str__(self) -> str:
        shown = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.cls.__name__}-{self.model}-{shown}"


def takes(cls, *names):
    return inspect.signature(cls).parameters.keys() >= set(names)


def implementations(cls):
    foreach = [{"foreach": False}, {"foreach": True}] if takes(cls, "foreach") else [{}]
    return foreach + ([{"fused": True}] if takes(cls, "fused") else [])


def cases_of(cls):
    lr = OPTIONS[cls][0] | {"lr": torch.tensor(0.01)}
    for how in implementations(cls):
        # the fused kernels ignore strides, so that they go wrong on a slice, wrapped or not
        model = MODELS.get(cls, "dense" if "fused" in how else "mixed")
        options = list(OPTIONS[cls])
        options += [{"maximize": True}] if takes(cls, "maximize") else []
        options += [] if cls in NO_TENSOR_LR_IN_FOREACH and how.get("foreach") else [lr]
        if takes(cls, "capturable") and how.get("fused"):
            options.append({"capturable": True})  # the only path on which a CPU may have it
        yield from (Case(cls, given | how, model) for given in options)


CASES = [case for cls in OPTIONS for case in cases_of(cls)] + [
    Case(cls, how, "sparse")
    for cls in (optim.SGD, optim.Adagrad)
    for how in implementations(cls)
    if "fused" not in how  # which takes dense gradients only
]


def pairs(cases):
    """Each case with one wrapper that projects, and those of two classes with all wrappers."""
    return [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in cases
        for name in (WRAPPERS if case.cls in (optim.SGD, optim.Adam) else ["unbounded"])
        if case.model != "sparse" or name in WRAPPERS_FOR_SPARSE
    ]


PAIRS = pairs(CASES)
INTERRUPTIBLE = [pair for pair in PAIRS if pair.values[1] != "around_an_instance"]  # as unbounded
MIXED_DTYPES = [
    Case(cls, options | how, "dtypes")
    for cls in OPTIONS
    if cls not in MODELS
    for options in ([{}, OPTIONS[cls][-1]] if cls is optim.SGD else [OPTIONS[cls][-1]])
    for how in implementations(cls)
]
DTYPES = pairs(MIXED_DTYPES)


def parameters(model):
    # (not `torch.manual_seed`: that formats a traceback for each kind of device)
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    if model == "sparse":
        tensors = [randn(7, 3), randn(4, 1), randn(2, 2)]
    elif model == "matrices":
        tensors = [randn(5, 3), randn(3, 4).t(), randn(1, 1), randn(2, 2)]
    elif model == "dtypes":
        dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16)
        tensors = [randn(3, 4).to(dtype) for dtype in dtypes]
    else:
        shapes = [(5, 3), (1,), (4, 3, 2, 2), (3, 4), (6, 4), (2,)]
        tensors = [randn(shape) for shape in shapes]
        tensors[-1][0] = -0.0  # which adding 0 would change
        if model != "contiguous":
            tensors[2] = tensors[2].to(memory_format=torch.channels_last)
            tensors[3] = tensors[3].t()
        if model == "mixed":
            tensors[4] = tensors[4][::2, 1:]
    return [tensor.requires_grad_() for tensor in tensors]  # the last one never has a gradient


def objective(model, params, t):
    """Another one at each step, so that the signs of gradients change too."""
    if model == "sparse":
        rows = torch.tensor([t % 2, 3, t % 2])  # a row twice: the gradient is not coalesced
        return sum(embedding(rows, p, sparse=True).square().sum() for p in params[:-1])
    shift = (-1) ** t / (t + 1)
    return sum(((p - shift) * p.cos()).sum() for p in params[:-1])


@dataclass
class Run:
    """A training that can be interrupted."""

    case: Case
    params: list[torch.Tensor]
    optimizer: optim.Optimizer
    schedule: StepLR
    t: int = 0
    evaluations: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, case, wrapper):
        params, options = parameters(case.model), copy.deepcopy(case.options)
        if case.cls is optim.LBFGS:  # takes one group only
            groups: list[Any] = params
        else:
            lr = options.get("lr", inspect.signature(case.cls).parameters["lr"].default)
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": lr * 0.3}]
        optimizer = wrapper(groups, case.cls, **options)
        return cls(case, params, optimizer, StepLR(optimizer, step_size=2, gamma=0.5))

    def step(self):
        def closure():
            self.optimizer.zero_grad()
            loss = objective(self.case.model, self.params, self.t)
            loss.backward()
            self.evaluations.append(loss.detach())
            return loss.detach()

        if self.case.cls is optim.LBFGS or self.t % 2:  # both ways of stepping in one trajectory
            self.evaluations.append(self.optimizer.step(closure))
        else:
            closure()
            self.evaluations.append(self.optimizer.step())
        self.schedule.step()
        self.t += 1

    def steps(self, n):
        for _ in range(n):
            self.step()
        return self

    def snapshot(self):
        return snapshot(self.params, self.optimizer) | {"evaluations": self.evaluations.copy()}


def trajectory(run):
    return [run.steps(1).snapshot() for _ in range(STEPS)]


@cache
def bare_trajectory(case):
    return trajectory(Run.start(case, bare))


def checkpoint(run):
    file = io.BytesIO()
    saved = {
        "params": [p.detach() for p in run.params],
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "evaluations": run.evaluations,
    }
    torch.save(saved, file)
    return file.getvalue()


@cache
def bare_checkpoint(case):
    return checkpoint(Run.start(case, bare).steps(INTERRUPTED_AT))


def resumed(case, wrapper, file):
    """A run that goes on from a checkpoint, as a user would write it."""
    saved = torch.load(io.BytesIO(file), weights_only=True)
    run = Run.start(case, wrapper)
    with torch.no_grad():
        for p, value in zip(run.params, saved["params"], strict=True):
            p.copy_(value)
    run.schedule.load_state_dict(saved["schedule"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.t, run.evaluations = INTERRUPTED_AT, saved["evaluations"]
    return run


def unpickled(run):
    parts = pickle.dumps((run.params, run.optimizer, run.schedule))
    return Run(run.case, *pickle.loads(parts), run.t, run.evaluations.copy())


@pytest.fixture(autouse=True, scope="module")
def quick_and_quiet():
    """One thread: the fused kernels start all of them for each small tensor. Invariants are asked
    for explicitly, or torch warns when its own Adagrad makes a sparse tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield
    torch.set_num_threads(threads)


def test_every_optimizer_of_torch_is_listed():
    classes = {c for c in vars(optim).values() if inspect.isclass(c)}
    listed = {c for c in classes if issubclass(c, optim.Optimizer)} - {optim.Optimizer}
    assert listed == OPTIONS.keys()


@pytest.mark.parametrize("case, name", PAIRS + DTYPES)
def test_each_step_is_that_of_the_bare_optimizer(case, name):
    run = Run.start(case, WRAPPERS[name])
    for expected in bare_trajectory(case):
        assert not differences(run.steps(1).snapshot(), expected), f"step {run.t}"


@pytest.mark.parametrize("case, name", INTERRUPTIBLE)
def test_interrupted_and_continued(case, name):
    wrapper = WRAPPERS[name]
    run = Run.start(case, wrapper).steps(INTERRUPTED_AT)
    runs = {
        "own checkpoint": resumed(case, wrapper, checkpoint(run)),
        "bare checkpoint": resumed(case, wrapper, bare_checkpoint(case)),
        "deepcopy": copy.deepcopy(run),
        "pickle": unpickled(run),
        "original": run,
    }
    for _ in range(INTERRUPTED_AT, STEPS):  # in turns: what two of them shared would change twice
        for continued in runs.values():
            continued.steps(1)
    for how, continued in runs.items():
        assert not differences(continued.snapshot(), bare_trajectory(case)[-1]), how


@pytest.mark.parametrize("case, name", DTYPES)
def test_resumed_in_low_precision(case, name):
    """Loading casts the state to each parameter's dtype; ours loads what the bare one loads."""
    wrapper = WRAPPERS[name]
    file = checkpoint(Run.start(case, wrapper).steps(INTERRUPTED_AT))
    mine, theirs = resumed(case, wrapper, file), resumed(case, bare, bare_checkpoint(case))
    assert not differences(mine.steps(2).snapshot(), theirs.steps(2).snapshot())


@pytest.mark.parametrize("cls", [c for c in OPTIONS if takes(c, "capturable")])
@pytest.mark.parametrize("name", WRAPPERS)
def test_capturable_is_refused_on_a_cpu_as_by_the_bare_optimizer(cls, name):
    runs = [
        Run.start(Case(cls, {"capturable": True}), wrapper) for wrapper in (bare, WRAPPERS[name])
    ]
    refusals = []
    for run in runs:
        with pytest.raises(AssertionError, match="capturable") as refusal:
            run.step()
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]


def test_the_comparison_tells_trajectories_apart():
    """A last digit of the gradients, or a word in the state, is a difference."""
    case = Case(optim.SGD, {"momentum": 0.9})
    off = Run.start(case, partial(ParamTransformingOptimizer, grad_scale=1 + 2**-22))
    seen = set(differences(off.steps(STEPS).snapshot(), bare_trajectory(case)[-1]))
    assert seen >= {"params", "grads", "state"}

    noted = Run.start(case, ParamTransformingOptimizer).steps(1)
    noted.optimizer.state[noted.params[0]]["ours"] = 1
    assert differences(noted.snapshot(), bare_trajectory(case)[0]) == ["state"]
