"""Stable Diffusion 1.x and 2.x: the embedded checkpoint, a local diffusers folder, or a Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from flowgym_gym.models.checkpoints import EMBEDDED
from flowgym_gym.models.fitting import text_width, width
from flowgym_gym.models.pipeline import LatentBaseModel

__all__ = ["EMBEDDED", "StableDiffusionBaseModel"]


class StableDiffusionBaseModel(LatentBaseModel):
    """Stable Diffusion 1.x and 2.x (``epsilon`` and ``v_prediction``) with classifier-free
    guidance.

    States are latents, ``(n, 4, height / 8, width / 8)``. Without ``checkpoint`` the one embedded
    in the package is opened, ``"tiny"``, which works offline. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    checkpoints: ClassVar[dict[str, str]] = {
        "sd-legacy/stable-diffusion-v1-5": "creativeml-openrail-m",
        "stabilityai/stable-diffusion-2-1": "openrail++",
    }
    default_checkpoint: ClassVar[str | None] = "tiny"
    denoiser_name: ClassVar[str] = "unet"
    parts: ClassVar[tuple[str, ...]] = ("vae", "tokenizer", "text_encoder")
    measured: ClassVar[tuple[str, ...]] = ("tokenizer",)
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)

    @property
    def unet(self) -> Any:
        """The network."""
        return self.denoiser

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        return (text_width(self.denoiser, "the text encoder", width(self.pipe.text_encoder)),)

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the checkpoint takes."""
        self._check_length(prompt, "tokenizer")

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states, shape ``(tokens, features)``, and pooled output ``(features,)`` of the
        text encoder.

        An encoder that pools nothing, such as T5, is pooled by the mean over the prompt's tokens.
        """
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = tokenizer(
            self.pipe.maybe_convert_prompt(prompt, tokenizer),
            padding="max_length",
            max_length=self._longest("tokenizer"),
            return_tensors="pt",
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        output = encoder(
            tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device) if masked else None,
        )
        states = output.last_hidden_state[0]
        pooled = getattr(output, "pooler_output", None)
        words = tokens.attention_mask[0].bool().to(states.device)
        return {"encoder_hidden_states": states}, states[words].mean(
            dim=0
        ) if pooled is None else pooled[0]

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The U-Net's prediction; see :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`."""
        output: Tensor = self.unet(x, timesteps, **conditions, return_dict=False)[0]
        return output
