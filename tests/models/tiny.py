"""Pipelines of every family from small configurations with random weights, as tiny as diffusers
allows.
"""

import tempfile
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flowgym_gym.models.stable_diffusion import EMBEDDED

# Options that keep the states of a family small where its checkpoints do not say how large they
# are.
OPTIONS = {name: {"height": 16, "width": 24} for name in ("flux", "flux_schnell")}

DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@cache
def folder(name):
    """Folder of a tiny checkpoint, built and saved once per session, and removed at its end."""
    parent = tempfile.TemporaryDirectory(prefix="flowgym-tiny-")
    _folders.append(parent)
    build(name).save_pretrained(Path(parent.name) / name)
    return str(Path(parent.name) / name)


_folders = []


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipe = {**BUILDERS, **OTHERS}[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip_tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(EMBEDDED / "tiny" / "tokenizer")


def clip(projected=False, layers=2):
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(
        config
    )


def t5_tokenizer():
    """A T5 tokenizer of single letters."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters += [(chr(c), -3.0) for c in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(letters, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def t5():
    config = transformers.T5Config(
        vocab_size=98,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def vae(channels=4, levels=2, layers=1, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * levels,
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        sample_size=32,
        **options,
    )


def unet(sample_size=(4, 8), **options):
    return diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **options,
    )


def stable_diffusion(scheduler=None, **unet_options):
    return diffusers.StableDiffusionPipeline(
        unet=unet(cross_attention_dim=16, **unet_options),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler or diffusers.DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def like_the_embedded_one():
    """Stable Diffusion with the states and pictures of the checkpoint in the package, (4, 8, 8) and
    64 x 64, and next to no weights or layers.
    """
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4,
    )
    pipe = stable_diffusion()
    pipe.register_modules(unet=network, vae=vae(levels=4, layers=0, mid_block_add_attention=False))
    return pipe


def stable_diffusion_2():
    """Stable Diffusion 2.1: v-prediction, linear projections, heads by level."""
    return stable_diffusion(
        diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction"), use_linear_projection=True
    )


def stable_diffusion_xl():
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=16 + 6 * 4,
            use_linear_projection=True,
        ),
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


def stable_diffusion_3(**scheduler):
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        vae=vae(4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projected=True),
        text_encoder_2=clip(projected=True),
        text_encoder_3=t5_of(32),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )


def t5_of(width):
    config = t5().config
    config.d_model = width
    return transformers.T5EncoderModel(config)


def flux(distilled=True):
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=distilled, base_image_seq_len=4, max_image_seq_len=64
        ),
    )


def flux_schnell():
    return flux(distilled=False)


def pixart(pipeline=diffusers.PixArtAlphaPipeline, **options):
    return pipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            **{
                "sample_size": 4,
                "num_layers": 1,
                "patch_size": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "caption_channels": 16,
                "cross_attention_dim": 16,
                "in_channels": 4,
                "out_channels": 8,
                "use_additional_conditions": False,
                **options,
            }
        ),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_sigma():
    return pixart(diffusers.PixArtSigmaPipeline)


def dit():
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=4,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label={0: "tench, Tinca tinca", 207: "golden retriever"},
    )


def ddpm():
    """google/ddpm-cifar10-32's architecture, smaller: attention, linear betas, clipping at every
    step.
    """
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="fixed_small"),
    )


BUILDERS = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_2": stable_diffusion_2,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "flux_schnell": flux_schnell,
    "pixart": pixart,
    "pixart_sigma": pixart_sigma,
    "dit": dit,
    "ddpm": ddpm,
}
# Not of a family of its own.
OTHERS = {"like_the_embedded_one": like_the_embedded_one}
