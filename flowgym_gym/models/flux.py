"""Flux.1: flow matching with packed latents and a guidance scale that the network takes as an
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgym_gym.checks import check_number
from flowgym_gym.errors import OptionError
from flowgym_gym.models.fitting import width
from flowgym_gym.models.pipeline import FlowMatchBaseModel

# diffusers' defaults.
T5_TOKENS = 512
DISTILLED_GUIDANCE = 3.5


class FluxBaseModel(FlowMatchBaseModel):
    """Flux.1: guidance-distilled (``dev``) or not (``schnell``).

    States are latents as the autoencoder has them, ``(n, 16, height / 8, width / 8)``: the
    network's packing of 2 x 2 patches into tokens is undone, so that an action has the latent's
    shape. The CLIP encoder reads the first 77 tokens of a prompt.

    Args:
        checkpoint: See :class:`~flowgym_gym.models.pipeline.LatentBaseModel`.
        prompts: See there.
        guidance_scale: What a guidance-distilled network takes as an input, at least 0; None is
            diffusers' 3.5. Costs nothing. Other checkpoints take none: there None, and all from 0
            up to 1, which is off in diffusers, change nothing.
        true_cfg_scale: Weight of classifier-free guidance; from 0 up to 1 it is off, above 1 the
            network runs on twice the batch.
        **options: Further arguments of :class:`~flowgym_gym.models.pipeline.LatentBaseModel`;
            ``height`` and ``width`` are 1024 where they are None, and ``negative_prompt`` is what
            classifier-free guidance steers away from.

    Raises:
        CheckpointError: If a checkpoint is missing, damaged, or of another family.
        OptionError: If another argument cannot be used.

    References:
        Black Forest Labs, FLUX.1, 2024; Meng et al., On Distillation of Guided Diffusion Models,
        CVPR 2023.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    checkpoints: ClassVar[dict[str, str]] = {
        "black-forest-labs/FLUX.1-schnell": "apache-2.0",
        "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    }
    parts: ClassVar[tuple[str, ...]] = (
        "vae",
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
    )
    measured: ClassVar[tuple[str, ...]] = ("tokenizer",)
    even_times: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "pooled_projections")

    def __init__(
        self,
        checkpoint: Any = None,
        prompts: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        *,
        true_cfg_scale: float = 1.0,
        **options: Any,
    ) -> None:
        if guidance_scale is not None:
            check_number("guidance_scale", guidance_scale, minimum=0)
        check_number("true_cfg_scale", true_cfg_scale, minimum=0)
        super().__init__(checkpoint, prompts, true_cfg_scale, **options)
        distilled = self.denoiser.config.guidance_embeds
        if guidance_scale is not None and guidance_scale > 1 and not distilled:
            raise OptionError(
                f"guidance_scale is {guidance_scale}, but the checkpoint is not guidance-distilled "
                "and takes none; true_cfg_scale is classifier-free guidance"
            )
        self.distilled_guidance = float(
            DISTILLED_GUIDANCE if guidance_scale is None else guidance_scale
        )

    @property
    def patch(self) -> int:
        """Two by two of a latent's elements are one token."""
        return 2

    def _read_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return self._shape(self.pipe.default_sample_size, self.patch, height, width)

    @property
    def _channels(self) -> int:
        # A token is a patch of 2 x 2.
        return int(self.denoiser.config.in_channels) // 4

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        config = self.denoiser.config
        return (
            (
                "joint_attention_dim",
                config.joint_attention_dim,
                "the T5 encoder",
                width(self.pipe.text_encoder_2),
            ),
            (
                "pooled_projection_dim",
                config.pooled_projection_dim,
                "the CLIP encoder",
                width(self.pipe.text_encoder),
            ),
        )

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError if the prompt has more tokens than the T5 encoder takes."""
        self._check_length(prompt, "tokenizer_2", T5_TOKENS)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states of the T5 encoder, ``(tokens, features)``, and the pooled output of the
        CLIP encoder.
        """
        states, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=T5_TOKENS
        )
        return {"encoder_hidden_states": states[0], "pooled_projections": pooled[0]}, pooled[0]

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The transformer's prediction; see
        :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`.
        """
        n, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        packed = (
            x.reshape(n, channels, rows, 2, columns, 2)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(n, rows * columns, -1)
        )
        where = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        guidance = torch.full((n,), self.distilled_guidance, dtype=torch.float32, device=x.device)
        output: Tensor = self.denoiser(
            packed,
            timestep=timesteps.to(x.dtype) / 1000,
            guidance=guidance if self.denoiser.config.guidance_embeds else None,
            txt_ids=x.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.nn.functional.pad(where, (1, 0)).to(x),
            **conditions,
            return_dict=False,
        )[0]
        return (
            output.reshape(n, rows, columns, channels, 2, 2)
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(x.shape)
        )
