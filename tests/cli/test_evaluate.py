"""`rai-toolbox evaluate`: on files and import paths, killed and resumed, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rai_toolbox.cli import main
from rai_toolbox.cli.evaluate import load_model
from rai_toolbox.constraints import L2Ball, LinfBall
from rai_toolbox.perturbations.evaluation.report import RobustnessReport

NETS = '''
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


X = torch.rand(30, 4, generator=torch.Generator().manual_seed(1))


def batches_done():
    state = Path("out/state.json")
    return len(json.loads(state.read_text())["batches"]) if state.exists() else 0


class Mortal(nn.Sequential):
    """Ends its process, with no chance to clean up, some calls after so many batches."""

    calls = 0

    def forward(self, x):
        batches, calls = map(int, os.environ.get("KILLED_AFTER", "-1 0").split())
        if os.environ.get("RANK", "0") != os.environ.get("KILLED_RANK", "0"):
            return super().forward(x)
        if "KILLED_IN" in os.environ and torch.equal(x[0], X[int(os.environ["KILLED_IN"])]):
            # Another rank writes the file while this one has begun its next batch.
            while batches_done() < batches:
                time.sleep(0.01)
        done = batches_done()
        self.calls += done == batches
        if self.calls > calls and done == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def mortal():
    torch.manual_seed(0)
    return Mortal(nn.Linear(4, 3))


net = mortal()
NUMBER = 3


def flat():
    return nn.Sequential(nn.Linear(4, 3), nn.Threshold(1e6, 1.0))


def data():
    return X, net(X).argmax(1)


def batches():
    x, y = data()
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def broken():
    raise ValueError("an error of its own")
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module, an array file, and what it takes to forget it all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    data = torch.rand(30, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    np.savez(tmp_path / "data.npz", data=data.double().numpy(), target=net(data).argmax(1).numpy())
    yield tmp_path
    sys.modules.pop("nets", None)


def run(*changed, **options):
    """Run the command with these options instead of the usual ones."""
    given = {"model": "nets:mortal", "data": "data.npz", "norm": "linf", "epsilon": "0.05 0.3"}
    given |= {"steps": "5", "batch-size": "10"} | {
        k.replace("_", "-"): v for k, v in options.items()
    }
    words = [word for name, text in given.items() for word in (f"--{name}", *text.split())]
    return ["evaluate", *words, *changed]


def test_it_writes_the_report_as_table_json_and_picture(folder, capsys):
    assert main(run("--norm", "l2", "--epsilon", "0.1")) == 0
    shown = capsys.readouterr()
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert shown.out.startswith(str(report))
    assert (len(report), report.clean_accuracy) == (30, 1.0)
    assert report.robust_accuracy(LinfBall(0.3)) < report.robust_accuracy(LinfBall(0.05))
    assert report.robust_accuracy(L2Ball(0.1)) < 1
    assert (folder / "out/report.csv").read_text(encoding="utf-8") == report.to_csv()
    assert (folder / "out/report.png").stat().st_size > 10_000
    assert sorted(file.name for file in (folder / "out").iterdir()) == [
        "report.csv",
        "report.json",
        "report.png",
    ]
    assert "warning" not in shown.err and "evaluating" in shown.err


@pytest.mark.parametrize("data", ["nets:data", "nets:batches", "data.npz"])
@pytest.mark.parametrize("model", ["nets:mortal", "nets:net"])
def test_models_and_data_come_from_import_paths_too(folder, model, data):
    assert main(run(model=model, data=data, epsilon="0.1", restarts="2", rivals="1")) == 0
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert (len(report), report.clean_accuracy) == (30, 1.0)
    solver = report.settings["solver"]
    assert [solver[name] for name in ("steps", "restarts", "rivals")] == [5, 2, 1]


def test_weights_are_those_of_the_file(folder):
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(4, 3))
    torch.save(other.state_dict(), folder / "weights.pt")
    assert main(run(weights="weights.pt", epsilon="0")) == 0
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "data.npz")
    data, target = torch.from_numpy(arrays["data"]).float(), torch.from_numpy(arrays["target"])
    expected = (other(data).argmax(1) == target).double().mean().item()
    assert report.clean_accuracy == expected < 1


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "model"])
def test_weights_of_wrapped_models_and_checkpoints_are_found(prefix, nested, folder):
    torch.manual_seed(7)
    # names that end alike, and a module whose version is stored beside the weights
    nets = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    nets[0].add_module("10", nets[1])
    model, other = nets[0], deepcopy(nets[0])
    wanted = {name: torch.rand_like(value.double()) for name, value in other.state_dict().items()}
    other.load_state_dict(wanted)
    state = other.state_dict(prefix=prefix)
    saved = state if nested is None else {"epoch": 3, nested: state, "optimizer": {}}
    torch.save(saved, folder / "weights.pt")
    sys.modules["nets"] = SimpleNamespace(net=model)
    load_model("nets:net", "weights.pt", torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_weights_of_another_model_behind_a_prefix_are_refused(folder, capsys):
    weights = {"module.0.weight": torch.zeros(3, 4), "ema.0.bias": torch.zeros(3)}
    torch.save(weights, folder / "weights.pt")
    assert main(run(weights="weights.pt")) == 2
    assert "--weights must be a state_dict of the model" in capsys.readouterr().err


def test_norms_and_radii_are_taken_as_people_write_them(folder):
    assert main(run(norm="Linf", epsilon="8/255 0.1", limit="5")) == 0
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert report.epsilons == {"Linf": (8 / 255, 0.1)}


def test_images_of_integers_are_scaled_and_limited(folder):
    arrays = np.load(folder / "data.npz")
    pixels = (255 * arrays["data"]).round().astype(np.uint8)
    np.savez(folder / "pixels.npz", data=pixels, target=arrays["target"])
    assert main(run(data="pixels.npz", divide_by="255", limit="12")) == 0
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert len(report) == 12 and report.clean_accuracy > 0.9


def test_warnings_are_printed_in_words(folder, capsys):
    np.savez(folder / "zeros.npz", data=np.full((3, 4), 0.5), target=np.zeros(3, np.int64))
    assert main(run(model="nets:flat", data="zeros.npz", epsilon="0.1")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 3
    assert lines[0].startswith("warning: Linf 0.1: the gradient is exactly 0 at ")
    assert lines[1].startswith("warning: Linf 0.1: the loss did not rise for ")
    assert lines[2].startswith("warning: Linf 0.1: the robust accuracy is unreliable: ")


def test_the_standard_ensemble_and_what_each_attack_did(folder, monkeypatch, capsys):
    from rai_toolbox.perturbations.ensemble import standard

    constants = sys.modules[standard.__module__]
    monkeypatch.setattr(constants, "_STEPS", 5)
    monkeypatch.setattr(constants, "_QUERIES", 5)
    words = run("--standard", epsilon="0.3")
    at = words.index("--steps")
    assert main(words[:at] + words[at + 2 :]) == 0
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert f"{report}\n\n{report.by_attack()}\n" in capsys.readouterr().out
    assert [row.attack for row in report.by_attack()] == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert report.settings["solver"]["attacks"]["APGD-T"]["rivals"]["number"] == 9
    for flag in ("--steps", "--restarts", "--rivals"):
        assert main([*words[:at], *words[at + 2 :], flag, "3"]) == 2
        assert "--standard must not be given with --steps, " in capsys.readouterr().err


def test_a_broken_bound_fails_the_run(folder, monkeypatch, capsys):
    from rai_toolbox.cli import evaluate
    from rai_toolbox.perturbations.attack import attack

    def cheat(model, data, target, *, ball, **settings):
        found = attack(model, data, target, ball=ball, **settings)
        return found._replace(data=found.data - 2)

    monkeypatch.setattr(evaluate, "short_ensemble", cheat)
    assert main(run()) == 1
    assert (
        "30 of 30 examples (100.0%) are outside the data range, by up to" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_run_that_is_killed_goes_on_to_the_same_table(folder, batches):
    command = [sys.executable, "-m", "rai_toolbox", *run()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KILLED_AFTER": f"{batches} 4"}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    kept = folder / "out/state.json"
    if batches:
        assert len(json.loads(kept.read_text(encoding="utf-8"))["batches"]) == batches
    assert kept.exists() == (batches > 0)
    assert main(run("--resume")) == 0
    assert not kept.exists()
    assert main(run("--out", "whole")) == 0
    for name in ("report.json", "report.csv"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def by_ranks(number, command, **environment):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launch, f"--nproc-per-node={number}", "-m", "rai_toolbox", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_ranks_share_the_work_and_go_on_where_one_was_killed(folder):
    command = run("--batch-size", "7")  # five batches
    # (row 21 is the first of batch 3, the second one of rank 1)
    killed = by_ranks(2, command, KILLED_AFTER="2 4", KILLED_RANK="1", KILLED_IN="21")
    assert killed.returncode == 1 and "Signal 9" in killed.stderr
    kept = json.loads((folder / "out/state.json").read_text(encoding="utf-8"))
    assert len(kept["batches"]) == 2  # one of each
    again = by_ranks(2, [*command, "--resume"])
    assert again.returncode == 0, again.stderr
    assert main([*command, "--out", "whole"]) == 0
    for name in ("report.json", "report.csv"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert len(list((folder / "out").iterdir())) == 3
    report = RobustnessReport.from_json((folder / "out/report.json").read_text(encoding="utf-8"))
    assert again.stdout.count(str(report)) == 1  # one rank tells
    assert again.stderr.count("evaluating:   0%") == 1


def test_a_run_that_did_not_end_is_not_thrown_away(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/state.json").write_text("{}", encoding="utf-8")
    assert main(run()) == 2
    assert "go on with it by --resume, or remove it" in capsys.readouterr().err
    assert main(run("--resume")) == 2
    assert "`state_file` must be of this format" in capsys.readouterr().err
    assert (folder / "out/state.json").read_text(encoding="utf-8") == "{}"


def pickled(path):
    np.savez(path, data=np.array([object()]), target=np.array([0]))


def misshapen(path):
    np.savez(path, data=np.zeros((3, 4)), target=np.zeros(2, dtype=np.int64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "nets"}, "--model must be module:name, got 'nets'"),
        ({"model": "nots:net"}, "--model: there is no module 'nots', got 'nots:net'"),
        ({"model": "nets:not"}, "--model: 'nets' has no 'not', got 'nets:not'"),
        ({"model": "nets:NUMBER"}, "--model must give a model, got int from 'nets:NUMBER'"),
        ({"model": "nets:data"}, "--model must give a model, got tuple from 'nets:data'"),
        ({"data": "data.txt"}, "--data must be an .npz file or module:name, got 'data.txt'"),
        ({"data": "none.npz"}, "No such file or directory: 'none.npz'"),
        ({"data": "one.npz"}, "must hold the arrays `data` and `target`, got ['data'] in one.npz"),
        ({"data": "pickled.npz"}, "without pickled objects, got pickled.npz: Object arrays"),
        ({"data": "text.npz"}, "must be an .npz file of numbers, without pickled objects, got"),
        ({"data": "plain.npz"}, "must be an .npz file of numbers, without pickled objects, got"),
        ({"data": "misshapen.npz"}, "one target per example, got 3 examples and 2 targets"),
        ({"data": "nets:NUMBER"}, "--data must give (data, target), a Dataset or batches, got int"),
        ({"data": "nets:batches", "limit": "3"}, "--limit and --divide-by need tensors"),
        ({"weights": "none.pt"}, "No such file or directory: 'none.pt'"),
        ({"weights": "other.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "unsafe.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "text.npz"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "short.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "list.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "tensor.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"weights": "inner.pt"}, "--weights must be a state_dict of the model, saved by torch"),
        ({"device": "cuda:99"}, "--device must be one that is there, got 'cuda:99': "),
        ({"device": "toaster"}, "--device must be one that is there, got 'toaster': "),
        ({"range": "1 0"}, "--range must be LOWER < UPPER, got 1 0"),
        ({"range": "0 0.5"}, "`data` must be within `data_range`, [0, 0.5], got"),
        ({"data": "bytes.npz"}, "--data of torch.uint8 need --divide-by: 255 for images of bytes"),
        ({"data": "high.npz"}, "`target` must hold classes from 0 to 2, got 3"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(folder, options, said, capsys):
    np.savez(folder / "one.npz", data=np.zeros((3, 4)))
    np.savez(folder / "bytes.npz", data=np.zeros((3, 4), np.uint8), target=np.zeros(3, np.int64))
    np.savez(folder / "high.npz", data=np.zeros((3, 4)), target=np.full(3, 3))
    np.save(folder / "plain.npy", np.zeros(3))
    (folder / "plain.npy").rename(folder / "plain.npz")
    (folder / "text.npz").write_text("no numbers here", encoding="utf-8")
    pickled(folder / "pickled.npz")
    misshapen(folder / "misshapen.npz")
    torch.save({"weight": torch.zeros(1)}, folder / "other.pt")
    torch.save({"run": os.getcwd}, folder / "unsafe.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    (folder / "short.pt").write_text("junk")
    torch.save(torch.zeros(1), folder / "tensor.pt")
    torch.save({"state_dict": torch.zeros(1)}, folder / "inner.pt")
    assert main(run(**options)) == 2
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("rai-toolbox: ")]
    assert line.startswith("rai-toolbox: error: ")
    assert said in line
    assert not (folder / "out/report.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "l3"}, "--norm: invalid choice: 'l3'"),
        ({"epsilon": "-0.1"}, "--epsilon: must be >= 0 and finite, got -0.1"),
        ({"epsilon": "nan"}, "--epsilon: must be >= 0 and finite, got nan"),
        ({"epsilon": "much"}, "--epsilon: invalid"),
        ({"epsilon": "8/"}, "--epsilon: invalid"),
        ({"epsilon": "8/0"}, "--epsilon: must be >= 0 and finite, got 8/0"),
        ({"epsilon": "8/-255"}, "--epsilon: must be >= 0 and finite, got 8/-255"),
        ({"epsilon": ""}, "--epsilon: expected at least one argument"),
        ({"steps": "0"}, "--steps: must be >= 1, got 0"),
        ({"divide_by": "0"}, "--divide-by: must be > 0 and finite, got 0"),
    ],
)
def test_wrong_arguments_are_refused(options, said, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(run(**options))
    assert said in capsys.readouterr().err


def test_each_norm_needs_its_epsilons(folder, capsys):
    assert main(run("--norm", "l2")) == 2
    assert "each --norm must be followed by its --epsilon, got 2 and 1" in capsys.readouterr().err


def test_errors_of_the_users_own_code_keep_their_traceback(folder):
    with pytest.raises(ValueError, match="an error of its own"):
        main(run(data="nets:broken"))


def test_without_matplotlib_there_is_all_but_the_picture(folder, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(run()) == 0
    shown = capsys.readouterr()
    assert f"warning: there is no {Path('out/report.png')}: matplotlib cannot be" in shown.err
    assert 'pip install "rai-constrained[plots]"' in shown.err and "report.png" not in shown.out
    names = sorted(file.name for file in (folder / "out").iterdir())
    assert names == ["report.csv", "report.json"]


def test_the_help_says_what_it_needs(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    for word in ("rai-constrained[plots]", "--model", "--data", "--norm", "--epsilon", "--resume"):
        assert word in "".join(shown.split())
