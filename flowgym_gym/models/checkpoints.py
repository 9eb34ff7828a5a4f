"""Checkpoints in diffusers' format: where they are, what they hold, and opening them.

A checkpoint is a folder (local, embedded in the package, or a Hub id) with a ``model_index.json``
that names the class of its pipeline and the parts it consists of. Weights are read from safetensors
only, and parts that bring code of their own are refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowgym_gym.errors import CheckpointError, OptionError, did_you_mean, reason, shown
from flowgym_gym.models.lora import merge_lora
from flowgym_gym.models.parts import load_other, load_own
from flowgym_gym.models.recognition import INDEX, MODULAR, name_folder, name_weights, read_file
from flowgym_gym.models.single_file import open_file
from flowgym_gym.sharing import Shared
from flowgym_gym.sources import Source, find_source

EMBEDDED = Path(__file__).parent / "embedded"

# Parts of text-to-image pipelines that sampling does not use.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = ("diffusers", "transformers")
LORA_EXAMPLE = "a .safetensors file, a folder that holds one, or a Hub id 'owner/name'"

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
        denoiser: Where a U-Net or transformer is that takes the place of the checkpoint's own.
        vae: The same for the autoencoder.
        lora: Where LoRA weights are, which are merged into the weights.
        lora_scale: Weight of the LoRA.
        memory: Names from ``MEMORY``.
        compile: Whether the network goes through ``torch.compile``.
    """

    denoiser: Source | None = None
    vae: Source | None = None
    lora: Source | None = None
    lora_scale: float = 1.0
    memory: tuple[str, ...] = ()
    compile: bool = False


