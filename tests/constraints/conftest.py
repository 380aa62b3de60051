"""Which tests of sets are slow: those in other dtypes than float32."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark repetitions in other dtypes, where a test also runs in float32.

    `test_laws.py` says for each case itself which dtypes are quick.
    """
    here = [i for i in items if i.path.parent.name == "constraints" and hasattr(i, "callspec")]
    dtypes = {id(item): item.callspec.params.get("dtype") for item in here}
    in_float32 = {item.function for item in here if dtypes[id(item)] == torch.float32}
    for item in here:
        other = dtypes[id(item)] not in (None, torch.float32)
        if other and item.function in in_float32 and item.originalname != "test_laws":
            item.add_marker(pytest.mark.slow)
