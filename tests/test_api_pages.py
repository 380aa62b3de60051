"""Each public object has one page in the documentation, and each set a picture."""

import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = [
    "rai_toolbox",
    "rai_toolbox.constraints",
    "rai_toolbox.optim",
    "rai_toolbox.perturbations",
    "rai_toolbox.testing",
]
TABLE = re.compile(r"currentmodule:: (\S+)\n\n.. autosummary::\n((?: .*\n|\n)*)")


def listed() -> Counter[str]:
    """How often each object is in a table of the API."""
    found: Counter[str] = Counter()
    for page in sorted((DOCS / "api").glob("*.md")):
        for module, body in TABLE.findall(page.read_text(encoding="utf-8")):
            names = [line.strip() for line in body.splitlines() if not line.strip().startswith(":")]
            found.update(f"{module}.{name}" for name in names if name)
    return found


def test_each_public_object_has_one_page():
    public = {f"{m}.{name}" for m in MODULES for name in import_module(m).__all__}
    in_text = {"rai_toolbox.testing.LAWS"}  # described on the page of its group
    assert listed() == Counter(public - in_text)


@pytest.fixture
def set_pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    yield import_module("set_pictures")
    sys.modules.pop("set_pictures")


def test_each_set_has_a_picture(set_pictures):
    sets = import_module("rai_toolbox.constraints").__all__
    assert set(set_pictures.PICTURES) == set(sets) - {"Constraint", "Projected"}


@pytest.mark.parametrize("name", ["Stiefel", "Birkhoff", "Rank"])
def test_a_picture_is_drawn(set_pictures, name, tmp_path):
    set_pictures.draw(name, tmp_path)
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
