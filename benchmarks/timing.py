"""Times of alternatives that are compared with each other, measured side by side.

Each round times every alternative once, in shuffled order, so that other load on the machine
affects all of them alike. A ratio is the median over rounds of (alternative / baseline) in a round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # an extra: rai-constrained[progress]
    tqdm = None

Samples = dict[str, list[float]]  # seconds per call, one entry a round

Progress = Callable[[int, int], object]

SAMPLE_S = 0.01  # a sample is repeated calls for at least this long
MIN_ROUNDS, MAX_ROUNDS = 5, 400


def silent(done: int, total: int) -> None:
    """No progress shown."""


@contextmanager
def progress_bar(text: str) -> Iterator[Progress]:
    """A progress bar, updated with the number of rounds done and the total."""
    if tqdm is None:
        print(f"{text} ...", flush=True)
        yield silent
        return
    with tqdm(desc=text, unit="round", leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    reset: Callable[[], object] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Samples:
    """Seconds per call of each alternative; `progress` is called with rounds done and expected.

    Rounds are repeated until `budget_s` is used up, warm-up included. The time of `reset`, which is
    called before each call, does not count.
    """

    def sample(fn: Callable[[], object], calls: int) -> float:
        seconds, start = 0.0, perf_counter()
        for _ in range(calls):
            if reset is not None:
                seconds += perf_counter() - start
                reset()
                start = perf_counter()
            fn()
        return (seconds + perf_counter() - start) / calls

    order = list(alternatives)
    shuffle = random.Random(seed).shuffle
    with no_garbage_collection():
        start = perf_counter()
        for fn in alternatives.values():
            fn()
            fn()
        warm = [sample(fn, 1) for fn in alternatives.values()]
        calls = math.ceil(SAMPLE_S / min(warm))

        samples: Samples = {name: [] for name in alternatives}
        for done in range(1, MAX_ROUNDS + 1):
            shuffle(order)
            for name in order:
                samples[name].append(sample(alternatives[name], calls))
            used = (perf_counter() - start) / budget_s
            progress(done, max(done, MIN_ROUNDS, min(MAX_ROUNDS, round(done / used))))
            if used > 1 and done >= MIN_ROUNDS:
                break
    return samples


def compare(samples: Samples, baseline: str) -> dict[str, dict[str, Any]]:
    """Per alternative: median in ms; median and quartiles of the ratio to `baseline`."""
    rows = {}
    for name, seconds in samples.items():
        ratios = [s / b for s, b in zip(seconds, samples[baseline], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "ratio": quartiles[1],
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "rounds": len(seconds),
        }
    return rows
