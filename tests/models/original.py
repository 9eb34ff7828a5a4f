"""Whole checkpoints in one file, as the authors of Stable Diffusion 1 had them and as model sites
offer them.
"""

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_original(pipe, file):
    """Save a StableDiffusionPipeline of one layer per block in one file in the original format."""
    attended = ["CrossAttn" in block for block in pipe.unet.config.up_block_types]
    levels = len(pipe.vae.config.block_out_channels)
    weights = {
        f"model.diffusion_model.{unet_name(k, attended)}": v
        for k, v in pipe.unet.state_dict().items()
    }
    for name, value in pipe.vae.state_dict().items():
        new = vae_name(name, levels)
        weights[f"first_stage_model.{new}"] = (
            value[..., None, None] if is_linear(new, value) else value
        )
    # transformers 5.6 and later leave the first word of these names out.
    encoder = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    weights |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in encoder.items()}
    save_file({name: value.contiguous().clone() for name, value in weights.items()}, file)


def is_linear(name, value):
    """Whether a weight of the autoencoder's attention was a convolution originally."""
    return "attn_1" in name and name.endswith("weight") and value.ndim == 2


def unet_name(name, attended):
    """The original name of a weight of a U-Net of one layer per block."""
    name = re.sub("^conv_in", "input_blocks.0.0", name)
    name = re.sub(
        "^time_embedding.linear_([12])", lambda m: f"time_embed.{2 * int(m[1]) - 2}", name
    )
    name = re.sub("^conv_norm_out", "out.0", name)
    name = re.sub("^conv_out", "out.2", name)
    name = re.sub(
        r"^down_blocks.(\d).resnets.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0", name
    )
    name = re.sub(
        r"^down_blocks.(\d).attentions.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1", name
    )
    name = re.sub(
        r"^down_blocks.(\d).downsamplers.0.conv",
        lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op",
        name,
    )
    name = re.sub(r"^mid_block.resnets.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = re.sub("^mid_block.attentions.0", "middle_block.1", name)
    name = re.sub(
        r"^up_blocks.(\d).resnets.(\d)",
        lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0",
        name,
    )
    name = re.sub(
        r"^up_blocks.(\d).attentions.(\d)",
        lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1",
        name,
    )
    name = re.sub(
        r"^up_blocks.(\d).upsamplers.0",
        lambda m: f"output_blocks.{2 * int(m[1]) + 1}.{2 if attended[int(m[1])] else 1}",
        name,
    )
    if re.search(r"blocks?\.\d+\.0\.|middle_block\.[02]\.", name):
        for new, old in RESNET.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def vae_name(name, levels):
    """The original name of a weight of an autoencoder."""
    name = re.sub(r"down_blocks.(\d).resnets.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks.(\d).downsamplers.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks.(\d).resnets.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(
        r"up_blocks.(\d).upsamplers.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name
    )
    name = re.sub(r"mid_block.resnets.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for new, old in ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name
