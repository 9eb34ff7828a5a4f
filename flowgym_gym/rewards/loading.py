"""Rewards by id, and where they find their weights: a local folder or file, or the Hub if it is
named.

No pickle runs code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgym_gym import sources
from flowgym_gym.errors import CheckpointError, OptionError, reason
from flowgym_gym.registry import reward_registry
from flowgym_gym.rewards.base import Reward
from flowgym_gym.weights import check_filled

PICKLED = (".pth", ".pt", ".bin")


def load_reward(id: str, **kwargs: Any) -> Reward[Any]:
    """The reward registered as ``id``, shared by all who ask for the same unless it is stateful.

    Raises:
        UnknownIdError: If the id is not registered.
        UnknownOptionError: If the reward has no such argument.
        OptionError: If an argument cannot be used, or what is registered is no reward.
    """
    with torch.inference_mode(False):  # Others who share it may want gradients.
        reward = reward_registry.get(id).shared(kwargs)
    if not isinstance(reward, Reward):
        raise OptionError(
            f"{id!r} is a {type(reward).__name__}, expected a subclass of flowgym_gym.Reward"
        )
    return reward


def find_folder(
    argument: str, value: object, reward: str, example: str, weights: bool = True
) -> tuple[str, bool]:
    """Where a model's folder is, and whether that is on this machine.

    Args:
        argument: Name of the reward's argument.
        value: What was given for it: a folder, or a Hub id ``"owner/name"``;
            :mod:`flowgym_gym.sources` says what is taken for which.
        reward: The reward's id, for the message.
        example: The Hub id that the reward was made for.
        weights: Whether the folder must hold a model; it need not for a tokenizer.

    Raises:
        CheckpointError: If nothing was named, or it is neither a folder nor a Hub id.
    """
    expected = f"a local folder in transformers' format, or the Hub id {example!r}"
    how = f"{expected}: reward_kwargs={{{argument!r}: ...}}"
    if value is None:
        raise CheckpointError(
            f"{reward} needs {'weights' if weights else argument} and never looks for them by "
            f"itself; name {how}"
        )
    source = sources.find_source(argument, value, how)
    if source.file:
        raise CheckpointError(f"{argument} {source.name!r} is a file; expected {how}")
    if source.local and weights:
        _check_folder(Path(source.name))
    return source.name, source.local


def find_file(argument: str, value: object, reward: str, example: str) -> Path:
    """A file of weights on this machine; a file on the Hub, ``"owner/name:file"``, is brought here.

    Raises:
        CheckpointError: If nothing was named, or it is not there.
    """
    how = (
        f"a local file, or one on the Hub such as {example!r}: reward_kwargs={{{argument!r}: ...}}"
    )
    if value is None:
        raise CheckpointError(
            f"{reward} needs weights and never looks for them by itself; name {how}"
        )
    return sources.find_file(argument, value, how)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else; or those under its
    ``state_dict``.

    Raises:
        CheckpointError: If the file is damaged, or a pickle would make anything but tensors.
    """
    from safetensors.torch import load_file

    try:
        tensors: Any = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix in PICKLED
            else load_file(path)
        )
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as weights: {type(error).__name__}: {reason(error)}"
        ) from error
    if isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(tensors).__name__}, expected tensors by name"
        )
    return {str(name): value.float() for name, value in tensors.items()}


def build(model: Any, config: Any, tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> Any:
    """A frozen model of transformers with given weights, in float32.

    Args:
        model: Its class.
        config: Its configuration.
        tensors: Its weights by transformers' names; those of other parts are left out.
        path: Where the weights were read, for the message.
        **kwargs: Further arguments of the class.

    Raises:
        CheckpointError: If a weight is missing, has another shape, or is of a larger model.
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
    check_filled(repr(str(path)), built, found)
    return built.eval().requires_grad_(False)


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads ``source`` into a CheckpointError, without its
    chatter.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source!r} could not be loaded: {type(error).__name__}: {reason(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"folder {str(folder)!r} has no config.json, so it is no model in transformers' format"
        )
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        raise CheckpointError(
            f"folder {str(folder)!r} has no safetensors "
            f"weights{f', only {pickles}' if pickles else ''}; pickled weights are not loaded, "
            "convert them with save_pretrained"
        )
