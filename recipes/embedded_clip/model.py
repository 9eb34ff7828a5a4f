r"""A small CLIP for the embedded checkpoint's pictures and captions, and how it is trained.

Pictures and captions of a batch are compared by the cosine of their embeddings, :math:`z_{ij} = e^s
\cos(u_i, v_j)`. A batch holds two pictures of each concept, and captions that leave out the
background are true of both, so the target of a picture is spread evenly over all captions that are
true of it, and the other way round:

.. math:: L = -\tfrac1{2n} \sum_{ij} \Big( \frac{y_{ij}}{\sum_k y_{ik}} \log \mathrm{softmax}_j
    z_{ij} + \frac{y_{ij}}{\sum_k y_{kj}} \log \mathrm{softmax}_i z_{ij} \Big),

with :math:`y_{ij} = 1` where caption :math:`j` is true of picture :math:`i`. With one true caption
a picture this is CLIP's own loss (Radford et al., Learning transferable visual models from natural
language supervision, 2021).
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from recipes.embedded_checkpoint.concepts import COLORS, CONCEPTS, caption
from recipes.embedded_checkpoint.denoiser import tidy_configurations
from recipes.embedded_checkpoint.judge import as_unit, disturb
from recipes.embedded_checkpoint.text import MAX_TOKENS
from recipes.embedded_checkpoint.training import Outcome, train

IMAGE_SIZE, PATCH_SIZE = 64, 8
TEXT_WIDTH, TEXT_LAYERS = 128, 2
VISION_WIDTH, VISION_LAYERS = 128, 4
PROJECTION = 128
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}
"""What transformers' image processor is told."""
LEARNING_RATE = 2e-3
NAMED_SHARE = 0.5
"""How often a caption names the background."""


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64 x 64 pictures and the captions' tokenizer."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 3 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 3 * VISION_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def normalize(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as the vision model takes them."""
    return (pictures - torch.tensor(MEAN).view(-1, 1, 1).to(pictures)) / torch.tensor(STD).view(
        -1, 1, 1
    ).to(pictures)


class Batches:
    """Pictures and captions of a step, reproducible from its number.

    Args:
        data: The rendered training set, ordered by concept.
        tokenizer: Turns captions into ids.
        concepts: Different concepts in a batch; it holds two pictures of each.
    """

    def __init__(
        self, data: dict[str, np.ndarray], tokenizer: CLIPTokenizer, concepts: int
    ) -> None:
        self.data, self.tokenizer, self.concepts = data, tokenizer, concepts
        self.names, self.colors = list(CONCEPTS), list(COLORS)
        self.per_concept = len(data["images"]) // len(CONCEPTS)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures ``(n, 3, 64, 64)`` in [0, 1], token ids ``(n, tokens)``, and which caption is
        true of which picture.

        The last, shape ``(n, n)``, is 1 where the caption of that column is true of the picture of
        that row.
        """
        rng = np.random.default_rng((11, step))
        chosen = np.repeat(rng.permutation(len(self.names))[: self.concepts], 2)
        rows = chosen * self.per_concept + rng.integers(self.per_concept, size=len(chosen))
        color = self.data["color"][rows]
        named = rng.random(len(rows)) < NAMED_SHARE
        texts = [
            caption(self.names[c], self.colors[k] if with_color else None, rng)
            for c, k, with_color in zip(chosen, color, named, strict=True)
        ]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
        same_color = (color[:, None] == color[None]) | ~named[None]
        true = (chosen[:, None] == chosen[None]) & same_color
        pictures = as_unit(self.data["images"][rows], "cpu")
        # One half is disturbed in one way, the other in another: what is drawn for a whole batch
        # varies within it.
        parts = [disturb(part, rng) for part in pictures.split(len(pictures) // 2)]
        return torch.cat(parts), tokens, torch.from_numpy(true).float()


def contrast(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy of pictures against captions and of captions against pictures, see above."""
    pictures = -(true / true.sum(1, keepdim=True) * functional.log_softmax(logits, 1)).sum(1).mean()
    captions = -(true / true.sum(0, keepdim=True) * functional.log_softmax(logits, 0)).sum(0).mean()
    return (pictures + captions) / 2


def train_clip(
    data: dict[str, np.ndarray],
    tokenizer: CLIPTokenizer,
    work: Path,
    minutes: float,
    concepts: int,
    device: str,
) -> tuple[CLIPModel, Outcome]:
    """Train the model; on return it holds averaged weights."""
    torch.manual_seed(11)
    model = build_model(tokenizer).to(device)
    batches = Batches(data, tokenizer, concepts)

    def losses(step: int) -> dict[str, Tensor]:
        pictures, tokens, true = (part.to(device) for part in batches.draw(step))
        logits = model(input_ids=tokens, pixel_values=normalize(pictures)).logits_per_image
        best = true.gather(1, logits.argmax(1, keepdim=True)).mean()
        return {"loss": contrast(logits, true), "accuracy": best}

    outcome = train(
        "clip",
        model,
        losses,
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        weight_decay=1e-2,
        checkpoint=work / "clip.pt",
        ema_decay=0.99,
    )
    return model, outcome


def export(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save float16 weights, tokenizer and image processor in transformers' folder format."""
    half = CLIPModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.eval().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "concepts.txt").write_text("\n".join(CONCEPTS) + "\n", encoding="utf-8")
    tidy_configurations(folder.parent)
