"""How the API reference reads the docstrings: an extension of Griffe.

Griffe reads the source and does not run it. What is made when `jaxjd` is imported, the
aggregators `jaxjd.NAME`, is completed here.
"""

import inspect
import re
from typing import Any

import griffe

import jaxjd

EXAMPLE = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Turn `upgrad = _aggregator(weighting.upgrad)` into a documented function."""
        del kwargs
        if pkg.name != "jaxjd":
            return
        for name, member in list(pkg.members.items()):
            if not isinstance(member, griffe.Attribute) or name.startswith("_"):
                continue
            room, _, of = str(member.value).partition("(")[2].rstrip(")").partition(".")
            made = pkg[f"{room}.{of}"].final_target
            function = griffe.Function(
                name, parameters=made.parameters, returns="Aggregator", parent=pkg
            )
            text = inspect.getdoc(getattr(jaxjd, name))
            function.docstring = griffe.Docstring(text, parent=function)
            pkg.set_member(name, function)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(docstring: str) -> str:
    """Fence the examples, which Markdown would take for quotations."""
    return EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", docstring)
