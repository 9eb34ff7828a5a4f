"""What a folder or a file is that someone gives as a checkpoint: variants of weights, and names for
what is none.

Only names of files, configurations and the keys of safetensors headers are read; no weights, and
nothing from the Hub.
"""

from __future__ import annotations

import json
from pathlib import Path

from flowgym_gym.errors import CheckpointError, reason

INDEX = "model_index.json"
MODULAR = "modular_model_index.json"
SAFETENSORS = ".safetensors"
SAVE = (
    "save one with save_pretrained of the pipeline, such as StableDiffusionPipeline.save_pretrained"
)
# Weights of other kinds, by the ends of their names.
OTHER_WEIGHTS = {
    ".msgpack": "Flax weights",
    ".onnx": "ONNX weights",
    ".xml": "OpenVINO weights",
    ".gguf": "GGUF weights",
    ".bin": "pickled weights",
    ".ckpt": "pickled weights",
    ".pt": "pickled weights",
    ".pth": "pickled weights",
}
# What keys of a single file say, the first that holds; the last part says what to do.
PART = (
    "give a checkpoint folder, and beside it this part, saved with save_pretrained as a folder, as"
)
LORA = "give it as lora= beside a checkpoint"
WHOLE = "a whole checkpoint in the original format"
NUNCHAKU = "quantised weights of Nunchaku, which need code of their own"
KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".qweight", ".wscales"), NUNCHAKU, "take the weights that they were made from"),
    (
        (".lora_A.", ".lora_B.", "lora_up.", "lora_down.", ".hada_w", ".lokr_w"),
        "LoRA weights",
        LORA,
    ),
    (
        ("controlnet_cond_embedding.", "control_model."),
        "a ControlNet",
        "ControlNets are not supported",
    ),
    (("ip_adapter.", "image_proj."), "an IP-Adapter", "IP-Adapters are not supported"),
    (("model.diffusion_model.",), "a network in the original format", f"{PART} denoiser="),
    (
        ("double_blocks.", "joint_blocks."),
        "a transformer in the original format",
        f"{PART} denoiser=",
    ),
    (
        ("down_blocks.0.resnets.0.time_emb_proj.", "time_embedding.linear_1."),
        "a U-Net",
        f"{PART} denoiser=",
    ),
    (("transformer_blocks.0.",), "a transformer", f"{PART} denoiser="),
    (
        ("decoder.conv_in.", "first_stage_model.", "decoder.layers."),
        "an autoencoder",
        f"{PART} vae=",
    ),
    (
        ("text_model.", "encoder.block.0.layer.0.SelfAttention."),
        "a text encoder",
        "give a whole checkpoint",
    ),
    (
        ("emb_params", "string_to_param", "clip_l", "clip_g"),
        "a textual inversion",
        "load it into an open pipeline",
    ),
)
# Pipelines of whole checkpoints in the original format, by keys that only they have.
PIPELINES = (
    ("conditioner.embedders.1.", "StableDiffusionXLPipeline"),
    ("cond_stage_model.", "StableDiffusionPipeline"),
    ("model.diffusion_model.joint_blocks.", "StableDiffusion3Pipeline"),
    ("model.diffusion_model.double_blocks.", "FluxPipeline"),
)


def find_variant(folder: Path) -> str | None:
    """The variant of the weights in a part's folder, such as ``"fp16"``; None where there are plain
    ones, or none.

    Plain weights come first; of several variants the first by name.
    """
    names = [path.name for path in folder.glob(f"*model*{SAFETENSORS}")]
    # NAME.VARIANT.safetensors; NAME.VARIANT-00001-of-00002.safetensors and
    # NAME-00001-of-00002.VARIANT.safetensors
    variants = [name.removesuffix(SAFETENSORS).split(".")[1:] for name in names]
    if not variants or [] in variants:
        return None
    return min(variant[0].split("-0")[0] for variant in variants)


def name_weights(folder: Path) -> str:
    """What weights a folder has that has none in safetensors, as a part of a message."""
    ends = {path.suffix for path in folder.iterdir()} if folder.is_dir() else set()
    found = [what for end, what in OTHER_WEIGHTS.items() if end in ends]
    return f"only {found[0]}, which are not loaded" if found else "no others either"


