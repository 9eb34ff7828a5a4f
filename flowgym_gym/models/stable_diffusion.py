"""Stable Diffusion 1.x: the embedded checkpoint, a local diffusers folder, or a Hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_number, check_whole
from flowgym_gym.errors import CheckpointError, OptionError
from flowgym_gym.models.base import BaseModel, OutputType
from flowgym_gym.schedulers import DiffusionScheduler
from flowgym_gym.types import FlowTensor

EMBEDDED = Path(__file__).parent / "embedded"
DEFAULT_PROMPT = "a photo of a cat"

# diffusers' prediction_type -> output_type
PREDICTIONS: dict[str, OutputType] = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "endpoint"}


class StableDiffusionBaseModel(BaseModel[FlowTensor]):
    """Stable Diffusion with classifier-free guidance in diffusers' convention.

    States are latents, ``(n, 4, H / 8, W / 8)``; samples are images, ``(n, 3, H, W)`` in [0, 1].

    Args:
        checkpoint: ``"tiny"`` (embedded in the package, works offline), a local folder in diffusers' format, or a Hub
            id such as ``"sd-legacy/stable-diffusion-v1-5"``. Only safetensors weights are loaded.
        prompts: A prompt, a list of them, or the path of a text file with one per line. An episode draws one.
        guidance_scale: Weight of classifier-free guidance; 1 is off, above 1 the network runs on twice the batch.
        negative_prompt: What guidance steers away from; only used with guidance.
        device: Where the model runs.
        dtype: Number format of the network: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        decode_batch_size: Images decoded at a time, which bounds the memory that decoding takes.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or not a Stable Diffusion pipeline.
        OptionError: If another argument cannot be used, such as a prompt longer than the tokenizer takes.
    """

    def __init__(
        self,
        checkpoint: str = "tiny",
        prompts: str | Sequence[str] = DEFAULT_PROMPT,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        device: torch.device | str | None = None,
        dtype: str = "float32",
        decode_batch_size: int = 8,
    ) -> None:
        super().__init__(device)
        check_number("guidance_scale", guidance_scale, minimum=1)
        check_whole("decode_batch_size", decode_batch_size)
        if not isinstance(negative_prompt, str):
            raise OptionError(f"negative_prompt is {negative_prompt!r}, expected a string")
        self.prompts: list[str] = read_prompts(prompts)
        self.guidance_scale = float(guidance_scale)
        self.negative_prompt = negative_prompt
        self.decode_batch_size = decode_batch_size

        source, local = find_checkpoint(checkpoint)
        self.pipe = load_pipeline(source, local, str(self.device), getattr(torch, dtype))
        self.unet, self.vae = self.pipe.unet, self.pipe.vae
        self._scheduler = DiffusionScheduler.from_diffusers(self.pipe.scheduler)
        prediction = self.pipe.scheduler.config.prediction_type
        if prediction not in PREDICTIONS:
            raise CheckpointError(
                f"checkpoint {checkpoint!r} predicts {prediction!r}, expected one of {tuple(PREDICTIONS)}"
            )
        self.output_type = PREDICTIONS[prediction]
        for prompt in [*self.prompts, negative_prompt]:
            self._check_length(prompt)
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def scheduler(self) -> DiffusionScheduler:
        """The checkpoint's own schedule."""
        return self._scheduler

    @property
    def do_guidance(self) -> bool:
        """Whether the network runs twice per state."""
        return self.guidance_scale > 1

    def sample_p0(self, n: int, **kwargs: Any) -> tuple[FlowTensor, dict[str, Any]]:
        """Draw latents, standard normal, and a prompt for each.

        Args:
            n: Number of latents.
            **kwargs: ``prompt``, a string or a list of ``n``, instead of drawing from ``prompts``.

        Returns:
            Latents, shape ``(n, 4, H / 8, W / 8)``, and ``{"prompt": [...]}``.
        """
        prompt = kwargs.pop("prompt", None)
        # Drawn on the CPU, so that a seed means the same noise on every device.
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        latents = torch.randn(n, self.unet.config.in_channels, height, width)
        if prompt is None:
            prompt = [self.prompts[i] for i in torch.randint(len(self.prompts), (n,)).tolist()]
        elif isinstance(prompt, str):
            prompt = [prompt] * n
        if len(prompt) != n or not all(isinstance(p, str) for p in prompt):
            raise OptionError(f"prompt is {prompt!r}, expected a string or a list of {n} strings")
        return FlowTensor(latents.to(self.device)), {"prompt": list(prompt), **kwargs}

    def preprocess(self, x: FlowTensor, **kwargs: Any) -> tuple[FlowTensor, dict[str, Any]]:
        """Encode the prompts; each distinct one is encoded once.

        Returns:
            ``x`` and ``encoder_hidden_states``, shape ``(n, tokens, features)``, with
            ``negative_encoder_hidden_states`` of the same shape where guidance is on.
        """
        prompts = kwargs["prompt"]
        kwargs["encoder_hidden_states"] = torch.stack([self._encode(p)[0] for p in prompts])
        if self.do_guidance:
            kwargs["negative_encoder_hidden_states"] = torch.stack([self._encode(self.negative_prompt)[0]] * len(x))
        return x, kwargs

    def forward(self, x: FlowTensor, t: Tensor, **kwargs: Any) -> FlowTensor:
        """The U-Net's prediction, with guidance in one batched call of ``2n``; see :class:`BaseModel`."""
        latents = x.data.to(self.unet.dtype)
        timesteps = self.scheduler.model_input(t)
        states = kwargs["encoder_hidden_states"]
        if not self.do_guidance:
            return FlowTensor(self.unet(latents, timesteps, states, return_dict=False)[0].to(x.dtype))
        output = self.unet(
            torch.cat([latents, latents]),
            torch.cat([timesteps, timesteps]),
            torch.cat([kwargs["negative_encoder_hidden_states"], states]),
            return_dict=False,
        )[0].to(x.dtype)
        unconditional, conditional = output.chunk(2)
        return FlowTensor(unconditional + self.guidance_scale * (conditional - unconditional))

    def postprocess(self, x: FlowTensor) -> FlowTensor:
        """Decode latents to images in [0, 1], ``decode_batch_size`` at a time."""
        latents = (x.data / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(self.decode_batch_size)]
        return FlowTensor((torch.cat(images).to(x.dtype) / 2 + 0.5).clamp(0, 1))

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Pooled output of the text encoder, shape ``(n, features)``."""
        return torch.stack([self._encode(p)[1] for p in prompts]).float()

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Hidden states ``(tokens, features)`` and pooled output ``(features,)`` of a prompt."""
        if prompt not in self._encoded:
            self._check_length(prompt)
            tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
            tokens = tokenizer(
                prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
            ).input_ids
            # The cache outlives the call, and tensors made in inference mode could not take part in gradients.
            with torch.inference_mode(False), torch.no_grad():
                output = encoder(tokens.to(self.device))
            self._encoded[prompt] = (output.last_hidden_state[0], output.pooler_output[0])
        return self._encoded[prompt]

    def _check_length(self, prompt: str) -> None:
        tokenizer = self.pipe.tokenizer
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise OptionError(
                f"prompt {prompt!r} has {length} tokens, but the checkpoint takes {tokenizer.model_max_length}; "
                "shorten it"
            )


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """A prompt, a list of prompts or a text file with one per line, as a list.

    Raises:
        OptionError: If there is none, one is empty or not a string, or the named ``.txt`` file cannot be read.
    """
    if isinstance(prompts, str):
        if prompts.endswith(".txt"):
            try:
                lines = Path(prompts).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise OptionError(f"prompts names the text file {prompts!r}, which cannot be read: {error}") from error
            found = [line.strip() for line in lines if line.strip()]
        else:
            found = [prompts]
    else:
        found = list(prompts) if isinstance(prompts, Sequence) else []
    if not found or not all(isinstance(p, str) and p.strip() for p in found):
        raise OptionError(
            f"prompts is {prompts!r}, expected a prompt, a list of prompts, or a .txt file with one per line"
        )
    return found


