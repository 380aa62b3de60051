"""The cost of a step of `Scion` beside that of `torch.optim.Muon`, on square matrices.

`python benchmarks/scion.py` takes about a minute; the two optimizers take turns, and the
fastest step of each counts. The ratios are to be at most 1.1.
"""

from __future__ import annotations

import argparse
from time import perf_counter

import torch
from torch.optim import Muon, Optimizer

from rai_toolbox.constraints import SpectralBall
from rai_toolbox.optim import Scion

SETTINGS = {"lr": 1e-3, "momentum": 0.95, "nesterov": True}


def weights(count: int, size: int, device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        matrix = torch.randn(size, size, generator=generator).to(device)
        made.append(torch.nn.Parameter(matrix))
        made[-1].grad = torch.randn(size, size, generator=generator).to(device)
    return made


def seconds(optimizer: Optimizer, device: str) -> float:
    start = perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    def params() -> list[torch.nn.Parameter]:
        return weights(args.count, args.size, args.device)

    ball = SpectralBall(1.0)
    optimizers = {
        "Muon": Muon(params(), weight_decay=0.1, **SETTINGS),
        "Scion, unconstrained": Scion(
            params(), constraint=ball, unconstrained=True, weight_decay=0.1, **SETTINGS
        ),
        "Scion, constrained": Scion(params(), constraint=SpectralBall(2.0), **SETTINGS),
    }
    best = dict.fromkeys(optimizers, float("inf"))
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            best[name] = min(best[name], seconds(optimizer, args.device))
    for name, time in best.items():
        print(f"{name:24} {1e3 * time:8.2f} ms   {time / best['Muon']:.2f} x Muon")


if __name__ == "__main__":
    main()
