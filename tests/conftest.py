"""Fixtures that tests of several folders share, and what chooses tests."""

import sys

import pytest

COLLECTED = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption(
        "--sample", type=int, metavar="N", help="run at most N cases of each test function"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.name == "test_demo.py" and "out" in item.fixturenames:
            item.add_marker(pytest.mark.slow)  # they share one run of the whole demo
    config.stash[COLLECTED] = {
        item.nodeid: item.get_closest_marker("slow") is not None for item in items
    }
    result = yield  # here -m and -k leave cases out
    if config.getoption("--sample") is not None:
        keep_a_sample(config, items, config.getoption("--sample"))
    return result


def keep_a_sample(config, items, most):
    """At most so many cases of each test function, spread over all that it has."""
    functions = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        cases[i * (len(cases) - 1) // max(1, most - 1)]
        for cases in functions.values()
        for i in range(most)
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture
def collected(pytestconfig):
    """Of each test that was collected, slow ones included: its id, and whether it is slow."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture
def as_on_a_device(monkeypatch):
    """As where reading a value would wait: no loop ends early, none goes by pieces of a cache."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rai_toolbox.") and hasattr(module, "is_eager"):
            monkeypatch.setattr(module, "is_eager", lambda x: False)
