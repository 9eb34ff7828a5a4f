r"""Rewards of CLIP models: how well a picture fits its prompt, and how people like it.

A picture and a prompt are compared by the cosine of their embeddings :math:`u` and :math:`v`,

.. math:: \cos(u, v) = \frac{u \cdot v}{\lVert u \rVert \lVert v \rVert},

after the picture has been resized, cropped and normalised as the model's image processor says. That
is done on tensors, so that gradients reach the pixels; Pillow rounds to 8 bits where tensors do
not, which moves scores in the third digit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowgym_gym.checks import check_choice, check_whole
from flowgym_gym.defaults import plain_defaults
from flowgym_gym.errors import CheckpointError, RewardError, reason
from flowgym_gym.rewards.base import Reward, all_valid, as_images, as_prompts
from flowgym_gym.rewards.loading import find_file, find_folder, loading, read_tensors
from flowgym_gym.types import FlowTensor
from flowgym_gym.weights import check_filled

OPENAI = "openai/clip-vit-large-patch14"
PICKSCORE, PICKSCORE_PROCESSOR = (
    "yuvalkirstain/PickScore_v1",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
HEAD_EXAMPLES = {
    "mlp": "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
    "linear": "OWNER/NAME:sa_0_4_vit_l_14_linear.pth",
}
# Pillow's numbers for filters, as image processors give them, in torch's words.
FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


class CLIP:
    """A frozen CLIP model with its tokenizer and its way to prepare pictures, in float32.

    Args:
        source: Folder or Hub id of the model.
        local: Whether ``source`` is a folder; then the network is never touched.
        processor: Folder or Hub id of tokenizer and image processor, and whether it is a folder;
            the model's if None.
        model: The model itself, where it is loaded already; ``source`` then is where the rest is.

    Raises:
        CheckpointError: If it cannot be loaded.
    """

    @plain_defaults()
    def __init__(
        self, source: str, local: bool, processor: tuple[str, bool] | None = None, model: Any = None
    ) -> None:
        prepared_by, prepared_locally = processor or (source, local)
        with loading(source):
            from transformers import CLIPModel

            self.model: Any = model or _filled(CLIPModel, source, local)
        with loading(prepared_by):
            from transformers import CLIPTokenizer
            from transformers.image_processing_base import ImageProcessingMixin

            self.tokenizer = CLIPTokenizer.from_pretrained(
                prepared_by, local_files_only=prepared_locally
            )
            prepared, _ = ImageProcessingMixin.get_image_processor_dict(
                prepared_by, local_files_only=prepared_locally
            )
            self.prepare = Preparation(prepared)
        if (
            len(self.tokenizer) < 10
        ):  # transformers makes up an empty tokenizer where it finds no files.
            raise CheckpointError(
                f"{prepared_by!r} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)"
            )
        self.model.eval().requires_grad_(False)
        config: Any = self.model.config
        self.length, self.features = (
            int(config.text_config.max_position_embeddings),
            int(config.projection_dim),
        )
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> Tensor:
        """What CLIP multiplies cosines with."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    @plain_defaults()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings of images ``(n, 3, H, W)`` in [0, 1], shape ``(n, features)``."""
        move(self.model, images.device)
        features = _pooled(self.model.get_image_features(pixel_values=self.prepare(images)))
        return functional.normalize(features, dim=-1)

    @plain_defaults()
    def embed_texts(self, texts: list[str], device: torch.device) -> Tensor:
        """Unit embeddings of texts, shape ``(n, features)``; each distinct text is embedded
        once.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            move(self.model, device)
            with torch.no_grad():
                for start in range(0, len(new), 64):
                    part = new[start : start + 64]
                    tokens = self.tokenizer(
                        part,
                        padding=True,
                        truncation=True,
                        max_length=self.length,
                        return_tensors="pt",
                    ).to(device)
                    features = functional.normalize(
                        _pooled(self.model.get_text_features(**tokens)), dim=-1
                    )
                    self._texts.update(zip(part, features.cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts]).to(device)

    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine of each image with its text, shape ``(n,)``."""
        return (self.embed_images(images) * self.embed_texts(texts, images.device)).sum(dim=1)


