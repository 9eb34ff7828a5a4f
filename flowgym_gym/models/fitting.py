"""Whether the parts of a pipeline fit together, and are read rightly here; each check raises a
CheckpointError.

All of them look at configurations alone, so that what cannot work is refused when a checkpoint is
opened, by name, and not by a library's error at the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flowgym_gym.errors import CheckpointError, shown

# What diffusers' samplers of these names do is not DDIM on a schedule, by which they would be read
# otherwise.
REPLACE = (
    "; to sample the network by DDIM all the same, give it another scheduler: pipe.scheduler = "
    "DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing')"
)
CONSISTENCY = (
    "predicts the finished sample and draws new noise at every step, for which its network was "
    "distilled; no sampler "
    "here does that" + REPLACE
)
OTHER_SAMPLERS = {
    "LCMScheduler": CONSISTENCY,
    "TCDScheduler": CONSISTENCY,
    "DDIMInverseScheduler": "goes from data to noise" + REPLACE,
    "DPMSolverMultistepInverseScheduler": "goes from data to noise" + REPLACE,
    "RePaintScheduler": "fills in a picture that it is given" + REPLACE,
    "UnCLIPScheduler": "is that of a prior or of a decoder of its embeddings" + REPLACE,
}
# What a discrete scheduler may be told that makes its schedule or the network's time another one.
OTHER_SCHEDULES = {
    "thresholding": (False, "has dynamic thresholding"),
    "use_flow_sigmas": (False, "samples a flow on the levels of use_flow_sigmas"),
    "timestep_type": ("discrete", "gives the network a continuous time"),
}
# Which conditions a U-Net may want beyond the text, and what these networks are.
CONDITIONS = {
    "time_cond_proj_dim": (
        "is distilled to take the guidance scale as an input (a consistency model), which is not "
        "supported; take the checkpoint that it was distilled from"
    ),
    "class_embed_type": "wants class labels beside the prompt, which is not supported",
    "num_class_embeds": "wants class labels, which is not supported",
}
# A tokenizer without a length says 1e30.
NO_LENGTH = 10**6
# What T5 was trained with; its relative positions have no bound, so that newer configurations do
# not say it.
T5_POSITIONS = 512


def check_schedule(scheduler: Any, pipeline: str) -> None:
    """Refuse a scheduler whose noise schedule is not that of DDIM or DDPM, or that samples in
    another way.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in OTHER_SAMPLERS:
            raise CheckpointError(f"the checkpoint's {kind} {OTHER_SAMPLERS[ancestor.__name__]}")
    what = None if hasattr(scheduler, "alphas_cumprod") else "has no discrete noise schedule"
    for name, (expected, otherwise) in OTHER_SCHEDULES.items():
        if config.get(name, expected) != expected:
            what = what or otherwise
    if what is not None:
        raise CheckpointError(
            f"the checkpoint's {kind} {what}, expected the schedule of a {pipeline} such as that "
            "of a DDIMScheduler without thresholding"
        )


def require_parts(pipe: Any, parts: Iterable[str]) -> None:
    """Refuse a pipeline that was opened without one of the parts."""
    missing = [part for part in parts if getattr(pipe, part, None) is None]
    # Optional encoders need their tokenizer.
    for part, value in pipe.components.items():
        if part.startswith("text_encoder") and value is not None:
            tokenizer = part.replace("text_encoder", "tokenizer")
            missing += [tokenizer] * (
                getattr(pipe, tokenizer, None) is None and tokenizer not in missing
            )
    if missing:
        raise CheckpointError(
            f"the {type(pipe).__name__} has no {' and no '.join(missing)}, without which it cannot "
            "be sampled; open the pipeline with all of its parts"
        )


def check_network(network: Any, addition: str | None = None) -> None:
    """Refuse a network that takes conditions which no prompt gives, such as those of an IP-Adapter.

    Args:
        network: The U-Net or transformer.
        addition: The kind of added embedding that its family gives it.
    """
    config, kind = network.config, type(network).__name__
    for name, what in CONDITIONS.items():
        if config.get(name, None) is not None:
            raise CheckpointError(
                f"the checkpoint's network {what} ({name} = {shown(config[name])})"
            )
    projection = config.get("encoder_hid_dim_type", None)
    held = any(
        getattr(network, name, None) is not None for name in ("encoder_hid_proj", "image_proj")
    )
    if projection == "ip_image_proj" or (held and projection is None):
        raise CheckpointError(
            f"the {kind} has an IP-Adapter loaded, which wants a picture at every step and is not "
            "supported; call unload_ip_adapter() of the pipeline before it is given"
        )
    if projection not in (None, "text_proj"):
        raise CheckpointError(
            "the checkpoint's network wants pictures beside the prompt (encoder_hid_dim_type = "
            f"{projection!r}), which is not supported"
        )
    if config.get("addition_embed_type", None) != addition:
        raise CheckpointError(
            "the checkpoint's network has addition_embed_type = "
            f"{config.get('addition_embed_type')!r}, but its family gives it {addition!r}; only "
            "text-to-image checkpoints are supported"
        )


