r"""What all diffusers pipelines have in common: opening, noise, prompts, guidance, decoding.

A family is a subclass that names the classes of pipelines it opens and says how its network is
called (``denoise``) and, where it takes prompts, how a prompt is encoded (``encode``). With
classifier-free guidance (Ho and Salimans, 2022) of weight :math:`w` in diffusers' convention the
prediction is

.. math:: o = o_{\text{negative}} + w\, (o_{\text{prompt}} - o_{\text{negative}}),

both from one call of the network on twice the batch.

A checkpoint whose scheduler says ``clip_sample`` bounds the expected sample to :math:`[-r, r]` at
every step. Such a model is read as one that predicts the bounded sample (``output_type``
``"endpoint"``), which is ancestral sampling with clipping at noise level 1, and DDIM with
diffusers' ``use_clipped_model_output=True`` at noise level 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_number, check_whole
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.dynamics import OUTPUTS, Schedule
from flowgym_gym.errors import CheckpointError, FlowGymError, ModelError, OptionError, reason, shown
from flowgym_gym.models.base import BaseModel, OutputType
from flowgym_gym.models.checkpoints import (
    Changes,
    as_memory,
    copy_pipeline,
    find_changes,
    load_pipeline,
    prepare,
    resolve,
)
from flowgym_gym.models.fitting import (
    check_channels,
    check_network,
    check_schedule,
    check_widths,
    give_lengths,
    require_parts,
)
from flowgym_gym.models.parts import check_autoencoder
from flowgym_gym.prompts import check_negative_prompt, read_prompts
from flowgym_gym.schedulers import DiffusionScheduler, FlowMatchScheduler, Scheduler
from flowgym_gym.types import FlowTensor, append_dims

DEFAULT_PROMPT = "a photo of a cat"
# How many prompts besides an environment's own stay encoded.
ENCODED_PROMPTS = 64

# diffusers' prediction_type -> output_type
PREDICTIONS: dict[str, OutputType] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "endpoint",
}


class PipelineBaseModel(BaseModel[FlowTensor]):
    """A diffusers pipeline as a base model; subclasses are the families.

    Args:
        checkpoint: A local folder in diffusers' format, a Hub id, or a pipeline that is already
            open (which is frozen in place); or what :func:`~flowgym_gym.models.checkpoints.resolve`
            found. Only safetensors weights are loaded.
        device: Where the model runs; an open pipeline stays where it is.
        dtype: Number format of the network: ``"float32"``, ``"float16"`` or ``"bfloat16"``; that of
            an open pipeline stays.
        changes: What is changed about the checkpoint.
        size: Height and width of the images in pixels; None for the checkpoint's own.

    Attributes:
        pipelines: Names of the pipeline classes of the family, as in ``model_index.json``.
        checkpoints: Hub ids that are known to fit, with the licence that their cards state.
        default_checkpoint: What is opened without ``checkpoint``; None where that must be given.
        denoiser_name: Which part of the pipeline predicts.
        parts: Other parts of the pipeline that must not be missing.
        measured: Its tokenizers whose own length decides how many tokens a prompt may have.
        addition: The ``addition_embed_type`` of the family's networks.
        pipe: The pipeline.
        denoiser: Its network, a module that is frozen and in evaluation mode.
        state_shape: Shape of a state, ``(channels, height, width)``.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or of another family.
        OptionError: If another argument cannot be used.
    """

    pipelines: ClassVar[tuple[str, ...]]
    checkpoints: ClassVar[dict[str, str]]
    default_checkpoint: ClassVar[str | None] = None
    denoiser_name: ClassVar[str] = "transformer"
    parts: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[tuple[str, ...]] = ()
    addition: ClassVar[str | None] = None
    incidental: ClassVar[tuple[str, ...]] = ("device", "memory", "compile")
    state_shape: tuple[int, int, int]

    @plain_defaults()
    def __init__(
        self,
        checkpoint: Any,
        device: torch.device | str | None,
        dtype: str,
        changes: Changes,
        size: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__(device)
        if checkpoint is None:
            checkpoint = self.default_checkpoint
        if checkpoint is None:
            raise CheckpointError(
                f"{type(self).__name__} has no checkpoint of its own in this package; give "
                "checkpoint=, a local folder in diffusers' format or a Hub id such as "
                f"{next(iter(self.checkpoints))!r}"
            )
        self.pipe = self._opened(checkpoint, device, dtype, changes)
        # Then other models have the same pipeline.
        self._cached = self.pipe is not checkpoint
        require_parts(self.pipe, ("scheduler", self.denoiser_name, *self.parts))
        self._take(self.pipe)
        self._check_parts()
        # diffusers looks for this among all parameters, at every call.
        self.denoiser_dtype: torch.dtype = self.denoiser.dtype
        self.state_shape = self._read_shape(*size)
        self._clip: float | None = None
        try:
            self._scheduler, self.output_type = self._read_schedule()
        except (TypeError, ValueError) as error:
            if isinstance(error, FlowGymError):
                raise
            kind = type(self.pipe.scheduler).__name__
            raise CheckpointError(
                f"the checkpoint's {kind} cannot be read: {reason(error)}"
            ) from error
        give_lengths(self.pipe, self.measured)
        if self.pipe is checkpoint:
            prepare(checkpoint, changes.memory)
            self.device = torch.device(self.pipe._execution_device)

    def _opened(
        self, checkpoint: Any, device: torch.device | str | None, dtype: str, changes: Changes
    ) -> Any:
        """The pipeline of a checkpoint, or the open one that was given."""
        if not hasattr(checkpoint, "components"):
            found = resolve(checkpoint)
            self._check_kind(found.pipeline, str(found.source))
            return load_pipeline(
                found, str(self.device), getattr(torch, dtype), changes, self.denoiser_name
            )
        self._check_kind(type(checkpoint).__name__, "this pipeline")
        if device is not None or changes != Changes(memory=changes.memory):
            raise OptionError(
                "checkpoint is an open pipeline, which is taken as it is; move it, and load its "
                "LoRA weights and other parts, before it is given, and leave device, denoiser, vae "
                "and lora out"
            )
        if (
            dtype != "float32"
            and getattr(torch, dtype) != getattr(checkpoint, self.denoiser_name).dtype
        ):
            raise OptionError(
                f"dtype is {dtype!r}, but checkpoint is an open pipeline, whose number format stays"
            )
        return checkpoint

    def _check_parts(self) -> None:
        """Raise a CheckpointError unless the pipeline's parts fit together and are of a kind that
        is read rightly.
        """
        check_network(self.denoiser, self.addition)

    def _leave(self) -> None:
        if self._cached:
            self._take(copy_pipeline(self.pipe, self.denoiser_name))

    def _take(self, pipe: Any) -> None:
        self.pipe, self.denoiser = pipe, getattr(pipe, self.denoiser_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PipelineBaseModel:
        # Parts that are no submodules, such as text encoders, go with the model.
        super()._apply(fn, recurse)
        mine = set(self.modules())
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module) and part not in mine:
                part._apply(fn, recurse)
        self.denoiser_dtype = self.denoiser.dtype
        return self

    def _check_kind(self, kind: str, where: str) -> None:
        if kind not in self.pipelines:
            raise CheckpointError(
                f"{where} holds a {kind}, expected a {' or '.join(self.pipelines)}; "
                "flowgym_gym.models.from_pretrained picks the family by itself"
            )

    def _read_schedule(self) -> tuple[Scheduler[FlowTensor], OutputType]:
        """The schedule that DDIM sampling would use, and what the network predicts.

        Raises:
            CheckpointError: If the checkpoint's scheduler is of another kind.
        """
        config = self.pipe.scheduler.config
        check_schedule(self.pipe.scheduler, type(self.pipe).__name__)
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise CheckpointError(
                f"the checkpoint's network predicts {prediction!r}, expected one of "
                f"{tuple(PREDICTIONS)}"
            )
        self._prediction = PREDICTIONS[prediction]
        if config.get("clip_sample", False):
            self._clip = float(config.get("clip_sample_range", 1.0))
        schedule = DiffusionScheduler.from_diffusers(self.pipe.scheduler)
        if self._clip and self._prediction == "epsilon" and schedule.alphas_cumprod[-1] == 0:
            raise CheckpointError(
                "the checkpoint's scheduler has clip_sample, rescale_betas_zero_snr and "
                "prediction_type 'epsilon', but where no signal is left there is no sample in a "
                "predicted noise, to be clipped; give the checkpoint a scheduler without "
                "rescale_betas_zero_snr, or the prediction_type that its network was trained for"
            )
        return schedule, "endpoint" if self._clip else self._prediction

    @abstractmethod
    def _read_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape of a state, for images of a size in pixels or of the checkpoint's own."""

    @property
    def scheduler(self) -> Scheduler[FlowTensor]:
        """The checkpoint's own schedule."""
        return self._scheduler

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> FlowTensor:
        """Standard normal states, shape ``(n, *state_shape)``, drawn on the CPU: a seed means the
        same everywhere.
        """
        noise = torch.randn(
            n, *self.state_shape, generator=generator, dtype=torch.float32, device="cpu"
        )
        return FlowTensor(noise.to(self.device))

    @abstractmethod
    def denoise(self, x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """Call the network.

        Args:
            x: States, shape ``(n, *state_shape)``, in the network's number format.
            timesteps: The network's time input, shape ``(n,)``.
            **conditions: One entry per state.

        Returns:
            Its output, shape ``(n, c, height, width)``; channels beyond those of a state are its
            variance and unused.
        """

    def _finish(self, x: Tensor, t: Tensor, output: Tensor) -> FlowTensor:
        """Drop a learned variance and bound the expected sample, if the checkpoint does."""
        output = output[:, : x.shape[1]]
        if output.shape != x.shape:  # which would be broadcast below
            raise ModelError(
                f"{type(self.denoiser).__name__} returned shape {tuple(output.shape)}, expected "
                f"{tuple(x.shape)}"
            )
        if self._clip is None:
            return FlowTensor(output)
        coefficients = (
            getattr(self._scheduler, name)(t) for name in ("alpha", "beta", "alpha_dot", "beta_dot")
        )
        (p, q), _ = OUTPUTS[self._prediction](
            Schedule(*(append_dims(c, x.ndim) for c in coefficients))
        )
        return FlowTensor((p * x + q * output).clamp(-self._clip, self._clip))


class LatentBaseModel(PipelineBaseModel):
    """A pipeline with a prompt and an autoencoder.

    States are latents, ``(n, c, height / f, width / f)``; samples are images, ``(n, 3, height,
    width)`` in [0, 1].

    Args:
        checkpoint: A local folder in diffusers' format, a Hub id, or an open pipeline; see
            :class:`PipelineBaseModel`.
        prompts: A prompt, a list of them, or where they are: a file, ``"set:NAME"`` or a dataset's
            column, see :func:`flowgym_gym.prompts.read_prompts`. An episode draws one.
        guidance_scale: Weight of classifier-free guidance; from 0 up to 1 it is off, as in
            diffusers, above 1 the network runs on twice the batch.
        negative_prompt: What guidance steers away from; only used with guidance.
        device: Where the model runs.
        dtype: Number format of the network: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        decode_batch_size: Images decoded at a time, which bounds the memory that decoding takes.
        height: Of the images, in pixels; None for the checkpoint's own.
        width: Of the images, in pixels; None for the checkpoint's own.
        denoiser: Folder or Hub id of a fine-tuned U-Net or transformer that takes the place of the
            checkpoint's own.
        vae: The same for the autoencoder.
        lora: Folder, ``.safetensors`` file or Hub id of LoRA weights, merged into the weights;
            needs the package peft.
        lora_scale: Weight of the LoRA.
        memory: Memory options of diffusers to switch on; see :class:`PipelineBaseModel`.
        compile: Whether the network goes through ``torch.compile``: the first steps take minutes,
            the others less time; what it gains is in the benchmarks. Results differ by rounding.

    Raises:
        CheckpointError: If a checkpoint is missing, damaged, or of another family.
        OptionError: If another argument cannot be used, such as a prompt longer than the tokenizer
            takes.
    """

    default_prompt: ClassVar[str] = DEFAULT_PROMPT
    # Besides, what settings tell by the model's own values: guidance, and the size by the shape of
    # the states.
    incidental: ClassVar[tuple[str, ...]] = (
        *PipelineBaseModel.incidental, "prompts", "decode_batch_size", "height", "width",
        "guidance_scale", "true_cfg_scale", "negative_prompt",
    )  # fmt: skip
    # Whether to decode in float32 where the autoencoder's configuration says that it overflows in
    # float16.
    upcast_vae: ClassVar[bool] = False
    # What `encode` gives and `denoise` takes, by name.
    conditions: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        checkpoint: Any = None,
        prompts: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        device: torch.device | str | None = None,
        dtype: str = "float32",
        decode_batch_size: int = 8,
        height: int | None = None,
        width: int | None = None,
        denoiser: str | None = None,
        vae: str | None = None,
        lora: str | None = None,
        lora_scale: float = 1.0,
        memory: str | Sequence[str] = (),
        compile: bool = False,
    ) -> None:
        check_number("guidance_scale", guidance_scale, minimum=0)
        check_whole("decode_batch_size", decode_batch_size)
        check_number("lora_scale", lora_scale)
        check_negative_prompt(negative_prompt)
        found = read_prompts([self.default_prompt] if prompts is None else prompts)
        check_choice("compile", compile, (False, True))
        changes = find_changes(
            denoiser,
            vae,
            lora,
            lora_scale=float(lora_scale),
            memory=as_memory(memory),
            compile=compile,
        )
        super().__init__(checkpoint, device, dtype, changes, (height, width))
        self.prompts: list[str] = found
        self.guidance_scale = float(guidance_scale)
        self.negative_prompt = negative_prompt
        self.decode_batch_size = decode_batch_size
        self._upcast()
        for prompt in [*self.prompts, negative_prompt]:
            self.check_prompt(prompt)
        self._encoded: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def _check_parts(self) -> None:
        super()._check_parts()
        check_autoencoder(self.pipe.vae)
        check_channels(self.denoiser, self._channels, self.pipe.vae.config.latent_channels)
        if self.pipe.vae.config.get("out_channels", 3) != 3:
            raise CheckpointError(
                f"the checkpoint's autoencoder makes {self.pipe.vae.config.out_channels} channels, "
                "expected pictures of 3"
            )
        check_widths(self._widths())

    def _widths(self) -> Sequence[tuple[str, Any, str, int | None]]:
        """The widths of embeddings that the network takes beside those that the encoders make; see
        `check_widths`.
        """
        return ()

    def _take(self, pipe: Any) -> None:
        super()._take(pipe)
        self.vae = pipe.vae

    def _upcast(self) -> None:
        if (
            self.upcast_vae
            and self.vae.dtype == torch.float16
            and self.vae.config.get("force_upcast", False)
        ):
            self.vae.to(torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatentBaseModel:
        super()._apply(fn, recurse)
        self._upcast()
        # Encodings lie where the model lay.
        self._encoded.clear()
        return self

    @property
    def do_guidance(self) -> bool:
        """Whether the network runs twice per state."""
        return self.guidance_scale > 1

    @abstractmethod
    def encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        """Encode a prompt; called once for each, without gradients.

        Returns:
            The conditions that ``denoise`` takes, by name, without a batch dimension; and one
            vector that stands for the prompt in observations, shape ``(features,)``.
        """

    def encode_negative(self, prompt: str) -> dict[str, Tensor]:
        """The conditions that guidance steers away from, for a negative prompt that may be
        empty.
        """
        return self._encode(prompt)[0]

    @abstractmethod
    def check_prompt(self, prompt: str) -> None:
        """Raise an OptionError unless the checkpoint can take the prompt."""

    def sample_p0(
        self, n: int, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[FlowTensor, dict[str, Any]]:
        """Draw latents, standard normal, and a prompt for each.

        Args:
            n: Number of latents.
            generator: Where random numbers come from; None for torch's global generator.
            **kwargs: ``prompt``, a string or a list of ``n``, instead of drawing from ``prompts``.

        Returns:
            Latents, shape ``(n, *state_shape)``, and ``{"prompt": [...]}``.

        Raises:
            OptionError: If a prompt is none that the checkpoint takes; nothing has been drawn then.
        """
        asked = kwargs.pop("prompt", None)
        prompts = None if asked is None else self._asked_prompts(asked, n)
        latents = self.draw_noise(n, generator)
        if prompts is None:
            chosen = torch.randint(
                len(self.prompts), (n,), generator=generator, dtype=torch.int64, device="cpu"
            )
            prompts = [self.prompts[i] for i in chosen.tolist()]
        return latents, {"prompt": prompts, **kwargs}

    def _asked_prompts(self, asked: Any, n: int) -> list[str]:
        prompts = [asked] * n if isinstance(asked, str) else asked
        if isinstance(prompts, np.ndarray) and prompts.ndim == 1:
            prompts = prompts.tolist()
        if (
            not isinstance(prompts, list | tuple)
            or len(prompts) != n
            or not all(isinstance(p, str) for p in prompts)
        ):
            raise OptionError(
                f"prompt is {shown(asked)}, expected a string or a list of {n} strings"
            )
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self.check_prompt(prompt)
        return list(prompts)

    def preprocess(
        self, x: FlowTensor, *, generator: torch.Generator | None = None, **kwargs: Any
    ) -> tuple[FlowTensor, dict[str, Any]]:
        """Encode the prompts; each distinct one is encoded once.

        Returns:
            ``x`` and the conditions of :meth:`encode`, batch first, with ``negative_`` ones where
            guidance is on.
        """
        encoded = [self._encode(prompt)[0] for prompt in kwargs["prompt"]]
        negative = self.encode_negative(self.negative_prompt) if self.do_guidance else {}
        for name in self.conditions:
            kwargs[name] = torch.stack([conditions[name] for conditions in encoded])
            if self.do_guidance:
                kwargs[f"negative_{name}"] = torch.stack([negative[name]] * len(x))
        return x, kwargs

    @plain_defaults()
    def forward(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> FlowTensor:
        """The network's prediction, with guidance in one batched call of ``2n``; see
        :class:`BaseModel`.
        """
        latents, timesteps = x.data.to(self.denoiser_dtype), self._scheduler.model_input(t)
        conditions = {name: kwargs[name] for name in self.conditions}
        if not self.do_guidance:
            return self._finish(
                x.data, t, self.denoise(latents, timesteps, **conditions).to(x.dtype)
            )
        output = self.denoise(
            torch.cat([latents, latents]),
            torch.cat([timesteps, timesteps]),
            **{
                name: torch.cat([kwargs[f"negative_{name}"], value])
                for name, value in conditions.items()
            },
        )
        negative, positive = output.to(x.dtype).chunk(2)
        return self._finish(x.data, t, negative + self.guidance_scale * (positive - negative))

    @plain_defaults()
    def postprocess(self, x: FlowTensor) -> FlowTensor:
        """Decode latents to images in [0, 1], ``decode_batch_size`` at a time."""
        latents = self._unscaled(x.data)
        parts = latents.to(self.vae.dtype).split(self.decode_batch_size)
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts])
        return FlowTensor((images.to(x.dtype) / 2 + 0.5).clamp(0, 1))

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder takes them; which of its statistics count is a family's, as in
        diffusers.
        """
        return latents / float(self.vae.config.scaling_factor)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """The vectors that stand for prompts in observations, shape ``(n, features)``."""
        return torch.stack([self._encode(prompt)[1] for prompt in prompts]).float()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.state_shape[1] * self.vae_scale, self.state_shape[2] * self.vae_scale

    @property
    def vae_scale(self) -> int:
        """How many pixels a latent's element is wide."""
        return int(2 ** (len(self.pipe.vae.config.block_out_channels) - 1))

    @property
    def _channels(self) -> int:
        """Channels of a state."""
        return int(self.denoiser.config.in_channels)

    def _read_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        config = self.denoiser.config
        patch = config.get("patch_size", None) or 1
        return self._shape(config.sample_size, patch, height, width)

    def _shape(
        self,
        sample_size: int | Sequence[int] | None,
        patch: int,
        height: int | None,
        width: int | None,
    ) -> tuple[int, int, int]:
        """Shape of a state, for the size that was asked for or else the checkpoint's own
        ``sample_size``.

        Raises:
            OptionError: If the size is no multiple of what the network works on.
        """
        sizes = read_size(sample_size, given=height is not None and width is not None)
        for i, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is None:
                continue
            check_whole(name, pixels)
            if pixels % (self.vae_scale * patch):
                raise OptionError(
                    f"{name} is {pixels}, expected a multiple of {self.vae_scale * patch} pixels"
                )
            sizes[i] = pixels // self.vae_scale
        return self._channels, sizes[0], sizes[1]

    def _check_length(self, prompt: str, part: str, longest: int | None = None) -> None:
        """Raise an OptionError if a prompt has more tokens than fit, or tokens that its encoder
        does not have.

        Args:
            prompt: The prompt.
            part: Name of the tokenizer.
            longest: How many tokens fit; None for what tokenizer and encoder take.
        """
        tokenizer, encoder = (
            getattr(self.pipe, part),
            getattr(self.pipe, part.replace("tokenizer", "text_encoder")),
        )
        tokens, longest = self._tokens(prompt, part), longest or self._longest(part)
        if len(tokens) > longest:
            raise OptionError(
                f"prompt {shown(prompt)} has {len(tokens)} tokens, but the checkpoint takes "
                f"{longest}; shorten it"
            )
        if tokenizer.pad_token_id is None:
            raise CheckpointError(
                f"the checkpoint's {part} has no pad_token, with which prompts are filled up"
            )
        known = getattr(encoder.get_input_embeddings(), "num_embeddings", None)
        largest = max(*tokens, tokenizer.pad_token_id)
        if known is not None and largest >= known:
            word = tokenizer.convert_ids_to_tokens(largest)
            raise OptionError(
                f"prompt {shown(prompt)} has the token {word!r}, which is number {largest} of the "
                f"{part}, but its encoder has embeddings for {known}; load its textual inversion "
                "into the pipeline as well (load_textual_inversion), or leave the word out"
            )

    def _tokens(self, prompt: str, part: str) -> list[int]:
        """A prompt's tokens; a word that stands for several (textual inversion) is each of them."""
        tokenizer, converted = getattr(self.pipe, part), prompt
        try:
            if hasattr(self.pipe, "maybe_convert_prompt"):
                converted = self.pipe.maybe_convert_prompt(prompt, tokenizer)
            return list(tokenizer(converted).input_ids)
        # Of half a surrogate pair, which no tokenizer can encode.
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"prompt {shown(prompt)} cannot be encoded: {reason(error)}"
            ) from error

    def _longest(self, part: str) -> int:
        """How many tokens a tokenizer of `measured` and its encoder take."""
        return int(getattr(self.pipe, part).model_max_length)

    @plain_defaults()
    def _encode(self, prompt: str) -> tuple[dict[str, Tensor], Tensor]:
        if prompt not in self._encoded:
            self.check_prompt(prompt)
            # The cache outlives the call, and tensors made in inference mode could not take part in
            # gradients.
            with torch.inference_mode(False), torch.no_grad():
                encoded = self.encode(prompt)
            if len(self._encoded) >= max(ENCODED_PROMPTS, 2 * len(self.prompts)):
                del self._encoded[next(iter(self._encoded))]
            self._encoded[prompt] = encoded
        return self._encoded[prompt]


