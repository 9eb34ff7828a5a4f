"""Files of prompts: which strings name one, and how each kind is read.

A string names a file where one of that name exists, or where it ends like a data file. So a mistyped or a missing
file is an error and never a prompt; a prompt that is spelled like a file's name is given in a list.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from flowgym_gym.errors import OptionError, shown

# Endings of files that hold text or data. Pictures are none of them: their names are captions in training data.
ENDINGS = frozenset(
    [".txt", ".text", ".lst", ".log", ".dat", ".csv", ".tsv", ".tab", ".psv", ".json", ".jsonl", ".jsonlines", ".ndjson", ".json5", ".yaml", ".yml", ".toml", ".xml", ".ini", ".md", ".markdown", ".rst", ".html", ".htm", ".rtf", ".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".xlsm", ".ods", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".db", ".sqlite", ".sqlite3", ".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".msgpack", ".tfrecord", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"]
)
PACKED = frozenset([".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"])
# How only paths and addresses begin: ./x, ../x, ~/x, ~user/x, /folder/x, C:\x; https://x, s3://x.
PATH = re.compile(r"\.{1,2}[/\\]|~[^/\\\s]*[/\\]|/[^/\s]+/|[A-Za-z]:[/\\](?![/\\])")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://\S")


@dataclass(frozen=True)
class Place:
    """A file of prompts, and which of its columns or fields holds them; None where that is not said."""

    path: Path
    column: str | None

    @property
    def ending(self) -> str:
        """What the file's name ends with, in lower case, ``".csv"``."""
        return _ending(str(self.path))


def find(prompts: str | os.PathLike[str]) -> Place | None:
    """The file that ``prompts`` names; None where it is text.

    Of a name that holds ``#`` the longest part that is a file is its path, and the rest is the column. Where there is
    no such file, the path is the shortest part that ends like a data file.

    Raises:
        OptionError: If it is an address of the internet, which nothing here asks, or a path of bytes.
    """
    text: object = os.fspath(prompts)
    if not isinstance(text, str):
        raise OptionError(f"prompts is the path {shown(text)} of bytes, expected one of text; os.fsdecode makes it so")
    if isinstance(prompts, str) and ADDRESS.match(text.strip()):
        raise OptionError(
            f"prompts is the address {shown(text)}, but prompts are read from files; download it, and name the file; "
            f"{insist(text)}"
        )
    parts = _parts(text) if isinstance(prompts, str) else [(os.path.expanduser(text), None), *_parts(text)]
    files = [part for part in parts if os.path.lexists(part[0]) and not os.path.isdir(part[0])]
    named = [part for part in reversed(parts) if _ending(part[0]) in ENDINGS]
    folders = [part for part in parts if os.path.isdir(part[0])]
    others = parts if PATH.match(text.strip()) or not isinstance(prompts, str) else []
    path, column = next(iter([*files, *named, *folders, *others]), (None, None))
    return None if path is None else Place(Path(path), column)


def insist(text: str) -> str:
    """How to give a text as a prompt that is taken for a place, as the end of an error message."""
    return f"a prompt that is spelled so is given in a list, [{shown(text, 60)}]"


def _parts(text: str) -> list[tuple[str, str | None]]:
    """The ways to read ``PATH#COLUMN``, the longest path first."""
    ends = [len(text), *(i for i in range(len(text) - 1, 0, -1) if text[i] == "#")]
    paths = [(text[:end].strip(), text[end + 1 :].strip() or None) for end in ends]
    return [(os.path.expanduser(path.rstrip("/\\") or path), column) for path, column in paths if path]


def _ending(path: str) -> str:
    name = os.path.basename(path).lower()
    return os.path.splitext(name)[1] or name
