"""The standard ensemble and smallest perturbations, beside other libraries: `make bench-attacks`.

Three small CNNs, trained on digits, on digits perturbed in Linf and in L2 balls; and the first one
with rounded pixels, which masks its gradients. Each is attacked by `standard()` and by the four
attacks of pyautoattack, in one run. Whether a result fools the model, and is inside ball and box,
is computed here in float64; a hook counts the examples that a model is called with. Writes the
figures to `out/bench/standard.json` and the tables to `docs/attacks/standard.md`, in 20 minutes;
with `--models` and `--balls` it renews some rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attacks_ours as ours
import attacks_problems as problems
import machine
import torch
from attacks import DOCS, NORMS, OUT, counted, judged
from attacks_peers import Solver
from attacks_problems import Problem
from attacks_tables import Report, excess, percent
from memory import peak_bytes
from tables import markdown, measured_on
from torch import Tensor, nn

from rai_toolbox.constraints import Constraint, L2Ball, LinfBall
from rai_toolbox.optim import PGD
from rai_toolbox.perturbations import (
    attack,
    fab_attack,
    minimum_norm_attack,
    square_attack,
    standard,
)

RADII = {
    "plain": {math.inf: 0.06, 2.0: 1.0, 1.0: 5.0},
    "Linf-trained": {math.inf: 0.15, 2.0: 1.5, 1.0: 8.0},
    "L2-trained": {math.inf: 0.1, 2.0: 1.5, 1.0: 8.0},
    "rounded pixels": {math.inf: 0.06, 2.0: 1.0, 1.0: 5.0},
}
PEER = "pyautoattack 0.2.0"


def small_cnn() -> nn.Sequential:
    """A CNN on digits of 14 x 14 pixels: so small that 5,000 queries take seconds."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


class Rounded(nn.Module):
    """Pixels rounded to eighths: the gradient is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (8 * x).round() / 8


def perturbed_in(ball: Constraint) -> problems.Shown:
    def shown(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return attack(net, images, labels, ball=ball, optimizer=PGD, steps=5).data

    return shown


def model(name: str, number: int) -> Problem:
    if name == "rounded pixels":
        plain = model("plain", number)
        return plain._replace(net=nn.Sequential(Rounded(), *plain.net))
    shown = {
        "plain": problems.as_they_are,
        "Linf-trained": perturbed_in(LinfBall(0.15)),
        "L2-trained": perturbed_in(L2Ball(1.5)),
    }[name]
    return problems.problem(small_cnn, number, epochs=8, shown=shown)


# Robust accuracy


def by_ours(problem: Problem, p: float, epsilon: float) -> Solver:
    generator = torch.Generator().manual_seed(0)
    return lambda: standard()(*problem, ball=ours.ball(p, epsilon), generator=generator).data


def by_peer(problem: Problem, p: float, epsilon: float) -> Solver:
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    net, data, target = problem
    found = AutoAttack(net, norm=NORMS[p], eps=epsilon, seed=0, version="standard")

    def run() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return found.run_standard_evaluation(data, target, batch_size=len(data))[0]

    return run


def side_by_side(name: str, balls: list[str], number: int) -> Iterator[Report]:
    problem = model(name, number)
    for p, epsilon in RADII[name].items():
        if NORMS[p] not in balls:
            continue
        row: Report = {"model": name, "norm": NORMS[p], "epsilon": epsilon, "data": number}
        for who, make in (("ours", by_ours), (PEER, by_peer)):
            start = time.perf_counter()
            row[who] = judged(problem, make(problem, p, epsilon), p, epsilon)
            row[who]["seconds"] = time.perf_counter() - start
        print(markdown(*ensemble_table([row])), flush=True)
        yield row


# Smallest perturbations


def norms(problem: Problem, points: Tensor, p: float) -> Tensor:
    """The distances of what fools; inf for the rest; 0 where the data do."""
    net, data, target = problem
    with torch.no_grad():
        wrong, before = (net(x).argmax(1) != target for x in (points, data))
    size = torch.linalg.vector_norm((points.double() - data.double()).flatten(1), p, dim=1)
    return size.where(wrong, math.inf).where(~before, 0.0)


def on_linear(number: int) -> Report:
    """The largest ratio of FAB's radii to the exact ones, which no bound of the data limits."""
    net, data, target = problem = problems.problem(problems.linear_net, number)
    weight = net[1].weight.double()
    logits, found = net(data).double(), {}
    for p in NORMS:
        dual = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}[p]
        gaps = logits.gather(1, target.unsqueeze(1)) - logits
        sizes = torch.linalg.vector_norm(weight[target].unsqueeze(1) - weight, dual, dim=2)
        exact = (gaps / sizes).nan_to_num(math.inf).amin(1).clamp(min=0)
        settings = {"ball": type(ours.ball(p, 1.0)), "data_range": None, "largest": 1e3}
        points = minimum_norm_attack(*problem, solver=fab_attack, steps=20, **settings).data
        ratio = norms(problem, points, p) / exact
        found[NORMS[p]] = ratio[exact > 0].max().item()
    return found


