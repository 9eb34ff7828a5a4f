"""DiT: a class-conditional diffusion transformer; its prompts are class labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flowgym_gym.errors import OptionError, did_you_mean, shown
from flowgym_gym.models.pipeline import LatentBaseModel


class DiTBaseModel(LatentBaseModel):
    """DiT with classifier-free guidance.

    States are latents, ``(n, 4, height / 8, width / 8)``. A prompt is a class: its number, such as
    ``"207"``, or one of the checkpoint's labels, such as ``"golden retriever"``. Guidance steers
    away from the class that stands for none, or from a ``negative_prompt``. See
    :class:`~flowgym_gym.models.pipeline.LatentBaseModel` for the arguments and the errors.

    References:
        Peebles and Xie, Scalable Diffusion Models with Transformers, ICCV 2023.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("DiTPipeline",)
    checkpoints: ClassVar[dict[str, str]] = {
        "facebook/DiT-XL-2-256": "cc-by-nc-4.0 (of the authors' repository)"
    }
    parts: ClassVar[tuple[str, ...]] = ("vae",)
    default_prompt: ClassVar[str] = "0"
    conditions: ClassVar[tuple[str, ...]] = ("class_labels",)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.denoiser.config.num_embeds_ada_norm)

    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError unless the prompt is a class, or empty."""
        if prompt:
            self.class_of(prompt)

    def class_of(self, prompt: str) -> int:
        """Number of the class that a prompt names.

        Raises:
            OptionError: If there is none.
        """
        labels = self.pipe.labels
        # No class has so many digits, and Python reads no more than some thousands of them.
        listed = prompt.strip().isdecimal() and len(prompt) <= 20
        number = labels.get(prompt, int(prompt) if listed else -1)
        if not 0 <= number < self.classes:
            known = f", or one of its {len(labels)} labels" if labels else ""
            raise OptionError(
                f"prompt is {shown(prompt)}, expected a class of the checkpoint, a number from 0 "
                f"to {self.classes - 1}{known}{did_you_mean(prompt, labels)}"
            )
        return int(number)

    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """The class, shape ``()``, and its embedding, shape ``(features,)``."""
        label = torch.tensor(self.class_of(prompt), device=self.device)
        embedder = self.denoiser.transformer_blocks[0].norm1.emb.class_embedder
        return {"class_labels": label}, embedder(label[None])[0]

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        """The class to steer away from; for an empty prompt the one that stands for none."""
        if prompt:
            return super().encode_negative(prompt)
        return {"class_labels": torch.tensor(self.classes, device=self.device)}

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The transformer's prediction; see
        :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`.
        """
        output: Tensor = self.denoiser(x, timestep=timesteps, **conditions, return_dict=False)[0]
        return output
