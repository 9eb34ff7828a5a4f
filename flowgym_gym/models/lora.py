"""Merging LoRA weights into a pipeline: all of them, or an error that says which fit nothing.

Files in the formats that diffusers reads (its own, and those of kohya's and other trainers) are
loaded by diffusers, folders of ``PeftModel.save_pretrained`` by peft. Afterwards the names in the
file are compared with those in the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.sources import Source
from flowgym_gym.weights import some

# What save_lora_weights of diffusers and save_pretrained of peft call their files.
DIFFUSERS, PEFT, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
PEFT_PREFIX = "base_model.model."
ADAPTER = "given"
# Weights beside or instead of LoRA's, by patterns of names. Without them a LoRA means something
# else.
OTHER_KINDS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.ia3_": "IA3",
    r"\.lora_mid\.": "LoRA of convolutions in Tucker's form",
    r"\.dora_scale$": "DoRA in LyCORIS's form",
    r"\.diff(_b)?$": "differences of whole weights",
}


def merge_lora(pipe: Any, source: Source, scale: float) -> None:
    """Merge LoRA weights into the pipeline's own, so that they cost nothing per step.

    Args:
        pipe: The pipeline; it is changed in place, and spoilt by an error.
        source: Folder, file or Hub id of the weights.
        scale: What they are multiplied with.

    Raises:
        CheckpointError: If they cannot be read, or are not all of them LoRA weights of parts of
            this pipeline.
        OptionError: If the pipeline takes none, or the package peft is missing.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise OptionError(
            f"lora is {source.name!r}, but a {type(pipe).__name__} takes no LoRA weights"
        )
    file = find_lora(source)
    keys = read_names(file)
    for pattern, kind in OTHER_KINDS.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise CheckpointError(
                f"lora {str(file)!r} holds weights of another kind, {kind}: {some(found)}; only "
                "LoRA is merged, and DoRA as peft saves it. Merge them with the program that "
                "trained them, and give the result as denoiser="
            )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "LoRA weights need the package peft: pip install 'flowgym_gym[models]'"
        ) from error
    if file.name == PEFT and (file.parent / PEFT_CONFIG).is_file():
        merge_peft(pipe, file, keys, scale)
    else:
        merge_diffusers(pipe, file, scale)


def find_lora(source: Source) -> Path:
    """The file of a LoRA, which is downloaded if it is on the Hub.

    Raises:
        CheckpointError: If there is no safetensors file, or there are several.
    """
    if source.file:
        if not source.name.endswith(".safetensors"):
            raise CheckpointError(
                f"lora is {source.name!r}; pickled weights are not loaded, expected a .safetensors "
                "file"
            )
        return Path(source.name)
    if source.local:
        folder = Path(source.name)
        return folder / _pick(source, [path.name for path in folder.iterdir()])
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(source.name)
    except (OfflineModeIsEnabled, OSError):  # not reachable; an earlier download may be there
        folder = Path(snapshot_download(source.name, local_files_only=True))
        return folder / _pick(source, [path.name for path in folder.iterdir()])
    name = _pick(source, names)
    if name == PEFT and PEFT_CONFIG in names:
        hf_hub_download(source.name, PEFT_CONFIG)
    return Path(hf_hub_download(source.name, name))


def _pick(source: Source, names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.endswith(".safetensors"))
    for known in (DIFFUSERS, PEFT):
        if known in files:
            return known
    if len(files) != 1:
        found = (
            f"several safetensors files ({', '.join(files)}); name one of them"
            if files
            else "no safetensors file"
        )
        raise CheckpointError(
            f"lora {source.name!r} could not be loaded: it has {found}, and pickled weights are "
            "not loaded"
        )
    return files[0]


