"""`make test` leaves the slow tests out, and still meets every file, set, optimizer and attack."""

import inspect
from pathlib import Path

import pytest
import torch

from rai_toolbox import constraints, optim, perturbations

ROOT = Path(__file__).parents[1]
FOLDERS = {"tests/constraints", "tests/optim", "tests/perturbations"}


def files(ids):
    return {i.partition("::")[0] for i in ids}


@pytest.fixture
def fast(collected):
    """The ids of all tests that are not slow; skips where only some files were collected."""
    if not FOLDERS <= {path.rpartition("/")[0] for path in files(collected)}:
        pytest.skip("looks at the whole suite")
    return [i for i, is_slow in collected.items() if not is_slow]


def classes(module, base):
    found = [getattr(module, name) for name in module.__all__]
    found = [c for c in found if inspect.isclass(c) and issubclass(c, base)]
    return [c.__name__ for c in found if c is not base]


def test_every_file_has_a_fast_test(collected):
    fast = [i for i, is_slow in collected.items() if not is_slow]
    assert files(collected) - files(fast) == set()


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("constraints", classes(constraints, constraints.Constraint)),
        ("optim", classes(optim, torch.optim.Optimizer)),
    ],
)
def test_every_class_is_in_the_name_of_a_fast_test(fast, folder, names):
    told = "\n".join(i for i in fast if i.startswith(f"tests/{folder}/"))
    told = told.lower().replace("_", "")  # a file may have the name of a class
    assert [name for name in names if name.lower() not in told] == []


def test_every_attack_is_in_a_file_with_a_fast_test(fast):
    paths = [path for path in files(fast) if path.startswith("tests/perturbations/")]
    text = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
    attacks = [n for n in perturbations.__all__ if inspect.isfunction(getattr(perturbations, n))]
    assert attacks and [name for name in attacks if name not in text] == []
