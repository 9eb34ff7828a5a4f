"""A network is opened with all of its weights, and with all that a file holds, or refused by name."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flowgym_gym import FlowTensor
from flowgym_gym.errors import CheckpointError
from flowgym_gym.models import from_pipeline, from_pretrained
from flowgym_gym.models.loading import clear_model_cache
from tests.models import tiny

# A network of every kind, in every family.
PARTS = [
    ("stable_diffusion", "unet"),
    ("stable_diffusion", "vae"),
    ("stable_diffusion", "text_encoder"),
    ("stable_diffusion_xl", "text_encoder_2"),
    ("stable_diffusion_3", "transformer"),
    ("stable_diffusion_3", "text_encoder_3"),
    ("flux", "text_encoder_2"),
    ("pixart", "transformer"),
    ("dit", "transformer"),
    ("ddpm", "unet"),
]


def copied(name, folder):
    shutil.copytree(tiny.folder(name), folder)
    return folder


def rewrite(folder, change):
    (file,) = Path(folder).glob("*.safetensors")
    tensors = load_file(file)
    changed = change(tensors)
    save_file(changed, file, {"format": "pt"})
    return tensors


def without_one(tensors):
    """All but a weight of a layer, which no other weight is tied to."""
    gone = next(
        name for name in sorted(tensors) if name.endswith("weight") and "embed_tokens" not in name
    )
    return {name: value for name, value in tensors.items() if name != gone}


DAMAGES = {
    "other names": (
        lambda tensors: {f"x.{name}": v for name, v in tensors.items()},
        r"missing: \d+ weights \(.*left over",
    ),
    "one missing": (without_one, r"missing: 1 weight \("),
    "other shapes": (
        lambda tensors: {name: torch.zeros(3) for name in tensors},
        r"of another shape|expected shape|could not be loaded",
    ),
}


@pytest.mark.parametrize(("name", "part"), PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_part_without_all_its_weights_is_named(name, part, damage, tmp_path):
    change, message = DAMAGES[damage]
    folder = copied(name, tmp_path / "copy")
    rewrite(folder / part, change)
    with pytest.raises(CheckpointError, match=rf"'{part}' of checkpoint folder .*({message})"):
        from_pretrained(str(folder), **tiny.OPTIONS.get(name, {}))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_the_configuration_leaves_out_are_named(part, tmp_path):
    """Such as those of a deeper network, or of adapters that were not merged."""
    folder = copied("stable_diffusion", tmp_path / "copy")
    deeper = {
        "unet": "down_blocks.7.x.weight",
        "vae": "decoder.up_blocks.7.x",
        "text_encoder": "encoder.layers.7.x",
    }
    rewrite(folder / part, lambda tensors: tensors | {deeper[part]: torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=rf"'{part}' of .* holds more than the .* left over: 1 weight"
    ):
        from_pretrained(str(folder))
    adapter = {
        "unet": "mid_block.attentions.0.lora_A.weight",
        "vae": "x",
        "text_encoder": "encoder.lora_A.weight",
    }
    with_adapter = copied("stable_diffusion", tmp_path / "adapter")
    rewrite(with_adapter / part, lambda tensors: tensors | {adapter[part]: torch.zeros(1)})
    with pytest.raises(CheckpointError, match="before adapters were merged"):
        from_pretrained(str(with_adapter))


def test_what_the_libraries_ignore_is_no_fault(tmp_path):
    """Buffers that are made anew, CLIP's pictures beside its texts, T5's decoder, names of earlier
    versions.
    """
    folder = copied("stable_diffusion", tmp_path / "copy")
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    pictures = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**shape, image_size=8, patch_size=4)
    ).state_dict()
    rewrite(
        folder / "text_encoder",
        lambda tensors: (
            {f"text_model.{name}": value for name, value in tensors.items()}
            | pictures
            | {
                "text_model.embeddings.position_ids": torch.arange(32),
                "logit_scale": torch.ones(()),
            }
        ),
    )
    expected = tiny.build("stable_diffusion").text_encoder.state_dict()
    opened = from_pretrained(str(folder)).pipe.text_encoder.state_dict()
    assert all(torch.equal(opened[name], expected[name]) for name in expected)
    config = tiny.t5().config
    config.tie_word_embeddings = False
    whole = transformers.T5ForConditionalGeneration(config)
    other = copied("pixart", tmp_path / "pixart")
    whole.save_pretrained(other / "text_encoder")
    opened = from_pretrained(str(other)).pipe.text_encoder.state_dict()
    assert torch.equal(opened["shared.weight"], whole.shared.weight)


def test_sharded_weights_are_all_needed(tmp_path):
    folder = copied("stable_diffusion", tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    unet = tiny.build("stable_diffusion").unet
    unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 2
    opened = from_pretrained(str(folder)).pipe.unet.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in unet.state_dict().items())
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != shards[0].name}
    index.write_text(json.dumps(table))
    clear_model_cache()
    with pytest.raises(CheckpointError, match=r"'unet' of checkpoint folder .* missing: "):
        from_pretrained(str(folder))


def test_replacements_are_looked_at_as_well(tmp_path):
    for option, part in (("denoiser", "unet"), ("vae", "vae")):
        module = getattr(tiny.build("stable_diffusion"), part)
        module.save_pretrained(tmp_path / part)
        rewrite(tmp_path / part, DAMAGES["other names"][0])
        with pytest.raises(
            CheckpointError, match=rf"'{part}' of checkpoint folder .* missing: \d+ weights"
        ):
            from_pretrained(tiny.folder("stable_diffusion"), **{option: str(tmp_path / part)})


def tiny_autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=0.7,
        )


def asymmetric_autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return diffusers.AsymmetricAutoencoderKL(
            down_block_out_channels=(4, 4),
            up_block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            sample_size=32,
            scaling_factor=0.3,
        )


@pytest.mark.parametrize("build", [tiny_autoencoder, asymmetric_autoencoder])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux"])
@torch.no_grad()
def test_another_autoencoder_decodes_as_in_diffusers(name, build, tmp_path):
    other = build()
    other.save_pretrained(tmp_path / "alone")
    reference = tiny.build(name)
    reference.vae = other
    # In a whole checkpoint, too, where the index names its class.
    reference.save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 12)
    decoded = latents / other.config.scaling_factor
    if name == "flux" and other.config.get("shift_factor", None) is not None:
        decoded = decoded + other.config.shift_factor
    expected = (other.decode(decoded, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    for folder, options in (
        (tiny.folder(name), {"vae": str(tmp_path / "alone")}),
        (tiny.folder(name), {"vae": str(tmp_path / "whole")}),
        (str(tmp_path / "whole"), {}),
    ):
        model = from_pretrained(folder, **tiny.OPTIONS.get(name, {}), **options)
        assert type(model.vae) is type(other)
        pictures = model.postprocess(FlowTensor(latents)).data
        assert torch.equal(pictures, expected)
        assert model.image_size == (model.state_shape[1] * 2, model.state_shape[2] * 2)


@torch.no_grad()
def test_pictures_of_another_autoencoder_are_those_of_the_pipeline(tmp_path):
    """The whole of StableDiffusionPipeline, from the last latent on."""
    other = tiny_autoencoder()
    other.save_pretrained(tmp_path)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny.folder("stable_diffusion"), vae=diffusers.AutoencoderTiny.from_pretrained(tmp_path)
    )
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    latents = torch.randn(1, 4, 4, 8)
    common = {
        "prompt": "a cat",
        "latents": latents,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "height": 8,
        "width": 16,
    }
    last = pipe(output_type="latent", **common).images
    model = from_pretrained(tiny.folder("stable_diffusion"), vae=str(tmp_path))
    torch.testing.assert_close(
        model.postprocess(FlowTensor(last)).data, pipe(output_type="pt", **common).images
    )


STATISTICS = {
    "shift_factor": 0.5,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart"]
)
@torch.no_grad()
def test_of_an_autoencoders_statistics_those_count_that_the_pipeline_uses(name):
    pipe, latents = tiny.build(name), []
    pipe.vae.register_to_config(**STATISTICS)
    model = from_pipeline(pipe, **tiny.OPTIONS.get(name, {}))
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: latents.append(z) or decode(z, **options)
    height, width = model.image_size
    common = {"prompt": "a cat", "num_inference_steps": 2, "height": height, "width": width}
    if name == "pixart":
        common["use_resolution_binning"] = False
    last, _ = (
        pipe(**common, generator=torch.Generator().manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt")
    )
    if name == "flux":
        last = pipe._unpack_latents(last, height, width, pipe.vae_scale_factor)
    model.postprocess(FlowTensor(last))
    theirs, ours = latents
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def consistency_decoder():
    return diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(4, 4),
        encoder_norm_num_groups=2,
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        decoder_add_attention=False,
        decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=2,
    )


def quantised():
    return diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


@pytest.mark.parametrize("build", [consistency_decoder, quantised])
def test_autoencoders_that_decode_otherwise_are_refused_by_name(build, tmp_path):
    other = build()
    other.save_pretrained(tmp_path)
    kind = type(other).__name__
    with pytest.raises(
        CheckpointError, match=rf"holds a {kind}, which cannot be the 'vae' .* AutoencoderTiny"
    ):
        from_pretrained(tiny.folder("stable_diffusion"), vae=str(tmp_path))
    pipe = tiny.build("stable_diffusion")
    pipe.vae = other
    with pytest.raises(CheckpointError, match=f"autoencoder is a {kind}, expected AutoencoderKL"):
        from_pipeline(pipe)


def test_a_network_of_another_class_is_refused_by_both_names(tmp_path):
    tiny.build("dit").transformer.save_pretrained(tmp_path / "dit")
    tiny.clip().save_pretrained(tmp_path / "clip")
    pixart, flux = tiny.folder("pixart"), tiny.folder("flux")
    for checkpoint, kind in (
        (pixart, "PixArtTransformer2DModel"),
        (flux, "FluxTransformer2DModel"),
    ):
        with pytest.raises(
            CheckpointError, match=rf"holds a DiTTransformer2DModel, .* expected {kind}"
        ):
            from_pretrained(checkpoint, denoiser=str(tmp_path / "dit"))
    with pytest.raises(
        CheckpointError, match=r"holds a UNet2DModel, .* expected UNet2DConditionModel"
    ):
        from_pretrained(tiny.folder("stable_diffusion"), denoiser=tiny.folder("ddpm"))
    with pytest.raises(
        CheckpointError,
        match=r"no model of diffusers .*_class_name.* expected FluxTransformer2DModel",
    ):
        from_pretrained(flux, denoiser=str(tmp_path / "clip"))


@torch.no_grad()
def test_transformers_under_their_earlier_name_take_the_place_of_others(tmp_path):
    """Published DiT and PixArt checkpoints say Transformer2DModel."""
    for name, norm in (("dit", "ada_norm_zero"), ("pixart", "ada_norm_single")):
        other = tiny.build(name).transformer
        other.save_pretrained(tmp_path / name)
        config = tmp_path / name / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(
            json.dumps(settings | {"_class_name": "Transformer2DModel", "norm_type": norm})
        )
        assert type(
            from_pretrained(tiny.folder(name), denoiser=str(tmp_path / name)).denoiser
        ) is type(other)
    with pytest.raises(CheckpointError, match="'transformer' of "):
        from_pretrained(tiny.folder("pixart"), denoiser=str(tmp_path / "dit"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"_class_name": ["my_code", "X"]}', '{"_class_name": "os"}', "{}"]
)
def test_configurations_that_name_no_class_are_refused(text, tmp_path):
    tiny.build("stable_diffusion").unet.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        from_pretrained(tiny.folder("stable_diffusion"), denoiser=str(tmp_path))
