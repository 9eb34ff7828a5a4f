r"""Rewards trained on human preferences that are published with packages of their own: ImageReward
and HPSv2.

The packages are not needed. Both models are of architectures that transformers has, CLIP and BLIP,
so the published checkpoints are read as tensors, under transformers' names, and gradients reach the
pixels. Pictures are prepared as the packages do: HPSv2 resizes tensors, ImageReward lets Pillow
round to 8 bits, which moves its scores in the third digit.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowgym_gym.checks import check_whole
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError
from flowgym_gym.rewards.base import Reward, all_valid
from flowgym_gym.rewards.clip import CLIP, Preparation, build_head, move, prompted_images
from flowgym_gym.rewards.loading import build, find_file, find_folder, loading, read_tensors
from flowgym_gym.sources import exists
from flowgym_gym.types import FlowTensor

IMAGE_REWARD, HPS = "THUDM/ImageReward:ImageReward.pt", "xswu/HPSv2:HPS_v2.1_compressed.pt"
BERT, CLIP_H = "google-bert/bert-base-uncased", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Names in open_clip's checkpoints, and what transformers calls the same; the parts of a layer in
# both towers.
OPEN_CLIP = {
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
# The same for the picture's encoder in BLIP's checkpoints; the text's has the same names in both.
BLIP = {
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.": "encoder.layers.",
    r"^norm\.": "post_layernorm.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.self_attn\.proj\.": ".self_attn.projection.",
}
# Channels of each head of attention, in both encoders and every size of BLIP.
HEAD = 64


class ImageRewardReward(Reward[FlowTensor]):
    """ImageReward: a BLIP model trained on rankings; standardised, so that most pictures score
    between -2 and 2.

    Args:
        weights: ``"ImageReward-v1.0"``, which is brought from the Hub, or a local
            ``ImageReward.pt``, or the same as safetensors.
        tokenizer: Local folder or Hub id of BERT's tokenizer; with ``"ImageReward-v1.0"`` it is the
            Hub's ``"google-bert/bert-base-uncased"`` unless another is named.
        batch_size: Pictures scored at a time.

    Raises:
        CheckpointError: If weights or tokenizer are missing, or the file holds another model.

    References:
        Xu et al., ImageReward, NeurIPS 2023; scores are those of the package image-reward 1.5.
    """

    differentiable = True
    units = "standard deviations of ImageReward's own scores"
    PUBLISHED = "ImageReward-v1.0"
    MEAN, STD, LENGTH = 0.16717362830052426, 1.0333394966054072, 35

    @plain_defaults()
    def __init__(
        self, weights: str | None = None, tokenizer: str | None = None, batch_size: int = 16
    ) -> None:
        check_whole("batch_size", batch_size)
        name = "images/image_reward"
        if weights == self.PUBLISHED and not exists(weights):
            weights, tokenizer = IMAGE_REWARD, tokenizer or BERT
        path = find_file("weights", weights, name, IMAGE_REWARD)
        words, local = find_folder("tokenizer", tokenizer, name, BERT, weights=False)
        with loading(words):
            from transformers import BertTokenizer, BlipTextModel, BlipVisionModel
            from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

            # What it does with capitals by default differs between versions of transformers.
            self.tokenizer: Any = BertTokenizer.from_pretrained(
                words, local_files_only=local, do_lower_case=True
            )
        if (
            len(self.tokenizer) < 10
        ):  # transformers makes up an empty tokenizer where it finds no files.
            raise CheckpointError(f"{words!r} has no tokenizer (tokenizer.json, or vocab.txt)")
        tensors = read_tensors(path)
        vision = {
            renamed(key, BLIP): value
            for key, value in below(tensors, "blip.visual_encoder.").items()
        }
        text, head = below(tensors, "blip.text_encoder."), below(tensors, "mlp.layers.")
        try:
            seen, read = vision_config(vision), text_config(text)
        except KeyError as error:
            raise CheckpointError(
                f"{str(path)!r} is not ImageReward: it has no {error.args[0]}"
            ) from error
        self.vision: Any = build(BlipVisionModel, seen, vision, path)
        self.text: Any = build(BlipTextModel, read, text, path, add_pooling_layer=False)
        self.head = build_head("mlp", read.hidden_size)
        with loading(str(path)):
            self.head.load_state_dict(head)
        self.head.eval().requires_grad_(False)
        self.size = seen.image_size
        self.prepare = Preparation(
            {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "size": self.size}
        )
        self.batch_size = batch_size

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        for part in (self.vision, self.text, self.head):
            move(part, images.device)
        starts = range(0, len(images), self.batch_size)
        scores = [
            self._score(images[i : i + self.batch_size], prompts[i : i + self.batch_size])
            for i in starts
        ]
        return all_valid(torch.cat(scores))

    @plain_defaults()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.LENGTH, return_tensors="pt"
        ).to(images.device)
        seen = self.vision(pixel_values=self.prepare(cover(images, self.size))).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
        ).last_hidden_state
        score: Tensor = self.head(read[:, 0]).squeeze(1)
        return (score - self.MEAN) / self.STD


class HPSv2Reward(Reward[FlowTensor]):
    """Human Preference Score v2: the cosine of a CLIP ViT-H/14 trained on choices, about 0.2 to
    0.35.

    Args:
        weights: ``"v2.0"`` or ``"v2.1"``, which are brought from the Hub, or a local checkpoint
            with open_clip's names.
        processor: Local folder or Hub id of the CLIP that it was trained from, for its
            configuration and tokenizer, not its weights; with ``"v2.0"`` and ``"v2.1"`` it is the
            Hub's ``"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`` unless another is named.
        batch_size: Pictures embedded at a time.

    Raises:
        CheckpointError: If weights or processor are missing, or the file holds another model.

    References:
        Wu et al., Human Preference Score v2, 2023; scores are those of the package hpsv2 1.2.0.
    """

    differentiable = True
    value_range = (-1.0, 1.0)
    units = "cosine of HPSv2's embeddings"
    VERSIONS = {"v2.0": "xswu/HPSv2:HPS_v2_compressed.pt", "v2.1": HPS}  # noqa: RUF012

    @plain_defaults()
    def __init__(
        self, weights: str | None = None, processor: str | None = None, batch_size: int = 32
    ) -> None:
        check_whole("batch_size", batch_size)
        name = "images/hpsv2"
        if str(weights) in self.VERSIONS and not exists(weights):
            weights, processor = self.VERSIONS[str(weights)], processor or CLIP_H
        path = find_file("weights", weights, name, HPS)
        source, local = find_folder("processor", processor, name, CLIP_H, weights=False)
        if local and not (Path(source) / "config.json").is_file():
            raise CheckpointError(
                f"processor {source!r} has no config.json, expected that of {CLIP_H!r}"
            )
        with loading(source):
            from transformers import CLIPConfig, CLIPModel

            config = CLIPConfig.from_pretrained(source, local_files_only=local)
        self.clip = CLIP(
            source, local, model=build(CLIPModel, config, from_open_clip(read_tensors(path)), path)
        )
        self.batch_size = batch_size

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        size = self.clip.model.config.vision_config.image_size
        scores = [
            self.clip.cosines(
                fit(images[i : i + self.batch_size], size), prompts[i : i + self.batch_size]
            )
            for i in range(0, len(images), self.batch_size)
        ]
        return all_valid(torch.cat(scores))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def renamed(name: str, table: dict[str, str]) -> str:
    """A name after all replacements of a table, pattern by pattern."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip model by the names of transformers' ``CLIPModel``."""
    result = {}
    for name, value in tensors.items():
        new = renamed(name, OPEN_CLIP)
        if ".in_proj_" in new:  # Queries, keys and values lie in one tensor.
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                result[new.replace(".in_proj_", f".{part}_proj.")] = rows
        else:
            # open_clip multiplies with its projections from the right.
            result[new] = value.T if new.endswith("_projection.weight") else value
    return {name: value.contiguous() for name, value in result.items()}


