"""Docstrings of this package in griffe's terms, for the site's Python API (an extension named in mkdocs.yml)."""

import ast
import re
from typing import Any

import griffe

# `mean, sigma: text`, with the lines that go on with it.
_TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)", flags=re.MULTILINE)
# What stands before a colon would be taken for the type; the signature has that.
_RETURNED = re.compile(r"^Returns:\n.*", flags=re.MULTILINE)
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Docstrings(griffe.Extension):
    """Examples as examples, names that share a description one by one, and fields of recipes as what `hyper` says."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = _TOGETHER.sub(_each, text)
            obj.docstring.value = _RETURNED.sub(lambda line: line[0].replace(": ", "&#58; "), text)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Before signatures of dataclasses are made of their fields."""
        call = attr.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) != "hyper":
            return
        default, *words = [str(a) for a in call.arguments if not isinstance(a, griffe.ExprKeyword)]
        named = {a.name: str(a.value) for a in call.arguments if isinstance(a, griffe.ExprKeyword)}
        title, text = map(ast.literal_eval, words)
        unit = f" ({ast.literal_eval(named['unit'])})" if "unit" in named else ""
        limits = ", ".join(f"{sign} {named[name]}" for name, sign in _SIGNS.items() if name in named)
        attr.docstring = griffe.Docstring(f"{title}{unit}. {text}" + (f" [{limits}]" if limits else ""), parent=attr)
        attr.value = default


def _each(match: re.Match[str]) -> str:
    return "\n".join(f"{match[1]}{name}{match[3]}" for name in match[2].split(", "))