def read_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file; only its header is read."""
    with safe_open(file, "pt") as tensors:
        names: list[str] = list(tensors.keys())
    if not names:
        raise CheckpointError(f"lora {str(file)!r} is empty")
    return names


def merge_diffusers(pipe: Any, file: Path, scale: float) -> None:
    """Merge a file that diffusers can read; see :func:`merge_lora`."""
    tensors = load_file(file)
    scaled = _scale_by_alphas(tensors, of_all=hasattr(pipe, "unet"))
    converted, dropped = _convert(pipe, tensors)
    before = _shapes(pipe)
    given = tensors if scaled else str(file.parent)
    pipe.load_lora_weights(
        given,
        weight_name=file.name,
        use_safetensors=True,
        local_files_only=True,
        adapter_name=ADAPTER,
    )
    parts = [name for name, part in pipe.components.items() if getattr(part, "peft_config", None)]
    applied = {key for name in parts for key in _adapter_names(name, getattr(pipe, name))}
    names = _names_in_model(pipe, converted)
    if left := [key for key, name in names.items() if name not in applied] + dropped:
        nothing = "not all of its weights fit" if applied else "none of its weights fits"
        peft = (
            f"; {PEFT_CONFIG} of peft is missing beside it"
            if left[0].startswith(PEFT_PREFIX)
            else ""
        )
        raise CheckpointError(
            f"lora {str(file)!r} is no LoRA of this {type(pipe).__name__}, {nothing}: "
            f"{some(left)}, of no layer of {', '.join(_modules(pipe))}{peft}"
        )
    if extra := applied - set(names.values()):
        raise CheckpointError(f"lora {str(file)!r} is incomplete: it has no {some(extra)}")
    pipe.fuse_lora(components=parts, lora_scale=scale, safe_fusing=True)
    pipe.unload_lora_weights()
    if changed := {name for name, shape in _shapes(pipe).items() if before.get(name) != shape}:
        raise CheckpointError(
            f"lora {str(file)!r} is of a network with other inputs: it enlarges {some(changed)}"
        )


def _scale_by_alphas(tensors: dict[str, Tensor], of_all: bool) -> bool:
    """Scale weights in kohya's format by alpha over rank where diffusers would do it wrongly, and
    say if it was done.

    It gives all layers of a U-Net and its text encoders the most frequent alpha, and Flux's last
    layer none.
    """
    down, up = ".lora_down.weight", ".lora_up.weight"
    layers = {key.removesuffix(down) for key in tensors if key.endswith(down)}
    alphas = {
        layer: tensors[f"{layer}.alpha"].item() for layer in layers if f"{layer}.alpha" in tensors
    }
    if not of_all:
        alphas = {layer: alpha for layer, alpha in alphas.items() if "final_layer" in layer}
    elif len(set(alphas.values())) <= 1 and len(alphas) in (0, len(layers)):
        return False
    for layer, alpha in alphas.items():
        del tensors[f"{layer}.alpha"]
        if layer + up in tensors:
            tensors[layer + up] = tensors[layer + up].float() * (alpha / len(tensors[layer + down]))
    return bool(alphas)


def _convert(pipe: Any, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that diffusers gives to weights of a file, and those of the file that it leaves out.

    What it leaves out it does not say, so the weights are followed as gradients are: what none of
    the results depends on was left out. Alphas are read as numbers, and zeros change nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = {key: value.float().requires_grad_() for key, value in tensors.items()}
        followed = {key: leaf * 1 for key, leaf in leaves.items()}  # conversions scale in place
        shape = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
        converted = pipe.lora_state_dict(followed, **shape)
        converted = converted[0] if isinstance(converted, tuple) else converted
        total = torch.stack([value.sum() for value in converted.values()]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    dropped = [
        key
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        if gradient is None and not key.endswith("alpha") and leaf.any()
    ]
    return list(converted), dropped


def _shapes(pipe: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the pipeline's networks, by name."""
    return {
        f"{part}.{name}": tuple(weight.shape)
        for part, module in _modules(pipe).items()
        for name, weight in module.named_parameters()
    }


