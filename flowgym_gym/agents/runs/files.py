"""Files of a run folder: written in one piece, brought to the disk, and locked to one process."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from flowgym_gym.errors import OptionError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
BEST = "best"
# Names under which files and folders are written before they get their own.
WRITING = "writing-"
LIBRARIES = (
    "flowgym_gym",
    "gymnasium",
    "stable_baselines3",
    "torch",
    "numpy",
    "diffusers",
    "transformers",
)
# What reading a half-written or foreign file can raise: json, zipfile, numpy, torch and whatever
# they call.
UNREADABLE = Exception


def check_new(out: Path) -> None:
    """Raise an OptionError unless a new run can be written to the folder ``out``; creates
    nothing.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file, expected a folder for the run")
    if out.is_dir() and any(not path.name.startswith(WRITING) for path in out.iterdir()):
        advice = (
            "resume it (--resume), or choose another folder"
            if (out / CONFIG).is_file()
            else "choose another folder"
        )
        raise OptionError(f"{out} is not empty; {advice}")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raise an OptionError if files cannot be made in ``out``, or ``out`` cannot be made."""
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OptionError(f"{out} cannot be written: no permission to make files in {existing}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one piece."""
    with whole_file(path) as file:
        json.dump(content, file, indent=2, default=_plain)
        file.write("\n")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file to write to that gets its name when all of it is on the disk, or never."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=WRITING, delete=False, encoding="utf-8", newline=""
        ) as file:
            temporary = Path(file.name)
            yield file
        sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its entries, is on the disk."""
    if path.is_dir():
        with suppress(OSError):  # Not every system can do this for a folder.
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def remove_leftovers(out: Path) -> None:
    """Delete what a killed process was writing."""
    for folder in (out, out / CHECKPOINTS, out / BEST):
        for path in folder.glob(f"{WRITING}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a run folder to this process; the lock ends with the process, however that ends.

    Raises:
        OptionError: If another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"another process is training in {out}; wait for it, or choose another folder"
            ) from error
        except OSError:  # A file system without locks.
            pass
        yield
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fsync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a plain value")
