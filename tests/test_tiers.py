"""`make test` leaves the slow tests out, and still meets every file, set, optimizer and attack."""

import inspect
from pathlib import Path

import pytest
import torch

from rai_toolbox import constraints, optim, perturbations

ROOT = Path(__file__).parents[1]
FOLDERS = {"constraints", "optim", "perturbations"}


@pytest.fixture
def fast(collected):
    """The ids of all tests that are not slow; skips where only some files were collected."""
    if not {f"tests/{folder}" for folder in FOLDERS} <= {
        "/".join(i.split("/")[:2]) for i in collected
    }:
        pytest.skip("looks at the whole suite")
    return [i for i, is_slow in collected.items() if not is_slow]


def classes(module, base):
    found = [getattr(module, name) for name in module.__all__]
    return [c.__name__ for c in found if inspect.isclass(c) and issubclass(c, base)]


def test_every_file_has_a_fast_test(collected):
    fast = {i.partition("::")[0] for i, is_slow in collected.items() if not is_slow}
    assert {i.partition("::")[0] for i in collected} - fast == set()


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("constraints", classes(constraints, constraints.Constraint)),
        ("optim", classes(optim, torch.optim.Optimizer)),
    ],
)
def test_every_class_is_in_the_name_of_a_fast_test(fast, folder, names):
    told = "\n".join(i for i in fast if i.startswith(f"tests/{folder}/"))
    assert [name for name in names if name not in told and name != "Constraint"] == []


def test_every_attack_is_in_a_file_with_a_fast_test(fast):
    paths = {i.partition("::")[0] for i in fast if i.startswith("tests/perturbations/")}
    text = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
    assert [name for name in perturbations.__all__ if name not in text] == []
