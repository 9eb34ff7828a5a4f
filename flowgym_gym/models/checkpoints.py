"""Checkpoints in diffusers' format: where they are, what they hold, and opening them.

A checkpoint is a folder (local, embedded in the package, or a Hub id) with a ``model_index.json`` that names the class
of its pipeline and the parts it consists of. Weights are read from safetensors only, and parts that bring code of their
own are refused.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flowgym_gym.errors import CheckpointError, OptionError, reason
from flowgym_gym.models.recognition import INDEX, MODULAR, find_variant, name_folder, name_weights, read_file
from flowgym_gym.sources import Source

EMBEDDED = Path(__file__).parent / "embedded"

# Parts of text-to-image pipelines that sampling does not use.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("diffusers", "transformers")
# What must be in a part's folder; transformers makes up an empty tokenizer where it finds no files.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)

# diffusers' own ways to save memory, by the names of the option `memory`.
MEMORY: dict[str, str] = {
    "attention_slicing": "enable_attention_slicing",
    "vae_slicing": "vae.enable_slicing",
    "vae_tiling": "vae.enable_tiling",
    "model_cpu_offload": "enable_model_cpu_offload",
    "sequential_cpu_offload": "enable_sequential_cpu_offload",
}


@dataclass(frozen=True)
class Changes:
    """What is changed about a checkpoint when it is opened; every value is plain.

    Attributes:
        denoiser: Folder or Hub id of a U-Net or transformer that takes the place of the checkpoint's own.
        vae: The same for the autoencoder.
        lora: Folder, ``.safetensors`` file or Hub id of LoRA weights, which are merged into the weights.
        lora_scale: Weight of the LoRA.
        memory: Names from ``MEMORY``.
        compile: Whether the network goes through ``torch.compile``.
    """

    denoiser: str | None = None
    vae: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    memory: tuple[str, ...] = ()
    compile: bool = False


def check_memory(memory: str | Sequence[str]) -> tuple[str, ...]:
    """Names of memory options as a tuple, or an OptionError if one does not exist."""
    names = (memory,) if isinstance(memory, str) else tuple(memory)
    for name in names:
        if name not in MEMORY:
            raise OptionError(f"memory names {name!r}, expected some of {tuple(MEMORY)}")
    return names


def find_checkpoint(checkpoint: object) -> Source:
    """Where a checkpoint is.

    Args:
        checkpoint: Name of an embedded checkpoint, a folder, or a Hub id ``"owner/name"``.

    Raises:
        CheckpointError: If it is none of these.
    """
    if not isinstance(checkpoint, str | os.PathLike) or not str(checkpoint):
        raise CheckpointError(f"checkpoint is {checkpoint!r}, expected a name, a folder or a Hub id")
    name = os.fspath(checkpoint)
    embedded = sorted(folder.name for folder in EMBEDDED.iterdir() if (folder / INDEX).is_file())
    folder = EMBEDDED / name if name in embedded else Path(name).expanduser()
    if folder.is_dir():
        return Source(str(folder.resolve()), local=True)
    if folder.is_file():
        return Source(str(folder.resolve()), local=True, file=True)
    if name.startswith((".", "~", os.sep)) or os.path.isabs(name) or name.count("/") != 1:
        raise CheckpointError(
            f"checkpoint {name!r} was not found; expected an embedded checkpoint ({', '.join(embedded)}), "
            "an existing folder in diffusers' format, or a Hub id such as 'sd-legacy/stable-diffusion-v1-5'"
        )
    return Source(name, local=False)


def read_index(source: Source) -> dict[str, Any]:
    """The checkpoint's ``model_index.json``; for a Hub id the file is downloaded, or taken from the local cache.

    Raises:
        CheckpointError: If there is none, or it does not name a pipeline.
    """
    path = Path(source.name) / INDEX
    if source.file:
        path = read_file(Path(source.name)) / INDEX
    elif not source.local:
        path = _download_index(source)
    elif not path.is_file():
        raise CheckpointError(f"checkpoint folder {source.name!r} {name_folder(path.parent)}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        kind = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as a pipeline's index: {error!r}") from error
    if not isinstance(kind, str):
        raise CheckpointError(f"{source} names the pipeline {kind!r}, which needs code of its own; that is never run")
    return dict(index)


def _download_index(source: Source) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source.name, INDEX))
    except Exception as error:
        if isinstance(error, EntryNotFoundError):
            try:
                folder = Path(hf_hub_download(source.name, MODULAR)).parent
            except Exception:  # it is none of these either: the first error says what is missing
                folder = None
            if folder is not None:
                raise CheckpointError(f"{source} {name_folder(folder)}") from error
        raise CheckpointError(
            f"Hub id {source.name!r} could not be loaded: {type(error).__name__}: {reason(error)}"
        ) from error


def tokenizer_files(kind: str) -> tuple[str, ...]:
    """Files of which a tokenizer of a class needs one; transformers makes up an empty one where it finds none.

    >>> tokenizer_files("BertTokenizer")
    ('tokenizer.json', 'vocab.txt')
    """
    import transformers

    names = getattr(getattr(transformers, kind, None), "vocab_files_names", None) or {}
    return tuple(dict.fromkeys(("tokenizer.json", names.get("vocab_file", "vocab.json"))))


def check_parts(source: Source, index: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless every part comes from diffusers or transformers and has the files it needs."""
    for part, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or part in UNUSED or entry[1] is None:
            continue
        if entry[0] not in LIBRARIES:
            raise CheckpointError(
                f"{source} has a {part!r} from {entry[0]!r}, which needs code of its own; that is never run"
            )
        if not source.local:
            continue
        # Checkpoints of one part, such as those of pixel-space models, may keep their files at the root.
        root = read_file(Path(source.name)) if source.file else Path(source.name)
        folder = root / part
        folder = folder if folder.is_dir() else folder.parent
        needed: tuple[str, ...] = ("scheduler_config.json",) if part == "scheduler" else ()
        if part.startswith("tokenizer"):
            folder, needed = root / part, tokenizer_files(entry[1])
        if needed and not any((folder / name).is_file() for name in needed):
            raise CheckpointError(f"{source} has no {' or '.join(needed)} in {part!r}")
        # A single file has the weights; for parts that it lacks diffusers would take any that the folder has.
        found = any(folder.glob("*.safetensors")) or (source.file and not any(folder.glob("*.bin")))
        if not needed and not found:
            raise CheckpointError(
                f"{source} has no safetensors weights in {part!r}, and {name_weights(folder)}; convert them with "
                "save_pretrained(..., safe_serialization=True)"
            )


