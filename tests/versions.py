"""Run a sample of the tests on other versions of torch: the oldest that we support, and the newest.

Each version has an environment of its own, a virtual environment with all of the packages that pip
installs for it: 5.5 GB of disk and some minutes, once. The oldest version runs on the oldest Python
that there is here, the newest on the newest one. The environments are in the folder of the project,
or in that which the variable RAI_TOOLBOX_VERSIONS names; packages are renewed when a requirement of
pyproject.toml has changed. `make test-versions` runs this file, on these two versions or on those
that are given: `make test-versions TORCH="2.6.0 2.9.1"`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST = "2.6.0", "2.15.0"
PYTHONS = ["python3.10", "python3.11", "python3.12", "python3.13"]
CASES = 2  # of each test function


def main(versions: list[str]) -> int:
    verdicts = {version: tested(version) for version in versions or [OLDEST, NEWEST]}
    for version, code in verdicts.items():
        print(f"torch {version}: {'passed' if code == 0 else f'FAILED (exit code {code})'}")
    return max(verdicts.values())


def tested(version: str) -> int:
    """Run the sample; the exit code of pytest."""
    python = environment(version)
    code = "import sys, torch; print('torch', torch.__version__, 'on Python', sys.version)"
    subprocess.run([python, "-c", code], check=True)
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--sample", str(CASES)]
    command += ["--timeout=300", "-p", "no:cacheprovider", "--ignore=tests/trainers"]
    # (the environment may serve several checkouts: this one is to be imported)
    here = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **here}).returncode


def environment(version: str) -> Path:
    """The interpreter of the environment of a version, which is made if there is none."""
    folder = Path(os.environ.get("RAI_TOOLBOX_VERSIONS", ROOT)) / f".venv-torch-{version}"
    python, stamp = folder / "bin" / "python", folder / "made-from.toml"
    wanted = requirements()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        print(f"making {folder}: about 5.5 GB", flush=True)
        base = interpreter(oldest=version == OLDEST)
        subprocess.run([base, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    subprocess.run([*install, "pip>=25.1"], check=True)  # older ones have no --group
    wanted_here = [f"torch=={version}", "-e", ".[demo]", "--group", "test"]
    subprocess.run([*install, *wanted_here], cwd=ROOT, check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def requirements() -> str:
    """What pyproject.toml asks for, as it is written there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text[text.index("requires-python") : text.index("[tool.")]


def interpreter(oldest: bool) -> str:
    """The oldest or the newest Python on the path that runs; this one if there is no other."""
    for name in PYTHONS if oldest else reversed(PYTHONS):
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return sys.executable


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