def find_checkpoint(checkpoint: str) -> tuple[str, bool]:
    """Where a checkpoint is and whether that is on this machine.

    Args:
        checkpoint: Name of an embedded checkpoint, a folder, or a Hub id ``"owner/name"``.

    Raises:
        CheckpointError: If it is none of these, or a folder that holds no Stable Diffusion pipeline.
    """
    if not isinstance(checkpoint, str | os.PathLike) or not str(checkpoint):
        raise CheckpointError(f"checkpoint is {checkpoint!r}, expected a name, a folder or a Hub id")
    name = os.fspath(checkpoint)
    embedded = sorted(folder.name for folder in EMBEDDED.iterdir() if (folder / "model_index.json").is_file())
    folder = EMBEDDED / name if name in embedded else Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return str(folder.resolve()), True
    looks_like_path = name.startswith((".", "~", os.sep)) or os.path.isabs(name) or name.count("/") != 1
    if looks_like_path:
        raise CheckpointError(
            f"checkpoint {name!r} was not found; expected an embedded checkpoint ({', '.join(embedded)}), "
            "an existing folder in diffusers' format, or a Hub id such as 'sd-legacy/stable-diffusion-v1-5'"
        )
    return name, False


def check_folder(folder: Path) -> None:
    """Raise a CheckpointError unless the folder holds a Stable Diffusion pipeline with safetensors weights."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} has no model_index.json, so it is not a diffusers pipeline; "
            "save one with StableDiffusionPipeline.save_pretrained"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(index)!r} cannot be read as a pipeline's index: {error!r}") from error
    if kind != "StableDiffusionPipeline":
        raise CheckpointError(f"checkpoint folder {str(folder)!r} holds a {kind}, expected a StableDiffusionPipeline")
    for part in ("unet", "vae", "text_encoder"):
        if not list((folder / part).glob("*.safetensors")):
            raise CheckpointError(
                f"checkpoint folder {str(folder)!r} has no safetensors weights in {part!r}; pickled weights are not "
                "loaded, convert them with save_pretrained(..., safe_serialization=True)"
            )
    # transformers makes up an empty tokenizer where it finds no files.
    for part, files in {"tokenizer": ("tokenizer.json", "vocab.json"), "scheduler": ("scheduler_config.json",)}.items():
        if not any((folder / part / name).is_file() for name in files):
            raise CheckpointError(f"checkpoint folder {str(folder)!r} has no {' or '.join(files)} in {part!r}")


@cache
def load_pipeline(source: str, local: bool, device: str, dtype: torch.dtype) -> Any:
    """The pipeline, frozen and in evaluation mode; loaded once per process for each device and number format.

    Args:
        source: Folder or Hub id.
        local: Whether ``source`` is a folder; then the network is never touched.
        device: Where it runs.
        dtype: Number format of its weights.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    with _quiet(bars=local):
        import diffusers

        try:
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=local,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            where = "folder" if local else "Hub id"
            raise CheckpointError(
                f"{where} {source!r} could not be loaded: {type(error).__name__}: {reason}"
            ) from error
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe.to(device)


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silence what loading says of image processors that are not used; with ``bars`` its progress bars, too."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            diffusers_logging.enable_progress_bar()
            if had_bars:
                transformers_logging.enable_progress_bar()
