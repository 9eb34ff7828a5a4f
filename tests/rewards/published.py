"""HPSv2 and ImageReward in plain torch, small, with the names that their published checkpoints
have.

Neither this package nor transformers is used here, so that the packages ``hpsv2`` and
``image-reward`` can load the same weights in an environment of their own (``published_scores.py``).
"""

import itertools
import math
import zlib

import torch
from torch import nn
from torch.nn import functional

# HPSv2's CLIP: open_clip's ViT-H/14, but for these sizes.
CLIP = {"width": 16, "layers": 2, "features": 12, "size": 32, "patch": 8, "length": 16, "heads": 2}
# ImageReward's BLIP; each head of attention has 64 channels.
BLIP = {"vision": 128, "text": 64, "layers": 2, "size": 32, "patch": 16, "length": 40}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "red",
    "heart",
    "##s",
    ",",
]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def fill(module):
    """Give a module weights that depend on their names alone; larger than usual, so that scores
    differ.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            phase = zlib.crc32(name.encode()) % 1000
            waves = torch.sin(
                1.7 * torch.arange(parameter.numel(), dtype=torch.float64) ** 1.1 + phase
            )
            if parameter.ndim > 1:
                waves = waves * 1.5 / math.sqrt(parameter[0].numel())
            else:
                waves = ("weight" in name) + 0.2 * waves
            parameter.copy_(waves.reshape(parameter.shape))
    return module.eval().requires_grad_(False)


def pictures(n=3, height=32, width=32):
    """Smooth pictures of 8 bits, ``(n, 3, height, width)`` in [0, 1]."""
    smooth = torch.sin(torch.arange(n * 3 * 8 * 8, dtype=torch.float64) ** 1.3).reshape(n, 3, 8, 8)
    images = functional.interpolate(
        (0.5 + 0.5 * smooth).float(), size=(height, width), mode="bilinear"
    )
    return (255 * images).round() / 255


def normalized(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Block(nn.Module):
    """A layer of open_clip's transformers."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, layers, features, size, patch, heads, **_):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, layers, heads)
        self.proj = nn.Parameter(torch.empty(width, features))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
            + self.positional_embedding
        )
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's CLIP, with a vocabulary of ``words``."""

    def __init__(self, words):
        super().__init__()
        width = CLIP["width"]
        self.visual = Visual(**CLIP)
        self.transformer = Tower(width, CLIP["layers"], CLIP["heads"])
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.empty(CLIP["length"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, CLIP["features"]))
        self.logit_scale = nn.Parameter(torch.empty([]))

    def forward(self, images, tokens):
        """HPSv2's score of pixels ``(n, 3, H, W)``, normalised, and tokens ``(n, length)``, padded
        with 0.
        """
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        # The token of the end has the largest number.
        texts = x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.text_projection
        return functional.cosine_similarity(self.visual(images), texts)


def attend(queries, keys, values, mask=None):
    """Attention with heads of 64 channels."""
    queries, keys, values = (
        part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in (queries, keys, values)
    )
    return (
        functional.scaled_dot_product_attention(queries, keys, values, mask)
        .transpose(1, 2)
        .flatten(2)
    )


class VisionBlock(nn.Module):
    """A layer of BLIP's picture encoder."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisualEncoder(nn.Module):
    def __init__(self, width, layers, size, patch):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(VisionBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Output(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        parts = {"query": width, "key": context, "value": context}
        self.self = nn.ModuleDict(
            {name: nn.Linear(inputs, width) for name, inputs in parts.items()}
        )
        self.output = Output(width, width)

    def forward(self, x, context, mask=None):
        queries, keys, values = (
            self.self["query"](x),
            self.self["key"](context),
            self.self["value"](context),
        )
        return self.output(attend(queries, keys, values, mask), x)


class TextLayer(nn.Module):
    """A layer of BLIP's text encoder: BERT's, with a look at the picture in between."""

    def __init__(self, width, context):
        super().__init__()
        self.attention, self.crossattention = Attention(width, width), Attention(width, context)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Output(4 * width, width)

    def forward(self, x, mask, context):
        x = self.crossattention(self.attention(x, x, mask), context)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class TextEncoder(nn.Module):
    def __init__(self, words, width, length, layers, context):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(length, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(TextLayer(width, context) for _ in range(layers))}
        )

    def forward(self, tokens, mask, context):
        places = self.embeddings["position_embeddings"].weight[: tokens.shape[1]]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + places)
        for layer in self.encoder["layer"]:
            x = layer(x, mask[:, None, None].bool(), context)
        return x


class MLP(nn.Module):
    """The head of LAION's improved aesthetic predictor, which ImageReward has taken over; no
    activations.
    """

    def __init__(self, features):
        super().__init__()
        first, *rest = (
            nn.Linear(*pair) for pair in itertools.pairwise((features, 1024, 128, 64, 16, 1))
        )
        # Where the published ones have dropout, which does nothing once they are trained.
        gap = nn.Identity
        self.layers = nn.Sequential(first, gap(), rest[0], gap(), rest[1], gap(), rest[2], rest[3])

    def forward(self, x):
        return self.layers(x)


class ImageReward(nn.Module):
    """ImageReward; besides its words the vocabulary has two special ones that only generators use."""

    def __init__(self):
        super().__init__()
        vision, text, layers = BLIP["vision"], BLIP["text"], BLIP["layers"]
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": VisualEncoder(vision, layers, BLIP["size"], BLIP["patch"]),
                "text_encoder": TextEncoder(len(WORDS) + 2, text, BLIP["length"], layers, vision),
            }
        )
        self.mlp = MLP(text)

    def forward(self, images, tokens, mask):
        """Scores of pixels ``(n, 3, H, W)``, normalised, and tokens ``(n, length)`` with their
        mask.
        """
        x = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](images))
        return (self.mlp(x[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
