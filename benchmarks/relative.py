"""The nearest relative, diffusiongym, on the same network: a base model written in its own
interface.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusiongym import BaseModel, DDTensor, DiffusionScheduler, EpsilonEnvironment, Reward


class SharedStableDiffusion(BaseModel):  # type: ignore[misc]
    """The pipeline that the other rows use; pictures are decoded in slices of the same size.

    Args:
        pipe: A loaded ``StableDiffusionPipeline``.
        prompt: Of every episode.
        decode_batch: Latents decoded at a time.
    """

    output_type = "epsilon"

    def __init__(self, pipe: Any, prompt: str, decode_batch: int) -> None:
        super().__init__(pipe.device)
        self.pipe, self.prompt, self.decode_batch = pipe, prompt, decode_batch
        self._scheduler = DiffusionScheduler(pipe.scheduler.alphas_cumprod.to(pipe.device))

    @property
    def scheduler(self) -> Any:
        """Its own schedule."""
        return self._scheduler

    def sample_p0(self, n: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Standard normal latents."""
        config = self.pipe.unet.config
        shape = (n, config.in_channels, config.sample_size, config.sample_size)
        return DDTensor(torch.randn(shape, device=self.device)), kwargs

    def preprocess(self, x: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Encode the prompt."""
        states, _ = self.pipe.encode_prompt(self.prompt, self.device, len(x), False)
        return x, {**kwargs, "encoder_hidden_states": states}

    def forward(self, x: Any, t: torch.Tensor, **kwargs: Any) -> Any:
        """The U-Net's prediction."""
        unet = self.pipe.unet
        output = unet(
            x.data.to(unet.dtype), self.scheduler.model_input(t), kwargs["encoder_hidden_states"]
        )
        return DDTensor(output.sample.to(x.data.dtype))

    def postprocess(self, x: Any) -> Any:
        """Decode to pictures in [0, 1]."""
        vae = self.pipe.vae
        latents = (x.data / vae.config.scaling_factor).to(vae.dtype)
        pictures = torch.cat([vae.decode(part).sample for part in latents.split(self.decode_batch)])
        return DDTensor((pictures.float() / 2 + 0.5).clamp(0, 1))


class Red(Reward):  # type: ignore[misc]
    """Mean of the red channel."""

    def __call__(
        self, sample: Any, latent: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score pictures."""
        rewards = sample.data[:, 0].mean(dim=(1, 2))
        return rewards, torch.ones_like(rewards)


def environment(pipe: Any, prompt: str, steps: int, decode_batch: int) -> Any:
    """Its environment; ``sample(n, pbar=False)`` rolls out ``n`` trajectories."""
    model = SharedStableDiffusion(pipe, prompt, decode_batch).eval()
    return EpsilonEnvironment(model, Red(), steps, reward_scale=100)
