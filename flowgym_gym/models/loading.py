"""Base models by id, made once per process and shared by all environments; checkpoints by their
family.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from flowgym_gym.checks import check_choice
from flowgym_gym.errors import CheckpointError, OptionError, reason, shown
from flowgym_gym.models.base import BaseModel
from flowgym_gym.models.checkpoints import Checkpoint, forget_pipelines, resolve
from flowgym_gym.registry import RegistryEntry, base_model_registry, reward_registry

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The model whose ids open checkpoints of every family.
ANY_FAMILY = "images/stable_diffusion"


def from_pretrained(path_or_id: str, **options: Any) -> BaseModel[Any]:
    """The base model of a checkpoint in diffusers' format, of the family that its
    ``model_index.json`` names.

    Args:
        path_or_id: A local folder, a Hub id, or the name of an embedded checkpoint.
        **options: Arguments of the family's base model, and ``device`` and ``dtype``.

    Returns:
        The model, frozen and in evaluation mode, shared by all that ask for it with the same
        arguments.

    Raises:
        CheckpointError: If the checkpoint cannot be opened, or is of no supported family; the
            message lists those.

    >>> from flowgym_gym.models import from_pretrained
    >>> type(from_pretrained("tiny")).__name__
    'StableDiffusionBaseModel'
    """
    return load_base_model(ANY_FAMILY, checkpoint=path_or_id, **options)


def from_pipeline(pipe: Any, **options: Any) -> BaseModel[Any]:
    """The base model of a diffusers pipeline that is already open.

    The pipeline is frozen in place (evaluation mode, no gradients for its weights) and stays on its
    device and in its number format; LoRA weights, quantised weights (GGUF, torchao, float8), memory
    options and offloading that were set up before are kept.

    Args:
        pipe: A diffusers pipeline.
        **options: Arguments of the family's base model, such as ``prompts`` and ``guidance_scale``.

    Raises:
        CheckpointError: If the pipeline is of no supported family; the message lists those.
    """
    entry = base_model_registry.get(_family(type(pipe).__name__, "this pipeline"))
    model: BaseModel[Any] = entry.instantiate(checkpoint=pipe, **options)
    return model.eval().requires_grad_(False)


def is_open(checkpoint: object) -> bool:
    """Whether a checkpoint is a pipeline that is already open."""
    return hasattr(checkpoint, "components")


@dataclass(frozen=True)
class FoundModel:
    """Which base model is meant, with the checkpoint that decided it.

    Attributes:
        entry: The base model.
        checkpoint: What was found and read of the checkpoint, for the model to open; None where the
            model is told something else, or nothing.
    """

    entry: RegistryEntry
    checkpoint: Checkpoint | None = None


def find_base_model(id: str, checkpoint: object = None) -> FoundModel:
    """The base model that opens a checkpoint: ``id``, unless that is the one whose ids open every
    family.

    Raises:
        UnknownIdError: If the id is not registered.
        CheckpointError: If the checkpoint cannot be found or read, or is of no supported family.
    """
    if id == ANY_FAMILY and is_open(checkpoint):
        id = _family(type(checkpoint).__name__, "this pipeline")
    if id != ANY_FAMILY or not isinstance(checkpoint, str | os.PathLike):
        return FoundModel(base_model_registry.get(id))
    found = resolve(checkpoint)
    return FoundModel(base_model_registry.get(_family(found.pipeline, str(found.source))), found)


def _family(pipeline: str, where: str) -> str:
    families = _families()
    if pipeline not in families:
        raise CheckpointError(
            f"{where} holds a {pipeline}, which is not supported; supported are "
            f"{', '.join(sorted(families))}, and for others a BaseModel of your own"
        )
    return families[pipeline]


@cache
def _families() -> dict[str, str]:
    """Ids of the built-in base models by the pipelines that they open."""
    from flowgym_gym.models.pipeline import PipelineBaseModel

    entries = [base_model_registry.get(id) for id in base_model_registry.list()]
    return {
        pipeline: entry.id
        for entry in entries
        if _is_built_in(entry) and issubclass(entry.cls, PipelineBaseModel)
        for pipeline in entry.cls.pipelines
    }


def _is_built_in(entry: RegistryEntry) -> bool:
    where = (
        entry.entry_point if isinstance(entry.entry_point, str) else entry.entry_point.__module__
    )
    return where.startswith("flowgym_gym.models.")


def load_base_model(
    id: str, device: torch.device | str | None = None, dtype: str = "float32", **kwargs: Any
) -> BaseModel[Any]:
    """The base model registered as ``id``, frozen and in evaluation mode.

    Args:
        id: Registered id, such as ``"images/stable_diffusion"``.
        device: Where it runs.
        dtype: Number format of the network, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        **kwargs: Its own arguments.

    Raises:
        UnknownIdError: If the id is not registered.
        UnknownOptionError: If the model has no such argument.
        OptionError: If the device or number format does not exist here.
    """
    return load_found(find_base_model(id, kwargs.get("checkpoint")), device, dtype, **kwargs)


def load_found(
    found: FoundModel,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    **kwargs: Any,
) -> BaseModel[Any]:
    """As :func:`load_base_model`, of a base model that was found already."""
    entry = found.entry
    # An open pipeline stays where it is, and so must not be told a device that nobody asked for.
    taken_as_it_is = device is None and is_open(kwargs.get("checkpoint"))
    kwargs = {"device": None if taken_as_it_is else as_device(device), **kwargs}
    check_choice("dtype", dtype, DTYPES)
    options = entry.options()
    if options is None or "dtype" in options:
        kwargs["dtype"] = dtype
    elif dtype != "float32":
        raise OptionError(
            f"dtype is {shown(dtype)}, but {entry.id!r} has no dtype option and runs in float32"
        )
    # A class that a user put in the place of a family is told what the user said.
    resolved = (
        {"checkpoint": found.checkpoint} if found.checkpoint and _is_built_in(entry) else None
    )
    with torch.inference_mode(False):  # Others who share it may want gradients.
        model = entry.shared(kwargs, resolved)
    if not isinstance(model, BaseModel):
        raise OptionError(
            f"{entry.id!r} is a {type(model).__name__}, expected a subclass of "
            "flowgym_gym.BaseModel"
        )
    if "_modules" not in vars(model):
        raise OptionError(
            f"the __init__ of {type(model).__name__} does not call super().__init__(device); let it"
        )
    return model.eval().requires_grad_(False)


def clear_model_cache() -> None:
    """Forget every shared model, so that its memory is freed once no environment uses it."""
    base_model_registry.forget_instances()
    reward_registry.forget_instances()
    forget_pipelines()


def as_device(device: torch.device | str | None) -> torch.device:
    """The device, or an OptionError if this machine does not have it."""
    if isinstance(device, list | tuple):
        raise OptionError(
            f"device is {shown(device)}, expected one device; sub-environments are split over "
            "several by gymnasium.make_vec(id, num_envs=..., device=[...])"
        )
    try:
        if isinstance(device, bytes):
            raise TypeError("bytes are no name")
        checked = torch.device("cpu" if device is None else device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        raise OptionError(
            f"device is {shown(device)}, which cannot be used here ({reason(error)}); try 'cpu'"
        ) from error
    if checked.type == "meta":
        raise OptionError("device is 'meta', whose tensors hold no numbers; try 'cpu'")
    return checked
