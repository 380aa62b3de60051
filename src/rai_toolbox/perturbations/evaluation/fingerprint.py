"""Fingerprints: a few bytes that identify settings, a model or data across processes."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rai_toolbox.checks import as_plain
from rai_toolbox.constraints.base import Constraint
from rai_toolbox.constraints.sharding import complete


def fingerprint(*values: object) -> str:
    """A short text that differs if any of `values` differs.

    Tensors are compared by bits, dtype and shape, modules by class and `state_dict`, functions and
    classes by name, lambdas also by their code.
    """
    return _digest(repr(described(values)).encode())


def described(value: object) -> Any:
    """`value` as plain data for JSON, equal for equal settings in another process."""
    value = as_plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # strict JSON has no such number
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, nn.Module):
        return f"{_name(type(value))} {fingerprint(value.state_dict())}"
    if isinstance(value, Tensor):
        whole = complete(value.detach()).cpu().resolve_conj().resolve_neg().contiguous()
        # From the memory of the tensor, as numpy may be missing.
        memory = (ctypes.c_char * whole.nbytes).from_address(whole.data_ptr())
        return f"{value.dtype} {tuple(value.shape)} {_digest(memory)}"
    if isinstance(value, Constraint):
        return described(value.to_plain())
    if isinstance(value, partial):
        call = {"call": described(value.func), **described(value.keywords)}
        return call | ({"args": described(value.args)} if value.args else {})
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
        code = value.__code__
        constants = [item for item in code.co_consts if not isinstance(item, CodeType)]
        text = f"{code.co_code!r} {code.co_names} {constants}"
        return f"{_name(value)} {_digest(text.encode())}"
    return _name(value) if hasattr(value, "__qualname__") else _name(type(value))


def _name(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _digest(data: bytes | ctypes.Array[ctypes.c_char]) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