def name_folder(folder: Path) -> str:
    """What a folder without a ``model_index.json`` is, and what to do, as the end of a message."""
    if (folder / MODULAR).is_file():
        return (
            f"has a {MODULAR}: it is a modular pipeline, which is not supported; save the pipeline "
            "that its blocks make up in the usual format, with save_pretrained of a class such as "
            "StableDiffusionXLPipeline"
        )
    inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    if inside:
        return (
            f"has no {INDEX}, but holds checkpoints in {', '.join(map(repr, inside[:5]))}; give "
            "one of these folders"
        )
    if (folder / "adapter_config.json").is_file() or list(folder.glob("*lora*.safetensors")):
        return f"has no {INDEX}: it holds LoRA weights; {LORA}"
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            return f"has no {INDEX}: it is a single part of a pipeline, {_name_part(folder / name)}"
    files = sorted(path.name for path in folder.glob(f"*{SAFETENSORS}"))
    if files:
        return (
            f"has no {INDEX}, but weights in single files ({', '.join(files[:3])}); give one of "
            "these files"
        )
    if folder.is_dir() and name_weights(folder) != name_weights(folder / INDEX):
        return (
            f"has no {INDEX}, so it is not a diffusers pipeline: it holds {name_weights(folder)}; "
            f"{SAVE}"
        )
    return f"has no {INDEX}, so it is not a diffusers pipeline; {SAVE}"


def _name_part(config: Path) -> str:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        kind = (
            values.get("_class_name")
            or (values.get("architectures") or [None])[0]
            or values.get("tokenizer_class")
        )
    except (ValueError, AttributeError, TypeError, KeyError, OSError, RecursionError):
        kind = None
    kind = str(kind or "of an unknown kind")
    if "Autoencoder" in kind or "VQModel" in kind:
        return f"a {kind}; give a checkpoint, and this as vae="
    if "UNet" in kind or "Transformer" in kind:
        return f"a {kind}; give a checkpoint, and this as denoiser="
    return f"{kind}; give the folder of the whole pipeline"


def read_keys(file: Path) -> list[str]:
    """Names of the weights in a safetensors file.

    Raises:
        CheckpointError: If it is no safetensors file.
    """
    if file.suffix != SAFETENSORS:
        what = OTHER_WEIGHTS.get(file.suffix, "no safetensors weights")
        raise CheckpointError(
            f"checkpoint file {str(file)!r} holds {what}, which are not loaded; expected a folder "
            "in diffusers' format or a whole checkpoint in one .safetensors file (quantised "
            "weights go through an open pipeline, flowgym_gym.models.from_pipeline)"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint file {str(file)!r} cannot be read as safetensors: {reason(error)}"
        ) from error


def read_file(file: Path) -> Path:
    """The folder with the configuration of a whole checkpoint in one file.

    The configuration is a folder in diffusers' format: the one that the file lies in, or one beside
    it that is named as the file without ``.safetensors``; its weights are not read. diffusers would
    ask the Hub for it otherwise.

    Raises:
        CheckpointError: If the file is something else, or has no configuration; the message says
            what it is.
    """
    keys = read_keys(file)
    here = f"checkpoint file {str(file)!r}"
    kind = next(
        (kind for start, kind in PIPELINES if any(key.startswith(start) for key in keys)), None
    )
    whole = kind is not None and any(key.startswith(("first_stage_model.", "vae.")) for key in keys)
    if not whole:
        for marks, what, advice in KINDS:
            if any(mark in key for mark in marks for key in keys):
                raise CheckpointError(f"{here} holds {what}; {advice}")
        shown = ", ".join(sorted(keys)[:3]) or "none"
        raise CheckpointError(
            f"{here} holds weights of an unknown kind ({shown}); expected a folder in diffusers' "
            "format"
        )
    for folder in (file.with_suffix(""), file.parent):
        if (folder / INDEX).is_file():
            return folder
    raise CheckpointError(
        f"{here} is {WHOLE}, of a {kind}, but its configuration is not beside it, and is not "
        "taken from "
        f"the Hub; convert it once, with diffusers.{kind}.from_single_file({str(file)!r})"
        f".save_pretrained({str(file.with_suffix(''))!r}), and give that folder; or put the folder "
        "of a checkpoint of the same kind there (its weights may be missing)"
    )
