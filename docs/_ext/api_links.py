"""Turns code in prose that names a public object, such as `ProjectedOptimizer`, into a link."""

import re
from importlib import import_module
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

MODULES = ["", ".constraints", ".optim", ".perturbations", ".testing"]
CODE = re.compile(r"(?:rai_toolbox\.(?:\w+\.)?)?(\w+)(?:\(.*\))?")  # perhaps with arguments


def targets():
    """The full name of each public name."""
    modules = [import_module(f"rai_toolbox{name}") for name in MODULES]
    return {name: f"{module.__name__}.{name}" for module in modules for name in module.__all__}


TARGETS = targets()


def target(code):
    """The full name of the object that this code names, or None."""
    match = CODE.fullmatch(code)
    return TARGETS.get(match[1]) if match else None


class ApiLinks(SphinxTransform):
    default_priority = 100  # before references are resolved

    def apply(self, **kwargs):
        if Path(self.env.doc2path(self.env.docname)).suffix != ".md":
            return
        for code in list(self.document.findall(nodes.literal)):
            name = target(code.astext())
            inside = (nodes.reference, nodes.title, pending_xref)
            if name and "xref" not in code["classes"] and not isinstance(code.parent, inside):
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=name)
                link["refdoc"], link["refexplicit"], link["refwarn"] = self.env.docname, True, True
                code.replace_self(link)
                link += code


def setup(app):
    app.add_transform(ApiLinks)
    return {"parallel_read_safe": True}
