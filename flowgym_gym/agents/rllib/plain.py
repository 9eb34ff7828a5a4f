"""States of RLlib as JSON and arrays: a checkpoint of a run holds nothing that can be executed.

RLlib pickles what its algorithms return as their state. That is made of dictionaries, lists,
numbers, texts and arrays alone, which is what is written here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def packed(state: Any, prefix: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A state as what JSON can hold, and its arrays by names that begin with ``prefix``.

    Raises:
        TypeError: If it holds something else.
    """
    arrays: dict[str, np.ndarray] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            name = f"{prefix}{len(arrays)}"
            arrays[name] = value
            return ["array", name]
        if isinstance(value, np.generic):
            return pack(value.item())
        if isinstance(value, dict):
            return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return [type(value).__name__, [pack(item) for item in value]]
        if isinstance(value, float) and not math.isfinite(value):
            return ["float", repr(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a state of RLlib holds a {type(value).__name__}")

    return pack(state), arrays


def unpacked(plain: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The state that :func:`packed` took; whatever error comes if it is none."""
    if not isinstance(plain, list):
        return plain
    kind, content = plain
    if kind == "array":
        # RLlib goes on to write into some of them.
        return np.array(arrays[content])
    if kind == "dict":
        return {unpacked(key, arrays): unpacked(item, arrays) for key, item in content}
    if kind == "float":
        return float(content)
    items = [unpacked(item, arrays) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)
