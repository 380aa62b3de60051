"""Every private or version-dependent name of torch, each behind one name with a fallback."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Optimizers

use_grad_for_differentiable: Callable[..., Any] = getattr(
    torch_optimizer, "_use_grad_for_differentiable", torch.no_grad()
)
"""Decorator of `step`: grad mode is on in it only if the optimizer is differentiable."""


def get_value(tensor: Tensor) -> Any:
    """The number in a tensor; the tensor itself while torch.compile traces."""
    return tensor if torch.compiler.is_compiling() else tensor.item()


Muon: type | None = getattr(torch.optim, "Muon", None)  # from torch 2.9 on

NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # the base class of batch and instance normalizations
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


_GLOBAL_STEP_HOOKS: list[Mapping[int, Any]] = [
    getattr(torch_optimizer, name, {})
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
]


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks run at its steps: its own, or those of all optimizers."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own) or any(_GLOBAL_STEP_HOOKS)


def has_own_step_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks run at the steps of this optimizer alone; Lookahead has none."""
    before = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return bool(before or getattr(optimizer, "_optimizer_step_post_hooks", None))


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a class's `step`, to which torch adds the hooks of steps."""
    while getattr(step, "hooked", False):  # dynamo may have wrapped it again, with its attributes
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def plain_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """`unhooked`, and without the decorator `use_grad_for_differentiable`.

    It switches grad mode, which breaks the graphs of torch.compile.
    """
    step = unhooked(step)
    decorated = getattr(step, "__code__", None) is _DECORATED
    return step.__wrapped__ if decorated else step  # type: ignore[attr-defined]


known_plain_step = lru_cache(plain_step)
"""`plain_step` of a function in one look, in eager mode: it is asked at each step."""

_DECORATED = getattr(use_grad_for_differentiable(lambda: None), "__code__", "no function")


_profiles_thread: Callable[[], bool] = getattr(
    torch._C._autograd, "_profiler_enabled", lambda: True
)
_profiles_all: Callable[[], bool] = partial(
    getattr, torch.autograd.profiler, "_is_profiler_enabled", True
)
# (Observers of execution traces, and daemons, cannot be detected without a profiler.)


set_grad_mode: Callable[[bool], object] = torch._C._set_grad_enabled
"""`torch.set_grad_enabled` as a function in C: who calls it has to restore the mode."""


def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """What torch makes of a class's `step`, without what has nothing to do.

    Torch runs hooks, shows the step in profiles and switches grad mode in a way that compilers
    understand. Together this takes as long as five operators on a small tensor.
    """
    hooked, plain = Optimizer.profile_hook_step(func), plain_step(func)

    @wraps(func)
    def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        optimizer: Any = args[0]
        compiling = torch.compiler.is_compiling()
        is_profiled = not compiling and (_profiles_thread() or _profiles_all())
        if is_profiled or has_step_hooks(optimizer):
            return hooked(*args, **kwargs)
        if compiling or plain is func:  # (a subclass's own step may have another grad mode)
            return func(*args, **kwargs)
        before = torch.is_grad_enabled()
        set_grad_mode(optimizer.defaults["differentiable"])
        try:
            return plain(*args, **kwargs)
        finally:
            set_grad_mode(before)

    return step


def is_wrapped_by_scheduler(step: Callable[..., Any]) -> bool:
    """Whether an optimizer's own `step` is what a learning rate scheduler has put there."""
    return getattr(step, "_wrapped_by_lr_sched", False)


def mark_stepped(optimizer: Any) -> None:
    """Tell learning rate schedulers that the optimizer has made a step."""
    optimizer._opt_called = True


def set_grad_dtype(tensor: Tensor, dtype: torch.dtype) -> None:
    """Allow a tensor gradients of another dtype; torch 2.6 allows any."""
    if hasattr(tensor, "grad_dtype"):
        tensor.grad_dtype = dtype


_run_backward: Callable[..., Any] | None = getattr(
    getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None
)


def backward(loss: Tensor, scale: Tensor, inputs: Sequence[Tensor]) -> None:
    """`torch.autograd.backward` of a loss times a scale of its shape, into the inputs.

    Torch first compares shapes that may be symbolic, and saves the context for threads of devices.
    For a loss on the CPU that takes as long as ten operators on a small tensor.
    """
    plain = type(loss) is Tensor and loss.is_cpu and not function_transforms_active()
    if plain and _run_backward is not None:
        inputs, options = tuple(inputs), {"allow_unreachable": True, "accumulate_grad": True}
        _run_backward((loss,), (scale,), False, False, inputs, **options)
    else:
        torch.autograd.backward(loss, scale, inputs=inputs)


# Operators on lists of tensors

foreach_add_: Callable[..., Any] = torch._foreach_add_
foreach_addcmul_: Callable[..., Any] = torch._foreach_addcmul_
foreach_clamp_max_: Callable[..., Any] = torch._foreach_clamp_max_
foreach_clamp_min_: Callable[..., Any] = torch._foreach_clamp_min_
foreach_copy_: Callable[..., Any] = torch._foreach_copy_
foreach_lerp_: Callable[..., Any] = torch._foreach_lerp_
foreach_mul_: Callable[..., Any] = torch._foreach_mul_
foreach_sign_: Callable[..., Any] = torch._foreach_sign_
_foreach_check_and_scale_: Callable[..., Any] = torch._amp_foreach_non_finite_check_and_unscale_


def foreach_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries of plain tensors of real numbers on the CPU are finite."""
    found = torch.zeros((), dtype=torch.float32, device="cpu")
    one = torch.ones((), dtype=torch.float32, device="cpu")
    _foreach_check_and_scale_(tensors, found, one)  # (by 1: it only looks)
    return found.item() == 0


share_memory: Callable[[Tensor, Tensor], bool] = getattr(
    torch._C, "_is_alias_of", lambda a, b: True
)
"""Whether two tensors are views of the same memory, as far as torch can tell."""


# Tracing and function transforms

not_compiled: Callable[..., Any] = getattr(torch, "_disable_dynamo", lambda function: function)
"""Decorator: keep torch.compile out of a method. `torch.compiler.disable` is slow to import."""


def graph_break() -> None:
    """End the graph that torch.compile captures here."""
    torch._dynamo.graph_break()


function_transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)
"""Whether tensors may be wrapped by `torch.func`."""

dispatch_modes_active: Callable[[], object] = getattr(
    torch._C, "_len_torch_dispatch_stack", lambda: True
)
"""Whether a `TorchDispatchMode` sees each operator."""

forward_ad_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)
"""Level of forward-mode AD that tensors may be duals of; -1 outside of any."""


def compile_apart(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` that does not share its limit of recompilations, where torch can do so."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(function, **options)


def lookup_backend(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands behind the name of a backend of torch.compile."""
    return torch._dynamo.lookup_backend(name)


def graph_breaks() -> dict[str, int]:
    """How often torch.compile has broken a graph, by reason; calls of `graph_break` left out."""
    from torch._dynamo.utils import counters  # slow to import

    intended = ("User-inserted graph break", "skip function graph_break")  # (2.6 says the second)
    return {
        reason: count
        for reason, count in counters["graph_break"].items()
        if not any(words in reason for words in intended)
    }


def eagerly() -> AbstractContextManager[object]:
    """Context: compiled functions run uncompiled, if torch has loaded its compiler."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()