def as_memory(memory: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of memory options as a tuple, none for None.

    Raises:
        OptionError: If one does not exist.
    """
    if memory is not None and not isinstance(memory, str | list | tuple):
        raise OptionError(f"memory is {shown(memory)}, expected some of {tuple(MEMORY)}")
    names = (memory,) if isinstance(memory, str) else tuple(memory or ())
    for name in names:
        if not isinstance(name, str) or name not in MEMORY:
            raise OptionError(
                f"memory names {shown(name)}, expected some of "
                f"{tuple(MEMORY)}{did_you_mean(name, MEMORY)}"
            )
    return names


def find_checkpoint(checkpoint: object, argument: str = "checkpoint") -> Source:
    """Where a checkpoint, or a part of one, is.

    Args:
        checkpoint: Name of an embedded checkpoint, a folder or file, or a Hub id;
            :mod:`flowgym_gym.sources` says what is taken for which.
        argument: Name of the argument, for messages.

    Raises:
        CheckpointError: If it is none of these.
    """
    embedded = sorted(folder.name for folder in EMBEDDED.iterdir() if (folder / INDEX).is_file())
    if isinstance(checkpoint, str) and checkpoint in embedded:
        return Source(str((EMBEDDED / checkpoint).resolve()), local=True)
    return find_source(
        argument,
        checkpoint,
        f"an embedded checkpoint ({', '.join(embedded)}), a folder in diffusers' format, or a Hub "
        "id such as 'sd-legacy/stable-diffusion-v1-5'",
    )


def find_changes(
    denoiser: object = None, vae: object = None, lora: object = None, **others: Any
) -> Changes:
    """Changes whose weights are found, and which are errors here if they are not; see
    :class:`Changes`.
    """
    return Changes(
        None if denoiser is None else find_checkpoint(denoiser, "denoiser"),
        None if vae is None else find_checkpoint(vae, "vae"),
        None if lora is None else find_source("lora", lora, LORA_EXAMPLE),
        **others,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, and whose index was read.

    Attributes:
        source: Where it is.
        index: Its ``model_index.json``.
    """

    source: Source
    index: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """The class of its pipeline, which says of which family it is."""
        return str(self.index["_class_name"])


def resolve(checkpoint: object) -> Checkpoint:
    """Find a checkpoint and read its index, once: whoever opens it is handed the result.

    Args:
        checkpoint: As :func:`find_checkpoint` takes it, or what was resolved already. Of a Hub id
            the index is downloaded, or taken from the local cache.

    Raises:
        CheckpointError: If there is none, or it does not name a pipeline.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    source = find_checkpoint(checkpoint)
    return Checkpoint(source, _read_index(source))


def _read_index(source: Source) -> dict[str, Any]:
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
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a pipeline's index: {error!r}"
        ) from error
    if not isinstance(kind, str):
        raise CheckpointError(
            f"{source} names the pipeline {kind!r}, which needs code of its own; that is never run"
        )
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
    """Files of which a tokenizer of a class needs one; transformers makes up an empty one where it
    finds none.

    >>> tokenizer_files("BertTokenizer")
    ('tokenizer.json', 'vocab.txt')
    """
    import transformers

    names = getattr(getattr(transformers, kind, None), "vocab_files_names", None) or {}
    return tuple(dict.fromkeys(("tokenizer.json", names.get("vocab_file", "vocab.json"))))


def check_libraries(source: Source, index: Mapping[str, Any]) -> None:
    """Raise a CheckpointError unless every part comes from diffusers or transformers."""
    for part, (library, _) in _parts(index).items():
        if library not in LIBRARIES:
            raise CheckpointError(
                f"{source} has a {part!r} from {library!r}, which needs code of its own; that is "
                "never run"
            )


def check_files(source: Source, index: Mapping[str, Any], root: Path) -> None:
    """Raise a CheckpointError unless every part has the files that it needs.

    Args:
        source: Where the checkpoint is, for messages.
        index: What of its ``model_index.json`` is to be loaded.
        root: The folder that holds it; for a single file, its configuration.
    """
    for part, (_, kind) in _parts(index).items():
        # Checkpoints of one part, such as those of pixel-space models, may keep their files at the
        # root.
        folder = root / part if (root / part).is_dir() else root
        needed: tuple[str, ...] = ("scheduler_config.json",) if part == "scheduler" else ()
        if part.startswith("tokenizer"):
            folder, needed = root / part, tokenizer_files(kind)
        if needed and not any((folder / name).is_file() for name in needed):
            raise CheckpointError(f"{source} has no {' or '.join(needed)} in {part!r}")
        # A single file has the weights; for parts that it lacks diffusers would take any that the
        # folder has.
        found = any(folder.glob("*.safetensors")) or (source.file and not any(folder.glob("*.bin")))
        if not needed and not found:
            raise CheckpointError(
                f"{source} has no safetensors weights in {part!r}, and {name_weights(folder)}; "
                "convert them with save_pretrained(..., safe_serialization=True)"
            )


_pipelines = Shared()


def forget_pipelines() -> None:
    """Forget every shared pipeline."""
    _pipelines.clear()


def _parts(index: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Library and class of each part that sampling uses, by name."""
    pairs = {
        part: entry for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2
    }
    return {
        part: (pair[0], pair[1])
        for part, pair in pairs.items()
        if part not in UNUSED and pair[1] is not None
    }


def load_pipeline(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, changes: Changes, denoiser: str
) -> Any:
    """The pipeline, frozen and in evaluation mode; loaded once per process, unless its files
    change.

    Args:
        checkpoint: Where it is, and what it holds.
        device: Where it runs.
        dtype: Number format of its weights.
        changes: What is changed about it.
        denoiser: Name of the part that predicts, ``"unet"`` or ``"transformer"``.

    Raises:
        CheckpointError: If it cannot be loaded.
        OptionError: If the pipeline has no such memory option.
    """
    sources = (checkpoint.source, changes.denoiser, changes.vae, changes.lora)
    return _pipelines.get(
        (checkpoint.source, device, dtype, changes, denoiser),
        [one.name for one in sources if one is not None and one.local],
        make=lambda: _load_pipeline(checkpoint, device, dtype, changes, denoiser),
        good=lambda _: True,
    )


def _load_pipeline(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, changes: Changes, denoiser: str
) -> Any:
    for name in changes.memory:
        check_offloading(name, device)
    source, index = checkpoint.source, checkpoint.index
    check_libraries(source, index)
    replaced = {denoiser: changes.denoiser, "vae": changes.vae}
    others = {part: other for part, other in replaced.items() if other is not None}
    options: dict[str, Any] = {part: None for part in UNUSED if part in index}
    if "safety_checker" in index:
        options["requires_safety_checker"] = False
    with _quiet(bars=source.local), _loading(source):
        pipe = _open(source, index, dtype, options, others)
    if changes.lora is not None:
        with _quiet(bars=changes.lora.local), _loading(changes.lora):
            merge_lora(pipe, changes.lora, changes.lora_scale)
    prepare(pipe, changes.memory, device)
    if changes.compile:
        getattr(pipe, denoiser).compile()
    return pipe


def _open(
    source: Source,
    index: Mapping[str, Any],
    dtype: torch.dtype,
    options: dict[str, Any],
    others: dict[str, Source],
) -> Any:
    """The pipeline from a folder, a single file or a Hub id, with other networks in place of its
    own.
    """
    import diffusers
    from diffusers.utils.import_utils import is_accelerate_available

    kind = getattr(diffusers, index["_class_name"])
    own = {part: entry for part, entry in index.items() if part not in {*others, *UNUSED}}
    if source.local:
        folder = read_file(Path(source.name)) if source.file else Path(source.name)
        check_files(source, own, folder)
    parts = {
        part: load_other(part, other, index.get(part), dtype) for part, other in others.items()
    }
    if source.file:
        return open_file(source, folder, own, kind, dtype, {**options, **parts})
    if not source.local:
        folder = Path(_download(source, kind, {**options, **parts}))
        check_files(source, own, folder)
    parts |= load_own(source, folder, own, dtype)
    return kind.from_pretrained(
        str(folder),
        dtype=dtype,
        local_files_only=True,
        low_cpu_mem_usage=is_accelerate_available(),  # or diffusers gives lines of advice
        **options,
        **parts,
    )


def _download(source: Source, kind: Any, options: dict[str, Any]) -> str:
    """The folder that a Hub id's files are in once they are here."""
    try:
        return str(kind.download(source.name, use_safetensors=True, **options))
    except (OSError, ValueError) as error:
        # Which files the repository has is seen only by asking for them.
        try:
            return str(kind.download(source.name, use_safetensors=True, variant="fp16", **options))
        except (OSError, ValueError):
            raise error from None


def check_offloading(name: str, device: str | None) -> None:
    """Raise an OptionError where a memory option offloads weights from an accelerator, and there is
    none.

    Args:
        name: Of the option.
        device: Where the model runs; None for wherever diffusers finds.
    """
    from diffusers.utils.torch_utils import get_device

    device = get_device() if device is None else device
    if "offload" in name and torch.device(device).type == "cpu":
        raise OptionError(
            f"memory names {name!r}, which keeps weights in the CPU's memory until an accelerator "
            "needs them, but the device is 'cpu'; leave it out, or give device= an accelerator "
            "such as 'cuda'"
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
            raise OptionError(
                f"memory names {name!r}, but a {type(pipe).__name__} has no {MEMORY[name]}"
            )
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
            raise OptionError(
                f"memory option {name!r} cannot be used here: {reason(error)}"
            ) from error
    return pipe


def copy_pipeline(pipe: Any, denoiser: str) -> Any:
    """A pipeline with the same weights in memory of its own, compiled where the other is."""
    copied, compiled = copy.deepcopy(pipe), getattr(pipe, denoiser)._compiled_call_impl is not None
    if compiled:
        getattr(copied, denoiser).compile()
    return copied


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turn whatever goes wrong inside into a CheckpointError that names the source."""
    try:
        yield
    except (CheckpointError, OptionError):
        raise
    except Exception as error:
        where = "file" if source.file else "folder" if source.local else "Hub id"
        raise CheckpointError(
            f"{where} {source.name!r} could not be loaded: {type(error).__name__}: {reason(error)}"
        ) from error


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silence what loading says of image processors that are not used; with ``bars`` its progress
    bars, too.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity, had_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
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