@cache
def load_pipeline(source: Source, device: str, dtype: torch.dtype, changes: Changes, denoiser: str) -> Any:
    """The pipeline, frozen and in evaluation mode; loaded once per process for each set of arguments.

    Args:
        source: Where it is.
        device: Where it runs.
        dtype: Number format of its weights.
        changes: What is changed about it.
        denoiser: Name of the part that predicts, ``"unet"`` or ``"transformer"``.

    Raises:
        CheckpointError: If it cannot be loaded.
        OptionError: If the pipeline has no such memory option.
    """
    for name in changes.memory:
        check_offloading(name, device)
    index = read_index(source)
    check_parts(source, index)
    options = {part: None for part in UNUSED if part in index}
    if "safety_checker" in index:
        options["requires_safety_checker"] = False  # type: ignore[assignment]
    with _quiet(bars=source.local), _loading(source):
        pipe = _open(source, index, dtype, options)
    for part, replacement in ((denoiser, changes.denoiser), ("vae", changes.vae)):
        if replacement is not None:
            setattr(pipe, part, _load_part(pipe, part, replacement, dtype))
    if changes.lora is not None:
        _merge_lora(pipe, changes.lora, changes.lora_scale)
    prepare(pipe, changes.memory, device)
    if changes.compile:
        getattr(pipe, denoiser).compile()
    return pipe


