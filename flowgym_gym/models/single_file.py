"""Whole checkpoints in one file, in the format of a model's authors: opened by diffusers, and
whether that took all.

diffusers converts the names of such a file, but says of no part whether the file had all of its
weights, and only of some what is left over. Here a part that was not filled is found by the weights
that have no values, and one that took only some by how many numbers there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models.parts import load_own, network
from flowgym_gym.sources import Source
from flowgym_gym.weights import some

NETWORK = ("model.diffusion_model.",)
AUTOENCODER = tuple(
    f"{start}.{layer}."
    for start in ("first_stage_model", "vae")
    for layer in ("encoder", "decoder", "quant_conv", "post_quant_conv")
)
# How the names of a part's weights begin. The other text encoders have more in a file than is used.
BEGINNINGS = {
    "unet": NETWORK,
    "transformer": NETWORK,
    "vae": AUTOENCODER,
    "text_encoder": (
        "cond_stage_model.transformer.text_model.",
        "conditioner.embedders.0.transformer.text_model.",
    ),
}
# Not a weight, but the numbers 0, 1, 2, ...
POSITIONS = "position_ids"


def open_file(
    source: Source,
    folder: Path,
    index: Mapping[str, Any],
    kind: Any,
    dtype: torch.dtype,
    parts: dict[str, Any],
) -> Any:
    """The pipeline in a single file.

    Args:
        source: The file.
        folder: Its configuration, which also has the text encoders that the file lacks.
        index: What of the folder's ``model_index.json`` is to be loaded.
        kind: The class of the pipeline.
        dtype: Number format of the weights.
        parts: Parts that are loaded already, and None for those that are left out.

    Raises:
        CheckpointError: If the file lacks weights that its configuration has a place for, or has
            more.
        OptionError: If the package accelerate is missing, without which no lack would be noticed.
    """
    from diffusers.utils import logging
    from diffusers.utils.import_utils import is_accelerate_available

    if not is_accelerate_available():
        raise OptionError(
            f"{source} needs the package accelerate: pip install 'flowgym_gym[models]'"
        )
    sizes = _read_sizes(Path(source.name))
    absent = {
        name: entry
        for name, entry in index.items()
        if name not in parts and _is_absent(entry, sizes)
    }
    parts = parts | load_own(source, folder, absent, dtype)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        pipe = kind.from_single_file(
            source.name, config=str(folder), dtype=dtype, local_files_only=True, **parts
        )
    except NotImplementedError as error:  # torch cannot move weights that have no values
        raise _unfit(source, folder, "weights of a network are missing") from error
    finally:
        logging.set_verbosity(verbosity)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in parts:
            _check_filled(source, folder, name, part, sizes)
    return pipe


def _read_sizes(file: Path) -> dict[str, int]:
    """How many numbers each weight of a file has; only the header is read."""
    with safe_open(file, framework="pt") as weights:
        return {name: math.prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _is_absent(entry: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a part is a text encoder of which the file has nothing; diffusers then takes the
    folder's.
    """
    from diffusers.loaders.single_file_utils import (
        is_clip_model_in_single_file,
        is_t5_in_single_file,
    )
    from transformers import PreTrainedModel

    kind = network(entry)
    if kind is None or not issubclass(kind, PreTrainedModel):
        return False
    return not (is_clip_model_in_single_file(kind, sizes) or is_t5_in_single_file(sizes))


def _check_filled(
    source: Source, folder: Path, name: str, part: torch.nn.Module, sizes: Mapping[str, int]
) -> None:
    weights = part.state_dict()
    empty = [key for key, value in weights.items() if value.is_meta]
    if empty:
        raise _unfit(source, folder, f"{name!r} lacks {some(empty)}")
    there = [
        key for key in sizes if key.startswith(BEGINNINGS.get(name, ())) and POSITIONS not in key
    ]
    given = sum(sizes[key] for key in there)
    taken = sum(value.numel() for key, value in weights.items() if POSITIONS not in key)
    if there and given != taken:
        raise _unfit(
            source, folder, f"it has {given} numbers for {name!r}, of which {taken} would be used"
        )


def _unfit(source: Source, folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source} does not fit its configuration in {str(folder)!r}: {what}; put the "
        "configuration of a checkpoint of the same kind there"
    )
