"""Files of prompts: which strings name one, and how each kind is read.

A string names a file where one of that name exists, or where it ends like a data file. So a
mistyped or a missing file is an error and never a prompt; a prompt that is spelled like a file's
name is given in a list.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgym_gym.errors import OptionError, did_you_mean, reason, shown
from flowgym_gym.prompts.text import fault

# Endings of files that hold text or data. Pictures are none of them: their names are captions in
# training data.
PACKED = frozenset([".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"])
ENDINGS = PACKED | {
    f".{name}"
    for name in re.findall(
        r"\w+",
        "txt text lst log dat csv tsv tab psv json jsonl jsonlines ndjson json5 yaml yml toml xml "
        "ini md markdown rst html htm rtf pdf doc docx odt xls xlsx xlsm ods parquet arrow "
        "feather orc avro db sqlite sqlite3 h5 hdf5 npy npz pkl pickle pt pth ckpt safetensors "
        "bin msgpack tfrecord",
    )
}
# No path and column are longer: the "#" of longer texts divide nothing.
LONGEST = 10_000
# How only paths and addresses begin: ./x, ../x, ~/x, ~user/x, /folder/x, C:\x; https://x, s3://x.
PATH = re.compile(r"\.{1,2}[/\\]|~[^/\\\s]*[/\\]|/[^/\s]+/|[A-Za-z]:[/\\](?![/\\])")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://\S")


@dataclass(frozen=True)
class Place:
    """A file of prompts.

    Attributes:
        path: Where it is.
        column: Which of its columns or fields holds the prompts; None where that is not said.
        text: The text that names it, where that could be a prompt; for error messages.
    """

    path: Path
    column: str | None = None
    text: str | None = None

    @property
    def ending(self) -> str:
        """What the file's name ends with, in lower case, ``".csv"``."""
        return ending(str(self.path))


def find(prompts: str | os.PathLike[str]) -> Place | None:
    """The file that ``prompts`` names; None where it is text.

    Of a name that holds ``#`` the longest part that is a file is its path, and the rest is the
    column. Where there is no such file, the path is the shortest part that ends like a data file.

    Raises:
        OptionError: If it is an address of the internet, which nothing here asks, or a path of
            bytes.
    """
    text: object = os.fspath(prompts)
    if not isinstance(text, str):
        raise OptionError(
            f"prompts is the path {shown(text)} of bytes, expected one of text; os.fsdecode makes "
            "it so"
        )
    if isinstance(prompts, str) and ADDRESS.match(text.strip()):
        raise OptionError(
            f"prompts is the address {shown(text)}, but prompts are read from files; download it, "
            f"and name the file; {insist(text)}"
        )
    parts = (
        _parts(text)
        if isinstance(prompts, str)
        else [(os.path.expanduser(text), None), *_parts(text)]
    )
    files = [part for part in parts if os.path.lexists(part[0]) and not os.path.isdir(part[0])]
    named = [part for part in reversed(parts) if ending(part[0]) in ENDINGS]
    folders = [part for part in parts if os.path.isdir(part[0])]
    others = parts if PATH.match(text.strip()) or not isinstance(prompts, str) else []
    path, column = next(iter([*files, *named, *folders, *others]), (None, None))
    return (
        None
        if path is None
        else Place(Path(path), column, text if isinstance(prompts, str) else None)
    )


def insist(text: str) -> str:
    """How to give a text as a prompt that is taken for a place, as the end of an error message."""
    return f"a prompt that is spelled so is given in a list, [{shown(text, 60)}]"


def _parts(text: str) -> list[tuple[str, str | None]]:
    """The ways to read ``PATH#COLUMN``, the longest path first."""
    hashes = (
        [i for i in range(len(text) - 1, 0, -1) if text[i] == "#"] if len(text) < LONGEST else []
    )
    ends = [len(text), *hashes]
    paths = [(text[:end].strip(), text[end + 1 :].strip() or None) for end in ends]
    return [
        (os.path.expanduser(path.rstrip("/\\") or path), column) for path, column in paths if path
    ]


def ending(path: str) -> str:
    """What a path ends with, in lower case, such as ``".csv"``; the name itself where it has no
    dot.
    """
    name = os.path.basename(path).lower()
    return os.path.splitext(name)[1] or name


def read(place: Place) -> list[str]:
    """The prompts of a file.

    Raises:
        OptionError: If the file is missing, of a kind that is not read, or damaged; if it is not
            UTF-8, has no such column, or holds something that is no prompt. The message names the
            file, and the line where there is one.
    """
    name = repr(str(place.path))
    reader = READERS.get(place.ending)
    if reader is None or not os.path.isfile(place.path):
        advice = "" if place.text is None else f"; {insist(place.text)}"
        raise OptionError(f"prompts names {_what(place)}{advice}")
    try:
        found = list(reader(_text(place.path), place.column))
    except OSError as error:
        raise OptionError(f"prompts names {name}, which cannot be read: {reason(error)}") from error
    except (_DamageError, csv.Error, RecursionError) as error:
        raise OptionError(f"prompts names {name}: {reason(error)}") from error
    for where, prompt in found:
        wrong = fault(prompt)
        if wrong:
            raise OptionError(f"prompts names {name}: {where} holds {shown(prompt)}, {wrong}")
    if not found:
        raise OptionError(f"prompts names {name}, which holds no prompts")
    return [prompt for _, prompt in found]


