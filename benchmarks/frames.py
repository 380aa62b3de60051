"""Prints how many Python functions of this library one call runs: counts, the same everywhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

import rai_toolbox
from rai_toolbox.constraints import L1Ball, L2Ball, LinfBall
from rai_toolbox.optim import ClampedParameterOptimizer, ProjectedOptimizer
from rai_toolbox.perturbations import attack

HERE = str(Path(rai_toolbox.__file__).parent)


def frames(call: Callable[[], object]) -> Counter[str]:
    """Calls of each function of this library, by file and name."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(HERE):
            found[f"{name.removeprefix(HERE)[1:]}:{frame.f_code.co_name}"] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def of_step(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> Counter[str]:
    """Of a second step, on one tensor of shape (8, 10)."""
    torch.manual_seed(0)
    param = torch.randn(8, 10, requires_grad=True)
    param.grad = torch.randn(8, 10)
    optim = make([param])
    optim.step()
    return frames(optim.step)


def of_attack(ball: object) -> Counter[str]:
    """Of an attack of 10 steps on 8 examples."""
    torch.manual_seed(0)
    net = torch.nn.Linear(10, 3)
    data, target = torch.rand(8, 10), torch.randint(3, (8,))
    call = lambda: attack(net, data, target, ball=ball, steps=10)  # noqa: E731
    call()
    return frames(call)


def main() -> None:
    adam = torch.optim.Adam
    cases = {
        "Clamped(Adam).step": lambda: of_step(
            lambda p: ClampedParameterOptimizer(p, adam, clamp_min=-1.0, clamp_max=1.0)
        ),
        "ProjectedOptimizer(Adam, L1Ball).step": lambda: of_step(
            lambda p: ProjectedOptimizer(p, adam, constraint=L1Ball(1.0))
        ),
        **{
            f"attack, 10 steps, {b}": lambda b=b: of_attack(b)
            for b in (LinfBall(0.1), L2Ball(0.5), L1Ball(1.0))
        },
    }
    for name, case in cases.items():
        found = case()
        print(f"{name}: {sum(found.values())}")
        if "-v" in sys.argv:
            for function, count in found.most_common(25):
                print(f"    {count:5} {function}")


if __name__ == "__main__":
    main()
