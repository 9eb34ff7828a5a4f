"""Where rewards find their weights: a local folder or file, or the Hub if it is named. No pickle runs code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.errors import CheckpointError, reason

PICKLED = (".pth", ".pt", ".bin")


def find_folder(argument: str, value: object, reward: str, example: str, weights: bool = True) -> tuple[str, bool]:
    """Where a model's folder is, and whether that is on this machine.

    Args:
        argument: Name of the reward's argument.
        value: What was given for it: a folder, or a Hub id ``"owner/name"``.
        reward: The reward's id, for the message.
        example: The Hub id that the reward was made for.
        weights: Whether the folder must hold a model; it need not for a tokenizer.

    Raises:
        CheckpointError: If nothing was named, or it is neither a folder nor a Hub id.
    """
    how = f"name a local folder in transformers' format, or the Hub id {example!r}: reward_kwargs={{{argument!r}: ...}}"
    if value is None:
        raise CheckpointError(
            f"{reward} needs {'weights' if weights else argument} and never looks for them by itself; {how}"
        )
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise CheckpointError(f"{argument} is {value!r}; {how}")
    folder = Path(value).expanduser()
    if folder.is_dir():
        if weights:
            _check_folder(folder)
        return str(folder.resolve()), True
    name = os.fspath(value)
    if name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        raise CheckpointError(f"{argument} is {name!r}, looked for in {folder.absolute()}, where no folder is; {how}")
    return name, False


def find_file(argument: str, value: object, reward: str, example: str) -> Path:
    """A file of weights on this machine; a file on the Hub, ``"owner/name:file"``, is brought here.

    Raises:
        CheckpointError: If nothing was named, or it is not there.
    """
    how = f"name a local file, or one on the Hub such as {example!r}: reward_kwargs={{{argument!r}: ...}}"
    if value is None:
        raise CheckpointError(f"{reward} needs weights and never looks for them by itself; {how}")
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise CheckpointError(f"{argument} is {value!r}; {how}")
    path = Path(value).expanduser()
    if path.is_file():
        return path
    repository, colon, file = os.fspath(value).partition(":")
    if not colon or repository.count("/") != 1 or repository.startswith((".", "~", os.sep)):
        raise CheckpointError(f"{argument} is {str(value)!r}, looked for at {path.absolute()}, where no file is; {how}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:
        raise CheckpointError(
            f"{file!r} of {repository!r} on the Hub could not be had: {type(error).__name__}: {reason(error)}; {how}"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else; or those under its ``state_dict``.

    Raises:
        CheckpointError: If the file is damaged, or a pickle would make anything but tensors.
    """
    from safetensors.torch import load_file

    try:
        tensors: Any = (
            torch.load(path, map_location="cpu", weights_only=True) if path.suffix in PICKLED else load_file(path)
        )
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as weights: {type(error).__name__}: {reason(error)}"
        ) from error
    if isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{str(path)!r} holds a {type(tensors).__name__}, expected tensors by name")
    return {str(name): value.float() for name, value in tensors.items()}


def build(model: Any, config: Any, tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> Any:
    """A frozen model of transformers with given weights, in float32.

    Args:
        model: Its class.
        config: Its configuration.
        tensors: Its weights by transformers' names; those that it does not have are left out.
        path: Where the weights were read, for the message.
        **kwargs: Further arguments of the class.

    Raises:
        CheckpointError: If a weight is missing or has another shape.
    """
    with loading(str(path)):
        built, found = model.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **kwargs,
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{str(path)!r} does not fill a {model.__name__}: {len(missing)} weights are missing, such as {missing[0]}"
        )
    if mismatched := sorted(found["mismatched_keys"]):
        name, got, expected = mismatched[0]
        raise CheckpointError(f"{str(path)!r} does not fit: {name} has shape {tuple(got)}, expected {tuple(expected)}")
    return built.eval().requires_grad_(False)


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads ``source`` into a CheckpointError, without its chatter."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source!r} could not be loaded: {type(error).__name__}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"folder {str(folder)!r} has no config.json, so it is no model in transformers' format")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        raise CheckpointError(
            f"folder {str(folder)!r} has no safetensors weights{f', only {pickles}' if pickles else ''}; pickled "
            "weights are not loaded, convert them with save_pretrained"
        )
