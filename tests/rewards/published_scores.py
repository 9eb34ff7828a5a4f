"""What the released packages score on the small models of ``published.py``.

They want libraries of their time, so each runs in an environment of its own, with this repository
as working directory:

    python -m tests.rewards.published_scores image-reward    # image-reward 1.5, transformers 4.49
    python -m tests.rewards.published_scores hpsv2           # hpsv2 1.2.0

The output belongs into ``SCORES``.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from tests.rewards import published

PROMPTS = ["a photo of a cat", "a red heart", "a photo of a dog, a photo of a red cat"]
SIZES = {"fitting": (32, 32), "resized": (64, 64), "wide": (40, 64)}
TOKENIZER = (
    Path(__file__).parents[2]
    / "flowgym_gym"
    / "models"
    / "embedded"
    / "tiny"
    / "tokenizer"
    / "tokenizer.json"
)
SCORES = {
    "images/image_reward": {
        "fitting": [-0.473076, -0.383762, 1.144281],
        "resized": [-0.465076, -0.395918, 1.144183],
        "wide": [-1.676233, 1.395714, 0.890959],
    },
    "images/hpsv2": {
        "fitting": [0.406805, 0.64654, -0.594076],
        "resized": [0.409448, 0.649929, -0.592927],
        "wide": [0.515497, 0.522217, -0.627549],
    },
}


def image_reward(folder):
    """A function of a picture and a prompt, the package's ``ImageReward.score``."""
    import ImageReward
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    module = importlib.import_module(
        "ImageReward.ImageReward"
    )  # The package hides it behind its class.
    sizes, mlp = published.BLIP, module.MLP
    (folder / "vocab.txt").write_text("\n".join(published.WORDS))
    text = {
        "vocab_size": len(published.WORDS) + 2,
        "hidden_size": sizes["text"],
        "intermediate_size": 4 * sizes["text"],
        "num_attention_heads": sizes["text"] // 64,
        "num_hidden_layers": sizes["layers"],
        "max_position_embeddings": sizes["length"],
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(text))
    torch.save(published.fill(published.ImageReward()).state_dict(), folder / "ImageReward.pt")

    # The package has its sizes, and the name of its tokenizer, written into the code.
    encoder = VisionTransformer(
        img_size=sizes["size"],
        patch_size=sizes["patch"],
        embed_dim=sizes["vision"],
        depth=sizes["layers"],
        num_heads=sizes["vision"] // 64,
    )
    blip_pretrain.create_vit = lambda *args: (encoder, sizes["vision"])
    blip_pretrain.init_tokenizer = lambda: BertTokenizer(str(folder / "vocab.txt"))
    module.MLP = lambda _: mlp(sizes["text"])
    model = ImageReward.load(
        str(folder / "ImageReward.pt"), "cpu", med_config=str(folder / "med_config.json")
    )
    model.preprocess = module._transform(sizes["size"])
    return lambda picture, prompt: model.score(prompt, picture)


def hpsv2(folder):
    """A function of a picture and a prompt, the package's ``hpsv2.img_score.score``."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform
    from tokenizers import Tokenizer

    sizes, tokenizer = published.CLIP, Tokenizer.from_file(str(TOKENIZER))
    tokenizer.enable_truncation(sizes["length"])
    state = published.fill(published.OpenCLIP(tokenizer.get_vocab_size())).state_dict()
    torch.save({"state_dict": state}, folder / "HPS.pt")
    shape = {"width": sizes["width"], "layers": sizes["layers"]}
    vision = {
        "image_size": sizes["size"],
        "patch_size": sizes["patch"],
        "head_width": sizes["width"] // sizes["heads"],
    }
    text = {
        "context_length": sizes["length"],
        "vocab_size": tokenizer.get_vocab_size(),
        "heads": sizes["heads"],
    }
    model = CLIP(sizes["features"], {**shape, **vision}, {**shape, **text}, output_dict=True)

    def tokens_of(texts):
        rows = [torch.tensor(tokenizer.encode(text).ids) for text in texts]
        return torch.stack(
            [torch.nn.functional.pad(row, (0, sizes["length"] - len(row))) for row in rows]
        )

    # The package has its sizes, and its vocabulary, written into the code.
    prepare = image_transform(sizes["size"], is_train=False, resize_longest_max=True)
    img_score.model_dict.update(model=model, preprocess_val=prepare)
    img_score.get_tokenizer = lambda name: tokens_of
    return lambda picture, prompt: float(
        img_score.score(picture, prompt, cp=str(folder / "HPS.pt"))[0]
    )


def main(name):
    with tempfile.TemporaryDirectory() as folder:
        score = {"image-reward": image_reward, "hpsv2": hpsv2}[name](Path(folder))
        for kind, (height, width) in SIZES.items():
            levels = (
                (255 * published.pictures(height=height, width=width))
                .round()
                .to(torch.uint8)
                .permute(0, 2, 3, 1)
            )
            pictures = [Image.fromarray(picture) for picture in levels.numpy()]
            print(kind, [round(score(*pair), 6) for pair in zip(pictures, PROMPTS, strict=True)])


if __name__ == "__main__":
    main(sys.argv[1])
