"""What the files that an environment names hold, so that it can be told later whether they are
still the same.

Files of up to 4 MB are hashed whole. Of larger ones, which are weights, the size and 64 blocks of
64 KiB that lie evenly from the beginning to the end are hashed, and of a safetensors file the whole
header, so that gigabytes take a fraction of a second.

What this can miss: a change of some numbers of a large file that leaves its size and header alone
and falls between the blocks. Training changes all weights, so another checkpoint differs in every
block; an edit by hand need not. Hidden files, documents and pictures of a folder are left out,
since nothing reads them. Files on the Hub are known by the commit of their repository in the local
cache, where one is; nobody is asked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from flowgym_gym.errors import CheckpointError, reason

BLOCK, BLOCKS = 64 * 1024, 64
WHOLE = BLOCK * BLOCKS
# The length of a safetensors header is written in so many bytes, and is at most that.
LENGTH_BYTES, LARGEST_HEADER = 8, 100_000_000
NOT_READ = (".md", ".rst", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pyc", ".lock")
# Files whose place in the cache tells the commit of a repository.
KNOWN_FILES = (
    "model_index.json",
    "config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)

# Digests by relative name; the empty name is that of a file by itself, "@" that of a commit.
Fingerprint = dict[str, str]
COMMIT = "@"


def fingerprint(place: str) -> Fingerprint:
    """What a local file or folder holds, or which commit of a repository is in the local cache.

    Args:
        place: Path of a file or folder, or a Hub id ``"owner/name"`` or ``"owner/name:file"``.

    Returns:
        A digest of each file by its name in the folder, ``{"": digest}`` of a single file, ``{"@":
        commit}`` of a Hub id, and nothing where neither is here.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    # Unlike a Path's methods, these take any text: one too long for a name, or of a user that there
    # is not.
    path = os.path.expanduser(place)
    if os.path.isfile(path):
        return {"": digest(Path(path))}
    if os.path.isdir(path):
        return {name: digest(Path(path, name)) for name in sorted(_files(Path(path)))}
    commit = cached_commit(place)
    return {} if commit is None else {COMMIT: commit}


def digest(path: Path) -> str:
    """SHA-256 of a file's size and contents, of a large file's samples; see the module.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        size = path.stat().st_size
        hashed = hashlib.sha256(f"{size}\n".encode())
        with path.open("rb") as file:
            for start, length in _samples(path, size):
                file.seek(start)
                hashed.update(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {reason(error)}") from error
    return hashed.hexdigest()


def differences(was: Fingerprint, now: Fingerprint) -> list[str]:
    """Names of what differs, each with how: changed, gone or new."""
    names = sorted({*was, *now})
    kinds = {
        name: "is gone" if name not in now else "is new" if name not in was else "has changed"
        for name in names
        if was.get(name) != now.get(name)
    }
    return [f"{name} {kind}" for name, kind in kinds.items()]


def cached_commit(place: str) -> str | None:
    """The commit of a Hub repository in the local cache; None where that is not to be had."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, file = place.partition(":")
    if repository.count("/") != 1:
        return None
    for name in (file,) if file else KNOWN_FILES:
        try:
            found = try_to_load_from_cache(repository, name)
        except (ValueError, OSError):  # It is no id at all.
            return None
        if isinstance(found, str):
            # .../snapshots/COMMIT/name
            return Path(found).parents[name.count("/")].name
    return None


def _samples(path: Path, size: int) -> Iterator[tuple[int, int]]:
    if size <= WHOLE:
        yield 0, size
        return
    with path.open("rb") as file:
        header = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if path.suffix == ".safetensors" and header <= min(size, LARGEST_HEADER):
        yield 0, LENGTH_BYTES + header
    for i in range(BLOCKS):
        yield i * (size - BLOCK) // (BLOCKS - 1), BLOCK


def _files(folder: Path) -> Iterator[str]:
    """Names of the files below a folder that something may read; links are followed, but in no
    circle.
    """
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in files:
            if not name.startswith(".") and not name.lower().endswith(NOT_READ):
                path = Path(parent) / name
                if path.is_file():
                    yield path.relative_to(folder).as_posix()
