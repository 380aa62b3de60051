"""Peak memory of a call."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr otherwise

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most bytes that `fn` holds at once beyond those in use when it is called (CPU).

    Every allocation counts, also the temporaries inside of kernels: the events of torch's
    profiler are added up in the order of their times.
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