def check_channels(network: Any, channels: int, made: int | None) -> None:
    """Refuse a network whose latents are not those of the autoencoder, or whose output is no
    prediction of them.

    Args:
        network: The U-Net or transformer.
        channels: Of a state, as the network takes them.
        made: Of a latent, as the autoencoder makes them; None where there is none.
    """
    if made is not None and channels != made:
        raise CheckpointError(
            f"the checkpoint's network takes {channels} channels, but its autoencoder makes "
            f"{made}; give denoiser= or vae= one that fits the other (networks for inpainting, "
            "upscaling or editing take more channels, and only text-to-image checkpoints are "
            "supported)"
        )
    taken, given = network.config.in_channels, network.config.get("out_channels", None)
    # Twice as many where the network predicts a variance as well.
    if given is not None and given not in (taken, 2 * taken):
        raise CheckpointError(
            f"the checkpoint's network takes {taken} channels and gives {given}, expected {taken}, "
            f"or {2 * taken} with a variance; only text-to-image and unconditional checkpoints are "
            "supported"
        )


def check_widths(widths: Sequence[tuple[str, Any, str, int | None]]) -> None:
    """Refuse a network that takes embeddings of another width than the encoders make.

    Args:
        widths: Name and value of the network's setting (a number, or one per block; None is not
            looked at), what is given, and its width; None where that is not known.
    """
    for name, expected, what, width in widths:
        each = expected if isinstance(expected, list | tuple) else [expected]
        wrong = [
            number
            for number in each
            if number is not None and width is not None and number != width
        ]
        if wrong:
            raise CheckpointError(
                f"the network takes embeddings of width {wrong[0]} ({name}), but {what} makes "
                f"{width}; give a denoiser= that was trained with these encoders, or open the "
                "checkpoint that it belongs to"
            )


def width(encoder: Any) -> int | None:
    """Width of a text encoder's hidden states; None where it is not known."""
    return getattr(getattr(encoder, "config", None), "hidden_size", None)


def text_width(unet: Any, what: str, made: int | None) -> tuple[str, Any, str, int | None]:
    """What a U-Net's text width is compared with, for :func:`check_widths`."""
    config = unet.config
    blocks = [*config.down_block_types, config.get("mid_block_type") or "", *config.up_block_types]
    name = (
        "encoder_hid_dim"
        if config.get("encoder_hid_dim_type") == "text_proj"
        else "cross_attention_dim"
    )
    # Without attention to the prompt its width does not matter.
    return name, config[name] if any("CrossAttn" in block for block in blocks) else None, what, made


def projection(encoder: Any) -> int | None:
    """Width of the embedding that a text encoder with a projection makes; None where it is not
    known.
    """
    return getattr(getattr(encoder, "config", None), "projection_dim", None)


def give_lengths(pipe: Any, tokenizers: Iterable[str]) -> None:
    """Tell tokenizers that have no length, or a greater one than their encoder, how many tokens it
    takes.

    Raises:
        CheckpointError: Where that is not known.
    """
    for part in tokenizers:
        tokenizer, encoder = (
            getattr(pipe, part),
            getattr(pipe, part.replace("tokenizer", "text_encoder"), None),
        )
        if tokenizer is None:
            continue
        given, most = tokenizer.model_max_length, positions(encoder)
        if most is None and given >= NO_LENGTH:
            raise CheckpointError(
                f"the checkpoint's {part} has no model_max_length, and the configuration of its "
                "encoder does not say how many tokens it takes; add model_max_length to its "
                "tokenizer_config.json"
            )
        if most is None or given <= most:
            continue
        tokenizer.model_max_length = most
        if part == "tokenizer" and hasattr(pipe, "tokenizer_max_length"):
            # Some pipelines have copied it.
            pipe.tokenizer_max_length = most


def positions(encoder: Any) -> int | None:
    """How many tokens a text encoder takes; None where it is not known, or has no bound."""
    config = getattr(encoder, "config", None)
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return T5_POSITIONS if getattr(config, "model_type", None) in ("t5", "umt5") else None
