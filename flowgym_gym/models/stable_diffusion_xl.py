"""Stable Diffusion XL: two text encoders, pooled embeddings, and the size of the picture as conditions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flowgym_gym.models.pipeline import LatentBaseModel


class StableDiffusionXLBaseModel(LatentBaseModel):
    """Stable Diffusion XL with classifier-free guidance.

    States are latents, ``(n, 4, height / 8, width / 8)``. The size conditions are those of an uncropped picture of the
    size that is made. An empty ``negative_prompt`` stands for zeros where the checkpoint says so
    (``force_zeros_for_empty_prompt``), as no negative prompt does in diffusers. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, ICLR 2024.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    checkpoints: ClassVar[dict[str, str]] = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}
    denoiser_name: ClassVar[str] = "unet"
    # In float16 this autoencoder overflows; diffusers, too, decodes in float32 then.
    upcast_vae: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "text_embeds", "time_ids")

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the checkpoint takes."""
        for tokenizer in (self.pipe.tokenizer, self.pipe.tokenizer_2):
            if tokenizer is not None:
                self._check_length(prompt, tokenizer, tokenizer.model_max_length)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states ``(tokens, features)``, pooled ``text_embeds`` and ``time_ids``, shape ``(6,)``."""
        states, _, pooled, _ = self.pipe.encode_prompt(prompt, device=self.device, do_classifier_free_guidance=False)
        size = torch.tensor([*self.image_size, 0, 0, *self.image_size], dtype=states.dtype, device=states.device)
        conditions = {"encoder_hidden_states": states[0], "text_embeds": pooled[0], "time_ids": size}
        return conditions, pooled[0]

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        """As :meth:`encode`; zeros for an empty prompt where the checkpoint says so."""
        conditions = super().encode_negative(prompt)
        if not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            zeros = {name: torch.zeros_like(conditions[name]) for name in ("encoder_hidden_states", "text_embeds")}
            return {**conditions, **zeros}
        return conditions

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The U-Net's prediction; see :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`."""
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        output: Tensor = self.denoiser(
            x, timesteps, conditions["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False
        )[0]
        return output
