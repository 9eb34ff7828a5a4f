r"""Rewards of images that need no weights.

All take images :math:`(n, 3, H, W)` in [0, 1], with :math:`R, G, B` the channels and the luma
:math:`Y = 0.299 R + 0.587 G + 0.114 B` of ITU-R BT.601, and score the whole batch at once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowgym_gym.checks import check_choice, check_whole
from flowgym_gym.rewards.base import Reward, all_valid, as_images
from flowgym_gym.types import FlowTensor

LUMA = (0.299, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """Luma of images ``(n, 3, H, W)``, shape ``(n, H, W)``, in [0, 1]."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
    return (images * weights.view(-1, 1, 1)).sum(dim=1)


class PixelReward(Reward[FlowTensor]):
    """A reward that is a differentiable function of the pixels, given by ``score``."""

    differentiable = True

    def score(self, images: Tensor) -> Tensor:
        """Rewards of images ``(n, 3, H, W)`` in [0, 1], shape ``(n,)``."""
        raise NotImplementedError(f"{type(self).__name__} does not define score")

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1]; see :class:`Reward`."""
        return all_valid(self.score(as_images(type(self).__name__, x)))


class RedReward(PixelReward):
    """Mean of the red channel, in [0, 1]: the reward of flowgym's own example.

    Warning:
        White has a full red channel too and scores 1, as do yellow and pink. :class:`RednessReward`
        asks for red.
    """

    value_range = (0.0, 1.0)
    units = "mean of the red channel"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        return images[:, 0].mean(dim=(1, 2))


class RednessReward(PixelReward):
    r"""How much redder than anything else, in [-1, 1]: :math:`\bar R - (\bar G + \bar B) / 2`.

    Pure red scores 1, every grey (black and white among them) 0, cyan -1.
    """

    value_range = (-1.0, 1.0)
    units = "red minus the mean of green and blue"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2


class BrightnessReward(PixelReward):
    """Mean luma, in [0, 1]; black scores 0 and white 1.

    References:
        Recommendation ITU-R BT.601-7, 2011, section 2.5.1 (the luma).
    """

    value_range = (0.0, 1.0)
    units = "mean luma"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        return luma(images).mean(dim=(1, 2))


class ColorfulnessReward(PixelReward):
    r"""Hasler and Suesstrunk's colourfulness, on their scale: 0 is not colourful, 59 quite, 109
    extremely.

    .. math:: M = \sqrt{\sigma_{rg}^2 + \sigma_{yb}^2} + 0.3 \sqrt{\mu_{rg}^2 + \mu_{yb}^2}, \quad
        rg = R - G, \quad yb = (R + G) / 2 - B

    with channels from 0 to 255, means :math:`\mu` and population standard deviations :math:`\sigma`
    over the pixels. Since :math:`rg^2 + yb^2 \le 255^2 + 127.5^2`, no picture passes
    :math:`\sqrt{1.09} \cdot 285.1 < 298`.

    References:
        Hasler and Suesstrunk, Measuring colourfulness in natural images, Human Vision and
        Electronic Imaging, 2003.
    """

    value_range = (0.0, 298.0)
    units = "Hasler and Suesstrunk's M (8-bit channels)"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        red, green, blue = (255 * images).flatten(2).unbind(dim=1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])
        spread = opponents.var(dim=2, correction=0).sum(dim=0)
        shift = opponents.mean(dim=2).square().sum(dim=0)
        return _root(spread) + 0.3 * _root(shift)


class SharpnessReward(PixelReward):
    r"""Variance of the Laplacian of the luma, in [0, 16]; 0 for a plain picture, 16 for a black and
    white chessboard.

    The Laplacian is :math:`Y_{i-1,j} + Y_{i+1,j} + Y_{i,j-1} + Y_{i,j+1} - 4 Y_{i,j}`, the variance
    that over all pixels but the border. Noise is sharp, too.

    References:
        Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000 (LAPV).
    """

    value_range = (0.0, 16.0)
    units = "variance of the luma's Laplacian"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        y = luma(images)
        around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
        return (around - 4 * y[:, 1:-1, 1:-1]).flatten(1).var(dim=1, correction=0)


class SymmetryReward(PixelReward):
    """Left-right symmetry, in [0, 1]: 1 minus the mean absolute difference from the mirror
    image.
    """

    value_range = (0.0, 1.0)
    units = "1 - mean |picture - mirror image|"

    def score(self, images: Tensor) -> Tensor:
        """See :class:`PixelReward`."""
        return 1 - (images - images.flip(-1)).abs().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class JPEG:
    """How a size is measured.

    Attributes:
        quality: Pillow's JPEG quality.
        optimize: Whether Pillow looks for the best Huffman tables.
        rounds: Whether pixels are rounded to 8 bits or cut off.
        scale: A size is ``scale * bytes``, divided by the number of pixels where ``per_pixel``.
        per_pixel: See ``scale``.
    """

    quality: int
    optimize: bool
    rounds: bool
    scale: float
    per_pixel: bool


JPEG_UNITS = {
    "bits_per_pixel": JPEG(quality=85, optimize=True, rounds=False, scale=8.0, per_pixel=True),
    "kilobytes": JPEG(quality=95, optimize=False, rounds=True, scale=1 / 1000, per_pixel=False),
}


class IncompressionReward(Reward[FlowTensor]):
    """Size of the picture as a JPEG, above 0: detail and noise pay.

    Pictures are written by Pillow, in a pool of threads.

    Args:
        units: ``"bits_per_pixel"``, as diffusiongym measures (quality 85, optimised Huffman tables,
            pixels cut off to 8 bits), or ``"kilobytes"``, DDPO's (1000 bytes, quality 95, pixels
            rounded).
        quality: Another JPEG quality, 1 to 95.

    References:
        Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024,
        section 5.
    """

    value_range = (0.0, float("inf"))
    sign: ClassVar[float] = 1.0

    def __init__(self, units: str = "bits_per_pixel", quality: int | None = None) -> None:
        check_choice("units", units, JPEG_UNITS)
        if quality is not None:
            check_whole("quality", quality, 1, 95)
        self.units = units
        self.how = JPEG_UNITS[units]
        self.quality = self.how.quality if quality is None else int(quality)

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1]; see :class:`Reward`."""
        images = as_images(type(self).__name__, x).detach()
        levels = 255 * images.permute(0, 2, 3, 1).cpu()
        pictures = (levels.round() if self.how.rounds else levels).to(torch.uint8).numpy()
        pixels = images.shape[2] * images.shape[3] if self.how.per_pixel else 1
        sizes = torch.tensor(
            parallel(self._bytes, pictures), dtype=images.dtype, device=images.device
        )
        return all_valid(self.sign * sizes * (self.how.scale / pixels))

    def _bytes(self, picture: np.ndarray) -> int:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(picture).save(
            buffer, format="JPEG", quality=self.quality, optimize=self.how.optimize
        )
        return buffer.tell()


class CompressionReward(IncompressionReward):
    """Minus the size of the picture as a JPEG, below 0: plain pictures pay; otherwise
    :class:`IncompressionReward`.
    """

    value_range = (-float("inf"), 0.0)
    sign = -1.0


def parallel(function: Callable[[np.ndarray], int], items: np.ndarray) -> list[int]:
    """``function`` of every item, in a pool of threads that lasts as long as the process."""
    if len(items) == 1:
        return [function(items[0])]
    return list(_pool(os.getpid()).map(function, items))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    # One for each process: a forked child has none of the threads of its parent.
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="flowgym-jpeg")


def _root(values: Tensor) -> Tensor:
    """Square root whose gradient is 0, not infinite, at 0."""
    positive = values > 0
    return torch.where(
        positive, values.where(positive, torch.ones_like(values)).sqrt(), torch.zeros_like(values)
    )
