"""Docstrings of public objects: a summary, an example, errors, shapes and a source.

The examples are run as doctests.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

SOURCES = (Path(__file__).parents[1] / "docs" / "api" / "sources.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^- ([^,(]+?)(?:,[^(]*)? \((\d{4})\)", SOURCES, re.M)  # first author, year
MODULES = ["rai_toolbox.constraints", "rai_toolbox.optim", "rai_toolbox.perturbations"]
OBJECTS = {
    name: getattr(import_module(m), name) for m in MODULES for name in import_module(m).__all__
}

# Results are made by functions, whose examples show them; what they raise is said there, too.
RESULTS = {"Attacked", "Ensembled", "Examples", "MinimumNorm", "UniversalPerturbation"}
WARNINGS = {"RobustnessWarning", "StateFileError", "ZeroGradientWarning"}

NO_EXAMPLE = RESULTS | WARNINGS | {"Constraint"}  # which is abstract
NO_ERRORS = {
    *RESULTS,
    *WARNINGS,
    "Journal",  # does nothing, nor do its methods
    *("Constraint", "PerturbationModel"),  # abstract: their methods say what they raise
    "VerificationReport",  # counts, which are not checked
    *("cross_entropy", "margin_loss", "rival_margin", "is_fooled"),  # what torch raises
    *("uniform_like_l2_n_ball_", "uniform_like_linf_n_ball_"),  # refer to that of L1
}
NO_SOURCE = {
    *RESULTS,
    *WARNINGS,
    # their projections follow from the definitions
    *(
        "Box",
        "BoundedBall",
        "NonNegative",
        "LinfBall",
        "L2Ball",
        "MaxNorm",
        "MinMaxNorm",
        "UnitNorm",
    ),
    *("Constraint", "Masked", "Projected", "PerturbationModel"),  # act by other sets and models
    *("ParamTransformingOptimizer", "ChainedParamTransformingOptimizer"),  # likewise
    "Transport",  # refers to Birkhoff
    *(
        "L1NormedGradientOptim",
        "cross_entropy",
        "is_fooled",
        "uniform_like_linf_n_ball_",
    ),  # formulas
    *("AdditivePerturbation", "MaskedPerturbation", "classifier", "rival_margin"),
    *("constrain", "compiled", "SettingScheduler", "LinearSetting"),  # of this library
    *("evaluate_robustness", "verify", "RobustnessReport", "VerificationReport"),
    *("ensemble", "short_ensemble", "random_restart", "nearest_rivals", "most_likely_rivals"),
    "Journal",
}
YEAR = re.compile(r"\b(?:19|20)\d\d\b")
SECTION = re.compile(r"^(\w[\w ]+)\n-{3,}$", re.M)


def sections(name: str) -> dict[str, str]:
    parts = SECTION.split(inspect.getdoc(OBJECTS[name]) or "")
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def prose(name: str) -> str:
    """All but the examples, on one line."""
    return " ".join(" ".join(v for k, v in sections(name).items() if k != "Examples").split())


def tensors(text: str) -> list[str]:
    """The entries of a list of parameters or results that are tensors."""
    entries = re.split(r"\n(?=\S)", text.strip())
    return [entry for entry in entries if re.match(r".*\bTensor\b", entry)]


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_summary(name):
    summary, _, rest = (inspect.getdoc(OBJECTS[name]) or "").partition("\n")
    assert summary.endswith(".") and (not rest or rest.startswith("\n")), summary


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - NO_EXAMPLE))
def test_example(name):
    assert ">>> " in sections(name)["Examples"]


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - NO_ERRORS))
def test_errors(name):
    assert "Raises" in sections(name)


def test_nothing_else_is_exempt():
    assert (NO_EXAMPLE | NO_ERRORS | NO_SOURCE) <= set(OBJECTS)
    assert not any("Raises" in sections(name) for name in NO_ERRORS)
    assert not any(YEAR.search(prose(name)) for name in NO_SOURCE)


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_shapes(name):
    found = sections(name)
    for entry in tensors(found.get("Parameters", "")) + tensors(found.get("Returns", "")):
        assert re.search(r"shape|broadcast|[Ss]ee `|As in `|per group", entry), entry


OPTIMIZERS = [name for name in OBJECTS if getattr(OBJECTS[name], "step", None)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_say_which_shapes_they_see(name):
    assert re.search(r"shape|to_batch|settings? of", inspect.getdoc(OBJECTS[name])), name


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - NO_SOURCE))
def test_source(name):
    assert YEAR.search(prose(name))


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - NO_SOURCE))
def test_sources_are_listed_with_their_titles(name):
    text = prose(name)
    for found in YEAR.finditer(text):
        before = text[max(0, found.start() - 100) : found.start()]
        assert any(author in before for author, year in LISTED if year == found[0]), before
