"""Every private or version-dependent name of torch, each behind one name with a fallback."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import (
    _get_value,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

__all__ = [
    "BATCH_NORMS",
    "Muon",
    "compile_apart",
    "foreach_add_",
    "foreach_clamp_max_",
    "foreach_clamp_min_",
    "foreach_mul_",
    "forward_ad_level",
    "function_transforms_active",
    "get_value",
    "graph_break",
    "graph_breaks",
    "has_global_step_hooks",
    "is_of_compiler",
    "is_restart",
    "lookup_backend",
    "not_compiled",
    "set_grad_dtype",
    "share_memory",
    "tree_leaves",
    "use_grad_for_differentiable",
]

# Optimizers

use_grad_for_differentiable = _use_grad_for_differentiable
"""Decorator of `step`: grad mode is on in it only if the optimizer is differentiable."""

get_value: Callable[[Tensor], Any] = _get_value
"""A number of a tensor; the tensor itself while torch.compile traces."""

Muon: type | None = getattr(torch.optim, "Muon", None)  # from torch 2.9 on

BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase,)
"""Base class of all batch and instance normalizations."""


def has_global_step_hooks() -> bool:
    """Whether somebody hooks the steps of all optimizers."""
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def set_grad_dtype(tensor: Tensor, dtype: torch.dtype) -> None:
    """Let a tensor have gradients of another dtype; torch 2.6 and older check no dtype."""
    if hasattr(tensor, "grad_dtype"):
        tensor.grad_dtype = dtype


# Operators on lists of tensors

foreach_add_: Callable[..., Any] = torch._foreach_add_
foreach_clamp_max_: Callable[..., Any] = torch._foreach_clamp_max_
foreach_clamp_min_: Callable[..., Any] = torch._foreach_clamp_min_
foreach_mul_: Callable[..., Any] = torch._foreach_mul_


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    is_alias_of: Callable[[Tensor, Tensor], bool] | None
    is_alias_of = getattr(torch._C, "_is_alias_of", None)
    if is_alias_of is not None:
        return bool(is_alias_of(a, b))
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def tree_leaves(tree: Any) -> list[Any]:
    """What is in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for each in tree for leaf in tree_leaves(each)]
    return [tree]


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

forward_ad_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)
"""Level of forward-mode AD that tensors may be duals of; -1 outside of any."""


def compile_apart(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` that does not share its limit of recompilations, where torch can do so."""
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(function, **options)
    return compiled


def lookup_backend(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands behind the name of a backend of torch.compile."""
    found: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return found


def graph_breaks() -> dict[str, int]:
    """How often torch.compile has broken a graph, by reason."""
    from torch._dynamo.utils import counters  # slow to import

    return dict(counters["graph_break"])


def is_restart(error: Exception) -> bool:
    """Whether an exception is how dynamo starts a capture again."""
    from torch._dynamo.exc import RestartAnalysis  # slow to import

    return isinstance(error, RestartAnalysis)


def is_of_compiler(error: Exception) -> bool:
    """Whether an exception comes from torch's compiler, not from what it was to compile."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    inside = module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
    return inside or isinstance(error, TorchDynamoException)
