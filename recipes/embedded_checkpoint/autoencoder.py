"""Stage 1: the autoencoder, 64 x 64 pictures to 4 x 8 x 8 latents and back.

The loss is L1 on pixels, on image gradients (edges carry the drawing) and on 4 x 4 means (flat
areas keep their colour), plus a small KL term that keeps latents near each other without blurring
them.
"""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from recipes.embedded_checkpoint.training import ExponentialMovingAverage, Outcome, train

CHANNELS = (16, 32, 64, 128)
NORM_GROUPS = 4
KL_WEIGHT = 5e-4
LEARNING_RATE = 2e-3
HELD_OUT_EVERY = 97
"""Every n-th rendering is kept out of training, to measure reconstruction on."""


def build() -> AutoencoderKL:
    """A small ``AutoencoderKL`` that halves the resolution three times."""
    levels = len(CHANNELS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=64,
        force_upcast=False,
    )


def to_tensor(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Pictures ``(n, 64, 64, 3)`` uint8 to ``(n, 3, 64, 64)`` in [-1, 1]."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean L1 of pixels, gradients and 4 x 4 means of ``y`` against ``x``, both ``(n, 3,
    64, 64)``.
    """
    error = y - x
    pixels = error.abs().mean()
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    pooled = functional.avg_pool2d(error, 4).abs().mean()
    return pixels + 0.5 * gradients + 0.5 * pooled


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the held-out renderings."""
    held_out = np.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@torch.no_grad()
def peak_signal_to_noise(
    model: AutoencoderKL, images: np.ndarray, device: torch.device | str
) -> float:
    """Mean PSNR of reconstructions in dB, from mean squared errors of each picture."""
    values = []
    for start in range(0, len(images), 64):
        x = to_tensor(images[start : start + 64], device)
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((y - x) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(mse))
    return torch.cat(values).mean().item()


def train_autoencoder(
    images: np.ndarray, work: Path, minutes: float, batch: int, device: torch.device | str
) -> tuple[AutoencoderKL, Outcome, float]:
    """Train the autoencoder.

    Returns:
        The model with averaged weights, how training ended, and the held-out PSNR in dB.
    """
    torch.manual_seed(0)
    model = build().to(device).to(memory_format=torch.channels_last)
    training, held_out = split(len(images))
    order_seed = 1

    def losses(step: int) -> dict[str, Tensor]:
        epoch, position = divmod(step * batch, len(training) - batch)
        order = np.random.default_rng((order_seed, epoch)).permutation(training)
        x = to_tensor(images[order[position : position + batch]], device)
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample()).sample
        reconstruction = reconstruction_loss(y, x)
        kl = posterior.kl().mean() / math.prod(posterior.mean.shape[1:])
        return {"loss": reconstruction + KL_WEIGHT * kl, "reconstruction": reconstruction, "kl": kl}

    def watch(ema: ExponentialMovingAverage, step: int, progress: float) -> None:
        ema.swap()
        psnr = peak_signal_to_noise(model, images[held_out], device)
        ema.swap()
        print(f"autoencoder: {progress:.0%}, held-out PSNR {psnr:.2f} dB", flush=True)

    outcome = train(
        "autoencoder",
        model,
        losses,
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-4,
        checkpoint=work / "autoencoder.pt",
        on_checkpoint=watch,
    )
    return model, outcome, peak_signal_to_noise(model, images[held_out], device)


def sharpen_decoder(
    model: AutoencoderKL,
    images: np.ndarray,
    latents: dict[str, np.ndarray],
    work: Path,
    minutes: float,
    batch: int,
    device: torch.device | str,
) -> tuple[Outcome, float]:
    """Train the decoder of ``model`` further, in place; latents keep their meaning, since the
    encoder is frozen.

    Returns:
        How training ended, and the held-out PSNR in dB.
    """
    model.to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    training, held_out = split(len(images))
    mean, std = (torch.from_numpy(latents[key]) for key in ("mean", "std"))

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((7, step))
        rows = rng.choice(training, batch, replace=False)
        noise = torch.randn((batch, *mean.shape[1:]), generator=torch.Generator().manual_seed(step))
        z = (mean[rows] + std[rows] * noise).to(device)
        return {
            "loss": reconstruction_loss(model.decode(z).sample, to_tensor(images[rows], device))
        }

    outcome = train(
        "decoder",
        model,
        losses,
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-4,
        checkpoint=work / "decoder.pt",
        ema_decay=0.99,
    )
    return outcome, peak_signal_to_noise(model, images[held_out], device)


@torch.no_grad()
def encode_all(
    model: AutoencoderKL, images: np.ndarray, device: torch.device | str
) -> dict[str, np.ndarray]:
    """Posterior ``mean`` and ``std`` of every picture, float32, ``(n, 4, 8, 8)``."""
    means, stds = [], []
    for start in range(0, len(images), 128):
        posterior = model.encode(to_tensor(images[start : start + 128], device)).latent_dist
        means.append(posterior.mean.contiguous().cpu().numpy())
        stds.append(posterior.std.contiguous().cpu().numpy())
    return {"mean": np.concatenate(means), "std": np.concatenate(stds)}


def finish(model: AutoencoderKL, latents: dict[str, np.ndarray], folder: Path) -> None:
    """Set the scaling factor from the latents and save the model with its latents' spread in
    ``folder``.
    """
    spread = float(np.sqrt(np.mean(latents["std"] ** 2) + np.var(latents["mean"])))
    model.register_to_config(scaling_factor=1 / spread)
    model.save_pretrained(folder)