def on_cnn(number: int) -> list[Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from foolbox import PyTorchModel, attacks
    problem, found = model("plain", number), []
    net, data, target = problem
    wrapped = PyTorchModel(net, bounds=(0, 1))

    def peer(kind: Callable[..., object]) -> Solver:
        return lambda: kind(wrapped, data, target, epsilons=None)[0]

    def mine(p: float) -> Solver:
        solver = partial(fab_attack, rivals=9)
        ball = type(ours.ball(p, 1.0))
        return lambda: minimum_norm_attack(*problem, ball=ball, solver=solver, steps=100).data

    kinds: dict[float, dict[str, Solver]] = {
        math.inf: {"FMN, 1000 steps": peer(attacks.LInfFMNAttack(steps=1000))},
        2.0: {
            "FMN, 1000 steps": peer(attacks.L2FMNAttack(steps=1000)),
            "DDN, 1000 steps": peer(attacks.DDNAttack(steps=1000)),
            "CW, 5 x 200 steps": peer(
                attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=200)
            ),
        },
        1.0: {
            "FMN, 1000 steps": peer(attacks.L1FMNAttack(steps=1000)),
            "EAD, 5 x 200 steps": peer(attacks.EADAttack(binary_search_steps=5, steps=200)),
        },
    }
    for p, peers in kinds.items():
        solvers = {"ours": mine(p)} | {f"foolbox 3.3.4, {name}": run for name, run in peers.items()}
        for name, run in solvers.items():
            with counted(net) as calls:
                points = run()
            median = norms(problem, points, p).median().item()
            per_example = calls.rows / number
            found.append({"norm": NORMS[p], "who": name, "median": median, "calls": per_example})
    return found


def memory(number: int) -> dict[str, int]:
    """Peak bytes of a search of so many queries."""
    problem, ball = model("plain", number), LinfBall(0.01)

    def peak(queries: int) -> int:
        return peak_bytes(lambda: square_attack(*problem, ball=ball, queries=queries))

    peak(2)  # what is allocated once
    return {str(queries): peak(queries) for queries in (100, 300, 900)}


# The tables


def ensemble_table(rows: list[Report]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "ball", "robust, %: ours", PEER, "calls per example: ours", PEER]
    header += ["ratio", "s: ours", PEER, "outside ball or box: ours", PEER]
    table = []
    for row in rows:
        both = row["ours"], row[PEER]
        calls = [each["calls_per_example"] for each in both]
        cells = [row["model"], f"{row['norm']} {row['epsilon']:g}"]
        cells += [percent(1 - each["fooled"]) for each in both]
        cells += [*(f"{number:.0f}" for number in calls), f"{calls[0] / calls[1]:.2f}"]
        cells += [f"{each['seconds']:.0f}" for each in both]
        cells += [excess(max(each["outside_ball"], each["outside_box"])) for each in both]
        table.append(cells)
    return header, table


