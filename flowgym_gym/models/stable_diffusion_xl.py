"""Stable Diffusion XL: two text encoders, pooled embeddings, and the size of the picture as
conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgym_gym.models.fitting import projection, text_width, width
from flowgym_gym.models.pipeline import LatentBaseModel

# Height and width, where the picture was cropped, and the height and width that are aimed at.
SIZES = 6


class StableDiffusionXLBaseModel(LatentBaseModel):
    """Stable Diffusion XL with classifier-free guidance.

    States are latents, ``(n, 4, height / 8, width / 8)``. The size conditions are those of an
    uncropped picture of the size that is made. An empty ``negative_prompt`` stands for zeros where
    the checkpoint says so (``force_zeros_for_empty_prompt``), as no negative prompt does in
    diffusers. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis,
            ICLR 2024.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    checkpoints: ClassVar[dict[str, str]] = {
        "stabilityai/stable-diffusion-xl-base-1.0": "openrail++"
    }
    denoiser_name: ClassVar[str] = "unet"
    parts: ClassVar[tuple[str, ...]] = ("vae", "tokenizer_2", "text_encoder_2")
    measured: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    addition: ClassVar[str | None] = "text_time"
    # In float16 this autoencoder overflows; diffusers, too, decodes in float32 then.
    upcast_vae: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "text_embeds", "time_ids")

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        config = self.denoiser.config
        encoders = [
            encoder
            for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2)
            if encoder is not None
        ]
        widths = [width(encoder) for encoder in encoders]
        together = (
            None if None in widths else sum(number for number in widths if number is not None)
        )
        pooled = projection(self.pipe.text_encoder_2)
        times = SIZES * (config.addition_time_embed_dim or 0)
        return (
            text_width(self.denoiser, "the text encoders together", together),
            (
                "projection_class_embeddings_input_dim",
                config.projection_class_embeddings_input_dim,
                f"the second text encoder with {SIZES} size conditions",
                None if pooled is None else pooled + times,
            ),
        )

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the checkpoint takes."""
        for part in ("tokenizer", "tokenizer_2"):
            if getattr(self.pipe, part) is not None:
                self._check_length(prompt, part)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states ``(tokens, features)``, pooled ``text_embeds`` and ``time_ids``, shape
        ``(6,)``.
        """
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        size = torch.tensor(
            [*self.image_size, 0, 0, *self.image_size], dtype=states.dtype, device=states.device
        )
        conditions = {
            "encoder_hidden_states": states[0],
            "text_embeds": pooled[0],
            "time_ids": size,
        }
        return conditions, pooled[0]

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        """As :meth:`encode`; zeros for an empty prompt where the checkpoint says so."""
        conditions = super().encode_negative(prompt)
        if not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            zeros = {
                name: torch.zeros_like(conditions[name])
                for name in ("encoder_hidden_states", "text_embeds")
            }
            return {**conditions, **zeros}
        return conditions

    def _unscaled(self, latents: Tensor) -> Tensor:
        latents = super()._unscaled(latents)
        mean, std = (self.vae.config.get(name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return latents
        return (
            latents * latents.new_tensor(std)[:, None, None]
            + latents.new_tensor(mean)[:, None, None]
        )

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The U-Net's prediction; see :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`."""
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        output: Tensor = self.denoiser(
            x,
            timesteps,
            conditions["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output
