"""PixArt-alpha and PixArt-sigma: a diffusion transformer on T5 embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgym_gym.models.fitting import width
from flowgym_gym.models.pipeline import LatentBaseModel


class PixArtBaseModel(LatentBaseModel):
    """PixArt with classifier-free guidance.

    States are latents, ``(n, 4, height / 8, width / 8)``; the size is that which is asked for,
    without diffusers' ``use_resolution_binning``. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Chen et al., PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic
        Text-to-Image Synthesis, ICLR 2024.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    checkpoints: ClassVar[dict[str, str]] = {
        "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
    }
    parts: ClassVar[tuple[str, ...]] = ("vae", "tokenizer", "text_encoder")
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_attention_mask")

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        return (
            (
                "caption_channels",
                self.denoiser.config.caption_channels,
                "the T5 encoder",
                width(self.pipe.text_encoder),
            ),
        )

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the T5 encoder is given."""
        longest = (
            inspect.signature(self.pipe.encode_prompt).parameters["max_sequence_length"].default
        )
        self._check_length(prompt, "tokenizer", longest)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states ``(tokens, features)`` with their mask, and the mean of those that are not
        masked.
        """
        states, mask, _, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=self.device
        )
        conditions = {"encoder_hidden_states": states[0], "encoder_attention_mask": mask[0]}
        return conditions, states[0][mask[0].bool()].mean(dim=0)

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The transformer's prediction; see
        :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`.
        """
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        # Where the configuration leaves it open, the network has decided by its size.
        if self.denoiser.use_additional_conditions:
            height, width = self.image_size
            added = {
                "resolution": torch.tensor([[height, width]]).repeat(len(x), 1).to(x),
                "aspect_ratio": torch.tensor([[height / width]]).repeat(len(x), 1).to(x),
            }
        output: Tensor = self.denoiser(
            x, timestep=timesteps, added_cond_kwargs=added, **conditions, return_dict=False
        )[0]
        return output
