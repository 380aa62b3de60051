"""Imports only point left, no files import each other in a circle, and torch is all that is loaded.

Imports inside functions and under `if TYPE_CHECKING` count for the first two.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = "rai_toolbox"

# From left to right; a module imports from its own layer and from those left of it.
LAYERS = [
    {"_torch"},
    {
        "batch",
        "autograd",
        "checks",
        "extras",
        "foreach",
        "functional",
        "modules",
    },  # the foundation
    {"constraints"},
    {"optim"},
    {"perturbations"},
    {"testing"},
    {"__init__"},  # the package itself, which gathers what users import
    {"cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

ALWAYS_THERE = sys.stdlib_module_names | {"torch", PACKAGE}


def layer_of(module: str) -> str:
    """`rai_toolbox.optim.engine` -> `optim`; the package itself -> `__init__`."""
    return (module.split(".") + ["__init__"])[1]


def imports(node: ast.AST, package: str, when_loaded: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported under `node`, a file of `package`.

    With `when_loaded`, only what merely importing that file imports: nothing inside functions or
    under `if TYPE_CHECKING`.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            # one leading dot is `package`, each further one its parent
            parents = package.split(".")[: len(package.split(".")) + 1 - child.level]
            base = ".".join((parents if child.level else []) + [child.module or ""]).strip(".")
            if base == PACKAGE:  # `from rai_toolbox import optim` means the layer
                layers = {alias.name for alias in child.names if alias.name in RANK}
                yield from ((child.lineno, f"{PACKAGE}.{name}") for name in layers)
                if layers >= {alias.name for alias in child.names}:
                    continue
            yield child.lineno, base
        elif when_loaded and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif when_loaded and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from imports(ast.Module([other], []), package, when_loaded)
        else:
            yield from imports(child, package, when_loaded)


def faults(source: str, module: str, package: str) -> list[str]:
    """What is wrong with the imports of `module`, whose relative imports start from `package`."""
    layer, tree, found = layer_of(module), ast.parse(source), []
    for line, name in imports(tree, package):
        if name.split(".")[0] == PACKAGE and RANK[layer_of(name)] > RANK[layer]:
            found.append(f"{module}:{line} `{layer}` must not import `{name}`, right of it")
    for line, name in imports(tree, package, when_loaded=True):
        if name.split(".")[0] not in ALWAYS_THERE and layer != "cli":
            found.append(f"{module}:{line} imports `{name}`, which not every user has")
    return found


FILES = sorted((SRC / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC / PACKAGE)))
def test_imports_point_left(path):
    parts = path.relative_to(SRC).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__init__")
    assert layer_of(module) in RANK, f"give `{layer_of(module)}` its place in LAYERS"
    assert faults(path.read_text(encoding="utf-8"), module, ".".join(parts[:-1])) == []


def test_there_is_something_to_check():
    assert {"optim", "constraints"} <= {path.parent.name for path in FILES}


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """The files that each file imports, wherever in it; `a/__init__.py` has the name `a`."""
    found = {}
    for module, source in sources.items():
        is_package = any(other.startswith(f"{module}.") for other in sources)
        package = module if is_package else module.rpartition(".")[0]
        found[module] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & sources.keys()
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*(parents if node.level else []), node.module or ""]).strip(".")
                names = {f"{base}.{alias.name}" for alias in node.names}
                of_base = {base} if names - sources.keys() else set()  # a name that it defines
                found[module] |= (names | of_base) & sources.keys() - {module}
    return found


def in_circles(sources: dict[str, str]) -> set[str]:
    """The files from which a chain of imports leads back to themselves."""
    reached = arrows(sources)
    for through in sources:
        for module in sources:
            if through in reached[module]:
                reached[module] |= reached[through]
    return {module for module in sources if module in reached[module]}


def test_no_file_is_in_a_circle_of_imports():
    modules = {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    sources = {module: path.read_text(encoding="utf-8") for module, path in modules.items()}
    assert in_circles(sources) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from rai_toolbox.optim.engine import step",
        "from rai_toolbox.optim import engine",
        "import rai_toolbox.optim.engine",
        "from . import engine",
        "from .engine import step",
        "def f():\n    from .engine import step",
        "if TYPE_CHECKING:\n    from rai_toolbox.optim.engine import step",
        "from rai_toolbox.optim import step",  # by way of the package
    ],
)
def test_a_circle_is_found(source):
    names = ("rai_toolbox.optim", "rai_toolbox.optim.engine", "rai_toolbox.optim.inner", "rest")
    package, engine, inner, rest = names
    sources = {package: "from .engine import step", engine: "from .inner import x", inner: source}
    assert in_circles({**sources, rest: "import rai_toolbox.optim"}) >= {engine, inner}
    assert in_circles({**sources, inner: "import math"}) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("constraints.box", "from rai_toolbox.optim import ClampedParameterOptimizer"),
        ("constraints.box", "import rai_toolbox.optim.engine as engine"),
        ("constraints.box", "from ..optim import engine"),
        ("constraints.box", "from .. import optim"),
        ("constraints.box", "from rai_toolbox import optim"),
        ("constraints.box", "from rai_toolbox import negate"),  # the package gathers all layers
        ("constraints.box", "def f():\n    from rai_toolbox.optim import engine"),
        ("optim.engine", "if TYPE_CHECKING:\n    from rai_toolbox import perturbations"),
        ("batch", "from .constraints import box"),
        ("optim.engine", "import numpy as np"),
        ("optim.engine", "class A:\n    from matplotlib import pyplot"),
        ("optim.engine", "try:\n    import tqdm\nexcept ImportError:\n    tqdm = None"),
        ("optim.engine", "if TYPE_CHECKING:\n    pass\nelse:\n    import sklearn.datasets"),
    ],
)
def test_a_bad_import_is_found(module, source):
    module = f"{PACKAGE}.{module}"
    assert len(faults(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("optim.engine", "import math, torch.nn\nfrom torch import Tensor"),
        ("optim.engine", "from rai_toolbox.constraints.box import Box\nfrom .named import x"),
        ("optim.engine", "from .. import batch\nfrom rai_toolbox import constraints"),
        ("modules", "from .batch import to_batch"),
        ("optim.engine", "def f():\n    import numpy"),
        ("optim.engine", "if TYPE_CHECKING:\n    import numpy"),
        ("cli.demo", "import matplotlib\nfrom rai_toolbox import negate, optim"),
    ],
)
def test_a_good_import_passes(module, source):
    module = f"{PACKAGE}.{module}"
    assert faults(source, module, module.rpartition(".")[0]) == []


def test_loading_it_loads_nothing_more_of_torch_that_is_slow():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import rai_toolbox.optim, rai_toolbox.perturbations\n"
        "print(*{'sympy', 'torch._dynamo', 'torch._inductor'} & (set(sys.modules) - before))"
    )
    path = {**os.environ, "PYTHONPATH": str(SRC)}
    found = subprocess.run([sys.executable, "-c", code], env=path, check=True, capture_output=True)
    assert found.stdout.split() == []
