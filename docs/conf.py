"""How Sphinx builds the documentation: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from rai_toolbox import __version__

project = "rai_toolbox"
author = "rai_toolbox contributors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "api_links",  # in _ext
    "api_pages",
]
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",  # written by the build
    "filename_pattern": "/",  # run all of them
    "reference_url": {"rai_toolbox": None},  # names in the code link to their API pages
    "doc_module": ("rai_toolbox",),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "within_subsection_order": "FileNameSortKey",
    "write_computation_times": False,
}
html_theme = "furo"
html_title = f"{project} {version}"
templates_path = ["_templates"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `InnerOpt=SGD`, as in the source
autodoc_typehints = "none"  # docstrings say types together with shapes and meaning
python_maximum_signature_line_length = 80
toc_object_entries = False  # else each method is in the table of contents
# Docstrings write `name` for code, as Markdown does; what is documented here becomes a link.
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_ivar = True  # attributes are told, not listed again

myst_heading_anchors = 3  # for links such as constraints.md#batches
suppress_warnings = ["config.cache"]  # of sphinx-gallery: its settings are not written to the cache
exclude_patterns = ["stationarity/*", "attacks/*", "speed/*", "lbfgs/*"]  # parts of pages
