"""How Sphinx builds the documentation: `make docs`."""

from importlib.metadata import version as installed_version

project = "rai_toolbox"
author = "rai_toolbox contributors"
copyright = f"2026, {author}"
version = release = installed_version("rai-toolbox")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = f"{project} {version}"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types together with shapes and meaning
# Docstrings write `name` for code, as Markdown does; what is documented here becomes a link.
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes are told, not listed again

# The README links to files of the repository, which are no pages here.
suppress_warnings = ["myst.xref_missing"]
exclude_patterns = ["stationarity/*", "attacks/*", "speed/*", "lbfgs/*"]  # parts of pages


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples: the docstring of the class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", skip_fields)
