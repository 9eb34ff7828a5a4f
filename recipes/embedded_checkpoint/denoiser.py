r"""Stage 2: the text encoder and the U-Net, trained together to predict the noise in latents.

With :math:`x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon` and the signal-to-noise
ratio
:math:`s = \bar\alpha_t / (1 - \bar\alpha_t)`, the squared error of the predicted noise is weighted
by

.. math:: w(t) \propto (\min(s, 5) + c) / s.

The minimum is min-SNR weighting. The constant :math:`c` raises the weight at the noisiest times,
where the error of the predicted picture is :math:`1 / s` times the error of the predicted noise and
the subject is decided.
"""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, background_probabilities, caption
from recipes.embedded_checkpoint.text import WIDTH, build_text_encoder, build_tokenizer
from recipes.embedded_checkpoint.training import ExponentialMovingAverage, Outcome, train

CHANNELS = (96, 160)
LEARNING_RATE = 1.2e-3
SNR_CLAMP = 5.0
SNR_FLOOR = 0.15
EMPTY_SHARE = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
ORIGIN_KEYS = ("_name_or_path", "is_local", "local_files_only")


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule as a DDIM sampler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def build_unet() -> UNet2DConditionModel:
    """A two-level conditional U-Net for 4 x 8 x 8 latents, with text attention at full and at the
    lowest resolution.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        attention_head_dim=(3, 5),
    )


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module.

    Args:
        text_encoder: Gives the states the U-Net attends to.
        unet: Predicts the noise.
    """

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """Predicted noise.

        Args:
            noisy: Noisy latents, shape ``(n, 4, 8, 8)``.
            times: Integer time steps, shape ``(n,)``.
            tokens: Token ids, shape ``(n, 32)``.
        """
        return self.unet(noisy, times, self.text_encoder(tokens).last_hidden_state).sample


class Captions:
    """Draws captions for renderings and remembers their tokens.

    Args:
        tokenizer: Turns text into ids.
        data: The rendered training set.
    """

    def __init__(self, tokenizer: CLIPTokenizer, data: dict[str, np.ndarray]) -> None:
        self.tokenizer = tokenizer
        self.concept, self.color = data["concept"], data["color"]
        self.names, self.colors = list(CONCEPTS), list(COLORS)
        self.named = background_probabilities()[1]
        self.ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, padded to the model's length."""
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, padding="max_length", truncation=True).input_ids
        return self.ids[text]

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Token ids of one random caption for each row, shape ``(len(rows), 32)``."""
        texts = []
        for row in rows:
            color = self.color[row]
            named = self.colors[color] if rng.random() < self.named[color] else None
            text = caption(self.names[self.concept[row]], named, rng)
            texts.append("" if rng.random() < EMPTY_SHARE else text)
        return torch.tensor([self.encode(text) for text in texts])


def loss_weights(alphas_cumprod: Tensor) -> Tensor:
    """Weight of the squared error at every time step, with mean 1."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = (snr.clamp(max=SNR_CLAMP) + SNR_FLOOR) / snr
    return weights / weights.mean()


class Batches:
    """Noisy latents, times, tokens and noise, reproducible from the step.

    Args:
        data: The rendered training set.
        latents: Posterior means of its pictures.
        scaling_factor: Multiplies the latents.
        captions: Draws captions.
        batch: Batch size.
        device: Where batches go.
        seed: Seed of everything drawn.
    """

    def __init__(
        self,
        latents: np.ndarray,
        scaling_factor: float,
        captions: Captions,
        batch: int,
        device: torch.device | str,
        seed: int,
    ) -> None:
        self.latents = torch.from_numpy(latents).to(device) * scaling_factor
        self.captions, self.batch, self.device, self.seed = captions, batch, device, seed
        self.alphas_cumprod = build_scheduler().alphas_cumprod.to(device)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, times (one in each equal part of the schedule), tokens and noise of a
        step.
        """
        rng = np.random.default_rng((self.seed, step))
        per_epoch = len(self.latents) // self.batch
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((self.seed + 1, epoch)).permutation(len(self.latents))
        rows = order[position * self.batch : (position + 1) * self.batch]
        tokens = self.captions.draw(rows, rng).to(self.device)
        parts = (np.arange(self.batch) + rng.random(self.batch)) / self.batch
        times = torch.from_numpy((rng.permutation(parts) * 1000).astype(np.int64)).to(self.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x = self.latents[torch.from_numpy(rows).to(self.device)]
        noise = torch.randn(x.shape, generator=generator).to(self.device)
        abar = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        return abar.sqrt() * x + (1 - abar).sqrt() * noise, times, tokens, noise


def assemble(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: Denoiser
) -> StableDiffusionPipeline:
    """Everything as one pipeline, sharing the modules."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tidy_configurations(folder: Path) -> None:
    """Make saved configurations mean the same on every machine and in both libraries.

    Where the parts were loaded from is dropped. transformers opens a model in the type its
    configuration names and diffusers in float32, so the text encoder is asked for in float32 as
    well; its file stays float16.
    """
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in ORIGIN_KEYS}
        if "dtype" in kept:
            kept["dtype"] = "float32"
        if kept != config:
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_as_published(file: Path) -> None:
    """Give a CLIP text encoder's weights the names that published checkpoints have,
    ``text_model.*``.

    transformers saves them without that level from 5.6 on and reads both; earlier versions read
    only the published names and, where they find none, leave every weight random.
    """
    tensors = load_file(file)
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in tensors}
    save_file(
        {names[name]: value for name, value in tensors.items()}, file, metadata={"format": "pt"}
    )
    file.chmod(0o644)


def export(vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: Denoiser, folder: Path) -> None:
    """Save float16 weights in diffusers' folder format; the modules given stay as they are."""
    half = copy.deepcopy(model).half().cpu().eval()
    assemble(copy.deepcopy(vae).half().cpu().eval(), tokenizer, half).save_pretrained(folder)
    tidy_configurations(folder)
    name_as_published(folder / "text_encoder" / "model.safetensors")


def train_denoiser(
    data: dict[str, np.ndarray],
    latents: dict[str, np.ndarray],
    vae: AutoencoderKL,
    work: Path,
    minutes: float,
    batch: int,
    device: torch.device | str,
) -> tuple[Denoiser, CLIPTokenizer, Outcome]:
    """Train text encoder and U-Net; an interim pipeline is exported at intervals.

    Returns:
        The model with averaged weights, its tokenizer, and how training ended.
    """
    torch.manual_seed(4)
    tokenizer = build_tokenizer()
    model = Denoiser(build_text_encoder(tokenizer), build_unet()).to(device)
    batches = Batches(
        latents["mean"], vae.config.scaling_factor, Captions(tokenizer, data), batch, device, seed=4
    )
    weights = loss_weights(batches.alphas_cumprod)

    def losses(step: int) -> dict[str, Tensor]:
        noisy, times, tokens, noise = batches.draw(step)
        error = (model(noisy, times, tokens) - noise).square().mean(dim=(1, 2, 3))
        return {"loss": (weights[times] * error).mean(), "mse": error.mean().detach()}

    def interim(ema: ExponentialMovingAverage, step: int, progress: float) -> None:
        ema.swap()
        export(vae, tokenizer, model, work / "interim")
        ema.swap()

    outcome = train(
        "denoiser",
        model,
        losses,
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-3,
        checkpoint=work / "denoiser.pt",
        on_checkpoint=interim,
        ema_decay=0.999,
    )
    return model, tokenizer, outcome