class Preparation:
    """Resizes, crops and normalises images as an image processor of transformers does.

    Args:
        config: What ``preprocessor_config.json`` holds.

    Raises:
        CheckpointError: If it asks for something that is not known here.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        try:
            self.mean, self.std = (
                torch.tensor(config[name], dtype=torch.float32, device="cpu").view(-1, 1, 1)
                for name in ("image_mean", "image_std")
            )
            size, crop = config["size"], config.get("crop_size")
            self.shortest: int = size if isinstance(size, int) else size["shortest_edge"]
            crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
            self.crop = (
                (crop["height"], crop["width"])
                if crop and config.get("do_center_crop", True)
                else None
            )
            self.filter = FILTERS[config.get("resample", 3)]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"preprocessor_config.json is not that of a CLIP model: {error!r}"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(n, 3, H, W)`` in [0, 1] as the model takes them."""
        height, width = images.shape[-2:]
        short, long = sorted((height, width))
        if short != self.shortest:
            other = int(self.shortest * long / short)
            size = (self.shortest, other) if height <= width else (other, self.shortest)
            antialias = self.filter != "nearest-exact"
            images = functional.interpolate(
                images, size=size, mode=self.filter, antialias=antialias
            ).clamp(0, 1)
        if self.crop is not None:
            top, left = (
                (have - want) // 2 for have, want in zip(images.shape[-2:], self.crop, strict=True)
            )
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (images - self.mean.to(images)) / self.std.to(images)


class CLIPScoreReward(Reward[FlowTensor]):
    r"""How well the picture fits its prompt: the cosine of CLIP's embeddings, in [-1, 1].

    Args:
        weights: Local folder in transformers' format, or Hub id such as
            ``"openai/clip-vit-large-patch14"``.
        units: ``"cosine"``; ``"percent"``, :math:`100 \max(\cos, 0)` as torchmetrics reports; or
            ``"hessel"``,
            :math:`2.5 \max(\cos, 0)`.
        batch_size: Pictures embedded at a time.

    References:
        Radford et al., Learning transferable visual models from natural language supervision, ICML
        2021. Hessel et al., CLIPScore, EMNLP 2021 (``"hessel"``, there with prompts that begin "A
        photo depicts").
    """

    differentiable = True
    UNITS = {"cosine": (1.0, -1.0), "percent": (100.0, 0.0), "hessel": (2.5, 0.0)}  # noqa: RUF012

    def __init__(
        self, weights: str | None = None, units: str = "cosine", batch_size: int = 32
    ) -> None:
        check_choice("units", units, self.UNITS)
        check_whole("batch_size", batch_size)
        self.clip = CLIP(*find_folder("weights", weights, "images/clip_score", OPENAI))
        self.units, self.batch_size = units, batch_size
        self.scale, self.least = self.UNITS[units]
        self.value_range = (self.scale * self.least, self.scale)

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        cosines = torch.cat(
            [
                self.clip.cosines(images[i : i + self.batch_size], prompts[i : i + self.batch_size])
                for i in range(0, len(images), self.batch_size)
            ]
        )
        return all_valid(self.scale * cosines.clamp(min=self.least))