def verdicts(report: Report) -> list[list[str]]:
    found = []
    for row in report["ensembles"]:
        mine, theirs = (100 * (1 - row[who]["fooled"]) for who in ("ours", PEER))
        title = f"{row['model']}, {row['norm']}"
        text = f"{mine:.1f} vs. {theirs:.1f}"
        if row["model"] == "rounded pixels":
            found.append((f"{title}: not higher", text, mine <= theirs))
        else:
            found.append((f"{title}: within .5 points", text, abs(mine - theirs) <= 0.5001))
        ratio = row["ours"]["calls_per_example"] / row[PEER]["calls_per_example"]
        found.append((f"{title}: calls", f"<= 1: {ratio:.2f}", ratio <= 1))
    for norm, ratio in report.get("linear", {}).items():
        text = f"<= 1.001: {ratio:.5f}"
        found.append((f"linear model, {norm}: to the exact radius", text, ratio <= 1.001))
    if "memory" in report:
        peaks = list(report["memory"].values())
        ratio, queries = max(peaks) / min(peaks), ", ".join(report["memory"])
        text = f"<= 1.01: {ratio:.3f} ({max(peaks):,} bytes)"
        found.append((f"peak memory of Square, {queries} queries", text, ratio <= 1.01))
    smallest: dict[str, dict[bool, list[float]]] = {}
    for row in report.get("cnn", []):
        of = smallest.setdefault(row["norm"], {True: [], False: []})
        of[row["who"] == "ours"].append(row["median"])
    for norm, of in smallest.items():
        ratio = min(of[True]) / min(of[False])
        text = f"<= 1.01: {ratio:.3f}"
        found.append((f"plain, {norm}: median radius to foolbox's best", text, ratio <= 1.01))
    return [[what, text, "yes" if holds else "**no**"] for what, text, holds in found]


def page(report: Report) -> str:
    parts = [
        measured_on(report),
        "### Limits",
        markdown(["limit", "measured", "holds"], verdicts(report)),
    ]
    if report["ensembles"]:
        parts += [f"### Robust accuracy, {report['ensembles'][0]['data']} digits"]
        parts.append(markdown(*ensemble_table(report["ensembles"])))
    if "cnn" in report:
        rows = [
            [row["norm"], row["who"], f"{row['median']:.4f}", f"{row['calls']:.0f}"]
            for row in report["cnn"]
        ]
        parts += ["### Smallest perturbations, plain model"]
        parts.append(markdown(["norm", "attack", "median radius", "calls per example"], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The standard ensemble beside pyautoattack's.")
    parser.add_argument("--data", type=int, default=200, help="test digits (default 200)")
    parser.add_argument("--models", nargs="*", default=[*RADII, "norms"], help="which to renew")
    parser.add_argument("--balls", nargs="*", default=list(NORMS.values()), help="of which norms")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.out / "standard.json"
    before = json.loads(path.read_text()) if path.exists() else {"ensembles": []}
    report: Report = {**before, **machine.describe()}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        if name == "norms":
            report |= {"linear": on_linear(args.data // 2), "cnn": on_cnn(args.data // 2)}
            report["memory"] = memory(args.data // 2)
            path.write_text(json.dumps(report, indent=1) + "\n")
            continue
        for row in side_by_side(name, args.balls, args.data):
            key = row["model"], row["norm"]
            kept = [r for r in report["ensembles"] if (r["model"], r["norm"]) != key]
            order = list(RADII)
            report["ensembles"] = sorted([*kept, row], key=lambda r: order.index(r["model"]))
            path.write_text(json.dumps(report, indent=1) + "\n")
    (args.docs / "standard.md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