def vision_config(tensors: dict[str, Tensor]) -> Any:
    """Configuration of the BLIP picture encoder that has these weights."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    cells = tensors["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=layers_of(tensors),
        num_attention_heads=width // HEAD,
        image_size=patch * math.isqrt(cells),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(tensors: dict[str, Tensor]) -> Any:
    """Configuration of the BLIP text encoder that has these weights."""
    from transformers import BlipTextConfig

    words, width = tensors["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(tensors["encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=layers_of(tensors),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(tensors["embeddings.position_embeddings.weight"]),
        bos_token_id=None,  # Words that only generators use.
        eos_token_id=None,
        sep_token_id=None,
    )


def layers_of(tensors: dict[str, Tensor]) -> int:
    """Number of layers, which are numbered in the weights' names."""
    return 1 + max(
        int(number)
        for name in tensors
        for number in re.findall(r"^encoder\.layers?\.(\d+)\.", name)
    )


def cover(images: Tensor, size: int) -> Tensor:
    """The middle of pictures whose shortest side is ``size``, as ImageReward's package prepares
    them, unrounded.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        height, width = size * height // short, size * width // short
        images = functional.interpolate(
            images, size=(height, width), mode="bicubic", antialias=True
        ).clamp(0, 1)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return images[..., top : top + size, left : left + size]


def fit(images: Tensor, size: int) -> Tensor:
    """Pictures whose longest side is ``size``, with black on the other sides, as HPSv2's package
    prepares them.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = functional.interpolate(
            images, size=(height, width), mode="bicubic", antialias=True
        )
    left, top = (size - width) // 2, (size - height) // 2
    return functional.pad(images, (left, size - width - left, top, size - height - top))