def _open(source: Source, index: Mapping[str, Any], dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The pipeline as diffusers opens it: a folder, a single file, or a Hub id; in the variant that there is."""
    import diffusers
    from diffusers.utils.import_utils import is_accelerate_available

    kind = getattr(diffusers, index["_class_name"])
    if source.file:
        return _open_file(source, kind, dtype, options)
    # Without accelerate diffusers would do the same, after many lines of advice.
    options = {**options, "low_cpu_mem_usage": is_accelerate_available()}
    options |= {"dtype": dtype, "use_safetensors": True, "local_files_only": source.local}
    if source.local:
        return kind.from_pretrained(source.name, **options, **_load_variants(Path(source.name), index, dtype))
    try:
        return kind.from_pretrained(source.name, **options)
    except (OSError, ValueError) as error:
        # Which files the repository has is seen only by asking for them.
        try:
            return kind.from_pretrained(source.name, variant="fp16", **options)
        except (OSError, ValueError):
            raise error from None


def _open_file(source: Source, kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    from diffusers.utils import logging

    folder, verbosity = str(read_file(Path(source.name))), logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return kind.from_single_file(source.name, config=folder, dtype=dtype, local_files_only=True, **options)
    except NotImplementedError as error:  # torch cannot cast weights that are missing
        raise CheckpointError(
            f"{source} lacks weights that its configuration in {folder!r} has a place for; "
            "put the configuration of a checkpoint of the same kind there"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _load_variants(root: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The parts of a checkpoint folder whose weights are there in a variant only, such as ``"fp16"``, by name."""
    parts = {}
    for part, entry in index.items():
        folder = root / part if (root / part).is_dir() else root
        if not isinstance(entry, list) or part in UNUSED or entry[0] not in LIBRARIES or not find_variant(folder):
            continue
        kind = getattr(importlib.import_module(entry[0]), entry[1])
        if hasattr(kind, "save_pretrained") and issubclass(kind, torch.nn.Module):
            parts[part] = kind.from_pretrained(
                folder, variant=find_variant(folder), dtype=dtype, use_safetensors=True, local_files_only=True
            )
    return parts


def check_offloading(name: str, device: str | None) -> None:
    """Raise an OptionError where a memory option offloads weights from an accelerator, and there is none.

    Args:
        name: Of the option.
        device: Where the model runs; None for wherever diffusers finds.
    """
    from diffusers.utils.torch_utils import get_device

    device = get_device() if device is None else device
    if "offload" in name and torch.device(device).type == "cpu":
        raise OptionError(
            f"memory names {name!r}, which keeps weights in the CPU's memory until an accelerator needs them, but the "
            "device is 'cpu'; leave it out, or give device= an accelerator such as 'cuda'"
        )


def prepare(pipe: Any, memory: Sequence[str] = (), device: str | None = None) -> Any:
    """Freeze a pipeline, put its parts into evaluation mode, switch memory options on, and move it.

    Args:
        pipe: The pipeline; it is changed in place.
        memory: Names from ``MEMORY``.
        device: Where it goes; None leaves it where it is.

    Raises:
        OptionError: If it has no such memory option, or the option cannot be used here.
    """
    switches = []
    for name in memory:
        owner, _, method = MEMORY[name].rpartition(".")
        target = getattr(pipe, owner, None) if owner else pipe
        if not hasattr(target, method):
            raise OptionError(f"memory names {name!r}, but a {type(pipe).__name__} has no {MEMORY[name]}")
        check_offloading(name, device)
        switches.append(getattr(target, method))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    if device is not None and not any("offload" in name for name in memory):
        pipe.to(device)
    for name, switch in zip(memory, switches, strict=True):
        try:
            switch(**({"device": device} if "offload" in name and device is not None else {}))
        except (ImportError, RuntimeError, ValueError) as error:
            raise OptionError(f"memory option {name!r} cannot be used here: {reason(error)}") from error
    return pipe


def _load_part(pipe: Any, part: str, checkpoint: str, dtype: torch.dtype) -> Any:
    """Another U-Net, transformer or autoencoder of the same class, from a folder or Hub id."""
    source = find_checkpoint(checkpoint)
    # A whole checkpoint is as good as the folder of its part.
    inside = source.local and (Path(source.name) / part).is_dir()
    with _quiet(bars=source.local), _loading(source):
        return type(getattr(pipe, part)).from_pretrained(
            source.name,
            subfolder=part if inside else None,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=source.local,
        )


def _merge_lora(pipe: Any, lora: str, scale: float) -> None:
    """Merge LoRA weights into the pipeline's own, so that they cost nothing per step."""
    if not hasattr(pipe, "load_lora_weights"):
        raise OptionError(f"lora is {lora!r}, but a {type(pipe).__name__} takes no LoRA weights")
    path = Path(lora).expanduser()
    source = Source(str(path.resolve()), local=True) if path.is_file() else find_checkpoint(lora)
    folder, name = (Path(source.name).parent, path.name) if path.is_file() else (source.name, None)
    if path.is_file() and path.suffix != ".safetensors":
        raise CheckpointError(f"lora is {lora!r}; pickled weights are not loaded, expected a .safetensors file")
    with _quiet(bars=source.local), _loading(source):
        try:
            pipe.load_lora_weights(str(folder), weight_name=name, use_safetensors=True, local_files_only=source.local)
        except ValueError as error:
            if "PEFT" in str(error):
                raise OptionError("LoRA weights need the package peft: pip install 'flowgym_gym[models]'") from error
            raise
        pipe.fuse_lora(lora_scale=scale, safe_fusing=True)
        pipe.unload_lora_weights()


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turn whatever goes wrong inside into a CheckpointError that names the source."""
    try:
        yield
    except (CheckpointError, OptionError):
        raise
    except Exception as error:
        where = "folder" if source.local else "Hub id"
        raise CheckpointError(
            f"{where} {source.name!r} could not be loaded: {type(error).__name__}: {reason(error)}"
        ) from error


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silence what loading says of image processors that are not used; with ``bars`` its progress bars, too."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            diffusers_logging.enable_progress_bar()
            if had_bars:
                transformers_logging.enable_progress_bar()
