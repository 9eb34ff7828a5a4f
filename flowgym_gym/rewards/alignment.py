r"""Alignment with the prompt, offline: the probability of the prompt among what the embedded
checkpoint can draw.

The embedded CLIP compares a picture with its prompt and with the same prompt about every other
concept,

.. math:: r = \frac{e^{s \cos(u, v_p)}}{\sum_{c} e^{s \cos(u, v_c)}},

with :math:`u` the picture's embedding, :math:`v_c` that of the prompt with its concept replaced by
:math:`c`, and
:math:`s` the model's logit scale. It is a classifier's probability, not a human judgement.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgym_gym.checks import check_whole
from flowgym_gym.rewards.base import Reward, all_valid
from flowgym_gym.rewards.clip import CLIP, prompted_images
from flowgym_gym.types import FlowTensor

EMBEDDED_CLIP = Path(__file__).parent / "embedded" / "clip"
TEMPLATE = "a photo of a {}"


class AlignmentReward(Reward[FlowTensor]):
    """Probability that the picture shows what its prompt says, rather than another known concept,
    in [0, 1].

    A prompt that names none of the 256 concepts competes with "a photo of a ..." of all of them. In
    a prompt that names several, the first is replaced. Where the prompt names a background, all
    competitors have it, too.

    Args:
        batch_size: Pictures embedded at a time.

    References:
        The model's card, ``flowgym_gym/rewards/embedded/clip/README.md``, has its accuracy on
        held-out renderings.
    """

    value_range = (0.0, 1.0)
    units = "probability of the prompt among the known concepts"
    differentiable = True

    def __init__(self, batch_size: int = 64) -> None:
        check_whole("batch_size", batch_size)
        self.clip = CLIP(str(EMBEDDED_CLIP), local=True)
        self.batch_size = batch_size

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        scores = [
            self._probabilities(images[i : i + self.batch_size], prompts[i : i + self.batch_size])
            for i in range(0, len(images), self.batch_size)
        ]
        return all_valid(torch.cat(scores))

    def _probabilities(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = self.clip.embed_images(images)
        scale = self.clip.logit_scale.to(images.device)
        rows = []
        for u, prompt in zip(features, prompts, strict=True):
            texts = self.clip.embed_texts(list(competitors(prompt)), images.device)
            rows.append(torch.log_softmax(scale * (texts @ u), dim=0)[0].exp())
        return torch.stack(rows)


@cache
def concepts() -> tuple[str, ...]:
    """The concepts that the embedded checkpoint and the embedded CLIP know."""
    return tuple((EMBEDDED_CLIP / "concepts.txt").read_text(encoding="utf-8").splitlines())


def find_concept(prompt: str) -> re.Match[str] | None:
    """The first concept that a prompt names; of two that begin at the same word the longer."""
    return _pattern().search(prompt.lower())


@lru_cache(maxsize=1024)
def competitors(prompt: str) -> tuple[str, ...]:
    """The prompt, and after it the prompts that it competes with.

    >>> competitors("a cat on a red background")[:3]
    ('a cat on a red background', 'a dog on a red background', 'a fox on a red background')
    """
    text = prompt.lower()
    named = find_concept(text)
    if named is None:
        return (prompt, *(TEMPLATE.format(name) for name in concepts()))
    before, after = text[: named.start()], text[named.end() :]
    return (text, *(f"{before}{name}{after}" for name in concepts() if name != named.group()))


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(concepts(), key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b")
