"""Where prompts come from: text, lists, files, sets in this package, and columns of datasets.

Sets in this package, as ``"set:NAME"``:

``concepts-train``, ``concepts-held-out``
    "a photo of a ..." of the 256 things that the embedded checkpoint draws; every fourth is held
    out, so that an agent can be evaluated on things that it was not trained on.
``ddpo-animals``
    The 45 common animals of DDPO, "a cat".
``ddpo-activities``
    Those animals with DDPO's three activities, "a cat riding a bike".

References:
    Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024, section
    5.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowgym_gym.errors import MissingExtraError, OptionError, did_you_mean, reason, shown
from flowgym_gym.prompts.files import ENDINGS, PATH, READERS, Place, ending, find, insist, read
from flowgym_gym.prompts.text import check_text, fault

FOLDER = Path(__file__).parent
SETS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))
HOW = (
    f"a prompt, a list of prompts, a file ({', '.join(READERS)}; 'FILE.csv#COLUMN' names a column "
    f"or field, by default 'prompt'), 'set:NAME' with NAME one of {', '.join(SETS)}, or "
    "'dataset:NAME[SPLIT]#COLUMN'"
)


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """Prompts as a list.

    A string that names a file or folder that exists, or that ends like a data file, is never taken
    for a prompt; given in a list, ``["a.txt"]``, it is one.

    Args:
        prompts: A prompt; a list, tuple, array or column of prompts; a file (see below);
            ``"set:NAME"`` for a set of this package; or ``"dataset:NAME[SPLIT]#COLUMN"`` for a
            column of a dataset of the library ``datasets``, where NAME is a folder that
            ``save_to_disk`` wrote, or a Hub id, and SPLIT is ``train`` by default.

    Files are UTF-8, with or without a byte-order mark: ``.txt`` holds a prompt per line; ``.csv``
    and ``.tsv`` have names of columns in their first line; ``.jsonl`` and ``.ndjson`` hold an
    object per line; ``.json`` holds a list of prompts, a list of objects, or an object of lists.
    ``"FILE#NAME"`` says which column or field holds the prompts, ``prompt`` by default.

    Raises:
        OptionError: If there is none, one cannot be used, or the place that is named cannot be
            read.
        MissingExtraError: If a dataset is named and the library ``datasets`` is not installed.

    >>> len(read_prompts("set:ddpo-animals"))
    45
    """
    place = _place(prompts)
    if place is not None:
        return read(place)
    kind, name = _kind(prompts)
    if kind == "set":
        return _read_set(name)
    where = "prompts is" if isinstance(prompts, str) else "entry {} of prompts is"
    if kind == "dataset":
        where = f"row {{}} of {shown(prompts)} is"
    found = _read_dataset(name) if kind == "dataset" else _listed(prompts)
    for i, prompt in enumerate(found):
        wrong = fault(prompt)
        if wrong:
            raise OptionError(f"{where.format(i)} {shown(prompt)}, {wrong}")
    return [str.__str__(prompt) for prompt in found]


def _listed(prompts: object) -> list[Any]:
    """A prompt or a sequence of them as a list."""
    if isinstance(prompts, str):
        if prompts.strip() in SETS:
            raise OptionError(
                f"prompts is {shown(prompts)}, the name of a set: write 'set:{prompts.strip()}'; "
                f"{insist(prompts)}"
            )
        return [prompts]
    if (
        not isinstance(prompts, Sequence)
        and getattr(prompts, "ndim", None) == 1
        and hasattr(prompts, "tolist")
    ):
        prompts = prompts.tolist()  # an array, or a column of a table
    if (
        not isinstance(prompts, Sequence)
        or isinstance(prompts, bytes | bytearray | memoryview)
        or not len(prompts)
    ):
        raise OptionError(f"prompts is {shown(prompts)}, expected {HOW}")
    return list(prompts)


def check_negative_prompt(prompt: object) -> None:
    """Raise an OptionError unless ``prompt`` is a text, which may be empty and is no name of a data
    file.
    """
    check_text("negative_prompt", prompt, empty=True)
    if ending(str(prompt).strip()) in ENDINGS:
        raise OptionError(
            f"negative_prompt is {shown(prompt)}, the name of a file, expected the text itself"
        )


def prompts_file(prompts: object) -> Path | None:
    """The absolute path of the file that ``prompts`` names.

    None where ``prompts`` is text, a list, a set of this package or a dataset. The file need not
    exist: a string that ends like a data file names one all the same.
    """
    place = _place(prompts)
    return None if place is None else Path(os.path.abspath(place.path))


def resolved(prompts: Any) -> Any:
    """The same argument with the path of its file or dataset made absolute; ``#COLUMN`` stays.

    So the argument means the same when it is read again from another folder. What is no file and no
    folder comes back as it is.
    """
    place = _place(prompts)
    if place is not None:
        column = "" if place.column is None else f"#{place.column}"
        return f"{os.path.abspath(place.path)}{column}"
    kind, name = _kind(prompts)
    folder, rest = _split(name)
    if kind == "dataset" and os.path.isdir(os.path.expanduser(folder)):
        return f"dataset:{os.path.abspath(os.path.expanduser(folder))}{rest}"
    return prompts


def _place(prompts: object) -> Place | None:
    if _kind(prompts)[0] or not isinstance(prompts, str | os.PathLike):
        return None
    return find(prompts)


def _kind(prompts: object) -> tuple[str, str]:
    """``"set"`` or ``"dataset"`` and what follows the colon; empty where ``prompts`` is something
    else.

    Capital letters and spaces do not make a prompt of it, unless several words follow: "Set: a
    garden with a gnome".
    """
    if isinstance(prompts, str):
        found = re.match(r"\s*(set|dataset)s?\s*:\s*(.*)", prompts, re.IGNORECASE | re.DOTALL)
        if found and (prompts.startswith(("set:", "dataset:")) or len(found[2].split()) < 2):
            return found[1].lower(), found[2].rstrip()
    return "", ""


def _split(place: str) -> tuple[str, str]:
    """The name of ``NAME[SPLIT]#COLUMN``, and what follows."""
    end = min((i for i in (place.find("["), place.find("#")) if i >= 0), default=len(place))
    return place[:end], place[end:]


