"""Base models and rewards by id, made once per process and shared by all environments; pipelines by their family."""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import torch

from flowgym_gym.checks import check_choice
from flowgym_gym.errors import CheckpointError, OptionError, reason, shown
from flowgym_gym.models.base import BaseModel
from flowgym_gym.models.checkpoints import find_checkpoint, forget_pipelines, read_index
from flowgym_gym.registry import RegistryEntry, base_model_registry, reward_registry
from flowgym_gym.rewards import Reward
from flowgym_gym.sharing import Shared, places

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_shared = Shared()


# The model whose ids open checkpoints of every family.
ANY_FAMILY = "images/stable_diffusion"


def from_pretrained(path_or_id: str, **options: Any) -> BaseModel[Any]:
    """The base model of a checkpoint in diffusers' format, of the family that its ``model_index.json`` names.

    Args:
        path_or_id: A local folder, a Hub id, or the name of an embedded checkpoint.
        **options: Arguments of the family's base model, and ``device`` and ``dtype``.

    Returns:
        The model, frozen and in evaluation mode, shared by all that ask for it with the same arguments.

    Raises:
        CheckpointError: If the checkpoint cannot be opened, or is of no supported family; the message lists those.

    >>> from flowgym_gym.models import from_pretrained
    >>> type(from_pretrained("tiny")).__name__
    'StableDiffusionBaseModel'
    """
    return load_base_model(family_of(ANY_FAMILY, path_or_id), checkpoint=path_or_id, **options)


def from_pipeline(pipe: Any, **options: Any) -> BaseModel[Any]:
    """The base model of a diffusers pipeline that is already open.

    The pipeline is frozen in place (evaluation mode, no gradients for its weights) and stays on its device and in its
    number format; LoRA weights, quantised weights (GGUF, torchao, float8), memory options and offloading that were set
    up before are kept.

    Args:
        pipe: A diffusers pipeline.
        **options: Arguments of the family's base model, such as ``prompts`` and ``guidance_scale``.

    Raises:
        CheckpointError: If the pipeline is of no supported family; the message lists those.
    """
    model = base_model_registry.get(_family(type(pipe).__name__, "this pipeline")).instantiate(
        checkpoint=pipe, **options
    )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def is_open(checkpoint: object) -> bool:
    """Whether a checkpoint is a pipeline that is already open."""
    return hasattr(checkpoint, "components")


def family_of(id: str, checkpoint: object) -> str:
    """Id of the base model that opens a checkpoint: ``id``, unless that is the one whose ids open every family.

    Raises:
        CheckpointError: If the checkpoint cannot be found or read, or is of no supported family.
    """
    if id == ANY_FAMILY and is_open(checkpoint):
        return _family(type(checkpoint).__name__, "this pipeline")
    if id != ANY_FAMILY or not isinstance(checkpoint, str | os.PathLike):
        return id
    source = find_checkpoint(checkpoint)
    return _family(read_index(source)["_class_name"], str(source))


def _family(pipeline: str, where: str) -> str:
    families = _families()
    if pipeline not in families:
        raise CheckpointError(
            f"{where} holds a {pipeline}, which is not supported; supported are {', '.join(sorted(families))}, and for "
            "others a BaseModel of your own"
        )
    return families[pipeline]


@cache
def _families() -> dict[str, str]:
    """Ids of the built-in base models by the pipelines that they open."""
    from flowgym_gym.models.pipeline import PipelineBaseModel

    entries = [base_model_registry.get(id) for id in base_model_registry.list()]
    built_in = [entry for entry in entries if _module(entry).startswith("flowgym_gym.models.")]
    return {
        pipeline: entry.id
        for entry in built_in
        if issubclass(entry.cls, PipelineBaseModel)
        for pipeline in entry.cls.pipelines
    }


def _module(entry: RegistryEntry) -> str:
    return entry.entry_point if isinstance(entry.entry_point, str) else entry.entry_point.__module__


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
    entry = base_model_registry.get(family_of(id, kwargs.get("checkpoint")))
    # An open pipeline stays where it is, and so must not be told a device that nobody asked for.
    taken_as_it_is = device is None and is_open(kwargs.get("checkpoint"))
    kwargs = {"device": None if taken_as_it_is else check_device(device), **kwargs}
    check_choice("dtype", dtype, DTYPES)
    options = entry.options()
    if options is None or "dtype" in options:
        kwargs["dtype"] = dtype
    elif dtype != "float32":
        raise OptionError(f"dtype is {shown(dtype)}, but {id!r} has no dtype option and runs in float32")
    model = _load(entry, kwargs)
    if not isinstance(model, BaseModel):
        raise OptionError(f"{id!r} is a {type(model).__name__}, expected a subclass of flowgym_gym.BaseModel")
    if "_modules" not in vars(model):
        raise OptionError(f"the __init__ of {type(model).__name__} does not call super().__init__(device); let it")
    return model.eval().requires_grad_(False)


def load_reward(id: str, **kwargs: Any) -> Reward[Any]:
    """The reward registered as ``id``, shared unless it is stateful; errors as :func:`load_base_model`."""
    reward = _load(reward_registry.get(id), kwargs)
    if not isinstance(reward, Reward):
        raise OptionError(f"{id!r} is a {type(reward).__name__}, expected a subclass of flowgym_gym.Reward")
    return reward


def clear_model_cache() -> None:
    """Forget every shared model, so that its memory is freed once no environment uses it."""
    _shared.clear()
    forget_pipelines()


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, or an OptionError if this machine does not have it."""
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


def _device_name(value: object) -> str:
    if isinstance(value, torch.device):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _load(entry: RegistryEntry, kwargs: dict[str, Any]) -> Any:
    arguments = {**entry.default_kwargs, **kwargs}
    try:
        text = json.dumps(arguments, sort_keys=True, default=_device_name)
    except (TypeError, ValueError, RecursionError):  # What is no plain value has no name to be found under again.
        return entry.instantiate(**kwargs)
    named = tuple(places(arguments))
    return _shared.get(
        (entry.cls, text, named),
        named,
        make=lambda: entry.instantiate(**kwargs),
        good=lambda made: not getattr(made, "stateful", False) and not getattr(made, "moved", False),
    )
