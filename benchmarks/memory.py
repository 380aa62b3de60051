"""Peak memory of a call."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to stderr

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """The peak number of bytes that `fn` allocates on CPU, above those in use when it is called.

    Temporaries inside kernels count, too: the memory events of torch's profiler are summed in the
    order of their times.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    results = prof.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    peak = in_use = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        in_use += nbytes
        peak = max(peak, in_use)
    return peak
