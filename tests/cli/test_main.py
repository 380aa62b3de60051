"""The command line itself."""

import subprocess
import sys
from pathlib import Path

import pytest

import rai_toolbox.__main__
from rai_toolbox import cli
from rai_toolbox.extras import progress


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--help"])
    assert capsys.readouterr().out == shown
    assert shown.startswith("usage: rai-toolbox") and "demo" in shown


def test_help_of_the_demo_says_what_it_needs(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["demo", "--help"])
    shown = capsys.readouterr().out
    for word in ("rai-constrained[demo]", "--out", "--epochs", "--seed", "--quick"):
        assert word in shown


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rai-toolbox {rai_toolbox.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--epochs", "0"], "--epochs: must be >= 1, got 0"),
        (["demo", "--epochs", "x"], "--epochs: invalid"),
        (["demo", "--seed", "-1"], "--seed: must be in [0, 2**63), got -1"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.demo, "demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "rai-toolbox: interrupted\n"


def test_the_module_runs_and_help_loads_no_extra():
    code = (
        "import sys, runpy; sys.argv = ['rai-toolbox']\n"
        "try: runpy.run_module('rai_toolbox', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "extras = {'matplotlib', 'mlxtend', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'loaded {extras}' if extras else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: rai-toolbox")


def test_the_command_is_the_entry_of_the_module():
    # Both go through `run`, which ends processes that torchrun started.
    root = Path(__file__).parents[2]
    assert 'rai-toolbox = "rai_toolbox.cli:run"' in (root / "pyproject.toml").read_text("utf-8")
    assert rai_toolbox.__main__.run is cli.run


def test_progress_is_a_bar(capsys):
    with progress("working", total=3) as bar:
        for _ in range(3):
            bar.update()
    shown = capsys.readouterr().err
    assert "working: 100%" in shown and "3/3" in shown


def test_progress_without_tqdm_is_a_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress("working", total=3) as bar:
        bar.update()
    assert capsys.readouterr().err == "working ...\n"