class PickScoreReward(Reward[FlowTensor]):
    r"""PickScore, trained on what people pick: :math:`e^s \cos(u, v)` of a CLIP-H model, about 20
    for good pictures.

    Args:
        weights: Local folder in transformers' format, or the Hub id
            ``"yuvalkirstain/PickScore_v1"``.
        processor: Tokenizer and image processor, ``"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`` or a
            folder; None where they lie beside the weights.
        batch_size: Pictures embedded at a time.

    References:
        Kirstain et al., Pick-a-Pic, NeurIPS 2023.
    """

    differentiable = True
    units = "CLIP's logit (100 times the cosine)"

    def __init__(
        self, weights: str | None = None, processor: str | None = None, batch_size: int = 8
    ) -> None:
        check_whole("batch_size", batch_size)
        name = "images/pickscore"
        source = find_folder("weights", weights, name, PICKSCORE)
        prepared = None
        if processor is not None:
            prepared = find_folder("processor", processor, name, PICKSCORE_PROCESSOR, weights=False)
        self.clip = CLIP(*source, processor=prepared)
        self.batch_size = batch_size
        largest = self.clip.logit_scale.item()
        self.value_range = (-largest, largest)

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1] by ``prompt``; see :class:`Reward`."""
        images, prompts = prompted_images(type(self).__name__, x, kwargs)
        scores = [
            self.clip.logit_scale.to(images.device)
            * self.clip.cosines(images[i : i + self.batch_size], prompts[i : i + self.batch_size])
            for i in range(0, len(images), self.batch_size)
        ]
        return all_valid(torch.cat(scores))


class AestheticReward(Reward[FlowTensor]):
    """How beautiful people find pictures, about 1 to 10: a small head on the unit embedding of CLIP
    ViT-L/14.

    There are two heads, whose scores differ, and which one it is must be said:

    - ``predictor="mlp"``, ``sac+logos+ava1-l14-linearMSE`` (LAION's improved predictor), DDPO's;
    - ``predictor="linear"``, ``sa_0_4_vit_l_14_linear`` (LAION's first predictor), diffusiongym's.

    Args:
        clip: CLIP, a local folder in transformers' format or the Hub id
            ``"openai/clip-vit-large-patch14"``.
        head: The head's weights, a local safetensors file or a pickle of tensors (``.pth``), or
            ``"owner/name:file"`` on the Hub.
        predictor: Which of the two heads ``head`` is.
        batch_size: Pictures embedded at a time.

    Raises:
        CheckpointError: If weights are missing, or the file holds the other head.

    References:
        Schuhmann et al., LAION-5B, NeurIPS 2022, section on aesthetics.
        Black et al., Training diffusion models with reinforcement learning (DDPO), ICLR 2024.
    """

    differentiable = True
    units = "LAION's aesthetic score"

    def __init__(
        self,
        clip: str | None = None,
        head: str | None = None,
        predictor: str = "mlp",
        batch_size: int = 32,
    ) -> None:
        check_choice("predictor", predictor, HEAD_EXAMPLES)
        check_whole("batch_size", batch_size)
        name = "images/aesthetic"
        path = find_file("head", head, name, HEAD_EXAMPLES[predictor])
        self.clip = CLIP(*find_folder("clip", clip, name, OPENAI))
        tensors = read_tensors(path)
        found = "linear" if set(tensors) == {"weight", "bias"} else "mlp"
        if found != predictor:
            raise CheckpointError(
                f"head {str(path)!r} is the {found!r} predictor, but predictor is {predictor!r}; "
                "their scores cannot be compared, say which one is meant"
            )
        self.head = build_head(predictor, self.clip.features)
        try:
            self.head.load_state_dict(_without_prefix(tensors))
        except RuntimeError as error:
            raise CheckpointError(
                f"head {str(path)!r} does not fit CLIP's {self.clip.features} features: "
                f"{reason(error)}"
            ) from error
        self.head.eval().requires_grad_(False)
        self.batch_size = batch_size

    def forward(self, x: FlowTensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Score images of shape ``(n, 3, H, W)`` in [0, 1]; see :class:`Reward`."""
        images = as_images(type(self).__name__, x)
        move(self.head, images.device)
        scores = [
            self.head(self.clip.embed_images(part)).squeeze(1)
            for part in images.split(self.batch_size)
        ]
        return all_valid(torch.cat(scores))


def build_head(predictor: str, features: int) -> nn.Module:
    """An untrained head; the MLP has no activations, and its dropout does nothing once it is
    trained.
    """
    if predictor == "linear":
        return nn.Linear(features, 1)
    return nn.Sequential(
        nn.Linear(features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def move(module: nn.Module, device: torch.device) -> None:
    """Bring a module to a device, where gradients can pass through it later."""
    # Weights that were copied in inference mode could not take part in gradients.
    with torch.inference_mode(False):
        module.to(device)


def prompted_images(name: str, x: FlowTensor, kwargs: dict[str, Any]) -> tuple[Tensor, list[str]]:
    """Images and one prompt for each, none of them empty."""
    images = as_images(name, x)
    prompts = as_prompts(name, len(images), kwargs)
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise RewardError(
                f"{name} got an empty prompt for image {i}, expected a text to compare it with",
                sample=i,
            )
    return images, prompts


def _filled(kind: Any, source: str, local: bool) -> Any:
    """A model whose weights were all found, in float32."""
    model, report = kind.from_pretrained(
        source,
        use_safetensors=True,
        local_files_only=local,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # They are in the report, with their names.
        output_loading_info=True,
    )
    check_filled(repr(source), model, report)
    return model


def _pooled(output: Any) -> Tensor:
    """The projected embedding, which transformers returns by itself or, from version 5 on, in an
    output.
    """
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the ``layers.`` that the published MLP has."""
    return {name.removeprefix("layers."): value for name, value in tensors.items()}
