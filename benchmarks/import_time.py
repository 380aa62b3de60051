"""The time of `import rai_toolbox.optim` in addition to that of torch."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from typing import Any

from timing import Progress, silent

SCRIPT = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
{imports}
print(middle - start, perf_counter() - middle)
"""
IMPORTS = {"torch": "", "torch, rai_toolbox.optim": "import rai_toolbox.optim"}


def run(rounds: int, *, seed: int = 0, progress: Progress = silent) -> dict[str, Any]:
    """Medians over fresh interpreters, with and without ours, in shuffled order."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    order = list(IMPORTS)
    shuffle = random.Random(seed).shuffle
    for done in range(1, rounds + 1):
        shuffle(order)
        for name in order:
            command = [sys.executable, "-c", SCRIPT.format(imports=IMPORTS[name])]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            torch_s, ours_s = map(float, out.split())
            seconds[name].append((torch_s, ours_s))
        progress(done, rounds)

    def median_ms(values: list[float]) -> float:
        return 1e3 * statistics.median(values)

    bare, ours = seconds.values()
    return {
        "torch_ms": median_ms([sum(s) for s in bare]),
        "both_ms": median_ms([sum(s) for s in ours]),
        "extra_ms": median_ms([s[1] for s in ours]),  # within one interpreter: far less noise
        "rounds": rounds,
    }
