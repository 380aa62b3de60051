"""Counts what hands a value to the host, where a solver would wait for a device."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"}


class HostReads(TorchDispatchMode):
    """`count` is the number of operators that read a value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))
