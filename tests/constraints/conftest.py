"""Which tests of sets are slow: those that repeat quicker ones in other dtypes and scales."""

import pytest
import torch
from constraints.cases import CASES

FIRST = {str(case) for case in {case.kind: case for case in reversed(CASES)}.values()}
QUICK = {"dtype": torch.float32, "scale": 1.0}


def pytest_collection_modifyitems(items):
    """Mark as slow what a quicker item repeats; `test_laws.py` marks its own items."""
    here = [i for i in items if i.path.parent.name == "constraints" and hasattr(i, "callspec")]
    quick = {(i.function, name) for i in here for name in QUICK if is_quick(i, name)}
    for item in here:
        repeats = any((item.function, name) in quick and not is_quick(item, name) for name in QUICK)
        on_device = "as_on_a_device" in item.fixturenames
        if item.originalname == "test_laws":
            continue
        if repeats or (on_device and str(item.callspec.params.get("case")) not in FIRST):
            item.add_marker(pytest.mark.slow)


def is_quick(item, name):
    """Whether the item runs with the quick value of a parameter."""
    return item.callspec.params.get(name) == QUICK[name]