def merge_peft(pipe: Any, file: Path, keys: list[str], scale: float) -> None:
    """Merge what ``PeftModel.save_pretrained`` saved for one part of the pipeline, as peft's own
    merge does.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
    if (kind := settings.get("peft_type")) != "LORA":
        raise CheckpointError(
            f"lora {str(file.parent)!r} is of peft's kind {kind!r}, but only 'LORA' is merged"
        )
    whole = [key for key in keys if ".lora_" not in key]
    if whole and scale != 1:
        raise CheckpointError(
            f"lora {str(file.parent)!r} replaces {some(whole)}, which lora_scale={scale} cannot "
            "scale; leave it at 1"
        )
    part = _part_of(pipe, file, [key for key in keys if ".lora_" in key])
    config = PeftConfig.from_pretrained(str(file.parent))
    config.task_type = None  # tasks only add methods that their models must have
    model = PeftModel.from_pretrained(
        getattr(pipe, part), str(file.parent), config=config, torch_device="cpu"
    )
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if different := set(keys) ^ set(loaded):
        raise CheckpointError(
            f"lora {str(file.parent)!r} does not fit the {part}: {some(different)} are in one of "
            "the two only"
        )
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(scale)
    setattr(pipe, part, model.merge_and_unload(safe_merge=True))


def _part_of(pipe: Any, file: Path, keys: list[str]) -> str:
    """Which part of the pipeline has all layers that a LoRA in peft's format names."""
    layers = {key.removeprefix(PEFT_PREFIX).partition(".lora_")[0]: key for key in keys}
    fits = [
        name
        for name, module in _modules(pipe).items()
        if layers and set(layers) <= set(dict(module.named_modules()))
    ]
    if len(fits) == 1:
        return fits[0]
    named = {name: dict(module.named_modules()) for name, module in _modules(pipe).items()}
    left = {
        name: [key for layer, key in layers.items() if layer not in modules]
        for name, modules in named.items()
    }
    closest = min(left, key=lambda name: len(left[name]))
    raise CheckpointError(
        f"lora {str(file.parent)!r} is no LoRA of one part of this {type(pipe).__name__}: "
        + (
            f"its layers are in {' and in '.join(fits)}"
            if fits
            else f"{some(left[closest])} fit no layer of {closest}"
        )
    )


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's networks by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _adapter_names(name: str, part: nn.Module) -> list[str]:
    """Names of the LoRA weights that a part of the pipeline has got."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(part, adapter_name=ADAPTER, save_embedding_layers=False)
    return [f"{name}.{key}" for key in loaded]


def _names_in_model(pipe: Any, converted: Iterable[str]) -> dict[str, str]:
    """Names that weights in diffusers' format get in the model, by their names in that format."""
    names: dict[str, dict[str, str]] = {}
    for key in converted:
        part, _, rest = key.partition(".")
        names.setdefault(part, {})[rest] = key
    result = {}
    for part, keys in names.items():
        flat = part.startswith("text_encoder") and not hasattr(
            getattr(pipe, part, None), "text_model"
        )
        for name, key in _in_peft_format(part, keys).items():
            result[key] = f"{part}.{name.removeprefix('text_model.') if flat else name}"
    return result


def _in_peft_format(part: str, keys: dict[str, str]) -> dict[str, str]:
    """A mapping with names in any of diffusers' formats, by the names that diffusers gives them in
    peft's.
    """
    from diffusers.utils import state_dict_utils

    try:
        if part.startswith("text_encoder"):
            old = state_dict_utils.convert_state_dict_to_diffusers(keys)
            return dict(state_dict_utils.convert_state_dict_to_peft(old))
        if not any("lora_A" in name for name in keys):
            return dict(state_dict_utils.convert_unet_state_dict_to_peft(keys))
    except ValueError:  # names of no format; they are not in the model either
        pass
    return keys
