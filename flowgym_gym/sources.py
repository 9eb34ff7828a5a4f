"""Where checkpoints and weights are: a folder or file on this machine, or a repository of the Hub.

One rule holds for every name of weights, such as ``checkpoint``, ``lora`` and the arguments of
rewards:

1. What exists on this machine is that, always.
2. ``"hub:owner/name"`` is the Hub's ``owner/name``.
3. A name that looks like a path is one: it is an error that it is missing, and nobody is asked.
4. Any other ``"owner/name"`` is a Hub id.

A name looks like a path if no Hub id can be spelled like it, if it ends like a file of weights or
data, if its first part is in the working directory or one of the names that people give to folders
of weights, or if its second part is the name of a pipeline's part or of a trainer's checkpoint.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowgym_gym.errors import CheckpointError, reason, shown

HUB = "hub:"
# How the names of files of weights and data end, in lower case.
SUFFIXES = re.compile(
    r".*\.(safetensors|ckpt|bin|pt|pth|pkl|pickle|gguf|onnx|h5|msgpack|npy|npz|json|jsonl|yaml|yml"
    r"|txt|csv|tsv|zip|tar|gz)"
)
# What people call folders of weights, in lower case.
FOLDERS = re.compile(
    r"artifacts|cache|content|data|downloads|dreambooth|home|lightning_logs|local|logs?|mlruns|mnt|opt"
    r"|exp|exps|experiments?|exports?|finetuned?|finetunes|outputs?|out|pretrained(_models)?|results?"
    r"|(my_|saved_)?models?|(my_)?checkpoints?|ckpts?|loras?|vaes?|unets?|weights|root|runs?|saved?|saves"
    r"|scratch|snapshots|src|temp|tests?|tmp|train|trained|training|users|wandb|work|workspace"
)
# What trainers and diffusers call the folders inside those, in lower case.
INSIDE = re.compile(
    r"(checkpoint|checkpoints|ckpt|epoch|step|iter)([-_]?\d+)?|best|final|last|latest|unet|transformer|vae|"
    r"text_encoder(_\d)?|tokenizer(_\d)?|scheduler|snapshots"
)


@dataclass(frozen=True)
class Source:
    """Weights that were found.

    Attributes:
        name: Absolute path, or Hub id.
        local: Whether it is on this machine; then the network is never touched.
        file: Whether it is a single file, which is always local.
    """

    name: str
    local: bool
    file: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"

    @property
    def kind(self) -> str:
        """What it is, in words."""
        if self.file:
            return "checkpoint file"
        return "checkpoint folder" if self.local else "Hub id"


def find_source(argument: str, value: object, expected: str) -> Source:
    """Where weights are, by the rule of this module.

    Args:
        argument: Name of the argument, for messages.
        value: What was given for it, a string or a path.
        expected: What may be given, for messages.

    Raises:
        CheckpointError: If it is no name, or the path is missing or cannot be looked at.
    """
    name = _spelled(argument, value, expected)
    path = _look(argument, name, expected)
    if path.is_dir():
        return Source(str(path.resolve()), local=True)
    if path.is_file():
        # Caches of the Hub are links to files without an ending, which are not followed.
        return Source(os.path.abspath(path), local=True, file=True)
    if path.exists():
        raise CheckpointError(
            f"{argument} {shown(name)} is neither a folder nor a file; expected {expected}"
        )
    id = name.removeprefix(HUB)
    if isinstance(value, str) and is_hub_id(id) and (id != name or not looks_local(id)):
        return Source(id, local=False)
    raise _missing(argument, name, path, expected, id)


def find_file(argument: str, value: object, expected: str) -> Path:
    """A file on this machine, by the same rule; one on the Hub, ``"owner/name:file"``, is brought
    here.

    Raises:
        CheckpointError: If it is no name, or the file is missing or cannot be had.
    """
    name = _spelled(argument, value, expected)
    path = _look(argument, name, expected)
    if path.is_file():
        return Path(os.path.abspath(path))
    if path.exists():
        raise CheckpointError(
            f"{argument} {shown(name)} is a folder or no file; expected {expected}"
        )
    id, colon, file = name.removeprefix(HUB).partition(":")
    inside = colon and file and ".." not in file.split("/") and not file.startswith("/")
    known = name.startswith(HUB) or not looks_local(id)
    if not (isinstance(value, str) and inside and is_hub_id(id) and known):
        raise _missing(argument, name, path, expected, id if inside else "", f":{file}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(id, file))
    except Exception as error:
        raise CheckpointError(
            f"{file!r} of {id!r} on the Hub could not be had: {type(error).__name__}: "
            f"{reason(error)}; expected {expected}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether the Hub could have a repository ``owner/name`` of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def looks_local(name: str) -> bool:
    """Whether a name that a Hub id could have is more likely a path, by the rule of this module."""
    first, _, second = name.lower().partition("/")
    return (
        SUFFIXES.fullmatch(name.lower()) is not None
        or FOLDERS.fullmatch(first) is not None
        or INSIDE.fullmatch(second) is not None
        or Path(name.partition("/")[0]).exists()
        or os.path.lexists(name)  # a link to nothing
    )


def exists(name: object) -> bool:
    """Whether a name is that of something on this machine."""
    try:
        return isinstance(name, str | os.PathLike) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _missing(
    argument: str, name: str, path: Path, expected: str, id: str, file: str = ""
) -> CheckpointError:
    where = f"{argument} {shown(name)} was not found, looked for in {shown(os.path.abspath(path))}"
    insist = f"; if the Hub's {id!r} is meant, write {HUB + id + file!r}" if is_hub_id(id) else ""
    return CheckpointError(f"{where}; expected {expected}{insist}")


def _spelled(argument: str, value: object, expected: str) -> str:
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise CheckpointError(f"{argument} is {shown(value)}, expected {expected}")
    return name


def _look(argument: str, name: str, expected: str) -> Path:
    """The path of a name, which need not exist but can be looked for."""
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{argument} {shown(name)} cannot be looked for: {reason(error)}; expected {expected}"
        ) from error
    return path