class _DamageError(Exception):
    """What is wrong within a file."""


def _what(place: Place) -> str:
    """Why a place is none that prompts are read from."""
    path, kinds = str(place.path), ", ".join(READERS)
    if os.path.isdir(path):
        return f"the folder {shown(path)}, but prompts are read from files ({kinds})"
    if not os.path.lexists(path):
        user = re.match(r"~[^/\\]*", path)
        return f"the file {shown(path)}, " + (
            f"but there is no user {user[0][1:]!r}" if user else "which does not exist"
        )
    if place.ending in PACKED:
        return f"the packed file {shown(path)}; unpack it, and name the file within ({kinds})"
    if not os.path.isfile(path):
        return f"{shown(path)}, which is no regular file, or a link to nothing"
    return f"the file {shown(path)}, but prompts are read from files that end in {kinds}"


def _text(path: Path) -> str:
    """The text of a file in UTF-8, without byte-order marks; joined files have them at the
    beginning of lines, too.
    """
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise _DamageError("it is UTF-16 or UTF-32; save it as UTF-8")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise _DamageError(f"line {line} holds NUL, so it is no text in UTF-8; save it as UTF-8")
    try:
        return re.sub("^\ufeff", "", data.decode(), flags=re.MULTILINE)
    except UnicodeDecodeError as error:
        line = len(_lines(data[: error.start].decode()))
        raise _DamageError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


def _lines(text: str) -> list[str]:
    """The lines of a text, which end at newlines only; ``str.splitlines`` splits at ten other
    characters, too.
    """
    return re.split("\r\n|\n|\r", text)


Found = Iterator[tuple[str, Any]]


def _read_text(text: str, column: str | None) -> Found:
    if column is not None:
        raise _DamageError(f"a text file has no columns, but {column!r} is asked for")
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            yield f"line {number}", line.strip()


def _read_table(text: str, column: str | None, delimiter: str = ",") -> Found:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(rows, [])]
    if not header:
        return
    column = _column(column, header, "the columns (of its first line)")
    if header.count(column) > 1:
        raise _DamageError(f"the column {column!r} is there {header.count(column)} times")
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _DamageError(
                f"the row that begins in line {line} cannot be read: {error}"
            ) from error
        if row is None:
            return
        if row and len(row) != len(header):
            raise _DamageError(
                f"line {line} has {len(row)} cells, but the first line names {len(header)} "
                f"columns; a cell that holds {delimiter!r} is put in double quotes"
            )
        if row:
            yield f"line {line}", row[header.index(column)]


def _read_tabs(text: str, column: str | None) -> Found:
    return _read_table(text, column, "\t")


def _read_json_lines(text: str, column: str | None) -> Found:
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            yield f"line {number}", _field(_json(line, number), column, f"line {number}")


def _read_json(text: str, column: str | None) -> Found:
    data = _json(text)
    if isinstance(data, dict):  # of lists, a column each
        data = data[_column(column, data, "the names")]
        column = None
        if not isinstance(data, list):
            raise _DamageError(
                f"expected a list of prompts under that name, it holds {shown(data, 80)}"
            )
    elif not isinstance(data, list):
        raise _DamageError(f"it holds {shown(data, 80)}, expected a list of prompts")
    for number, entry in enumerate(data, start=1):
        where = f"entry {number}"
        if isinstance(entry, dict) or column is not None:
            entry = _field(entry, column, where)
        yield where, entry


def _json(text: str, line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        line += len(_lines(text[: error.pos])) - 1
        lines = "; a value per line is a .jsonl file" if error.msg == "Extra data" else ""
        raise _DamageError(f"line {line} is no JSON: {error.msg}{lines}") from error
    except ValueError as error:
        raise _DamageError(f"line {line}: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object holds {repeated!r} twice")
    return found


def _field(entry: Any, column: str | None, where: str) -> Any:
    if not isinstance(entry, dict):
        raise _DamageError(
            f"{where} is {shown(entry, 80)}, expected an object with {column or 'prompt'!r}"
        )
    return entry[_column(column, entry, f"the names of {where}")]


def _column(column: str | None, names: Iterable[str], of: str) -> str:
    """The column that is asked for, ``"prompt"`` where none is."""
    wanted, names = column or "prompt", list(names)
    if wanted not in names:
        there = shown(names, 300)
        raise _DamageError(
            f"there is no {wanted!r} among {of}, {there}{did_you_mean(wanted, names)}; 'FILE#NAME' "
            "names one"
        )
    return wanted


READERS: dict[str, Callable[[str, str | None], Found]] = {
    ".txt": _read_text,
    ".csv": _read_table,
    ".tsv": _read_tabs,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
}
