"""Fixtures that tests of several folders share."""

import sys

import pytest


@pytest.fixture
def as_on_a_device(monkeypatch):
    """As where reading a value would wait: no loop ends early, none goes by pieces of a cache."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rai_toolbox.") and hasattr(module, "in_blocks"):
            monkeypatch.setattr(module, "in_blocks", lambda x: False)
