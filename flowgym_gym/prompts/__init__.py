"""Where prompts come from: text, lists, files, sets in this package, and columns of datasets.

Sets in this package, as ``"set:NAME"``:

``concepts-train``, ``concepts-held-out``
    "a photo of a ..." of the 256 things that the embedded checkpoint draws; every fourth is held out, so that an agent
    can be evaluated on things that it was not trained on.
``ddpo-animals``
    The 45 common animals of DDPO, "a cat".
``ddpo-activities``
    Those animals with DDPO's three activities, "a cat riding a bike".

References:
    Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024, section 5.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowgym_gym.errors import MissingExtraError, OptionError, did_you_mean, reason, shown
from flowgym_gym.prompts.files import Place, find

FOLDER = Path(__file__).parent
SETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))
HOW = (
    "a prompt, a list of prompts, a .txt file with one per line, a .jsonl file ('FILE.jsonl#FIELD', by default "
    f"'prompt'), 'set:NAME' with NAME one of {', '.join(SETS)}, or 'dataset:NAME[SPLIT]#COLUMN'"
)


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list.

    Args:
        prompts: A prompt; a list of prompts; the path of a ``.txt`` file with one per line, or of a ``.jsonl`` file
            whose objects hold one under ``"prompt"`` or, as ``"FILE.jsonl#FIELD"``, another field; ``"set:NAME"`` for a
            set of this package; or ``"dataset:NAME[SPLIT]#COLUMN"`` for a column of a dataset of the library
            ``datasets``, where NAME is a folder that ``save_to_disk`` wrote, or a Hub id, and SPLIT is ``train`` by
            default.

    Raises:
        OptionError: If there is none, one is empty or not a string, or the place that is named cannot be read.
        MissingExtraError: If a dataset is named and the library ``datasets`` is not installed.

    >>> len(read_prompts("set:ddpo-animals"))
    45
    """
    if isinstance(prompts, str):
        place = prompts.partition("#")[0]
        found = next((read(prompts) for named, read in READERS.items() if _names(named, prompts, place)), [prompts])
    else:
        found = list(prompts) if isinstance(prompts, Sequence) else []
    if not found or not all(isinstance(p, str) and p.strip() for p in found):
        raise OptionError(f"prompts is {shown(prompts)}, expected {HOW}")
    return found


def prompts_file(prompts: object) -> Path | None:
    """The absolute path of the file that ``prompts`` names.

    None where ``prompts`` is text, a list, a set of this package or a dataset. The file need not exist: a string that
    ends like a data file names one all the same.
    """
    place = _place(prompts)
    return None if place is None else Path(os.path.abspath(place.path))


def resolved(prompts: Any) -> Any:
    """The same argument with the path of its file or dataset made absolute; ``#COLUMN`` stays.

    So the argument means the same when it is read again from another folder. What is no file and no folder comes back
    as it is.
    """
    place = _place(prompts)
    if place is not None:
        column = "" if place.column is None else f"#{place.column}"
        return f"{os.path.abspath(place.path)}{column}"
    if isinstance(prompts, str) and prompts.startswith("dataset:"):
        name, rest = _split(prompts.removeprefix("dataset:"))
        folder = os.path.expanduser(name)
        return f"dataset:{os.path.abspath(folder)}{rest}" if os.path.isdir(folder) else prompts
    return prompts


def _place(prompts: object) -> Place | None:
    if isinstance(prompts, str) and prompts.startswith(("set:", "dataset:")):
        return None
    return find(prompts) if isinstance(prompts, str | os.PathLike) else None


def _split(place: str) -> tuple[str, str]:
    """The name of ``NAME[SPLIT]#COLUMN``, and what follows."""
    end = min((i for i in (place.find("["), place.find("#")) if i >= 0), default=len(place))
    return place[:end], place[end:]


def _read_set(prompts: str) -> list[str]:
    name = prompts.removeprefix("set:")
    if name not in SETS:
        raise OptionError(f"prompts names the set {name!r}{did_you_mean(name, SETS)} (sets: {', '.join(SETS)})")
    return _lines(FOLDER / f"{name}.txt")


def _read_text(prompts: str) -> list[str]:
    try:
        return _lines(Path(prompts).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"prompts names the text file {prompts!r}, which cannot be read: {error}") from error


def _read_json_lines(prompts: str) -> list[str]:
    path, _, name = prompts.partition("#")
    name = name or "prompt"
    try:
        lines = _lines(Path(path).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"prompts names the JSON lines {path!r}, which cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)[name]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise OptionError(
                f"line {number} of {path!r} is {line[:80]!r}, expected an object with {name!r}"
            ) from error
        found.append(value)
    return found


def _read_dataset(prompts: str) -> list[str]:
    place, _, column = prompts.removeprefix("dataset:").partition("#")
    name, bracket, split = place.partition("[")
    if not name or not column or (bracket and not split.endswith("]")):
        raise OptionError(f"prompts is {prompts!r}, expected 'dataset:NAME#COLUMN' or 'dataset:NAME[SPLIT]#COLUMN'")
    split = split.removesuffix("]") or "train"
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError(
            f"prompts is {prompts!r}, which needs the package 'datasets': pip install 'flowgym_gym[datasets]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        data: Any = (
            datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(name, split=split)
        )
        if isinstance(data, datasets.DatasetDict):
            data = data[split]
        return list(data[column])
    except Exception as error:
        raise OptionError(
            f"prompts is {prompts!r}, which cannot be read: {type(error).__name__}: {reason(error)}"
        ) from error


# How prompts that name a place begin (with a colon) or how the place ends (with a dot), and what reads them.
READERS: dict[str, Callable[[str], list[str]]] = {
    "set:": _read_set,
    "dataset:": _read_dataset,
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
}


def _names(kind: str, prompts: str, place: str) -> bool:
    return prompts.startswith(kind) if kind.endswith(":") else (prompts if kind == ".txt" else place).endswith(kind)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _short(prompts: object) -> str:
    text = repr(prompts)
    return text if len(text) <= 200 else f"{text[:200]}..."
