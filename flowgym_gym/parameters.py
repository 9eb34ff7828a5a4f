"""What a class takes when it is made, with what its ``**kwargs`` stand for.

A subclass that adds one argument to twenty takes the others as ``**kwargs`` and hands them to
``super().__init__``. Their names and defaults are those of the class above it:

>>> class Shape:
...     def __init__(self, size=1, colour="red"): ...
>>> class Circle(Shape):
...     def __init__(self, radius=2, **kwargs):
...         super().__init__(2 * radius, **kwargs)
>>> [str(parameter) for parameter in parameters_of(Circle)]
['radius=2', "colour='red'"]
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

# Kinds of parameters that are given by name.
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@cache
def parameters_of(cls: type) -> tuple[inspect.Parameter, ...]:
    """The parameters of a class, its own first and then those that its ``**kwargs`` reach.

    Where ``**kwargs`` end in a class that does something else with them than to hand them on, they
    are among the parameters: such a class takes any name. Nothing is known of a class that is not
    written in Python, which has none here.
    """
    try:
        own = list(inspect.signature(cls).parameters.values())
    except ValueError:
        return ()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        # What an instance is made by otherwise, such as a metaclass, hands nothing on that is seen
        # here.
        lines = [above for above in cls.__mro__ if "__init__" in vars(above)]
        if (
            lines
            and list(inspect.signature(vars(lines[0])["__init__"]).parameters.values())[1:] == own
        ):
            return tuple(_follow(lines))
    return tuple(own)


def _follow(lines: list[type]) -> Iterator[inspect.Parameter]:
    """Parameters of the first class's ``__init__``, then of those of the next that it leaves open.

    Args:
        lines: The classes of a method resolution order that define ``__init__``.
    """
    method: Callable[..., Any] = vars(lines[0])["__init__"]
    own = list(inspect.signature(method).parameters.values())[1:]
    rest = next((parameter for parameter in own if parameter.kind is parameter.VAR_KEYWORD), None)
    call = None if rest is None or len(lines) < 2 else _handed_on(method, rest.name)
    if call is None or lines[1] is object:
        yield from own
        return
    yield from (parameter for parameter in own if parameter is not rest)
    # What the call itself gives is no longer open.
    given = {parameter.name for parameter in own} | {
        keyword.arg for keyword in call.keywords if keyword.arg
    }
    for place, parameter in enumerate(_follow(lines[1:])):
        if parameter.kind is parameter.VAR_KEYWORD:
            yield parameter
        elif parameter.kind in NAMED and parameter.name not in given and place >= len(call.args):
            yield parameter.replace(kind=parameter.KEYWORD_ONLY)


def _handed_on(method: Callable[..., Any], name: str) -> ast.Call | None:
    """The call ``super().__init__(..., **name)`` in a method that does nothing else with them; else
    None.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):  # made up at run time
        return None
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "super().__init__"
        and any(keyword.arg is None and keyword.value in uses for keyword in node.keywords)
        and not any(isinstance(argument, ast.Starred) for argument in node.args)
    ]
    return calls[0] if len(uses) == len(calls) == 1 else None
