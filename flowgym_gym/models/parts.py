"""Loading the networks of a pipeline, the checkpoint's own or others in their place, and whether
they were filled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowgym_gym.errors import CheckpointError, reason
from flowgym_gym.models.recognition import find_variant
from flowgym_gym.sources import Source
from flowgym_gym.weights import check_filled

CONFIG = "config.json"
# Autoencoders that decode a latent, and nothing else, to an image.
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
# What older checkpoints call transformers that have classes of their own by now; diffusers finds
# those.
LEGACY = "Transformer2DModel"


def load_own(
    source: Source, folder: Path, index: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The networks that a pipeline's index names, by name.

    Args:
        source: Where the checkpoint is, for messages.
        folder: The folder that holds it.
        index: What of its ``model_index.json`` is to be loaded.
        dtype: Number format of the weights.

    Raises:
        CheckpointError: If weights are missing, or others than those of the network.
    """
    parts = {}
    for name, entry in index.items():
        kind = network(entry)
        if kind is None:
            continue
        # Checkpoints of one part, such as those of pixel-space models, may keep their files at the
        # root.
        place = folder / name if (folder / name).is_dir() else folder
        parts[name] = _load(kind, str(place), dtype, f"{name!r} of {source}", local_files_only=True)
    return parts


def load_other(name: str, source: Source, own: Any, dtype: torch.dtype) -> Any:
    """A network that takes the place of a checkpoint's own.

    Args:
        name: Which part of the pipeline it is.
        source: Where it is: its own folder, or that of a whole checkpoint with such a part.
        own: What the pipeline's index says of the checkpoint's own.
        dtype: Number format of the weights.

    Raises:
        CheckpointError: If it is of a class that the pipeline cannot use, or its weights are not
            all there.
    """
    if source.file:
        raise CheckpointError(
            f"{source} is a single file; expected a folder in diffusers' format, with its {CONFIG}"
        )
    subfolder, config = _read_config(name, source)
    wanted = own[1] if isinstance(own, list) and len(own) == 2 else None
    allowed = AUTOENCODERS if name == "vae" and wanted in AUTOENCODERS else (wanted,)
    kind = config.get("_class_name")
    if kind not in allowed and not (kind == LEGACY and name == "transformer"):
        described = (
            f"a {kind}"
            if isinstance(kind, str)
            else f"no model of diffusers ({CONFIG} has no _class_name)"
        )
        raise CheckpointError(
            f"{source} holds {described}, which cannot be the {name!r} of this pipeline; expected "
            f"{' or '.join(map(str, allowed))}"
        )
    import diffusers

    loaded = _load(
        getattr(diffusers, str(wanted if kind == LEGACY else kind)),
        source.name,
        dtype,
        f"{name!r} of {source}",
        local_files_only=source.local,
        subfolder=subfolder,
    )
    if kind == LEGACY and type(loaded).__name__ not in (wanted, LEGACY):
        raise CheckpointError(
            f"{source} holds a {type(loaded).__name__}, which cannot be the {name!r} of this "
            f"pipeline; expected {wanted}"
        )
    return loaded


def check_autoencoder(vae: Any) -> None:
    """Raise a CheckpointError if a pipeline's autoencoder is one of diffusers' that decodes in
    another way.
    """
    kind = type(vae)
    if kind.__module__.startswith("diffusers.") and kind.__name__ not in AUTOENCODERS:
        raise CheckpointError(
            f"the checkpoint's autoencoder is a {kind.__name__}, expected "
            f"{' or '.join(AUTOENCODERS)}, which decode a latent by itself; give another one as "
            "vae="
        )


def network(entry: Any) -> Any:
    """The class of a part of an index if it is a network, and None for tokenizers and the like."""
    if not (
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)
    ):
        return None
    kind = getattr(importlib.import_module(entry[0]), entry[1], None)
    return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None


def _load(kind: Any, place: str, dtype: torch.dtype, where: str, **options: Any) -> Any:
    """A network from a folder or Hub id, all of whose weights were found there."""
    from diffusers import ModelMixin
    from diffusers.utils.import_utils import is_accelerate_available

    if issubclass(kind, ModelMixin):
        # Without accelerate diffusers would do the same, after many lines of advice.
        options["low_cpu_mem_usage"] = is_accelerate_available()
    else:
        options["ignore_mismatched_sizes"] = True  # They are in the report, with their names.
    if options["local_files_only"]:
        options["variant"] = find_variant(Path(place) / (options.get("subfolder") or ""))
    try:
        model, report = kind.from_pretrained(
            place, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:
        raise CheckpointError(
            f"{where} could not be loaded: {type(error).__name__}: {reason(error)}"
        ) from error
    check_filled(where, model, report)
    return model


def _read_config(name: str, source: Source) -> tuple[str, dict[str, Any]]:
    """Which folder of a source holds a part, and the configuration there."""
    if source.local:
        inside = name if (Path(source.name) / name).is_dir() else ""
        path = Path(source.name) / inside / CONFIG
        if not path.is_file():
            raise CheckpointError(
                f"{source} has no {CONFIG}, so it is no {name} in diffusers' format"
            )
    else:
        inside, path = _download_config(name, source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {reason(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(config).__name__}, expected a configuration"
        )
    return inside, config


def _download_config(name: str, source: Source) -> tuple[str, Path]:
    """The same of a Hub id, where the configuration at the root comes first."""
    from huggingface_hub import hf_hub_download

    failed: Exception | None = None
    for inside in ("", name):
        try:
            return inside, Path(hf_hub_download(source.name, CONFIG, subfolder=inside or None))
        except Exception as error:
            failed = failed or error
    assert failed is not None
    raise CheckpointError(
        f"{source} could not be loaded: {type(failed).__name__}: {reason(failed)}"
    ) from failed
