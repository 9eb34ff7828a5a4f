"""Checks of arguments that several parts share; each raises an OptionError that names value and
expectation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flowgym_gym.errors import OptionError, shown

MAX_SEED = 2**63 - 1
# Agents compute with float32, in which larger numbers are infinite.
LARGEST = float(np.finfo(np.float32).max)


def check_number(name: str, value: Any, minimum: float = -math.inf) -> None:
    """Raise an OptionError unless ``value`` is a finite number of at least ``minimum``."""
    try:
        good = not isinstance(value, bool) and isinstance(value, int | float | np.number)
        good = good and math.isfinite(value) and value >= minimum
    except (OverflowError, TypeError):  # an integer beyond floating point, or a complex number
        good = False
    if not good:
        at_least = "" if minimum == -math.inf else f", at least {minimum}"
        raise OptionError(f"{name} is {shown(value)}, expected a finite number{at_least}")


def check_weight(name: str, value: Any, minimum: float = -math.inf, times: float = 1.0) -> None:
    """As :func:`check_number`, for what is multiplied with numbers up to ``times``: float32 must
    hold the product.
    """
    check_number(name, value, minimum)
    if abs(float(value)) * times > LARGEST:
        raise OptionError(
            f"{name} is {shown(value)}, which gives rewards beyond float32; expected at most "
            f"{LARGEST / times:.3g}"
        )


def check_whole(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise an OptionError unless ``value`` is a whole number from ``minimum`` to ``maximum``."""
    good = not isinstance(value, bool) and isinstance(value, int | np.integer) and value >= minimum
    if not good or (maximum is not None and value > maximum):
        limits = f", at least {minimum}" if maximum is None else f" from {minimum} to {maximum}"
        raise OptionError(f"{name} is {shown(value)}, expected a whole number{limits}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise an OptionError unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    ):
        raise OptionError(f"{name} is {shown(value)}, expected one of {choices}")


def check_once(
    name: str, value: object, where: str, others: Mapping[str, Any], key: str = ""
) -> None:
    """Raise an OptionError if what ``name`` says is said again in the arguments ``others``, as
    ``key``.
    """
    key = key or name
    if key in others:
        raise OptionError(
            f"{name} is {shown(value)}, but {where} has {key!r}: {shown(others[key])}; give only "
            "one of them"
        )


def check_mapping(name: str, value: object) -> None:
    """Raise an OptionError unless ``value`` is None or a dictionary of arguments by name."""
    if value is not None and not (
        isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    ):
        raise OptionError(f"{name} is {shown(value)}, expected a dictionary of arguments by name")


def check_seed(seed: object) -> None:
    """Raise an OptionError unless ``seed`` is None or a whole number that generators take."""
    if seed is not None:
        check_whole("seed", seed, minimum=0, maximum=MAX_SEED)
