"""What is built from the project can be installed and used: the wheel, and the source archive."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import rai_toolbox

ROOT = Path(__file__).parents[1]
CODE = """
import importlib.metadata, pathlib, torch, rai_toolbox
from rai_toolbox.constraints import Simplex
from rai_toolbox.optim import ProjectedOptimizer
print(pathlib.Path(rai_toolbox.__file__).parent)
print(importlib.metadata.version("rai-constrained"))
x = torch.zeros(1, 3, requires_grad=True)
ProjectedOptimizer([x], constraint=Simplex(), lr=1.0).make_feasible_()
print(float(x.detach().sum()))
"""


def output_of(*command: object) -> list[str]:
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd="/")
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the source archive."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
def test_the_archives_hold_the_package_and_what_it_is_built_from(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    stem = f"rai_constrained-{rai_toolbox.__version__}"
    assert (wheel.name, source.name) == (f"{stem}-py3-none-any.whl", f"{stem}.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "rai_toolbox/py.typed" in names
    assert all(name.startswith(("rai_toolbox/", f"{stem}.dist-info/")) for name in names)
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "tests/conftest.py", "docs/conf.py", "constraints.txt"} <= files
    assert not any(name.startswith((".venv", "out/", "docs/api/generated")) for name in files)


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / "bin" / "python"
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    output_of(*pip, "install", "--no-deps", "--no-index", wheel)
    # torch is that of this environment, whose own editable install is not seen: a folder that a
    # .pth file names is only looked through for modules
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]), encoding="utf-8")
    version = rai_toolbox.__version__
    assert output_of(python, "-I", "-c", CODE) == [str(packages / "rai_toolbox"), version, "1.0"]
    command = tmp_path / "bin" / "rai-toolbox"
    assert output_of(command, "--version") == [f"rai-toolbox {version}"]


def test_the_distribution_has_a_name_of_its_own():
    """`rai-toolbox` is another project, which holds a package of the same name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nname = "rai-constrained"' in text
    assert '"rai-toolbox[' not in text
