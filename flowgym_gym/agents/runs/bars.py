"""A progress bar that is never a reason to stop: not a closed terminal, nor what ``TQDM_...``
variables say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from flowgym_gym.console import is_terminal


class Bar:
    """tqdm's bar on standard error, where that is a terminal that can be written to; else nothing.

    Args:
        total: How much there is to do.
        done: How much of it has been done.
        unit: What is counted.
        label: What is written before it.
    """

    def __init__(self, total: int, done: int = 0, unit: str = "step", label: str = "") -> None:
        self._bar: Any = None
        if is_terminal(sys.stderr):
            with self._harmless():
                self._bar = tqdm(
                    total=total, initial=done, unit=unit, desc=label or None, file=sys.stderr
                )

    @property
    def shown(self) -> bool:
        """Whether there is a bar to see."""
        return self._bar is not None

    def update(self, steps: int, values: Mapping[str, str] | None = None) -> None:
        """Go on by some steps, and show values beside them."""
        with self._harmless():
            if self._bar is not None and values is not None:
                self._bar.set_postfix(values, refresh=False)
            if self._bar is not None:
                self._bar.update(steps)

    def close(self) -> None:
        """Leave the bar as it is."""
        with self._harmless():
            if self._bar is not None:
                self._bar.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        # Of the terminal, which has gone, or of tqdm, which reads variables of the environment.
        except Exception:
            self._bar = None
