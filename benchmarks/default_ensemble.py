"""The default of `evaluate_robustness` beside `standard()`, on models that mask gradients.

Small nets for digits of 8 x 8 pixels, plain and trained on perturbed digits; each with rounded
pixels (in torch, with gradients that are passed through, or in NumPy) and with outputs that are
saturated; and a CNN for 14 x 14 pixels with rounded pixels. Writes the figures to
`out/bench/default.json` and the table to `docs/attacks/default.md`, in 20 minutes; with `--sets`
and `--kinds` it renews some rows. Settings were tuned on the first set of nets and digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from attacks import DOCS, OUT
from attacks_tables import Report, percent
from sklearn.datasets import load_digits
from standard_attacks import RADII, model
from tables import markdown, measured_on
from torch import Tensor, nn

from rai_toolbox.constraints import Constraint, L1Ball, L2Ball, LinfBall
from rai_toolbox.perturbations import attack, short_ensemble, standard

BALLS = {"Linf": LinfBall, "L2": L2Ball, "L1": L1Ball}
TRAINING = {"plain": None, "Linf-trained": LinfBall(0.1), "L2-trained": L2Ball(0.7)}


class Data(NamedTuple):
    """Which digits train and test nets, and the radii; pixels are rounded to 1 / `levels`."""

    train: slice
    test: slice
    seed: int
    levels: int
    radii: dict[str, float]


SETS = {
    "tuned": Data(slice(100, None), slice(200), 0, 8, {"Linf": 0.1, "L2": 0.5, "L1": 1.2}),
    "A": Data(slice(1400), slice(1400, 1600), 1, 8, {"Linf": 0.07, "L2": 0.7, "L1": 2.0}),
    "B": Data(slice(400, None), slice(200, 400), 2, 5, {"Linf": 0.12, "L2": 0.4, "L1": 1.0}),
}


class _PassedThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        return (levels * x).round() / levels

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _in_numpy(net: nn.Sequential, levels: int) -> Callable[[Tensor], Tensor]:
    first, first_bias, second, second_bias = (p.detach().numpy() for p in net.parameters())

    def run(x: Tensor) -> Tensor:
        hidden = ((levels * x.numpy()).round() / levels @ first.T + first_bias).clip(0)
        return torch.from_numpy(hidden @ second.T + second_bias)

    return run


Make = Callable[[nn.Sequential, int], Callable[[Tensor], Tensor]]
KINDS: dict[str, Make] = {
    "rounded": lambda net, levels: lambda x: net((levels * x).round() / levels),
    "passed through": lambda net, levels: lambda x: net(_PassedThrough.apply(x, levels)),
    "NumPy": _in_numpy,
    "saturated": lambda net, levels: lambda x: (200 * net(x)).softmax(1),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels).float() / 16, torch.tensor(classes)


def trained(data: Data, ball: Constraint | None) -> nn.Sequential:
    """A small net, after the first steps trained on perturbed digits."""
    x, y = (each[data.train] for each in digits())
    torch.manual_seed(data.seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(120):
        is_clean = ball is None or step < 20
        shown = x if is_clean else attack(net, x, y, ball=ball, steps=3).data
        adam.zero_grad()
        nn.functional.cross_entropy(net(shown), y).backward()
        adam.step()
    return net


def robust(net: Any, data: Tensor, target: Tensor, points: Tensor) -> float:
    with torch.no_grad():
        return (net(points).argmax(1) == target).float().mean().item()


def row(names: tuple[str, str, str], net: Any, batch: tuple[Tensor, Tensor], ball: Any) -> Report:
    found: Report = {"names": list(names)}
    for who, run in (("default", short_ensemble), ("standard", standard())):
        generator = torch.Generator().manual_seed(0)
        points = run(net, *batch, ball=ball, generator=generator).data
        found[who] = robust(net, *batch, points)
    found["time"] = times(net, batch, ball) if names[1] != "NumPy" else None
    return found


def times(net: Any, batch: tuple[Tensor, Tensor], ball: Any) -> float:
    """The time of the default in units of one `attack`: the median of three rounds."""

    def seconds(run: Callable[..., object], **settings: Any) -> float:
        start = time.perf_counter()
        run(net, *batch, ball=ball, **settings)
        return time.perf_counter() - start

    return statistics.median(seconds(short_ensemble) / seconds(attack) for _ in range(3))


def rows_of(name: str, kinds: list[str]) -> list[Report]:
    found = []
    if name == "CNN":
        net, *batch = model("rounded pixels", 200)
        for norm, epsilon in zip(BALLS, RADII["rounded pixels"].values(), strict=True):
            ball = BALLS[norm](epsilon)
            found.append(row((name, "rounded", norm), net, (batch[0], batch[1]), ball))
        return found
    data = SETS[name]
    batch = [each[data.test] for each in digits()]
    nets = {how: trained(data, ball) for how, ball in TRAINING.items()}
    for kind in kinds:
        for norm, epsilon in data.radii.items():
            for how, net in nets.items():
                names = (f"{name}, {how}", kind, norm)
                one = KINDS[kind](net, data.levels)
                found.append(row(names, one, (batch[0], batch[1]), BALLS[norm](epsilon)))
    return found


def page(report: Report) -> str:
    header = ["nets and digits", "model", "ball", "robust, %: default", "`standard()`", "points"]
    table = []
    for each in report["rows"]:
        default, long = each["default"], each["standard"]
        cells = [*each["names"], percent(default), percent(long), f"{100 * (default - long):+.1f}"]
        table.append([*cells, "" if each["time"] is None else f"{each['time']:.1f}"])
    return f"{measured_on(report)}\n\n{markdown([*header, 'time / one `attack`'], table)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The default ensemble beside the standard one.")
    parser.add_argument("--sets", nargs="*", default=[*SETS, "CNN"], help="of nets and digits")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of masked gradients")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # which say that gradients are masked
    path = args.out / "default.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {tuple(each["names"]): each for each in before}
    for name in args.sets:
        rows |= {tuple(each["names"]): each for each in rows_of(name, args.kinds)}
        report: Report = {**machine.describe(), "rows": list(rows.values())}
        path.write_text(json.dumps(report, indent=1) + "\n")
        (args.docs / "default.md").write_text(page(report))
    print((args.docs / "default.md").read_text())


if __name__ == "__main__":
    main()