def _read_set(name: str) -> list[str]:
    if name not in SETS:
        raise OptionError(
            f"prompts names the set {shown(name)}{did_you_mean(name, SETS)} (sets: "
            f"{', '.join(SETS)}); {insist(f'set:{name}')}"
        )
    return read(Place(FOLDER / f"{name}.txt"))


def _read_dataset(place: str) -> list[Any]:
    name, rest = _split(place)
    form = re.fullmatch(r"(?:\[(.*?)\])?#(.+)", rest, re.DOTALL)
    asked = shown(f"dataset:{place}")
    if not name or not form:
        raise OptionError(
            f"prompts is {asked}, expected 'dataset:NAME#COLUMN' or 'dataset:NAME[SPLIT]#COLUMN'"
        )
    split, column, folder = form[1] or "train", form[2], os.path.expanduser(name)
    if not os.path.isdir(folder) and (os.path.lexists(folder) or PATH.match(name)):
        there = "is a file" if os.path.lexists(folder) else "does not exist"
        raise OptionError(
            f"prompts is {asked}, but {shown(name)} {there}; expected a dataset's folder, or a Hub "
            "id"
        )
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError(
            f"prompts is {asked}, which needs the package 'datasets': pip install "
            "'flowgym_gym[datasets]'"
        ) from error
    try:
        data = (
            datasets.load_from_disk(folder)
            if os.path.isdir(folder)
            else datasets.load_dataset(name, split=split)
        )
        return list((data[split] if isinstance(data, datasets.DatasetDict) else data)[column])
    except Exception as error:
        raise OptionError(
            f"prompts is {asked}, which cannot be read: {type(error).__name__}: {reason(error)}"
        ) from error
