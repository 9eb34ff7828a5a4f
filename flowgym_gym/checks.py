"""Checks of arguments that several parts share."""

from __future__ import annotations

import math

import numpy as np

from flowgym_gym.errors import OptionError


def check_number(name: str, value: object, minimum: float = -math.inf) -> None:
    """Raise an OptionError unless ``value`` is a finite number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not minimum <= value < math.inf:
        at_least = "" if minimum == -math.inf else f", at least {minimum}"
        raise OptionError(f"{name} is {value!r}, expected a finite number{at_least}")
