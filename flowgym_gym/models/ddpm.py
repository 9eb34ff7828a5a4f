"""DDPM: unconditional diffusion models of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgym_gym.checks import check_choice
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.models.checkpoints import as_memory, find_changes
from flowgym_gym.models.fitting import check_channels
from flowgym_gym.models.pipeline import PipelineBaseModel, read_size
from flowgym_gym.types import FlowTensor


class DDPMBaseModel(PipelineBaseModel):
    """A diffusion model of pixels, without a prompt.

    States are images, ``(n, c, height, width)``, in [-1, 1] once they are finished; samples are the
    same in [0, 1]. The noise of a step is that of DDIM, which is DDPM's smaller variance
    (``fixed_small``).

    Args:
        checkpoint: A local folder in diffusers' format, a Hub id, or an open pipeline.
        device: Where the model runs; an open pipeline stays where it is.
        dtype: Number format of the network: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        denoiser: Folder or Hub id of a fine-tuned U-Net that takes the place of the checkpoint's
            own.
        memory: Memory options of diffusers to switch on, such as ``"attention_slicing"``.
        compile: Whether the network goes through ``torch.compile``.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or of another family.
        OptionError: If another argument cannot be used.

    References:
        Ho et al., Denoising Diffusion Probabilistic Models, NeurIPS 2020.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("DDPMPipeline", "DDIMPipeline")
    checkpoints: ClassVar[dict[str, str]] = {"google/ddpm-cifar10-32": "apache-2.0"}
    denoiser_name: ClassVar[str] = "unet"

    def __init__(
        self,
        checkpoint: Any = None,
        device: torch.device | str | None = None,
        dtype: str = "float32",
        denoiser: str | None = None,
        memory: str | Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        check_choice("compile", compile, (False, True))
        changes = find_changes(denoiser, memory=as_memory(memory), compile=compile)
        super().__init__(checkpoint, device, dtype, changes)

    def _read_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        rows, columns = read_size(self.denoiser.config.sample_size, given=False)
        return self.denoiser.config.in_channels, rows, columns

    def _check_parts(self) -> None:
        super()._check_parts()
        check_channels(self.denoiser, self.denoiser.config.in_channels, None)

    def sample_p0(
        self, n: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[FlowTensor, dict[str, Any]]:
        """Standard normal noise, shape ``(n, c, height, width)``."""
        return self.draw_noise(n, generator), kwargs

    @plain_defaults()
    def forward(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> FlowTensor:
        """The U-Net's prediction; see :class:`BaseModel`."""
        output = self.denoise(x.data.to(self.denoiser_dtype), self._scheduler.model_input(t))
        return self._finish(x.data, t, output.to(x.dtype))

    def postprocess(self, x: FlowTensor) -> FlowTensor:
        """Images in [0, 1]."""
        return FlowTensor((x.data / 2 + 0.5).clamp(0, 1))

    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The U-Net's prediction; see :class:`~flowgym_gym.models.pipeline.PipelineBaseModel`."""
        output: Tensor = self.denoiser(x, timesteps, return_dict=False)[0]
        return output
