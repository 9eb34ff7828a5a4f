"""Models and rewards that are made once per process, for as long as the files they were made of
stay the same.

What arguments name is known by its absolute path, so that a relative one means another thing in
another folder, and by the times and sizes of the files that lie there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowgym_gym.sources import exists

# Longer texts are prompts.
LONGEST_PATH = 4096
Stamp = tuple[tuple[str, int, int, int], ...]


class Shared:
    """Values by key; one is made again where the files it was made of have changed, in place of the
    older one.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Stamp], Any]] = {}

    def get(
        self,
        key: Hashable,
        places: Iterable[str],
        make: Callable[[], Any],
        good: Callable[[Any], bool],
    ) -> Any:
        """The value of a key.

        Args:
            key: What it is known by.
            places: Files and folders that it is made of.
            make: Makes it.
            good: Whether a value may be shared, when it is made and later, when it is handed out
                again.
        """
        stamps = [stamp(place) for place in places]
        kept = self._kept.get(key)
        if kept is not None and kept[0] == stamps and good(kept[1]):
            return kept[1]
        made = make()
        if good(made):
            self._kept[key] = (stamps, made)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def stamp(place: str) -> Stamp:
    """Names, times of change, sizes and numbers of all files of a folder, or of one file."""
    path = Path(place)
    files = [path]
    if path.is_dir():
        files = [
            Path(folder) / name
            for folder, _, names in os.walk(path, followlinks=True)
            for name in names
        ]
    found = []
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError:  # a link to nothing, or a file that has just gone
            continue
        found.append((str(file), status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def places(value: Any) -> Iterator[str]:
    """Absolute paths of what arguments name on this machine, wherever in dictionaries and lists it
    stands.
    """
    if isinstance(value, Mapping):
        for entry in value.values():
            yield from places(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from places(entry)
    elif isinstance(value, str | os.PathLike) and len(os.fspath(value)) <= LONGEST_PATH:
        text = str(value)
        # FILE#COLUMN, and dataset:FOLDER[SPLIT]#COLUMN
        inner = re.fullmatch(r"(?:dataset:)?(.*?)(?:\[[^\]]*\])?(?:#[^#]*)?", text, re.DOTALL)
        for name in dict.fromkeys((text, inner[1] if inner else text)):
            if name and exists(name):
                yield os.path.abspath(Path(name).expanduser())
