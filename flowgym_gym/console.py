"""What is said to the user, on consoles of every encoding, and where there is none.

A prompt may hold an emoji and a console may be of code page 1252; standard error may be closed, a
pipe that nobody reads, or None (``pythonw``). None of that is a reason to end a training.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def accept_all_text() -> None:
    r"""Let standard output and error write what their encoding lacks as ``\U0001f600``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):  # It is closed.
                stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Tell the user something, on standard error if that can be written to."""
    tell(text, sys.stderr)


def tell(text: str, stream: TextIO | None) -> bool:
    """Write a line to a stream, if that is neither None nor closed.

    Returns:
        False where it could not be written: the disk is full, or nobody reads the pipe.
    """
    if stream is None:
        return True
    encoding = getattr(stream, "encoding", None) or "utf-8"
    plain = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(plain, file=stream, flush=True)
    except OSError:
        return False
    except ValueError:  # It is closed.
        return True
    return True


def flushed(stream: TextIO | None) -> bool:
    """Write what a stream still holds; whether that worked. What cannot be written goes nowhere."""
    if stream is None:
        return True
    try:
        stream.flush()
    except ValueError:  # It is closed.
        return True
    except OSError:
        # Or Python would try again at its end, and complain.
        with suppress(AttributeError, OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that is None or closed is none."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