def read_size(sample_size: int | Sequence[int] | None, given: bool) -> list[int]:
    """Height and width of a state by a network's ``sample_size``.

    Args:
        sample_size: As the configuration has it.
        given: Whether the size was asked for, so that it does not matter.

    Raises:
        OptionError: If the configuration says no size, and none was asked for.
    """
    sizes = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
    if (
        isinstance(sizes, list | tuple)
        and len(sizes) == 2
        and all(isinstance(x, int) and x > 0 for x in sizes)
    ):
        return [int(x) for x in sizes]
    if given:
        return [0, 0]
    raise OptionError(
        f"the checkpoint's network has sample_size = {shown(sample_size)}, which does not say how "
        "large its pictures are; give height= and width=, or set it in the configuration of the "
        "network"
    )


class FlowMatchBaseModel(LatentBaseModel):
    """A flow-matching transformer: optimal transport on the checkpoint's shifted times.

    The network predicts noise minus sample; as everywhere in this package the velocity points to
    the sample.
    """

    # The dynamic shift at the largest size, where the checkpoint's scheduler has none, and how
    # times are spaced.
    max_shift: ClassVar[float] = 1.15
    even_times: ClassVar[bool] = False

    @property
    def patch(self) -> int:
        """How many of a latent's elements a token is wide."""
        return int(self.denoiser.config.patch_size)

    def _read_schedule(self) -> tuple[Scheduler[FlowTensor], OutputType]:
        tokens = (self.state_shape[1] // self.patch) * (self.state_shape[2] // self.patch)
        return FlowMatchScheduler(
            self.pipe.scheduler, tokens, self.max_shift, self.even_times
        ), "velocity"

    def _unscaled(self, latents: Tensor) -> Tensor:
        return super()._unscaled(latents) + (self.vae.config.get("shift_factor", None) or 0.0)

    def _finish(self, x: Tensor, t: Tensor, output: Tensor) -> FlowTensor:
        return FlowTensor(-output)
