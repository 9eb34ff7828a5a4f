"""What the API reference makes of a docstring: its formulas, cross-references and examples are
written as Sphinx has them, the site is Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """Turns all docstrings of a package into Markdown once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe."""
        self._turn(pkg)

    def _turn(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._turn(member)


def as_markdown(text: str, scope: griffe.Object) -> str:
    """A docstring as Markdown; names in it are looked up in ``scope``, the object that has it."""
    text = re.sub(r"^( *)\.\. math::(.*?)(?=\n\s*\n|\Z)", _formula, text, flags=re.M | re.S)
    text = re.sub(r":math:`([^`]*)`", lambda found: f"${' '.join(found[1].split())}$", text)
    text = re.sub(r":\w+:`~?([^`]*)`", lambda found: _reference(found[1], scope), text)
    return re.sub(r"^( *)>>> .*(?:\n *\S.*)*", _example, text, flags=re.M)


def _formula(found: re.Match[str]) -> str:
    indent = found[1]
    return f"\n{indent}$$\n{indent}{' '.join(found[2].split())}\n{indent}$$\n"


def _reference(name: str, scope: griffe.Object) -> str:
    """A link, where the reference has an entry of this name; else the name."""
    name = " ".join(name.split())
    if name.startswith("flowgym_gym."):
        path, name = name, name.rpartition(".")[2]
    else:
        try:
            path = scope.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'


def _example(found: re.Match[str]) -> str:
    indent = found[1]
    return f"{indent}```pycon\n{found[0]}\n{indent}```"
