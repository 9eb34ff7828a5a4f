"""matplotlib as a run needs it: figures that are saved, whatever the user's own matplotlib is set
up for.

``MPLBACKEND`` says where figures are shown. Here none is, so that a backend which is not installed,
such as that of a notebook whose shell starts a training, is no reason to fail; nor do the user's
styles decide how a run's pictures look.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flowgym_gym.errors import MissingExtraError, reason

BACKEND = "MPLBACKEND"


@contextmanager
def _any_backend() -> Iterator[None]:
    """Import matplotlib inside without its backend, then set that as matplotlib would have, if it
    exists.
    """
    backend = os.environ.pop(BACKEND, None) if "matplotlib" not in sys.modules else None
    try:
        yield
    finally:
        if backend is not None:
            os.environ[BACKEND] = backend
    if backend:
        with suppress(ValueError):
            sys.modules["matplotlib"].rcParams["backend"] = backend


def _load() -> Any:
    try:
        with _any_backend():
            import matplotlib.figure
            import matplotlib.style
            import matplotlib.ticker
    except ModuleNotFoundError:
        raise
    except (
        Exception
    ) as error:  # of a damaged matplotlibrc, or an installation that does not fit numpy
        raise MissingExtraError(
            f"matplotlib cannot be imported: {type(error).__name__}: {reason(error)}"
        ) from error
    return matplotlib


matplotlib: Any = _load()
ticker: Any = matplotlib.ticker
if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure
else:
    # It belongs to no window, unlike pyplot's.
    Figure = matplotlib.figure.Figure


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw and save inside with matplotlib's own defaults, and without warnings of letters that its
    font lacks.
    """
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def plain_text(text: str) -> str:
    r"""Text that matplotlib takes as it is: no formula begins at a dollar sign, and half an emoji
    is a ``?``.
    """
    return text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
