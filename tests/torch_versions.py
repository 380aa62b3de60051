"""Marks for tests of what older versions of torch cannot do, by the library or without it."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def needs_torch(major: int, minor: int, why: str) -> pytest.MarkDecorator:
    """Skip on versions before this one."""
    return pytest.mark.skipif(TORCH < (major, minor), reason=f"torch >= {major}.{minor}: {why}")


views_in_vmap = needs_torch(2, 13, "older ones take no view of another dtype in vmap")
compiles = needs_torch(2, 13, "older ones compile less of a step, and at most 8 optimizers")
takes_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="older ones take no gradient of another dtype"
)
differentiates_lr = needs_torch(2, 7, "older ones take no tensor as learning rate there")
shards_on_cpu = needs_torch(2, 7, "older ones have no fully_shard on a CPU, and no src_data_rank")
views_columns = needs_torch(2, 12, "older ones view no columns of several sub-tensors")
