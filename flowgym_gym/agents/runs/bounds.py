"""What numbers a setting may have: said where the setting is, and checked in one place."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass
from typing import ClassVar

import numpy as np

from flowgym_gym.errors import OptionError, shown


@dataclass(frozen=True)
class Bounds:
    """Limits of a number; the metadata of a dataclass's field keep them under ``Bounds.KEY``.

    Attributes:
        minimum: The least that it may be.
        maximum: The most.
        above: Whether it must be more than ``minimum``.
        whole: Whether it must be whole.
        special: Values other than such numbers that mean something.
    """

    KEY: ClassVar[str] = "bounds"

    minimum: float = -math.inf
    maximum: float = math.inf
    above: bool = False
    whole: bool = False
    special: tuple[object, ...] = ()

    @classmethod
    def of(cls, field: Field[object]) -> Bounds:
        """The bounds of a dataclass's field; none where it says none."""
        found = field.metadata.get(cls.KEY)
        return found if isinstance(found, cls) else cls()

    def check(self, name: str, value: object) -> None:
        """Raise an OptionError unless ``value`` is a number within the bounds, or a special
        value.
        """
        if any(type(value) is type(word) and value == word for word in self.special):
            return
        types = (int, np.integer) if self.whole else (int, float, np.integer, np.floating)
        if (
            isinstance(value, bool)
            or not isinstance(value, types)
            or not self.minimum <= value <= self.maximum
            or (not isinstance(value, int) and math.isinf(value))
            or (self.above and value == self.minimum)
        ):
            raise OptionError(f"{name} is {shown(value)}, expected {self}")

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a finite number"
        if self.above:
            text = f"{number} above {self.minimum:g}"
        elif self.maximum < math.inf:
            text = f"{number} from {self.minimum:g} to {self.maximum:g}"
        else:
            text = number if self.minimum == -math.inf else f"{number}, at least {self.minimum:g}"
        words = ("null" if word is None else str(word) for word in self.special)
        return " or ".join((text, *words))
