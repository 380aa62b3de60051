"""The time of a projection onto `Birkhoff`: 100 matrices of 32 x 32 in float32, near and far.

`python benchmarks/birkhoff.py` takes some seconds; the fastest of ten calls counts. It is to
take at most 50 ms. Far matrices, of entries of 10 times a normal number, take more steps.
"""

from __future__ import annotations

from time import perf_counter

import torch

from rai_toolbox.constraints import Birkhoff


def main() -> None:
    for scale in (1.0, 10.0):
        x = scale * torch.randn(100, 32, 32, generator=torch.Generator().manual_seed(0))
        best = float("inf")
        for _ in range(10):
            start = perf_counter()
            Birkhoff().project(x)
            best = min(best, perf_counter() - start)
        print(f"Birkhoff, entries of {scale:4} x normal: {1e3 * best:6.1f} ms")


if __name__ == "__main__":
    main()
