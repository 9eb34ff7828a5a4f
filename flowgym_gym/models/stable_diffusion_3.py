"""Stable Diffusion 3 and 3.5: flow matching with a transformer and three text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from flowgym_gym.errors import OptionError
from flowgym_gym.models.fitting import projection, width
from flowgym_gym.models.pipeline import FlowMatchBaseModel

# diffusers' default for the T5 encoder.
T5_TOKENS = 256


class StableDiffusion3BaseModel(FlowMatchBaseModel):
    """Stable Diffusion 3 with classifier-free guidance; the T5 encoder may be missing, as in
    diffusers.

    States are latents, ``(n, 16, height / 8, width / 8)``. The CLIP encoders read the first 77
    tokens of a prompt. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML
        2024.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    checkpoints: ClassVar[dict[str, str]] = {
        "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community"
    }
    parts: ClassVar[tuple[str, ...]] = (
        "vae",
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
    )
    measured: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    max_shift: ClassVar[float] = 1.16
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "pooled_projections")

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        config, pipe = self.denoiser.config, self.pipe
        pooled = [projection(pipe.text_encoder), projection(pipe.text_encoder_2)]
        together = (
            None if None in pooled else sum(number for number in pooled if number is not None)
        )
        return (
            (
                "joint_attention_dim",
                config.joint_attention_dim,
                "the T5 encoder",
                width(pipe.text_encoder_3),
            ),
            (
                "pooled_projection_dim",
                config.pooled_projection_dim,
                "the CLIP encoders together",
                together,
            ),
        )

    def _read_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        shape = super()._read_shape(height, width)
        most = self.denoiser.config.pos_embed_max_size * self.patch
        if max(shape[1:]) > most:
            raise OptionError(
                f"height and width are {shape[1] * self.vae_scale} and {shape[2] * self.vae_scale} "
                f"pixels, but the checkpoint's network has positions for {most * self.vae_scale} "
                "at most"
            )
        return shape

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the longest encoder takes."""
        if self.pipe.text_encoder_3 is None:
            self._check_length(prompt, "tokenizer")
        else:
            self._check_length(prompt, "tokenizer_3", T5_TOKENS)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states of all encoders, ``(tokens, features)``, and the pooled output of the CLIP
        encoders.
        """
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}, pooled[0]

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The transformer's prediction; see
        :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`.
        """
        output: Tensor = self.denoiser(x, timestep=timesteps, **conditions, return_dict=False)[0]
        return output
