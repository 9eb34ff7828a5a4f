"""Small models of the architectures that weighted rewards were made for, saved as the real ones
are.
"""

import json
import shutil

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowgym_gym.models.stable_diffusion import EMBEDDED
from tests.rewards import published

FEATURES, SIZE = 12, 32
TOKENIZER = EMBEDDED / "tiny" / "tokenizer"
# OpenAI's preparation of pictures, for small ones.
PREPROCESSOR = {
    "crop_size": SIZE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": SIZE,
}


def save_processor(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def save_clip(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**shape, **text},
        vision_config={**shape, "image_size": SIZE, "patch_size": 8},
        projection_dim=FEATURES,
        logit_scale_init_value=3.0,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # Untrained weights are so small that all scores would be the same.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    save_processor(folder)
    return model


def save_heads(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    mlp, linear = published.MLP(FEATURES).eval(), nn.Linear(FEATURES, 1).eval()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.mul_(2)
    torch.save(mlp.state_dict(), folder / "mlp.pth")
    torch.save(linear.state_dict(), folder / "linear.pth")
    save_file(mlp.state_dict(), folder / "mlp.safetensors")
    return mlp, linear


def save_hpsv2(folder):
    """HPSv2's checkpoint, with open_clip's names and other things beside them, and configuration
    and tokenizer.
    """
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    model = published.fill(published.OpenCLIP(len(tokenizer)))
    sizes = published.CLIP
    shape = {
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "hidden_act": "gelu",
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": sizes["length"]}
    ends = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    vision = {"image_size": sizes["size"], "patch_size": sizes["patch"]}
    config = CLIPConfig(
        text_config={**shape, **text, **ends},
        vision_config={**shape, **vision},
        projection_dim=sizes["features"],
    )
    save_processor(folder)
    config.save_pretrained(folder)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS.pt")
    return {"weights": str(folder / "HPS.pt"), "processor": str(folder)}


def save_image_reward(folder):
    """ImageReward's checkpoint, and BERT's tokenizer."""
    (folder / "bert").mkdir(parents=True)
    (folder / "bert" / "vocab.txt").write_text("\n".join(published.WORDS))
    torch.save(published.fill(published.ImageReward()).state_dict(), folder / "ImageReward.pt")
    return {"weights": str(folder / "ImageReward.pt"), "tokenizer": str(folder / "bert")}


def save_all(folder):
    """Folders of every weighted reward that runs offline, as reward_kwargs by reward id."""
    clip = folder / "clip"
    save_clip(clip)
    save_heads(folder / "heads")
    return {
        "images/clip_score": {"weights": str(clip)},
        "images/pickscore": {"weights": str(clip)},
        "images/aesthetic": {"clip": str(clip), "head": str(folder / "heads" / "mlp.pth")},
        "images/image_reward": save_image_reward(folder / "image_reward"),
        "images/hpsv2": save_hpsv2(folder / "hpsv2"),
    }
