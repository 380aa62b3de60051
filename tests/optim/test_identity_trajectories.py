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

from rai_toolbox.optim import ParamTransformingOptimizer

STEPS, INTERRUPTED_AT = 6, 3

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
    optim.Muon: [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
    optim.SparseAdam: [{}],
}
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
    model = {optim.Muon: "matrices", optim.SparseAdam: "sparse"}.get(cls, "mixed")
    lr = {"lr": torch.tensor(0.01)}
    for how in implementations(cls):
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
PAIRS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in CASES
    for name in WRAPPERS
    if case.model != "sparse" or name in WRAPPERS_FOR_SPARSE
]
DTYPES = [
    pytest.param(Case(cls, how, "dtypes"), name, id=f"{cls.__name__}-{how}-{name}")
    for cls in OPTIONS
    if cls not in (optim.LBFGS, optim.Muon, optim.SparseAdam)
    for how in implementations(cls)
    for name in WRAPPERS
]


def parameters(model):
    torch.manual_seed(0)
    if model == "sparse":
        tensors = [torch.randn(7, 3), torch.randn(4, 1), torch.randn(2, 2)]
    elif model == "matrices":
        tensors = [torch.randn(5, 3), torch.randn(3, 4).t(), torch.randn(1, 1), torch.randn(2, 2)]
    elif model == "dtypes":
        dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16)
        tensors = [torch.randn(3, 4).to(dtype) for dtype in dtypes]
    else:
        image = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        strided = [torch.randn(3, 4).t(), torch.randn(6, 4)[::2, 1:]]
        tensors = [torch.randn(5, 3), image, torch.randn(1), *strided, torch.randn(2)]
    return [tensor.requires_grad_() for tensor in tensors]  # the last one never has a gradient


def objective(model, params, t):
    """Another one at each step, so that the signs of gradients change too."""
    if model == "sparse":
        rows = torch.tensor([t % 2, 3, t % 2])  # a row twice: the gradient is not coalesced
        return sum(embedding(rows, p, sparse=True).square().sum() for p in params[:-1])
    shift = (-1) ** t / (t + 1)
    return sum(((p - shift).square() + p.sin()).double().sum() for p in params[:-1])


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
        evaluations, self.evaluations = self.evaluations, []
        return snapshot(self.params, self.optimizer) | {"evaluations": evaluations}

    def steps(self, n):
        return [self.step() for _ in range(n)]


@cache
def bare_trajectory(case):
    return Run.start(case, bare).steps(STEPS)


def assert_same(mine, bare):
    for t, (one, other) in enumerate(zip(mine, bare, strict=True)):
        assert not differences(one, other), f"{STEPS - len(mine) + t + 1}. step"


def from_checkpoint(run, wrapper, of=None):
    """The run, continued in a fresh process, as a user would write it."""
    file, source = io.BytesIO(), run if of is None else of
    saved = {
        "params": [p.detach() for p in source.params],
        "optimizer": source.optimizer.state_dict(),
        "schedule": source.schedule.state_dict(),
    }
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = Run.start(run.case, wrapper)
    with torch.no_grad():
        for p, value in zip(fresh.params, loaded["params"], strict=True):
            p.copy_(value)
    fresh.schedule.load_state_dict(loaded["schedule"])
    fresh.optimizer.load_state_dict(loaded["optimizer"])
    fresh.t = source.t
    return fresh


def from_bare_checkpoint(run, wrapper):
    unwrapped = Run.start(run.case, bare)
    unwrapped.steps(INTERRUPTED_AT)
    return from_checkpoint(run, wrapper, of=unwrapped)


def deep_copied(run, _wrapper):
    return copy.deepcopy(run)


def pickled(run, _wrapper):
    params, optimizer, schedule = pickle.loads(
        pickle.dumps((run.params, run.optimizer, run.schedule))
    )
    return Run(run.case, params, optimizer, schedule, run.t)


def test_every_optimizer_of_torch_is_listed():
    classes = {c for c in vars(optim).values() if inspect.isclass(c)}
    listed = {c for c in classes if issubclass(c, optim.Optimizer)} - {optim.Optimizer}
    assert listed == OPTIONS.keys()


@pytest.mark.parametrize("case, name", PAIRS + DTYPES)
def test_each_step_is_that_of_the_bare_optimizer(case, name):
    assert_same(Run.start(case, WRAPPERS[name]).steps(STEPS), bare_trajectory(case))


@pytest.mark.parametrize(
    "continued", [from_checkpoint, from_bare_checkpoint, deep_copied, pickled]
)
@pytest.mark.parametrize("case, name", PAIRS)
def test_interrupted_and_continued(case, name, continued):
    run = Run.start(case, WRAPPERS[name])
    run.steps(INTERRUPTED_AT)
    other = continued(run, WRAPPERS[name])
    expected = bare_trajectory(case)[INTERRUPTED_AT:]
    # one step ahead each, in turns: what the two still shared would show in the other
    others, own = other.steps(1), run.steps(2)
    others, own = others + other.steps(STEPS - INTERRUPTED_AT - 1), own + run.steps(1)
    assert_same(others, expected)
    assert_same(own, expected)


@pytest.mark.parametrize("case, name", DTYPES)
def test_resumed_in_low_precision(case, name):
    """Loading casts the state to each parameter's dtype; ours loads what the bare one loads."""
    run, unwrapped = Run.start(case, WRAPPERS[name]), Run.start(case, bare)
    run.steps(INTERRUPTED_AT), unwrapped.steps(INTERRUPTED_AT)
    mine, theirs = from_checkpoint(run, WRAPPERS[name]), from_checkpoint(unwrapped, bare)
    assert_same(mine.steps(2), theirs.steps(2))


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
    """One unit in the last place of a gradient, or a word in the state, is a difference."""
    case = Case(optim.SGD, {"momentum": 0.9})
    off = Run.start(case, partial(ParamTransformingOptimizer, grad_scale=1 + 2**-22))
    seen = set(differences(off.step(), bare_trajectory(case)[0]))
    assert seen >= {"params", "grads", "state"}

    noted = Run.start(case, ParamTransformingOptimizer)
    noted.step()
    noted.optimizer.state[noted.params[0]]["ours"] = 1
    mine = snapshot(noted.params, noted.optimizer) | {"evaluations": []}
    assert "state" in differences(mine, bare_trajectory(case)[0])
