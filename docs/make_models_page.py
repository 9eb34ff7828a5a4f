"""Makes the table of docs/models.md from the registry: ``python docs/make_models_page.py``.

Families, checkpoint ids and licences come from the registered classes; shapes, outputs and
schedules from the code that opens a checkpoint, on networks of the checkpoint's full-size
architecture that are built without memory for their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from flowgym_gym import base_model_registry
from flowgym_gym.models.pipeline import LatentBaseModel, PipelineBaseModel

PAGE = Path(__file__).with_name("models.md")

SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def clip_text(hidden: int, layers: int, heads: int, projected: bool = False) -> nn.Module:
    """A CLIP text encoder."""
    config = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=hidden,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(
        config
    )


def t5_xxl() -> nn.Module:
    """The encoder of T5 1.1 XXL."""
    config = transformers.T5Config(
        d_model=4096,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        vocab_size=32128,
    )
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4) -> nn.Module:
    """The autoencoder of Stable Diffusion, or that of 3 and Flux with 16 channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def stable_diffusion_1() -> dict[str, Any]:
    """Stable Diffusion 1.5."""
    return {
        "unet": diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "text_encoder": clip_text(768, 12, 12),
        "vae": vae(),
        "scheduler": partial(diffusers.DDIMScheduler, **SD_SCHEDULE),
    }


def stable_diffusion_2() -> dict[str, Any]:
    """Stable Diffusion 2.1."""
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        "text_encoder": clip_text(1024, 23, 16),
        "vae": vae(),
        "scheduler": partial(
            diffusers.DDIMScheduler, **SD_SCHEDULE, prediction_type="v_prediction"
        ),
    }


def stable_diffusion_xl() -> dict[str, Any]:
    """Stable Diffusion XL 1.0."""
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        "text_encoder": clip_text(768, 12, 12),
        "text_encoder_2": clip_text(1280, 32, 20, projected=True),
        "vae": vae(),
        "scheduler": partial(
            diffusers.EulerDiscreteScheduler,
            **{
                k: SD_SCHEDULE[k]
                for k in ("beta_start", "beta_end", "beta_schedule", "steps_offset")
            },
        ),
    }


def stable_diffusion_3() -> dict[str, Any]:
    """Stable Diffusion 3.5 medium."""
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "text_encoder": clip_text(768, 12, 12, projected=True),
        "text_encoder_2": clip_text(1280, 32, 20, projected=True),
        "text_encoder_3": t5_xxl(),
        "vae": vae(16),
        "scheduler": partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0),
    }


def flux(distilled: bool) -> dict[str, Any]:
    """Flux.1, dev or schnell."""
    return {
        "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=distilled),
        "text_encoder": clip_text(768, 12, 12),
        "text_encoder_2": t5_xxl(),
        "vae": vae(16),
        "scheduler": partial(
            diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=distilled
        ),
        "default_sample_size": 128,
    }


def pixart() -> dict[str, Any]:
    """PixArt for 1024 pixels."""
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=128, patch_size=2, caption_channels=4096
        ),
        "text_encoder": t5_xxl(),
        "vae": vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler,
    }


def dit() -> dict[str, Any]:
    """DiT-XL/2 for 256 pixels."""
    return {
        "transformer": diffusers.DiTTransformer2DModel(sample_size=32, out_channels=8),
        "vae": vae(),
        "scheduler": partial(diffusers.DDIMScheduler, clip_sample=False),
    }


def ddpm() -> dict[str, Any]:
    """DDPM for CIFAR-10."""
    return {
        "unet": diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        ),
        "scheduler": diffusers.DDPMScheduler,
    }


ARCHITECTURES: dict[str, Callable[[], dict[str, Any]]] = {
    "sd-legacy/stable-diffusion-v1-5": stable_diffusion_1,
    "stabilityai/stable-diffusion-2-1": stable_diffusion_2,
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "stabilityai/stable-diffusion-3.5-medium": stable_diffusion_3,
    "black-forest-labs/FLUX.1-schnell": lambda: flux(distilled=False),
    "black-forest-labs/FLUX.1-dev": lambda: flux(distilled=True),
    "PixArt-alpha/PixArt-XL-2-1024-MS": pixart,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": pixart,
    "facebook/DiT-XL-2-256": dit,
    "google/ddpm-cifar10-32": ddpm,
}

BEGIN, END = "<!-- table made by make_models_page.py -->\n\n", "\n\n<!-- end of the table -->"


def table() -> str:
    """One row for each checkpoint of each registered family."""
    rows = [
        "| id | checkpoint | state | output | schedule | licence | parameters | float16 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    entries = [base_model_registry.get(id) for id in base_model_registry.list()]
    families = {entry.id: entry.cls for entry in entries if entry.id.startswith("images/")}
    for id, cls in sorted(families.items(), key=lambda item: item[0]):
        if not issubclass(cls, PipelineBaseModel):
            continue
        for checkpoint, licence in cls.checkpoints.items():
            rows.append(
                f"| `{id}` | `{checkpoint}` | {row(cls, ARCHITECTURES[checkpoint], licence)} |"
            )
    return "\n".join(rows)


def row(
    cls: type[PipelineBaseModel], architecture: Callable[[], dict[str, Any]], licence: str
) -> str:
    """The columns that a checkpoint's architecture decides."""
    with torch.device("meta"):
        built = architecture()
    parts = {name: part for name, part in built.items() if isinstance(part, nn.Module)}
    # What a constructor does, less the tokenizers.
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    model.pipe = SimpleNamespace(**{**built, "scheduler": built["scheduler"]()})
    model.denoiser = parts[cls.denoiser_name]
    model._clip = None
    model.state_shape = model._read_shape(None, None)
    schedule, output = model._read_schedule()
    parameters = sum(p.numel() for part in parts.values() for p in part.parameters())
    kind = type(schedule).__name__
    if (
        issubclass(cls, LatentBaseModel)
        and model.state_shape[0] != parts["vae"].config.latent_channels
    ):
        raise SystemExit(f"{cls.__name__}: state and autoencoder do not fit")
    shape = " x ".join(map(str, model.state_shape))
    count = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    memory = (
        f"{2 * parameters / 2**30:.1f} GiB"
        if parameters > 2**28
        else f"{2 * parameters / 2**20:.0f} MiB"
    )
    return f"{shape} | `{output}` | `{kind}` | {licence} | {count} | {memory}"


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END.strip("\n"))
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
