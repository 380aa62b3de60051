"""What the pages of the API need beyond autodoc: clean signatures, links, pictures, help texts."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from set_pictures import PICTURES, draw
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

MODULES = (
    "rai_toolbox",
    *(f"rai_toolbox.{m}" for m in "constraints optim perturbations testing".split()),
)
# The public name of each object, by its short one.
NAMES = {name: f"{module}.{name}" for module in MODULES for name in import_module(module).__all__}
COMMANDS = ("demo", "evaluate")
GENERATED = "api/generated"
DEFAULTS = {
    "=REQUIRED": "",
    "=TINY": "=1.18e-38",
    "=MUON": "=Scion.MUON",
    "=default_generator": "=torch.default_generator",
    "=<factory>": "={}",
}
LOG = logging.getLogger(__name__)


def write_pictures_and_help(app):
    """Draw the sets, and write what the commands print as their help."""
    folder = Path(app.srcdir) / GENERATED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in PICTURES:
        draw(name, folder)
    for command in COMMANDS:
        line = [sys.executable, "-m", "rai_toolbox", command, "--help"]
        found = subprocess.run(line, capture_output=True, env={**os.environ, "COLUMNS": "90"})
        (folder / f"{command}.txt").write_bytes(found.stdout)


def clean_signature(app, what, name, obj, options, signature, returned):
    """Show defaults as a caller writes them, and none for settings that must be given."""
    for default, shown in DEFAULTS.items():
        signature = signature and signature.replace(default, shown)
    if signature and re.search("<|REQUIRED", signature):
        LOG.warning("the signature of %s has a default that is no code: %s", name, signature)
    return signature, None


def public_bases(app, name, obj, options, bases):
    """Replace private bases by the public ones that they derive from."""
    found = [public for base in bases for public in _public(base)]
    bases[:] = list(dict.fromkeys(found)) or [object]


def _public(base):
    if base is object or base.__name__ in NAMES or not base.__module__.startswith("rai_toolbox"):
        return [] if base is object else [base]
    return [public for other in base.__bases__ for public in _public(other)]


def add_picture(app, what, name, obj, options, lines):
    """Below the summary of a set, its picture."""
    if what == "class" and obj.__name__ in PICTURES:
        caption = PICTURES[obj.__name__][1].replace("|", r"\|")
        path = f"/{GENERATED}/{obj.__name__}.png"
        lines[1:1] = ["", f".. figure:: {path}", f"   :alt: {caption}", "", f"   {caption}", ""]


def join_shared_parameters(app, what, name, obj, options, lines):
    """Tell in one line of the parameters that another page describes."""
    shared = re.compile(r":param (\S+): (See `.*)")
    found = [match for line in lines if (match := shared.fullmatch(line))]
    for see in {match[2] for match in found}:
        names = [match[1] for match in found if match[2] == see]
        if len(names) > 1:
            named = ", ".join(f"**{name}**" for name in names)
            at = lines.index(f":param {names[0]}: {see}")
            lines[at] = f":Shared parameters: {named} -- {see[0].lower()}{see[1:]}"
            lines[:] = [line for line in lines if not line.endswith(f": {see}")]


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples: the docstring of the class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def link_by_short_name(app, env, node, contnode):
    """Link `Simplex`, from wherever it is named, and methods that a private base defines."""
    head, _, rest = node.get("reftarget", "").partition(".")
    domain = env.domains["py"]
    target = ".".join(filter(None, [NAMES.get(head), rest]))
    found = domain.objects.get(target) if node.get("refdomain") == "py" else None
    if found is None:
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)


def setup(app):
    app.connect("builder-inited", write_pictures_and_help, priority=1)  # before autosummary
    app.connect("autodoc-process-signature", clean_signature)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", add_picture, priority=900)  # after napoleon
    app.connect("autodoc-process-docstring", join_shared_parameters, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", link_by_short_name)
    return {"parallel_read_safe": True}
